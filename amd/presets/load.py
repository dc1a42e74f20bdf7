"""Load the config of a run or task: a preset or a file, with dotted overrides. Torch-free.

One loader serves every kind of run; the recipes are in `pretraining`, `finetuning` and `detection`.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any, TypeVar

import yaml

from amd.config import ConfigError, RunConfig, Section, flatten, overridden, validate, with_overrides
from amd.presets.detection import DETECTION_PRESETS
from amd.presets.finetuning import FINETUNE_PRESETS
from amd.presets.preset import UNSET, Preset
from amd.presets.pretraining import PRESETS
from amd.storage import read_bytes

C = TypeVar("C", bound=RunConfig)
S = TypeVar("S", bound=Section)

PRESETS_BY_KIND: dict[str, Mapping[str, Preset[Any]]] = {
    "train": PRESETS,
    "finetune": FINETUNE_PRESETS,
    "detect": DETECTION_PRESETS,
}
# Alternatives to the weights that a preset needs.
INSTEAD_OF_WEIGHTS = {
    "weights": "weights=null",
    "teacher.weights": "train the teacher first with teacher.preset=<a …-teacher preset>",
}


def load_config(
    kind: type[C], preset: str | None, url: str | None, overrides: Mapping[str, Any], *, complete: bool = True
) -> C:
    """Load a run's config from a preset or a file (JSON or YAML, path or fsspec URL), and apply dotted overrides.

    Raises ConfigError for an invalid config and, if `complete` is set, for a required value that is not set.
    """
    if (preset is None) == (url is None):
        raise ConfigError(["specify either a preset or a config file: --preset NAME or --config FILE"])
    if url is not None:
        config = load_file(kind, url, overrides)
    else:
        config = with_overrides(find_preset(kind, preset or "").config, overrides)
    if complete:
        check_complete(config)
    return config


def load_file(kind: type[S], url: str | None, overrides: Mapping[str, Any]) -> S:
    """Return a config from a file, or from overrides only. Raises ConfigError."""
    return validate(kind, overridden({} if url is None else read_config_file(url), overrides))


def find_preset(kind: type[C], name: str) -> Preset[C]:
    """Return the preset with this name for a kind of run. Raises ConfigError for an unknown name."""
    presets = [preset for group in PRESETS_BY_KIND.values() for preset in group.values()]
    known: dict[str, Preset[C]] = {preset.name: preset for preset in presets if isinstance(preset.config, kind)}
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"known presets: {', '.join(known)}"
        raise ConfigError([f"preset={name!r}: unknown; {hint}"])
    return known[name]


def read_config_file(url: str, option: str = "--config", expected: str = "the sections of a run") -> dict[str, Any]:
    """Read the values from a JSON or YAML file, given by path or fsspec URL, without validating them.

    `option` and `expected`: command-line option and expected content, for error messages.
    Raises ConfigError.
    """
    try:
        content = read_bytes(url)
    except Exception as error:  # every backend raises its own exceptions
        raise ConfigError([f"{option} {url}: cannot be read ({error})"]) from None
    try:
        values = yaml.safe_load(content)  # JSON is YAML
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError([f"{option} {url}: neither JSON nor YAML ({str(error).splitlines()[0]})"]) from None
    if not isinstance(values, dict):
        raise ConfigError([f"{option} {url}: must be an object with {expected}, not {type(values).__name__}"])
    return values


def check_complete(config: RunConfig) -> None:
    """Raise ConfigError if a value that the preset leaves to the user is not set."""
    unset = {
        key: value.removeprefix(UNSET).strip()
        for key, value in flatten(config.model_dump(mode="json")).items()
        if isinstance(value, str) and value.startswith(UNSET)
    }
    problems = [
        f"{key}: presets contain no data; set {key}=<{needed or 'folder, list file or tar shards'}>"
        for key, needed in unset.items()
        if key.startswith("data.")
    ]
    problems += [
        f"{key}: this preset needs {unset[key]}; set {key}=<file, URI or encoder id>, or {alternative}"
        for key, alternative in INSTEAD_OF_WEIGHTS.items()
        if key in unset
    ]
    if problems:
        raise ConfigError(problems)
