"""Import third-party weights as a published encoder.

The config is inferred from tensor shapes and folder metadata; values that cannot be inferred must be passed.
"""

from __future__ import annotations

import math
import os
import re
from importlib.metadata import version
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from amd.artifacts.card import Card, HeadCard
from amd.artifacts.discovery import CARD, encoder_folder, load_card
from amd.artifacts.weights import load_decoder, save_encoder, serialize_encoder
from amd.config import ENCODER_SIZES, ClipConfig, ConfigError, EncoderConfig, ImportConfig, Positions, validate
from amd.exchange.initialization import fill_from
from amd.exchange.positions import fixed_kind
from amd.exchange.source import Source, open_source, published
from amd.models.encoder import Encoder
from amd.models.teachers.timm import TIMM, timm_clip
from amd.storage import exists, join, resolve_root

# Number of heads by (width, depth), which tensors do not reveal. The last entry is the giant model of VideoMAE V2.
KNOWN_HEADS = {(size.width, size.depth): size.heads for size in ENCODER_SIZES.values()} | {(1408, 40): 16}
FRAMES, SIZE = 16, 224  # as in VideoMAE, if neither the file nor the user specifies them


class Imported(NamedTuple):
    card: Card
    url: str
    notes: list[str]
    """Values that were guessed and parts that were omitted."""


def import_encoder(config: ImportConfig) -> Imported:
    """Publish `config.weights` (anything `open_source` accepts) as the encoder `config.id` under the storage root.

    Idempotent: repeating an import returns the encoder that the first import published. Raises ConfigError if the
    weights cannot be read or do not fit, a required value can be neither inferred nor guessed, or the ID belongs to
    another encoder.
    """
    weights, root, id = config.weights, resolve_root(config.storage), config.id
    url = encoder_folder(root, id)
    named = timm_clip(weights) if weights.startswith(TIMM) else None
    if named is not None and config.image_size is not None:
        named = validate(ClipConfig, named.model_dump() | {"size": config.image_size})
    source = open_source(weights, root, named or ClipConfig())
    notes: list[str] = []
    clip = source.card.clip if source.card else named or _clip(source, config, notes)
    encoder_config = source.card.encoder if source.card else _encoder(source, config, clip, notes)
    encoder = Encoder(encoder_config, clip.grid, clip.token_values)
    start = fill_from(encoder, source, clip)
    head = _head(source, encoder_config.width, notes)
    card = source.card or Card(
        id=id,
        encoder=encoder_config,
        clip=clip,
        interpolation=config.interpolation or source.facts.interpolation or "bilinear",
        pooling=start.pooling,
        head=None if head is None else _head_card(head, source),
        start=start.lineage,
        versions={"amd-service": version("amd-service"), "torch": torch.__version__},
    )
    # Never copy the job from an imported card: the service derives the encoder's owner from it.
    origin = {"id": id, "job": os.environ.get("AMD_JOB")}
    card = card.model_copy(update={**origin, "weights_license": config.license or source.license})
    decoder = load_decoder(published(weights, root) or weights, card) if card.decoder is not None else None
    if exists(join(url, CARD)):  # perhaps by an earlier attempt of this job that ended before it reported success
        found = load_card(url)
        if _comparable(found) != _comparable(serialize_encoder(encoder, card, head, decoder)[0]):
            raise ConfigError([f"id={id}: another encoder is already published with this ID; pass a different --id"])
        return Imported(found, url, notes)
    return Imported(save_encoder(url, encoder, card, head, decoder), url, notes)


def _comparable(card: Card) -> dict[str, Any]:
    """Return the card's fields that must match between two imports of the same weights."""
    return card.model_dump(exclude={"created", "job", "versions", "scores"})


