"""The complete AMD method: a student reconstructs pixels and the features of a teacher that sees more of the clip.

Three loss terms (Zhao et al., CVPR 2024): reconstruction of hidden pixels, direct alignment with the teacher on
student-visible tokens, and generation alignment on teacher-only tokens. Without a teacher, only reconstruction remains,
as in MAE for images and VideoMAE for video. Does not depend on devices, optimizers or logging.
Shapes: B batch, C channels, T frames, H height, W width, N tokens, P pixel values per token, V student-visible,
O teacher-only, R reconstructed, E teacher width.
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

StudentLike = Callable[[Tensor, TokenSets], StudentOutput]  # a Student, possibly wrapped in DDP


def distill(
    student: StudentLike, teacher: FeatureTeacher | None, clips: Tensor, sets: TokenSets, config: TrainConfig
) -> LossTerms:
    """Return the loss terms for a batch of clips (B, C, T, H, W), uint8 or normalised float."""
    clip, objective = config.clip, config.objective
    pixels = patchify(clips, clip.tubelet, clip.patch)  # (B, N, P)
    targets = teacher_features(teacher, pixels, sets, config) if teacher is not None else []

    visible = normalized_pixels(take_tokens(pixels, sets.student_visible), clip)  # (B, V, P)
    output = student(visible, sets)

    zero = torch.zeros((), device=pixels.device)
    reconstruction_loss = direct = generation = zero
    if output.reconstructed is not None:
        hidden = pixel_targets(take_tokens(pixels, sets.reconstructed), clip, objective.pixels)  # (B, R, P)
        reconstruction_loss = reconstruction(output.reconstructed, hidden)
    if targets:
        # Split at V: the teacher processes student-visible tokens first, then teacher-only tokens.
        shared = sets.student_visible.shape[1]
        direct = alignment(output.projected, [features[:, :shared] for features in targets], objective)
        if output.generated:
            generation = alignment(output.generated, [features[:, shared:] for features in targets], objective)
    return weigh(reconstruction_loss, direct, generation, objective)


def teacher_features(teacher: FeatureTeacher, pixels: Tensor, sets: TokenSets, config: TrainConfig) -> list[Tensor]:
    """Return the teacher's features at [student-visible, teacher-only] tokens, (B, V + O, E) per layer pair."""
    index = torch.cat([sets.student_visible, sets.teacher_only], dim=1)  # (B, V + O)
    tokens = normalized_pixels(take_tokens(pixels, index), config.clip)
    # Copy outside inference mode: autograd cannot save inference tensors for the backward pass.
    return [features.clone() for features in teacher(tokens, index)]
