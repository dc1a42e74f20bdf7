"""What the demo compares: one config for each arm, all of one seed alike but for what the arm is about. Torch-free."""

from __future__ import annotations

from typing import Any, NamedTuple

from amd.config import FinetuneConfig, TrainConfig, with_overrides
from amd.presets.finetuning import finetune_config
from amd.presets.pretraining import from_preset


class Modality(NamedTuple):
    key: str  # as in the presets' names
    title: str
    data: str  # name of the demo data
    classes: int

    @property
    def chance(self) -> float:
        return 100 / self.classes


IMAGE = Modality("image", "Images: which digit", "digits", 10)
VIDEO = Modality("video", "Clips: which way the digit moves", "moving-digits", 8)

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


class Plan(NamedTuple):
    """What all arms of one modality and seed have in common."""

    modality: Modality
    seed: int
    storage: str
    overrides: dict[str, Any]
    """Put over every student's config."""
    teacher_overrides: dict[str, Any]
    """Put over the teacher's."""


def distilled(plan: Plan, arm: str = "amd", **changes: Any) -> TrainConfig:
    """The AMD run; its teacher is trained first from the preset, one for every seed."""
    teacher = {"seed": plan.seed, **plan.teacher_overrides}
    return _config(plan, "amd", arm, {"teacher.overrides": teacher, **changes})


def undistilled(plan: Plan, steps: int | None = None) -> TrainConfig:
    """The same student without a teacher; `steps` for another length, its warm-up a tenth as in the preset."""
    length = {} if steps is None else {"schedule.steps": steps, "schedule.warmup_steps": steps // 10}
    return _config(plan, "mae", "mae" if steps is None else f"mae-{steps}", length)


def symmetric(plan: Plan) -> TrainConfig:
    """Teacher and student see the same tokens; there is then nothing to generate."""
    ratio = from_preset(f"demo-{plan.modality.key}-amd").mask.student_ratio
    return distilled(plan, "symmetric", **{"mask.teacher_ratio": ratio})


def direct_only(plan: Plan) -> TrainConfig:
    """The teacher sees more, but the student is only compared where both see."""
    return distilled(plan, "direct", **{"objective.weights.generation": 0.0})


def finetuned(plan: Plan, arm: str, weights: str | None, test: str) -> FinetuneConfig:
    """An arm's encoder, or none, fine-tuned on few labels and scored on `test`."""
    key = plan.modality.key
    same = {"seed": plan.seed, "storage": plan.storage, "weights": weights, "data.test": test}
    lengths = {name: value for name, value in plan.overrides.items() if name in FINETUNE_OVERRIDES}
    config = finetune_config(f"demo-{key}-finetune", None, {**lengths, **same})
    return with_overrides(config, {"name": f"demo-{key}-{arm}-s{plan.seed}-finetuned-{config.digest()[:8]}"})


FINETUNE_OVERRIDES = ("schedule.steps", "schedule.warmup_steps", "optim.batch_size", "data.loader_workers")


def _config(plan: Plan, preset: str, arm: str, changes: dict[str, Any]) -> TrainConfig:
    key = plan.modality.key
    same = {"seed": plan.seed, "storage": plan.storage}
    config = from_preset(f"demo-{key}-{preset}", {**plan.overrides, **changes, **same})
    # The digest in the name: after an upgrade that changes a preset, new runs do not meet old ones of the same name.
    return with_overrides(config, {"name": f"demo-{key}-{arm}-s{plan.seed}-{config.digest()[:8]}"})
