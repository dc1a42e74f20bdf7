"""Options and help of the commands that take a config, shared by `amd NAME` (Typer) and `python -m …` (argparse).

Does not import Typer, argparse or torch: a command's function is imported only after its config is validated.
"""

from __future__ import annotations

from collections.abc import Mapping
from pkgutil import resolve_name
from typing import Any, NamedTuple

from amd.config import DetectionConfig, FinetuneConfig, RunConfig, TrainConfig
from amd.presets.load import load_config


class CommandOption(NamedTuple):
    """A command-line option."""

    flags: tuple[str, ...]
    """Flags: the long form, then optionally a short form, which only `amd` accepts."""
    help: str
    is_switch: bool = False
    """Whether the option is a switch, which takes no value."""


CONFIG = CommandOption(("--config", "-c"), "File or URL of a JSON or YAML config.")
PRESET = CommandOption(("--preset", "-p"), "Name of a preset; `amd presets` lists all of them.")
LOCAL = CommandOption(("--local",), "Train in this process, without Ray.", is_switch=True)
DISTRIBUTED = CommandOption(
    ("--distributed",), "Train in the processes started by torchrun or srun, without Ray.", is_switch=True
)
LOCAL_EMBED = CommandOption(("--local",), "Embed a data set in this process, without Ray.", is_switch=True)
STORAGE = CommandOption(("--storage",), "Storage root for runs and encoders; default: AMD_STORAGE.")
AS_JSON = CommandOption(("--json",), "Print machine-readable JSON instead of text.", is_switch=True)

OVERRIDES = "Config overrides, e.g. mask.teacher_ratio=0.6."
SWEEP_OVERRIDES = "Overrides for the run (optim.base_lr=…) or the sweep (seeds=…)."
PROBE_OVERRIDES = "Overrides: data.train=… (labelled), data.test=…, knn.neighbours=…"


class TrainingCommand(NamedTuple):
    """A command that trains from a preset or a config file."""

    config: type[RunConfig]
    function: str
    """Training function, as `module:name`; takes a config and returns a RunResult. The module may import torch."""
    summary: str
    overrides: str
    """Help text for the overrides."""

    def run(self, preset: str | None, url: str | None, overrides: Mapping[str, Any], **options: Any) -> Any:
        """Load the config and train; `options` are passed to `launch`.

        Raises ConfigError before importing torch if the config is invalid.
        """
        config = load_config(self.config, preset, url, overrides)
        return resolve_name(self.function)(config, **options)


TRAINING_COMMANDS = {
    "train": TrainingCommand(
        TrainConfig,
        "amd.training.runs.launch:train",
        "Pre-train an encoder with Ray Train: on this machine, on the cluster at RAY_ADDRESS, or as a job.",
        OVERRIDES,
    ),
    "finetune": TrainingCommand(
        FinetuneConfig,
        "amd.downstream.supervised.classification.run:finetune",
        "Fine-tune an encoder on labelled data, test its best checkpoint with all views, and publish it.",
        "Overrides: weights=ENCODER, data.train=…, data.val=…, data.test=…",
    ),
    "detect": TrainingCommand(
        DetectionConfig,
        "amd.downstream.supervised.detection.run:detect",
        "Train an action detector on annotated key frames, score its best checkpoint by frame-mAP, and publish it.",
        "Overrides: weights=ENCODER, data.train=CSV, data.root=VIDEOS, data.val=CSV, …",
    ),
}
