"""Load a sweep's config from a preset or a file, and apply overrides.

Shared by `amd search`, `python -m tune_spaces` and search jobs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from amd.config import ConfigError, TrainConfig, overridden, validate
from amd.presets.load import find_preset, read_config_file
from tune_spaces.config import SearchConfig

TRAIN_SECTIONS = frozenset(TrainConfig.model_fields) - frozenset(SearchConfig.model_fields)
DIMENSIONS_PREFIX = "space.dimensions."


def load_search(preset_name: str | None, url: str | None, overrides: Mapping[str, Any]) -> SearchConfig:
    """Load a sweep's config from a file with the fields of SearchConfig, or from a preset, and apply dotted overrides.

    A file can contain `preset: NAME` and `overrides: {…}` instead of `train`. Overrides address fields of the sweep
    (budget.trials, space.use, seeds) or sections of the run that trials vary (optim.base_lr, train.seed). Raises
    ConfigError with one line per problem.
    """
    return search_from(preset_name, read_config_file(url) if url is not None else {}, overrides)


def search_from(preset_name: str | None, given: Mapping[str, Any], overrides: Mapping[str, Any]) -> SearchConfig:
    """Build a sweep's config from the values of a file; see `load_search`."""
    values = dict(given)
    changes = values.pop("overrides", None) or {}
    chosen_preset = preset_name or values.pop("preset", None)
    values.pop("preset", None)
    if not isinstance(changes, Mapping):
        raise ConfigError([f"overrides={changes!r}: must be a mapping of dotted keys to values"])
    if chosen_preset is not None:
        if "train" in values:
            raise ConfigError(
                ["train: the file contains a complete run, but a preset is set too; keep only one of them"]
            )
        values["train"] = find_preset(TrainConfig, str(chosen_preset)).config.model_dump(mode="json")
    elif "train" not in values:
        raise ConfigError(
            [
                "train: required: this is the run that the sweep varies; pass --preset NAME, or a config file with "
                "`preset: NAME` or a complete run under `train`"
            ]
        )
    moved = {full_key(key): value for key, value in {**changes, **overrides}.items()}
    dimension_keys = [key for key in moved if key.startswith(DIMENSIONS_PREFIX)]
    dimensions = {key.removeprefix(DIMENSIONS_PREFIX): moved.pop(key) for key in dimension_keys}
    changed = overridden(values, moved)
    if dimensions:  # dimension names contain dots but are not paths
        space = changed["space"] = {**(changed.get("space") or {})}
        space["dimensions"] = {**(space.get("dimensions") or {}), **dimensions}
    return validate(SearchConfig, changed)


def full_key(key: str) -> str:
    """Prefix keys of the run with `train.`: `optim.base_lr` becomes `train.optim.base_lr`."""
    return f"train.{key}" if key.split(".")[0] in TRAIN_SECTIONS else key
