"""View one clip of a training step: its token sets and their layers, its reconstruction, and its alignment.

Masks are the same as in training on a CPU with the same config, step and position. Accesses no files.
Shapes: N tokens, V student-visible, O teacher-only, R reconstructed tokens, P pixel values per token, T frames, H
height, W width; sets have batch size 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from amd.config import ConfigError, PixelTarget, TrainConfig
from amd.distillation import teacher_features
from amd.lab import Layer, layers
from amd.losses import normalized_pixels, token_alignment
from amd.models.encoder import Encoder
from amd.models.predictor import Decoder
from amd.models.student import Student
from amd.models.teachers.frozen import FeatureTeacher
from amd.reconstruction import MaskedTokens, reconstruct
from amd.tokens import TokenSets, patchify, take_tokens
from amd.training.trainer.distiller import sample_step_token_sets
from amd.visualization import as_bytes


class Autoencoder(NamedTuple):
    """An encoder and the decoder trained with it."""

    encoder: Encoder
    decoder: Decoder
    pixels: PixelTarget


class RebuiltClip(NamedTuple):
    """Reconstruction of a clip."""

    pixels: Tensor  # (3, T, H, W) float32 in [0, 1]; the clip at tokens that are not reconstructed
    errors: Tensor  # (R,) mean squared error of each reconstructed token, against the pixel targets of training
    loss: float  # mean of the errors


class Distillation(NamedTuple):
    """A student at some point of its training, and its teacher."""

    student: Student
    teacher: FeatureTeacher


class ClipAlignment(NamedTuple):
    """Alignment losses of a clip's tokens; their mean over a token set is the clip's loss term in training."""

    direct: Tensor  # (V,) of student-visible tokens
    generation: Tensor  # (O,) of teacher-only tokens; empty without generation alignment


class MaskView(NamedTuple):
    """Everything that the mask lab shows for a clip."""

    sets: TokenSets  # (1, …)
    layers: Mapping[Layer, Tensor]  # (3, T, H, W) uint8 each
    rebuilt: RebuiltClip | None
    alignment: ClipAlignment | None


def sample_clip_sets(config: TrainConfig, step: int, position: int) -> TokenSets:
    """Return the token sets that training on a CPU samples for a clip of the global batch, counted from 0.

    Raises ConfigError if the batch has fewer clips.
    """
    if not 0 <= position < config.clips_per_step:
        raise ConfigError(
            [
                f"position={position} must be from 0 to {config.clips_per_step - 1}: a step has optim.batch_size="
                f"{config.optim.batch_size} x data.repeats={config.data.repeats} clips"
            ]
        )
    return sample_step_token_sets(config, step, torch.Generator()).rows(position, position + 1)


@torch.inference_mode()
def view_masks(
    config: TrainConfig,
    sets: TokenSets,
    frames: Tensor | None,
    model: Autoencoder | None,
    distillation: Distillation | None = None,
) -> MaskView:
    """Draw the layers of a clip (3, T, H, W) uint8, or of a single-coloured clip if `frames` is None.

    Omits layers whose inputs are missing: the input layer needs a clip; the teacher's view and the roles need a
    config with a teacher; reconstruction and errors need a clip and a model; alignment needs a clip and a distillation.
    """
    clip = config.clip
    clips = (layers.plain_clip(clip) if frames is None else frames)[None]
    pixels = patchify(clips, clip.tubelet, clip.patch)  # (1, N, P)
    drawn: dict[Layer, Tensor] = {} if frames is None else {"input": pixels}
    drawn["student"] = layers.student_view(pixels, sets, clip)
    if config.objective.kind == "amd":
        drawn["teacher"] = layers.teacher_view(pixels, sets, clip)
        drawn["roles"] = layers.roles_view(pixels, sets, clip)
    drawn["masked"] = layers.masked_view(pixels, sets, clip)
    rebuilt = None
    if frames is not None and model is not None:
        rebuilt = _rebuild(model, clips, sets, config)
        tokens = patchify(as_bytes(rebuilt.pixels)[None], clip.tubelet, clip.patch)
        drawn["rebuilt"] = layers.rebuilt_view(tokens, sets, clip)
        drawn["error"] = layers.error_view(rebuilt.errors[None], sets.reconstructed, clip)
    alignment = None
    if frames is not None and distillation is not None:
        alignment = _align(distillation, pixels, sets, config)
        aligned = [sets.student_visible, sets.teacher_only] if len(alignment.generation) else [sets.student_visible]
        losses = torch.cat([alignment.direct, alignment.generation])[None]
        drawn["alignment"] = layers.error_view(losses, torch.cat(aligned, dim=1), clip)
    shown = {name: layers.single_clip(tokens, clip) for name, tokens in drawn.items()}
    return MaskView(sets, shown, rebuilt, alignment)


def _align(distillation: Distillation, pixels: Tensor, sets: TokenSets, config: TrainConfig) -> ClipAlignment:
    student, teacher = distillation
    targets = teacher_features(teacher, pixels, sets, config)
    visible = normalized_pixels(take_tokens(pixels, sets.student_visible), config.clip)
    output, shared = student(visible, sets), sets.student_visible.shape[1]
    direct = token_alignment(output.projected, [features[:, :shared] for features in targets], config.objective)
    generation = direct[:, :0]
    if output.generated:
        hidden = [features[:, shared:] for features in targets]
        generation = token_alignment(output.generated, hidden, config.objective)
    return ClipAlignment(direct[0], generation[0])


def _rebuild(model: Autoencoder, clips: Tensor, sets: TokenSets, config: TrainConfig) -> RebuiltClip:
    masked = MaskedTokens(sets.student_visible[0], sets.reconstructed[0])
    found = reconstruct(model.encoder, model.decoder, clips, masked, config.clip, model.pixels)
    return RebuiltClip(found.reconstructed[0], found.token_losses[0], found.losses[0].item())
