"""Foreign weights as a published encoder of ours: what shapes and folders tell is read off, the rest is asked for.

Knows nothing of training.
"""

from __future__ import annotations

import math
import re
from importlib.metadata import version
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from amd.artifacts.card import Card, Head
from amd.artifacts.discovery import CARD, encoder_folder, load_card
from amd.artifacts.weights import load_decoder, save_encoder, seal
from amd.config import ENCODER_SIZES, ClipConfig, ConfigError, EncoderConfig, ImportConfig, Positions, validate
from amd.exchange.positions import fixed_kind
from amd.exchange.source import Source, open_source, published
from amd.exchange.start import fill_from
from amd.models.encoder import Encoder
from amd.models.teachers.timm import TIMM, timm_clip
from amd.storage import exists, join, resolve_root

# Heads of published encoders whose heads are not 64 wide; no tensor tells them. The last: VideoMAE V2's giant.
KNOWN_HEADS = {(size.width, size.depth): size.heads for size in ENCODER_SIZES.values()} | {(1408, 40): 16}
FRAMES, SIZE = 16, 224  # of VideoMAE, where neither the file nor the user says


class Imported(NamedTuple):
    card: Card
    url: str
    notes: list[str]
    """What was guessed, and what was left out."""


def import_encoder(words: ImportConfig) -> Imported:
    """Publish `words.weights` (as `open_source` takes them) as the encoder `words.id` below the storage root.

    The same import again finds what the first has published. Raises ConfigError where the weights cannot be read or do
    not fit, something that cannot be guessed is not said, or the id is another encoder's.
    """
    weights, root, id = words.weights, resolve_root(words.storage), words.id
    url = encoder_folder(root, id)
    named = timm_clip(weights) if weights.startswith(TIMM) else None
    if named is not None and words.image_size is not None:
        named = validate(ClipConfig, named.model_dump() | {"size": words.image_size})
    source = open_source(weights, root, named or ClipConfig())
    notes: list[str] = []
    clip = source.card.clip if source.card else named or _clip(source, words, notes)
    config = source.card.encoder if source.card else _encoder(source, words, clip, notes)
    encoder = Encoder(config, clip.grid, clip.token_values)
    start = fill_from(encoder, source, clip)
    head = _head(source, config.width, notes)
    card = source.card or Card(
        id=id,
        encoder=config,
        clip=clip,
        interpolation=words.interpolation or source.facts.interpolation or "bilinear",
        pooling=start.pooling,
        head=None if head is None else _description(head, source),
        start=start.lineage,
        versions={"amd-service": version("amd-service"), "torch": torch.__version__},
    )
    card = card.model_copy(update={"id": id, "weights_license": words.license or source.license})
    decoder = load_decoder(published(weights, root) or weights, card) if card.decoder is not None else None
    if exists(join(url, CARD)):  # also by a job that was ended before it could say so, and is tried again
        found = load_card(url)
        if _lasting(found) != _lasting(seal(encoder, card, head, decoder)[0]):
            raise ConfigError([f"id={id}: another encoder is published under this name; choose another with --id"])
        return Imported(found, url, notes)
    return Imported(save_encoder(url, encoder, card, head, decoder), url, notes)


def _lasting(card: Card) -> dict[str, Any]:
    """What is alike in two imports of the same weights."""
    return card.model_dump(exclude={"created", "versions", "scores"})


def _clip(source: Source, words: ImportConfig, notes: list[str]) -> ClipConfig:
    facts, kernel = source.facts, source.weights.kernel
    patch = words.patch or (kernel[-1] if kernel else None)
    tubelet = words.tubelet or ((1 if len(kernel) == 2 else kernel[0]) if kernel else None)
    if patch is None or tubelet is None:
        raise ConfigError(
            [f"weights {source.name}: flat patch embeddings tell no shape of a token; give --patch and --tubelet"]
        )
    frames = words.frames or facts.frames or (1 if len(kernel) == 2 else None)
    if frames is None:
        frames = FRAMES
        notes.append(f"frames={FRAMES}: guessed, give --frames if it is another number")
    size = words.image_size or facts.size or _size_of_table(source, patch, max(1, frames // tubelet))
    if size is None:
        size = (SIZE, SIZE)
        notes.append(f"image size {SIZE}: guessed, give --image-size if it is another")
    values: dict[str, Any] = {
        "frames": frames,
        "size": size,
        "patch": patch,
        "tubelet": tubelet,
        "sampling_rate_frames": words.sampling_rate_frames,
        "mean": words.mean or facts.mean,
        "std": words.std or facts.std,
    }
    return validate(ClipConfig, {key: value for key, value in values.items() if value is not None})


def _size_of_table(source: Source, patch: int, frames: int) -> tuple[int, int] | None:
    """The pixels of a frame, from a table of positions of square frames."""
    table = source.weights.state.get("encoder.positions")
    if table is None:
        return None
    rows = table.shape[-2]
    for count in (rows - 1, rows) if "encoder.class_token" in source.weights.state else (rows,):
        side = math.isqrt(count // frames)
        if side and frames * side * side == count:
            return side * patch, side * patch
    return None


def _encoder(source: Source, words: ImportConfig, clip: ClipConfig, notes: list[str]) -> EncoderConfig:
    state = source.weights.state
    blocks = {int(found[1]) for key in state if (found := re.match(r"encoder\.blocks\.(\d+)\.", key))}
    embedding, first = state.get("encoder.patch_embed.weight"), state.get("encoder.blocks.0.mlp.fc1.weight")
    if embedding is None or first is None:
        raise ConfigError([f"weights {source.name}: no encoder is in it (a patch embedding and blocks)"])
    width, depth = embedding.shape[0], max(blocks) + 1
    heads = words.heads or source.heads
    if words.size is None and heads is None:
        heads = KNOWN_HEADS.get((width, depth), width // 64 if width % 64 == 0 else None)
        if heads is None:
            raise ConfigError([f"weights {source.name}: no tensor tells the number of heads; give --heads"])
        if (width, depth) not in KNOWN_HEADS:
            notes.append(f"heads={heads}: guessed as width / 64, give --heads if it is another number")
    shape = {"width": width, "depth": depth, "heads": heads}
    name = words.size or next((name for name, size in ENCODER_SIZES.items() if size._asdict() == shape), None)
    return validate(
        EncoderConfig,
        {
            **({"size": name} if name else shape),
            "mlp_ratio": first.shape[0] / first.shape[1],
            "class_token": "encoder.class_token" in state,
            "positions": words.positions or _positions(source, state, clip),
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
    """The classifier, where it reads what ours reads: the norm of the mean of the tokens."""
    weights = source.head()
    if "weight" not in weights:
        return None
    if not source.is_pooled:
        notes.append("its classifier reads the class token, ours the mean of all others: left out")
        return None
    classes = weights["weight"].shape[0]
    head = nn.Linear(width, classes)
    try:
        head.load_state_dict(weights)
    except RuntimeError:
        notes.append("its classifier has another width than the encoder: left out")
        return None
    return head


def _description(head: nn.Linear, source: Source) -> Head:
    labels = source.facts.labels
    return Head(classes=head.out_features, labels=labels if labels and len(labels) == head.out_features else None)