def _clip(source: Source, config: ImportConfig, notes: list[str]) -> ClipConfig:
    facts, kernel = source.facts, source.weights.kernel
    patch = config.patch or (kernel[-1] if kernel else None)
    tubelet = config.tubelet or ((1 if len(kernel) == 2 else kernel[0]) if kernel else None)
    if patch is None or tubelet is None:
        raise ConfigError(
            [f"{source}: the token shape cannot be inferred from flat patch embeddings; pass --patch and --tubelet"]
        )
    frames = config.frames or facts.frames or (1 if len(kernel) == 2 else None)
    if frames is None:
        frames = FRAMES
        notes.append(f"frames={FRAMES}: guessed; pass --frames if it is wrong")
    size = config.image_size or facts.size or _size_of_table(source, patch, max(1, frames // tubelet))
    if size is None:
        size = (SIZE, SIZE)
        notes.append(f"image size {SIZE}: guessed; pass --image-size if it is wrong")
    values: dict[str, Any] = {
        "frames": frames,
        "size": size,
        "patch": patch,
        "tubelet": tubelet,
        "sampling_rate_frames": config.sampling_rate_frames,
        "mean": config.mean or facts.mean,
        "std": config.std or facts.std,
    }
    return validate(ClipConfig, {key: value for key, value in values.items() if value is not None})


def _size_of_table(source: Source, patch: int, frames: int) -> tuple[int, int] | None:
    """Infer the frame size in pixels from the position table, assuming square frames."""
    table = source.weights.state.get("encoder.positions")
    if table is None:
        return None
    rows = table.shape[-2]
    for count in (rows - 1, rows) if "encoder.class_token" in source.weights.state else (rows,):
        side = math.isqrt(count // frames)
        if side and frames * side * side == count:
            return side * patch, side * patch
    return None


def _encoder(source: Source, config: ImportConfig, clip: ClipConfig, notes: list[str]) -> EncoderConfig:
    state = source.weights.state
    blocks = {int(found[1]) for key in state if (found := re.match(r"encoder\.blocks\.(\d+)\.", key))}
    embedding, first = state.get("encoder.patch_embed.weight"), state.get("encoder.blocks.0.mlp.fc1.weight")
    if embedding is None or first is None:
        raise ConfigError([f"{source}: contains no encoder (a patch embedding and blocks)"])
    width, depth = embedding.shape[0], max(blocks) + 1
    heads = config.heads or source.heads
    if config.size is None and heads is None:
        heads = KNOWN_HEADS.get((width, depth), width // 64 if width % 64 == 0 else None)
        if heads is None:
            raise ConfigError([f"{source}: the number of heads cannot be inferred from the tensors; pass --heads"])
        if (width, depth) not in KNOWN_HEADS:
            notes.append(f"heads={heads}: guessed as width / 64; pass --heads if it is wrong")
    shape = {"width": width, "depth": depth, "heads": heads}
    name = config.size or next((name for name, size in ENCODER_SIZES.items() if size._asdict() == shape), None)
    return validate(
        EncoderConfig,
        {
            **({"size": name} if name else shape),
            "mlp_ratio": first.shape[0] / first.shape[1],
            "class_token": "encoder.class_token" in state,
            "positions": config.positions or _positions(source, state, clip),
        },
    )


def _positions(source: Source, state: dict[str, Tensor], clip: ClipConfig) -> Positions:
    table = state.get("encoder.positions")
    if table is None:
        return "sincos_1d"  # VideoMAE stores none
    table = table[0] if table.ndim == 3 else table
    grid = source.grid or clip.grid
    if len(table) == grid.tokens + 1:
        table = table[1:]
    kind = fixed_kind(table, grid, 10_000.0) if len(table) == grid.tokens else None
    return kind or "learned"


def _head(source: Source, width: int, notes: list[str]) -> nn.Linear | None:
    """Return the classifier if, like ours, it takes the normalised mean of the tokens."""
    weights = source.head()
    if "weight" not in weights:
        return None
    if not source.is_pooled:
        notes.append("classifier omitted: it takes the class token, but ours takes the mean of the other tokens")
        return None
    classes = weights["weight"].shape[0]
    head = nn.Linear(width, classes)
    try:
        head.load_state_dict(weights)
    except RuntimeError:
        notes.append("classifier omitted: its width differs from the encoder's")
        return None
    return head


def _head_card(head: nn.Linear, source: Source) -> HeadCard:
    labels = source.facts.labels
    return HeadCard(classes=head.out_features, labels=labels if labels and len(labels) == head.out_features else None)
