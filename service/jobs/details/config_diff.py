"""Compare a job's config with its preset, value by value."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from amd.config import flatten
from amd.presets.load import PRESETS_BY_KIND
from service.jobs.details.changes import CHOSEN_BY_SERVICE

ABSENT = object()


class ConfigRow(NamedTuple):
    """One config value and its counterpart in the config that it is compared with."""

    key: str
    value: Any
    base: Any
    changed: bool
    """Whether the value differs; always false if there is nothing to compare with."""


def preset_values(kind: str, preset: str | None) -> dict[str, Any] | None:
    """Return the values of a preset, or None if there is no such preset."""
    found = PRESETS_BY_KIND.get("train" if kind == "search" else kind, {}).get(preset or "")
    return None if found is None else found.config.model_dump(mode="json")


def base_config(kind: str, preset: str | None, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the config to compare a job's config with, or None if the job has no preset.

    For a sweep, this is the job's config with the run that it varies replaced by the preset; otherwise, the preset.
    """
    base = preset_values(kind, preset)
    if base is None or kind != "search":
        return base
    return {**{name: value for name, value in config.items() if name != "train"}, "train": base}


def config_rows(config: Mapping[str, Any], base: Mapping[str, Any] | None) -> list[ConfigRow]:
    """Return a row for each dotted key in either config, except those that the service sets."""
    own = _flat(config)
    if base is None:
        return [ConfigRow(key, value, None, False) for key, value in own.items()]
    theirs = _flat(base)
    rows = []
    for key in dict.fromkeys([*own, *theirs]):
        value, other = own.get(key, ABSENT), theirs.get(key, ABSENT)
        shown, before = (None if one is ABSENT else one for one in (value, other))
        rows.append(ConfigRow(key, shown, before, value != other))
    return rows


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    chosen = {*CHOSEN_BY_SERVICE, *(f"train.{name}" for name in CHOSEN_BY_SERVICE)}
    return {key: value for key, value in flatten(values).items() if key not in chosen}
