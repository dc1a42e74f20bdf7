"""How fast and how carefully is learnt, relative to the recipe that is varied, so that one space fits all of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from amd.config import ConfigError, ScheduleConfig, TrainConfig
from tune_spaces.config import Dimension
from tune_spaces.spaces.parameter import Word, with_own

WARMUP_FRACTIONS = (0.0, 0.025, 0.05, 0.1, 0.2)
CLIP_NORMS = (None, 0.02, 0.1, 0.5, 1.0)

WORDS = {
    "recipe.lr_scale": Word(("optim.base_lr", "optim.min_lr"), lambda config: 1.0),
    "recipe.warmup_fraction": Word(
        ("schedule.warmup_epochs", "schedule.warmup_steps"), lambda config: own_fraction(config.schedule)
    ),
}


def dimensions(base: TrainConfig) -> dict[str, Dimension]:
    return {
        "recipe.lr_scale": Dimension(low=0.3, high=3.0, log=True),
        "recipe.warmup_fraction": Dimension(choices=_fractions(base.schedule)),
        "optim.clip_norm": Dimension(choices=with_own(CLIP_NORMS, base.optim.clip_norm)),
    }


def _fractions(schedule: ScheduleConfig) -> tuple[float | None, ...]:
    """One for each length of warm-up: a short schedule has few."""
    own = own_fraction(schedule)
    by_length: dict[int | None, float | None] = {}
    for fraction in (own, *WARMUP_FRACTIONS):
        by_length.setdefault(None if fraction is None else _length(fraction, schedule), fraction)
    return with_own(tuple(by_length.values()), own)


def own_fraction(schedule: ScheduleConfig) -> float | None:
    """None: the warm-up is counted in another unit than the run, and its fraction depends on the data set's size."""
    in_epochs = schedule.epochs is not None
    other = schedule.warmup_steps if in_epochs else schedule.warmup_epochs
    if other:
        return None
    return ((schedule.warmup_epochs if in_epochs else schedule.warmup_steps) or 0) / _total(schedule)


def overrides(point: Mapping[str, Any], config: TrainConfig) -> dict[str, Any]:
    """`recipe.lr_scale` multiplies both ends of the learning rate; the warm-up is counted in the unit of the run.

    Raises ConfigError for values that are none of a word.
    """
    found: dict[str, Any] = {}
    if (scale := point.get("recipe.lr_scale")) is not None:
        if not _is_number(scale) or scale <= 0:
            raise ConfigError([f"recipe.lr_scale={scale!r}: must be a number above 0; it multiplies learning rates"])
        found |= {"optim.base_lr": config.optim.base_lr * scale, "optim.min_lr": config.optim.min_lr * scale}
    if (fraction := point.get("recipe.warmup_fraction")) is not None:
        if not _is_number(fraction) or not 0 <= fraction <= 1:
            raise ConfigError([f"recipe.warmup_fraction={fraction!r}: must be a fraction of the run, from 0 to 1"])
        found |= _warmup(fraction, config.schedule)
    return found


def _warmup(fraction: float, schedule: ScheduleConfig) -> dict[str, Any]:
    own = own_fraction(schedule)
    length = _length(fraction, schedule)
    if own is not None and length == _length(own, schedule):
        return {}  # as it is, be it said or left out
    unit, other = ("epochs", "steps") if schedule.epochs is not None else ("steps", "epochs")
    return {f"schedule.warmup_{unit}": length, f"schedule.warmup_{other}": None}


def _length(fraction: float, schedule: ScheduleConfig) -> int:
    return round(fraction * _total(schedule))


def _total(schedule: ScheduleConfig) -> int:
    total = schedule.epochs or schedule.steps
    assert total is not None, "validated: one of them is given"
    return total


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
