"""AMD on one page: the teacher sees more of a clip than the student, which rebuilds pixels and the teacher's features.

Three terms (Zhao et al., CVPR 2024): reconstruction of hidden pixels; direct alignment with the teacher on the tokens
both see; generation alignment on the tokens only the teacher sees. Without a teacher the first term alone is MAE, or
VideoMAE for video.
Shapes: B batch, C colours, T frames, H height, W width, N tokens, P pixel values a token, V student-visible,
O teacher-only, R rebuilt, E teacher width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from amd.config import TrainConfig
from amd.losses import LossTerms, alignment, normalized_pixels, pixel_targets, reconstruction, weigh
from amd.models.student import StudentOutput
from amd.models.teachers.frozen import FeatureTeacher
from amd.tokens import TokenSets, patchify, take_tokens

StudentLike = Callable[[Tensor, TokenSets], StudentOutput]  # a Student, or DDP around one


def distill(
    student: StudentLike, teacher: FeatureTeacher | None, clips: Tensor, sets: TokenSets, config: TrainConfig
) -> LossTerms:
    """The loss terms of one batch of clips, (B, C, T, H, W) uint8 (or float, normalised already)."""
    clip, objective = config.clip, config.objective
    pixels = patchify(clips, clip.tubelet, clip.patch)  # (B, N, P)
    targets = teacher_features(teacher, pixels, sets, config) if teacher is not None else []

    visible = normalized_pixels(take_tokens(pixels, sets.student_visible), clip)  # (B, V, P)
    answer = student(visible, sets)

    none = torch.zeros((), device=pixels.device)
    rebuilding = direct = generation = none
    if answer.rebuilt is not None:
        hidden = pixel_targets(take_tokens(pixels, sets.rebuilt), clip, objective.pixels)  # (B, R, P)
        rebuilding = reconstruction(answer.rebuilt, hidden)
    if targets:
        # The teacher sees the student's tokens first, then those it sees alone.
        shared = sets.student_visible.shape[1]
        direct = alignment(answer.projected, [features[:, :shared] for features in targets], objective)
        if answer.generated:
            generation = alignment(answer.generated, [features[:, shared:] for features in targets], objective)
    return weigh(rebuilding, direct, generation, objective)


def teacher_features(teacher: FeatureTeacher, pixels: Tensor, sets: TokenSets, config: TrainConfig) -> list[Tensor]:
    """The teacher's features at [student-visible, teacher-only] tokens, (B, V + O, E) per layer pair."""
    index = torch.cat([sets.student_visible, sets.teacher_only], dim=1)  # (B, V + O)
    seen = normalized_pixels(take_tokens(pixels, index), config.clip)
    # A copy outside inference mode: a loss may not keep an inference tensor for its backward pass.
    return [features.clone() for features in teacher(seen, index)]
