"""Look at one clip of one training step: its token sets, their layers, and the reconstruction with an encoder.

Masks equal the ones that training on a CPU samples for the same config, step and position in the batch. Accesses no
files.
Shapes: N tokens, R reconstructed tokens, T frames, H height, W width; sets have a batch of 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from amd.config import ConfigError, PixelTarget, TrainConfig
from amd.lab import Layer, layers
from amd.models.encoder import Encoder
from amd.models.predictor import Decoder
from amd.reconstruction import MaskedTokens, reconstruct
from amd.tokens import TokenSets, patchify
from amd.training.trainer.distiller import sample_step_token_sets
from amd.visualization import as_bytes


class Autoencoder(NamedTuple):
    """An encoder with the decoder that was trained with it."""

    encoder: Encoder
    decoder: Decoder
    pixels: PixelTarget


class RebuiltClip(NamedTuple):
    """Reconstruction of a clip."""

    pixels: Tensor  # (3, T, H, W) float32 in [0, 1]; the clip at tokens that are not reconstructed
    errors: Tensor  # (R,) mean squared error of each reconstructed token, against the pixel targets of training
    loss: float  # mean of the errors


class MaskView(NamedTuple):
    """What the mask lab shows of a clip."""

    sets: TokenSets  # (1, …)
    layers: Mapping[Layer, Tensor]  # (3, T, H, W) uint8 each
    rebuilt: RebuiltClip | None


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
def view_masks(config: TrainConfig, sets: TokenSets, frames: Tensor | None, model: Autoencoder | None) -> MaskView:
    """Draw the layers of a clip (3, T, H, W) uint8, or of a single-coloured one without input.

    Layers that need what is not given are omitted: the input without a clip, the teacher's without a teacher, the
    rebuilt pixels and errors without a clip and a model.
    """
    clip = config.clip
    clips = (layers.plain_clip(clip) if frames is None else frames)[None]
    pixels = patchify(clips, clip.tubelet, clip.patch)  # (1, N, P)
    drawn: dict[Layer, Tensor] = {} if frames is None else {"input": pixels}
    drawn["student"] = layers.student_view(pixels, sets, clip)
    if config.objective.kind == "amd":
        drawn["teacher"] = layers.teacher_view(pixels, sets, clip)
    drawn |= {"roles": layers.roles_view(pixels, sets, clip), "masked": layers.masked_view(pixels, sets, clip)}
    rebuilt = None
    if frames is not None and model is not None:
        rebuilt = _rebuild(model, clips, sets, config)
        shown = patchify(as_bytes(rebuilt.pixels)[None], clip.tubelet, clip.patch)
        drawn["rebuilt"] = layers.rebuilt_view(shown, sets, clip)
        drawn["error"] = layers.error_view(rebuilt.errors[None], sets, clip)
    return MaskView(sets, {name: layers.single_clip(tokens, clip) for name, tokens in drawn.items()}, rebuilt)


def _rebuild(model: Autoencoder, clips: Tensor, sets: TokenSets, config: TrainConfig) -> RebuiltClip:
    masked = MaskedTokens(sets.student_visible[0], sets.reconstructed[0])
    found = reconstruct(model.encoder, model.decoder, clips, masked, config.clip, model.pixels)
    return RebuiltClip(found.reconstructed[0], found.token_losses[0], found.losses[0].item())
