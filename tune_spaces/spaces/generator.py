"""How large the generators are: depth, and width with heads that fit it.

Without generation alignment there are no generators: all their sizes are then the base's, so that equal runs are equal
configs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from amd.config import POSITION_PARTS, ConfigError, TrainConfig
from tune_spaces.config import Dimension
from tune_spaces.spaces.parameter import Word, with_own

DEPTHS = (1, 2, 4)
SECTION = "student.generator."
WIDTHS: dict[str, Callable[[TrainConfig], int]] = {
    "teacher": lambda config: _teacher_width(config),
    "half": lambda config: _half(config),
    "student": lambda config: config.student.encoder.width,
}
"""By name: the teacher's (AMD), about half of it, the student's. A number is a width too."""

WORDS = {"generator.width": Word((f"{SECTION}width", f"{SECTION}heads"), lambda config: _own_width(config))}


def dimensions(base: TrainConfig) -> dict[str, Dimension]:
    return {
        f"{SECTION}depth": Dimension(choices=with_own(DEPTHS, base.student.generator.depth)),
        "generator.width": Dimension(choices=_widths(base)),
    }


def _widths(base: TrainConfig) -> tuple[str | int, ...]:
    """Names of different widths, and the base's own where it has none."""
    named: dict[int, str] = {}
    for name, width in WIDTHS.items():
        named.setdefault(width(base), name)
    own = _own_width(base)
    return (*named.values(),) if own in named.values() else (own, *named.values())


def _own_width(config: TrainConfig) -> str | int:
    names = (name for name, width in WIDTHS.items() if width(config) == config.generator_width)
    return next(names, config.generator_width)


def _teacher_width(config: TrainConfig) -> int:
    assert config.teacher is not None, "a sweep has a teacher"
    return config.teacher.encoder.width


def _half(config: TrainConfig) -> int:
    """A multiple of what any positions ask for."""
    parts = max(POSITION_PARTS.values())
    return max(parts, _teacher_width(config) // 2 // parts * parts)


def overrides(point: Mapping[str, Any], config: TrainConfig, base: TrainConfig) -> dict[str, Any]:
    """`config` has its masks, its weights and the keys of the point already. Raises ConfigError for no width."""
    if config.teacher is None:
        return {}  # a dimension of one's own took it away; the config's rules say what is missing
    width = _width(point["generator.width"], config) if "generator.width" in point else config.generator_width
    if not config.has_generation:
        mine = [name for name in point if name.startswith(SECTION)]
        return {name: getattr(base.student.generator, name.removeprefix(SECTION), None) for name in mine}
    found: dict[str, Any] = {}
    if "generator.width" in point:
        found[f"{SECTION}width"] = _said(width, config)
    if width != base.generator_width and f"{SECTION}heads" not in point:
        found[f"{SECTION}heads"] = heads_that_fit(width, base)
    return found


def _width(chosen: Any, config: TrainConfig) -> int:
    if isinstance(chosen, str) and chosen in WIDTHS:
        return WIDTHS[chosen](config)
    if isinstance(chosen, int | float) and not isinstance(chosen, bool) and chosen == int(chosen) and chosen >= 4:
        return int(chosen)
    raise ConfigError([f"generator.width={chosen!r}: must be one of {', '.join(WIDTHS)}, or a whole number from 4"])


def _said(width: int, config: TrainConfig) -> int | None:
    """The teacher's width is said by none, unless the config says it by number already."""
    own = config.student.generator.width
    return None if width == _teacher_width(config) != own else width


def heads_that_fit(width: int, base: TrainConfig) -> int | None:
    """Heads of about the base's size that divide the width; none where the default (width // 64) does."""
    default = max(1, width // 64)
    if base.student.generator.heads is None and width % default == 0:
        return None
    wanted = width * base.generator_heads / base.generator_width
    divisors = [heads for heads in range(1, width + 1) if width % heads == 0]
    return min(divisors, key=lambda heads: (abs(heads - wanted), heads))
