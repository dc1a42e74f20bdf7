"""Where an encoder starts: weights of any kind into an encoder of ours, also at another input size.

As strict as `load`: what is missing, unexpected or of another shape is told at once. Wider in three things: fixed
position tables take the new size and learned ones are resampled, weights of images serve clips (the patch embedding is
inflated), and the last norm may start fresh.
Knows nothing of training.
"""

from __future__ import annotations

import logging
from typing import Any, NamedTuple

from torch import Tensor

from amd.artifacts.weights import Pooling
from amd.config import ClipConfig, Positions, TokenGrid
from amd.exchange.layouts import PATCHES, State
from amd.exchange.load import fill
from amd.exchange.positions import fixed_kind, grid_of, resample
from amd.exchange.source import Source, open_source, other_network
from amd.models.encoder import Encoder
from amd.tokens import position_table

logger = logging.getLogger(__name__)

NORM = ("norm.weight", "norm.bias")


class StartingPoint(NamedTuple):
    """What is known of the weights that an encoder started from."""

    source: str
    """As it was asked for."""
    layout: str
    weights_license: str | None
    """What they hand down, where a card tells it."""
    pooling: Pooling
    """What the last norm is one of: each token, or (mean_then_norm) their mean, as after fine-tuning."""
    lineage: dict[str, Any]
    """Facts for the card of what comes of it."""


def load_starting_point(
    encoder: Encoder,
    weights: str,
    storage: str | None,
    clip: ClipConfig,
    *,
    field: str = "encoder",
    final_norm: bool = True,
) -> StartingPoint:
    """Fill an encoder, in place.

    `weights`: a published encoder's id or folder, a file or URI of any known layout, a Hugging Face folder, or
    `timm:NAME`. `field`: the config's section that describes the encoder, for messages. Without `final_norm` the last
    norm keeps its fresh start.
    Raises ConfigError with everything that does not fit.
    """
    return fill_from(encoder, open_source(weights, storage, clip), clip, field=field, final_norm=final_norm)


def fill_from(
    encoder: Encoder, source: Source, clip: ClipConfig, *, field: str = "encoder", final_norm: bool = True
) -> StartingPoint:
    """The same from weights that are open already."""
    part = "encoder."
    state = {key.removeprefix(part): value for key, value in source.weights.state.items() if key.startswith(part)}
    problems = [*other_network(encoder.config, source, clip, field), *_fit_patches(state, source, clip)]
    problems += _fit_positions(encoder, state, source, field)
    for key in NORM:
        if not final_norm:
            state.pop(key, None)
        elif key not in state and source.is_pooled:
            state[key] = source.weights.state[f"classifier.{key}"]
    absent = set() if final_norm else set(NORM)
    what = f"weights {source.name} ({source.weights.layout})"
    fill(encoder, state, source.weights.unknown, absent, problems, what, field)
    _warn_of_lost_biases(state, what)
    return StartingPoint(
        source.name,
        source.weights.layout,
        source.license,
        "mean_then_norm" if source.is_pooled else "mean",
        _lineage(source),
    )


def _fit_patches(state: State, source: Source, clip: ClipConfig) -> list[str]:
    """Compare the file's tokens with the clip's, and inflate an image's patch embedding for clips."""
    kernel = source.weights.kernel
    if source.card:
        kernel = (source.card.clip.tubelet, source.card.clip.patch, source.card.clip.patch)
    if not kernel:  # flat, without a card: shapes alone must do
        return []
    tubelet, patch = (1 if len(kernel) == 2 else kernel[0]), kernel[-2:]
    if patch != (clip.patch, clip.patch):
        return [
            f"its patch is {'x'.join(map(str, patch))}, and a patch embedding serves one size: "
            f"set clip.patch={patch[0]}"
        ]
    if tubelet == clip.tubelet:
        return []
    if tubelet > 1:
        return [f"its tubelet is {tubelet} frames, and a patch embedding serves one length: set clip.tubelet={tubelet}"]
    # Every frame of a tubelet weighs the same, and a still clip gives what the image gave.
    key = PATCHES.removeprefix("encoder.")
    state[key] = state[key].repeat(1, clip.tubelet) / clip.tubelet
    return []


