"""The `recipe` space: learning rate, warm-up and gradient clipping, relative to the base recipe."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from amd.config import ConfigError, ScheduleConfig, TrainConfig
from tune_spaces.config import Dimension
from tune_spaces.spaces.parameter import Parameter, is_number, with_current

WARMUP_FRACTIONS = (0.0, 0.025, 0.05, 0.1, 0.2)
CLIP_NORMS = (None, 0.02, 0.1, 0.5, 1.0)

PARAMETERS = {
    "recipe.lr_scale": Parameter(("optim.base_lr", "optim.min_lr"), lambda config: 1.0),
    "recipe.warmup_fraction": Parameter(
        ("schedule.warmup_epochs", "schedule.warmup_steps"), lambda config: current_warmup_fraction(config.schedule)
    ),
}


def dimensions(base: TrainConfig) -> dict[str, Dimension]:
    return {
        "recipe.lr_scale": Dimension(low=0.3, high=3.0, log=True),
        "recipe.warmup_fraction": Dimension(choices=_fractions(base.schedule)),
        "optim.clip_norm": Dimension(choices=with_current(CLIP_NORMS, base.optim.clip_norm)),
    }


def _fractions(schedule: ScheduleConfig) -> tuple[float | None, ...]:
    """Return one fraction for each distinct warm-up length; a short schedule has only a few."""
    current = current_warmup_fraction(schedule)
    by_length: dict[int | None, float | None] = {}
    for fraction in (current, *WARMUP_FRACTIONS):
        by_length.setdefault(None if fraction is None else _length(fraction, schedule), fraction)
    return with_current(tuple(by_length.values()), current)


def current_warmup_fraction(schedule: ScheduleConfig) -> float | None:
    """Return the warm-up as a fraction of the run.

    Returns None if the warm-up and the run use different units, because the fraction then depends on the size of the
    data set.
    """
    in_epochs = schedule.epochs is not None
    other = schedule.warmup_steps if in_epochs else schedule.warmup_epochs
    if other:
        return None
    return ((schedule.warmup_epochs if in_epochs else schedule.warmup_steps) or 0) / _total(schedule)


def overrides(point: Mapping[str, Any], config: TrainConfig) -> dict[str, Any]:
    """Return the overrides for the point's recipe parameters.

    `recipe.lr_scale` multiplies both base_lr and min_lr; the warm-up is set in the unit of the run's length. Raises
    ConfigError for invalid values.
    """
    found: dict[str, Any] = {}
    if (scale := point.get("recipe.lr_scale")) is not None:
        if not is_number(scale) or scale <= 0:
            raise ConfigError(
                [f"recipe.lr_scale={scale!r}: must be a number above 0, because it multiplies learning rates"]
            )
        found |= {"optim.base_lr": config.optim.base_lr * scale, "optim.min_lr": config.optim.min_lr * scale}
    if (fraction := point.get("recipe.warmup_fraction")) is not None:
        if not is_number(fraction) or not 0 <= fraction <= 1:
            raise ConfigError([f"recipe.warmup_fraction={fraction!r}: must be a fraction of the run, from 0 to 1"])
        found |= _warmup(fraction, config.schedule)
    return found


def _warmup(fraction: float, schedule: ScheduleConfig) -> dict[str, Any]:
    current = current_warmup_fraction(schedule)
    length = _length(fraction, schedule)
    if current is not None and length == _length(current, schedule):
        return {}  # unchanged, whether or not the base sets it
    unit, other = ("epochs", "steps") if schedule.epochs is not None else ("steps", "epochs")
    return {f"schedule.warmup_{unit}": length, f"schedule.warmup_{other}": None}


def _length(fraction: float, schedule: ScheduleConfig) -> int:
    return round(fraction * _total(schedule))


def _total(schedule: ScheduleConfig) -> int:
    total = schedule.epochs or schedule.steps
    assert total is not None, "validated: one of them is set"
    return total
