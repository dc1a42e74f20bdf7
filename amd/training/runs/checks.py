"""Check a config before a run starts: storage, device, data and teacher. Every problem raises ConfigError."""

from __future__ import annotations

from typing import NamedTuple

from amd.config import ConfigError, RunConfig, TrainConfig
from amd.data.dataset.open import open_manifest
from amd.data.decoding.reader import check_decoder
from amd.device import choose_device
from amd.exchange.load import load_teacher
from amd.storage import StorageError, check_writable
from amd.training.reporting.metrics import check_mlflow


class DataFacts(NamedTuple):
    samples: int
    digest: str
    steps: int
    """Number of optimizer steps in the whole run, derived from the schedule."""


def check_storage(root: str) -> None:
    try:
        check_writable(root)
    except StorageError as error:
        raise ConfigError([str(error)]) from None


def check_machine(config: RunConfig, local: bool) -> None:
    """Check that optional packages in use are installed and, if this process trains, that its device is available.

    Raises ConfigError otherwise.
    """
    check_mlflow(config.tracking)
    check_decoder(config.data)
    if local:
        choose_device(config.scaling.device)


def check_data(config: RunConfig) -> DataFacts:
    """Count samples and steps. Raises ConfigError if data is missing or insufficient, or the schedule is invalid."""
    manifest = open_manifest(config.data)
    return check_counts(config, len(manifest), manifest.digest())


def check_counts(config: RunConfig, samples: int, digest: str) -> DataFacts:
    """Check batch size and schedule against the number of samples. Raises ConfigError if they do not fit."""
    batch = config.optim.batch_size
    if samples == 0:
        raise ConfigError([f"data.train={config.data.train}: has no samples; check it with `amd validate`"])
    if samples < batch:
        raise ConfigError(
            [
                f"optim.batch_size={batch} is above the {samples} samples of data.train={config.data.train}; "
                f"lower it to {samples} or less, or add data"
            ]
        )
    steps = config.schedule.total_steps(samples // batch)
    warmup = config.schedule.total_warmup_steps(samples // batch)
    if warmup > steps:
        raise ConfigError(
            [f"schedule: the warm-up is {warmup} steps long, but the run has only {steps}; shorten schedule.warmup_*"]
        )
    return DataFacts(samples, digest, steps)


def check_teacher(config: TrainConfig) -> None:
    """Load the teacher once, so that errors appear before the run starts. Raises ConfigError if loading fails."""
    if config.teacher is not None:
        load_teacher(config)
