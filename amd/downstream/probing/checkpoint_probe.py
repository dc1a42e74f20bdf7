"""Probe the checkpoints of a run in progress from a separate process.

Training neither waits for probes nor depends on them. Scores are written to the run's metrics folder, one file per
step, under names that training never uses; `read_metrics` merges each into the metrics line for its step.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from amd.config import CheckpointConfig, ClipConfig, ConfigError, EncoderConfig, RunProbeConfig, overridden, validate
from amd.downstream.probing.run import probe_now
from amd.models.encoder import Encoder
from amd.storage import join, read_json, write_bytes
from amd.training.checkpoints.store import CheckpointStore, DamagedCheckpoint, Snapshot
from amd.training.reporting.metrics_reader import Line
from amd.training.run_folder import CONFIG, find_run
from amd.training.runs.publishing import ENCODER

SECTION = "probe"  # of a run's config


def probe_checkpoint(run: str, step: int | None = None, overrides: Mapping[str, Any] | None = None) -> Line:
    """Probe a committed checkpoint of a run, by default the newest, and return the line added to its metrics.

    `run`: run folder, or run ID under AMD_STORAGE. Settings come from the `probe` section of the run's config, modified
    by `overrides`. Raises ConfigError if the run or the checkpoint does not exist, or the settings are invalid.
    """
    folder = find_run(run)
    values, settings = _read(folder, overrides or {})
    clip = validate(ClipConfig, values["clip"])
    encoder = Encoder(validate(EncoderConfig, values["student"]["encoder"]), clip.grid, clip.token_values)
    done, snapshot = _load(folder, step)
    state = snapshot.tensors["model"]
    encoder.load_state_dict(
        {key.removeprefix(ENCODER): value for key, value in state.items() if key.startswith(ENCODER)}
    )
    line: Line = {"step": done, **probe_now(settings, encoder, clip, values["data"]["interpolation"])}
    write_bytes(join(folder, "metrics", f"probe-{done:08d}.jsonl"), (json.dumps(line) + "\n").encode())
    return line


def _read(folder: str, overrides: Mapping[str, Any]) -> tuple[dict[str, Any], RunProbeConfig]:
    """Read the run's config and its probe settings."""
    try:
        values: dict[str, Any] = read_json(join(folder, CONFIG))
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError(
            [f"--run {folder}: contains no run ({CONFIG} is missing); pass a folder under runs/"]
        ) from None
    if "student" not in values:
        raise ConfigError([f"--run {folder}: not a pre-training run; probe its published encoder with `amd probe`"])
    try:
        return values, validate(RunProbeConfig, overridden(values.get(SECTION) or {}, overrides))
    except ConfigError as error:
        raise ConfigError([f"{SECTION}.{line}" for line in error.problems]) from None


def _load(folder: str, step: int | None) -> tuple[int, Snapshot]:
    store = CheckpointStore(join(folder, "checkpoints"), CheckpointConfig())
    if step is None:
        for _ in range(2):  # the run may commit a new checkpoint and delete the one being read
            try:
                found = store.load_newest()
            except FileNotFoundError:
                continue
            if found is not None:
                return found
        raise ConfigError([f"--run {folder}: has no checkpoint yet; wait for the first one"])
    try:
        return step, store.load(step)
    except (FileNotFoundError, DamagedCheckpoint):
        steps = ", ".join(map(str, store.committed())) or "none"
        raise ConfigError(
            [f"--step {step}: {folder} has no intact checkpoint for that step; available steps: {steps}"]
        ) from None
