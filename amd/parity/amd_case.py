"""An AMD case recorded from the official code: config, token sets, clips and weights, and our models built from them.

Masks are read from the inputs, sizes from the meta file; nothing is sampled.
Shapes: B batch, N tokens.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from amd.config import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    ConfigError,
    TrainConfig,
    validate,
)
from amd.exchange.load import load_encoder_state, load_student_state
from amd.models.encoder import Encoder
from amd.models.layers import LAYER_NORM_EPS
from amd.models.student import Student
from amd.models.teachers.frozen import Teacher
from amd.parity.files import GoldenTensors
from amd.parity.report import ParityReport
from amd.tokens import TokenSets

META = "amd_meta.json"
FILES = (
    "teacher_state",
    "student_state",
    "student_extra",
    "amd_inputs",
    "amd_outputs_f32",
    "amd_outputs_f64",
    "amd_grads_f32",
    "amd_grads_f64",
    "amd_after5steps_f32",
)
TOLERANCE = {"f32": 1e-5, "f64": 1e-9}
DTYPE = {"f32": torch.float32, "f64": torch.float64}


class AmdCase(NamedTuple):
    config: TrainConfig
    meta: dict[str, Any]
    video: Tensor  # (B, 3, T, H, W), normalised
    sets: TokenSets
    student: dict[str, Tensor]  # official keys, with generator_mask_tokens.I
    teacher: dict[str, Tensor]

    def networks(self, precision: str) -> tuple[Student, Teacher]:
        """Build our models with the recorded weights, in the given precision."""
        config = self.config
        assert config.teacher is not None, "built below with a teacher"
        student = Student(config)
        load_student_state(student, self.student, "student_state")
        encoder = Encoder(config.teacher.encoder, config.clip.grid, config.clip.token_values)
        load_encoder_state(encoder, self.teacher, "teacher_state", intermediates_only=True, section="teacher.encoder")
        teacher = Teacher(encoder, tuple(pair.teacher for pair in config.objective.layers))
        return student.to(DTYPE[precision]).train(), teacher.to(DTYPE[precision])


def read_case(meta: dict[str, Any], files: dict[str, GoldenTensors], report: ParityReport) -> AmdCase | None:
    inputs = files["amd_inputs"]
    video, student_mask, teacher_mask, diff = (
        inputs.take(name) for name in ("video", "mask_student", "mask_teacher", "mask_diff")
    )
    if video is None or student_mask is None or teacher_mask is None or diff is None:
        return None
    before = len(report.failures)
    hidden, hidden_both, shown = student_mask.bool(), teacher_mask.bool(), diff.bool()
    report.same("amd_inputs", "mask_teacher", hidden_both, hidden & ~shown)
    report.same("amd_inputs", "mask_diff", shown & ~hidden, torch.zeros_like(shown))
    masks = {"mask_student": hidden, "mask_diff": shown}
    for name, mask in masks.items():
        if len(set(mask.sum(dim=1).tolist())) > 1:
            report.fail("amd_inputs", name, "has rows with different counts")
            return None
    sets = TokenSets(_indices(~hidden), _indices(shown), _indices(hidden), _indices(hidden))
    config = _config(meta["config"], sets)
    report.same("amd_inputs", "video", list(video.shape[1:]), [3, config.clip.frames, *config.clip.size])
    report.same("amd_inputs", "masks", list(hidden.shape), [video.shape[0], config.clip.grid.tokens])
    if len(report.failures) > before:
        return None
    student = dict(files["student_state"].all()) | dict(files["student_extra"].all())
    return AmdCase(config, meta, video, sets, student, dict(files["teacher_state"].all()))


def _indices(mask: Tensor) -> Tensor:
    """Convert a mask (B, N) with the same number of True per row to ascending indices (B, K)."""
    return mask.nonzero()[:, 1].reshape(mask.shape[0], -1)


def _config(sizes: dict[str, Any], sets: TokenSets) -> TrainConfig:
    """Return the config of the recorded run from the meta file. Token counts come from the masks, not from ratios."""
    student, teacher = sizes["student"], sizes["teacher"]
    if sizes.get("ln_eps", LAYER_NORM_EPS) != LAYER_NORM_EPS:
        raise ConfigError(
            [f"ln_eps={sizes['ln_eps']}: must be {LAYER_NORM_EPS}, as in our norms and the official code"]
        )
    if not sizes.get("qkv_bias", True):
        raise ConfigError(["qkv_bias=false: must be true, because our attention has a bias on queries and values"])
    shared = {"mlp_ratio": sizes.get("mlp_ratio", 4.0)}
    hidden, only = sets.student_masked.shape[1], sets.teacher_only.shape[1]
    tokens = hidden + sets.student_visible.shape[1]
    # The official code collects features in order of depth, regardless of the order of the flags.
    pairs = zip(sorted(student["layers"]), sorted(teacher["layers"]), strict=True)
    values = {
        "clip": {
            "frames": sizes["num_frames"],
            "size": sizes["img_size"],
            "patch": sizes["patch_size"],
            "tubelet": sizes["tubelet_size"],
            # The official engine keeps them as float32 tensors, even in float64 runs.
            "mean": torch.tensor(IMAGENET_MEAN).tolist(),
            "std": torch.tensor(IMAGENET_STD).tolist(),
        },
        "student": {
            "encoder": _encoder(student) | shared,
            "decoder": {
                "width": student["decoder_embed_dim"],
                "depth": student["decoder_depth"],
                "heads": student["decoder_num_heads"],
            },
            "generator": {"depth": student["generator_depth"], "heads": student.get("generator_num_heads")},
        },
        "teacher": {"encoder": _encoder(teacher) | shared, "weights": "teacher_state.safetensors"},
        # Half a token is added because ratios are truncated to counts.
        "mask": {
            "strategy": "random",
            "student_ratio": (hidden + 0.5) / tokens,
            "teacher_ratio": (hidden - only + 0.5) / tokens,
        },
        "objective": {"layers": [{"student": s, "teacher": t} for s, t in pairs]},
        "data": {"train": "golden"},
        "optim": {"batch_size": 1},
        "schedule": {"steps": 5},
    }
    return validate(TrainConfig, values)


def _encoder(sizes: dict[str, Any]) -> dict[str, Any]:
    return {"width": sizes["embed_dim"], "depth": sizes["depth"], "heads": sizes["num_heads"]}
