"""The `generator` space: depth, and width with a matching number of heads.

Without generation alignment there are no generators, and their sizes stay at the base values, so that identical
runs have identical configs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from amd.config import POSITION_PARTS, ConfigError, TrainConfig
from tune_spaces.config import Dimension
from tune_spaces.spaces.parameter import Parameter, with_current

DEPTHS = (1, 2, 4)
SECTION = "student.generator."
WIDTHS: dict[str, Callable[[TrainConfig], int]] = {
    "teacher": lambda config: _teacher_width(config),
    "half": lambda config: _half(config),
    "student": lambda config: config.student.encoder.width,
}
"""Widths by name: the teacher's (as in AMD), about half of it, and the student's. A width can also be a number."""

PARAMETERS = {
    "generator.width": Parameter((f"{SECTION}width", f"{SECTION}heads"), lambda config: _current_width(config))
}


def dimensions(base: TrainConfig) -> dict[str, Dimension]:
    return {
        f"{SECTION}depth": Dimension(choices=with_current(DEPTHS, base.student.generator.depth)),
        "generator.width": Dimension(choices=_widths(base)),
    }


def _widths(base: TrainConfig) -> tuple[str | int, ...]:
    """Return the names of distinct widths, plus the base config's width if it has no name."""
    named: dict[int, str] = {}
    for name, width in WIDTHS.items():
        named.setdefault(width(base), name)
    current = _current_width(base)
    return (*named.values(),) if current in named.values() else (current, *named.values())


def _current_width(config: TrainConfig) -> str | int:
    names = (name for name, width in WIDTHS.items() if width(config) == config.generator_width)
    return next(names, config.generator_width)


def _teacher_width(config: TrainConfig) -> int:
    assert config.teacher is not None, "a sweep has a teacher"
    return config.teacher.encoder.width


def _half(config: TrainConfig) -> int:
    """Return about half the teacher's width, rounded down so that every position embedding supports it."""
    parts = max(POSITION_PARTS.values())
    return max(parts, _teacher_width(config) // 2 // parts * parts)


def overrides(point: Mapping[str, Any], config: TrainConfig, base: TrainConfig) -> dict[str, Any]:
    """Return the generator overrides for a point.

    `config` must already include the point's masks, weights and plain keys. Raises ConfigError for an invalid width.
    """
    if config.teacher is None:
        return {}  # removed by a custom dimension; config validation reports that
    width = _width(point["generator.width"], config) if "generator.width" in point else config.generator_width
    if not config.has_generation:
        sizes = [name for name in point if name.startswith(SECTION)]
        return {name: getattr(base.student.generator, name.removeprefix(SECTION), None) for name in sizes}
    found: dict[str, Any] = {}
    if "generator.width" in point:
        found[f"{SECTION}width"] = _width_override(width, config)
    if width != base.generator_width and f"{SECTION}heads" not in point:
        found[f"{SECTION}heads"] = fitting_heads(width, base)
    return found


def _width(chosen: Any, config: TrainConfig) -> int:
    if isinstance(chosen, str) and chosen in WIDTHS:
        return WIDTHS[chosen](config)
    if isinstance(chosen, int | float) and not isinstance(chosen, bool) and chosen == int(chosen) and chosen >= 4:
        return int(chosen)
    raise ConfigError([f"generator.width={chosen!r}: must be one of {', '.join(WIDTHS)}, or an integer of at least 4"])


def _width_override(width: int, config: TrainConfig) -> int | None:
    """Return None for the teacher's width, which is the default, unless the config sets that width explicitly."""
    current = config.student.generator.width
    return None if width == _teacher_width(config) != current else width


def fitting_heads(width: int, base: TrainConfig) -> int | None:
    """Return the head count that divides the width and is closest to the base's head size.

    Returns None if the base uses the default (width // 64) and that divides the width.
    """
    default = max(1, width // 64)
    if base.student.generator.heads is None and width % default == 0:
        return None
    target = width * base.generator_heads / base.generator_width
    divisors = [heads for heads in range(1, width + 1) if width % heads == 0]
    return min(divisors, key=lambda heads: (abs(heads - target), heads))