def _fit_positions(encoder: Encoder, state: State, source: Source, field: str) -> list[str]:
    """Make `state` hold the positions that the encoder needs: none where they are fixed, a table where learned."""
    ours = encoder.config
    table = state.pop("positions", None)
    if table is None:
        kind = _kind_without_table(source)
        if ours.positions == "learned" and kind is not None:
            base = source.card.encoder.position_base if source.card else ours.position_base
            state["positions"] = position_table(kind, encoder.grid, ours.width, base)
        elif kind not in (None, ours.positions):
            return [f"its positions are {kind}, not {ours.positions}: set {field}.positions={kind}"]
        return []
    table = table[0] if table.ndim == 3 else table  # ([1 +] N, D)
    if table.shape[1] != ours.width:
        return []  # another width altogether, which other tensors tell better
    placed = _placed(table, state, source, encoder.grid)
    if placed is None:
        return [
            f"its table of {len(table)} positions is of no square frames; import it with the size it was trained at "
            f"(a Hugging Face folder tells it), or give clip.size that size"
        ]
    table, grid = placed
    if not table.any():
        # A ViTMAE made afresh by transformers 5 is in this state; published files are not.
        return ["its table of positions is all zeros, it was never filled; fill it before saving"]
    if ours.positions == "learned":
        state["positions"] = resample(table, grid, encoder.grid)
        return []
    kind = fixed_kind(table, grid, ours.position_base)
    if kind == ours.positions:
        return []
    kind = kind or "learned"
    return [f"its positions are {kind}, not {ours.positions}: set {field}.positions={kind}"]


def _kind_without_table(source: Source) -> Positions | None:
    """The fixed positions of weights that hold no table: as the card says; VideoMAE's code computes 1-D ones."""
    if source.card:
        return source.card.encoder.positions
    return None if source.is_ours else "sincos_1d"


def _placed(table: Tensor, state: State, source: Source, ours: TokenGrid) -> tuple[Tensor, TokenGrid] | None:
    """The table of tokens alone, and its grid; a class token's position goes where it is only ever added: to the token.

    timm has models with a class token and no position for it.
    """
    token = state.get("class_token")
    image = len(source.weights.kernel) == 2
    lengths = [len(table)] if token is None else [len(table) - 1, len(table)]
    if len(table) in (ours.tokens, ours.per_frame) and token is not None and source.grid is None:
        lengths.reverse()
    for length in lengths:
        grid = source.grid or grid_of(length, ours, image=image)
        if grid is not None and grid.tokens == length:
            if token is not None and length < len(table):
                state["class_token"] = token + table[0].to(token.dtype)
            return table[len(table) - length :], grid
    return None


def _lineage(source: Source) -> dict[str, Any]:
    facts: dict[str, Any] = {"weights": source.name, "layout": source.weights.layout}
    if source.license:
        facts["weights_license"] = source.license
    if card := source.card:
        facts |= {
            "id": card.id,
            "objective": card.objective,
            "run": card.run,
            "sha256": card.sha256,
            "encoder": card.encoder.model_dump(mode="json"),
            "teacher": card.teacher,
        }
    return facts


def _warn_of_lost_biases(state: State, what: str) -> None:
    """transformers 5.0 could load published files with attention biases of zero, and save them so."""
    biases = [value for key, value in state.items() if key.endswith(("q_bias", "v_bias"))]
    others = [value for key, value in state.items() if key.endswith("fc1.bias")]
    if not any(value.any() for value in biases) and any(value.any() for value in others):
        logger.warning("%s: every attention bias is zero; was the file saved by a library that lost them?", what)
