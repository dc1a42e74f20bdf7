"""The arms that the demo compares, and their configs. Arms with the same seed differ only in the setting under test.

Does not import torch.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from amd.config import FinetuneConfig, TrainConfig, with_overrides
from amd.presets.load import load_config


class Modality(NamedTuple):
    key: str  # as in the presets' names
    title: str
    data: str  # name of the demo data set
    classes: int
    note: str = ""
    """Caveat shown with the students' reconstructions."""

    @property
    def chance(self) -> float:
        return 100 / self.classes


PICTURE_STEPS = 5  # number of steps after which a student's run writes pictures

IMAGE = Modality("image", "Images: which digit", "digits", 10, note="blurred: trained for features, not for pixels")
VIDEO = Modality(
    "video",
    "Clips: which way the digit moves under noise",
    "noisy-moving-digits",
    8,
    note="reconstructions are nearly grey: noise cannot be predicted, and its mean is grey",
)

TITLES = {
    "pixels": "raw pixels",
    "random": "student, random weights",
    "teacher": "teacher (128 x 6)",
    "mae": "student (64 x 4), undistilled",
    "mae-time": "  undistilled, as long as AMD takes",
    "amd": "student (64 x 4), AMD",
    "symmetric": "  teacher sees no more than the student",
    "direct": "  direct alignment alone",
}


class DemoPlan(NamedTuple):
    """Settings shared by all arms of one modality and seed."""

    modality: Modality
    seed: int
    storage: str
    overrides: dict[str, Any]
    """Overrides for every student's config."""
    teacher_overrides: dict[str, Any]
    """Overrides for the teacher's config."""


def distilled(plan: DemoPlan, arm: str = "amd", **changes: Any) -> TrainConfig:
    """Return the config of the AMD run. The teacher, one per seed, is trained first, from its preset."""
    teacher = {"seed": plan.seed, **plan.teacher_overrides}
    return _config(plan, "amd", arm, {"teacher.overrides": teacher, **changes})


def undistilled(plan: DemoPlan, steps: int | None = None) -> TrainConfig:
    """Return the config for training the same student without a teacher.

    `steps` overrides the length of the run; the warm-up is a tenth of the run, as in the preset.
    """
    schedule = {} if steps is None else {"schedule.steps": steps, "schedule.warmup_steps": steps // 10}
    return _config(plan, "mae", "mae" if steps is None else f"mae-{steps}", schedule)


def symmetric(plan: DemoPlan) -> TrainConfig:
    """Return a config in which teacher and student see the same tokens, so there is no generation alignment."""
    ratio = load_config(TrainConfig, f"demo-{plan.modality.key}-amd", None, {}).mask.student_ratio
    return distilled(plan, "symmetric", **{"mask.teacher_ratio": ratio})


def direct_only(plan: DemoPlan) -> TrainConfig:
    """Return a config in which the teacher sees more tokens, but only the direct alignment loss is used."""
    return distilled(plan, "direct", **{"objective.weights.generation": 0.0})


def finetuned(plan: DemoPlan, arm: str, weights: str | None, test: str) -> FinetuneConfig:
    """Return the config for fine-tuning an arm's encoder (None: random weights) on a few labels and scoring it on
    `test`."""
    key = plan.modality.key
    common = {"seed": plan.seed, "storage": plan.storage, "weights": weights, "data.test": test}
    shared = {name: value for name, value in plan.overrides.items() if name in FINETUNE_OVERRIDES}
    config = load_config(FinetuneConfig, f"demo-{key}-finetune", None, {**shared, **common})
    return with_overrides(config, {"name": f"demo-{key}-{arm}-s{plan.seed}-finetuned-{config.digest()[:8]}"})


FINETUNE_OVERRIDES = ("schedule.steps", "schedule.warmup_steps", "optim.batch_size", "data.loader_workers")


def _config(plan: DemoPlan, preset: str, arm: str, changes: dict[str, Any]) -> TrainConfig:
    key = plan.modality.key
    common = {"seed": plan.seed, "storage": plan.storage}
    config = load_config(TrainConfig, f"demo-{key}-{preset}", None, {**plan.overrides, **changes, **common})
    # Runs resume by name; the digest keeps names distinct after an upgrade that changes a preset.
    name = f"demo-{key}-{arm}-s{plan.seed}-{config.digest()[:8]}"
    assert config.schedule.steps is not None, "demo presets set the length of the run in steps"
    return with_overrides(config, {"name": name, "media.every_steps": max(1, config.schedule.steps // PICTURE_STEPS)})
