"""A sweep's config from a preset or a file, options and overrides: what the command, `python -m tune_spaces` and a job
share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from amd.config import ConfigError, TrainConfig, overridden, validate
from amd.presets.pretraining import preset, read_config_file
from tune_spaces.config import SearchConfig

SECTIONS = frozenset(TrainConfig.model_fields) - frozenset(SearchConfig.model_fields)
DIMENSIONS = "space.dimensions."
WHAT = "a preset's name in place of `train`, and changes to it"


def load_search(preset_name: str | None, url: str | None, overrides: Mapping[str, Any]) -> SearchConfig:
    """A sweep's config: a file with the fields of SearchConfig, or a preset to vary, with dotted overrides.

    In a file `preset: NAME` and `overrides: {…}` may stand in place of `train`. Overrides name the sweep's own fields
    (budget.trials, space.use, seeds) or sections of the run that trials vary (optim.base_lr, train.seed). Raises
    ConfigError with one line per problem.
    """
    return search_from(preset_name, read_config_file(url) if url is not None else {}, overrides)


def search_from(preset_name: str | None, given: Mapping[str, Any], overrides: Mapping[str, Any]) -> SearchConfig:
    """The same from values at hand in place of a file."""
    values = dict(given)
    changes = values.pop("overrides", None) or {}
    named = preset_name or values.pop("preset", None)
    values.pop("preset", None)
    if not isinstance(changes, Mapping):
        raise ConfigError([f"overrides={changes!r}: must be a mapping of dotted keys, {WHAT}"])
    if named is not None:
        if "train" in values:
            raise ConfigError(["train: the file holds a whole run and a preset is given too; take one of them"])
        values["train"] = preset(str(named)).config.model_dump(mode="json")
    elif "train" not in values:
        raise ConfigError(
            ["train: which run is varied? give --preset NAME, or a file with `preset: NAME` or a whole run as `train`"]
        )
    moved = {_placed(key): value for key, value in {**changes, **overrides}.items()}
    named = {key.removeprefix(DIMENSIONS): moved.pop(key) for key in list(moved) if key.startswith(DIMENSIONS)}
    changed = overridden(values, moved)
    if named:  # a dimension's name has dots of its own: it is no path
        space = changed["space"] = {**(changed.get("space") or {})}
        space["dimensions"] = {**(space.get("dimensions") or {}), **named}
    return validate(SearchConfig, changed)


def _placed(key: str) -> str:
    """`optim.base_lr` means the run's."""
    return f"train.{key}" if key.split(".")[0] in SECTIONS else key
