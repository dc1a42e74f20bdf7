"""Initialise an encoder from existing weights, possibly at a different input size.

As strict as `load`, with three exceptions. Position tables are adapted to the new size: 2-D sine-cosine tables are
interpolated as in MAE, other fixed tables are recomputed, and learned tables are resampled. Image weights can
initialise a video encoder, whose patch embedding is then inflated. The last norm may keep its own initialisation.
"""

from __future__ import annotations

import logging
from typing import Any, NamedTuple

from torch import Tensor

from amd.artifacts.weights import Pooling
from amd.config import ClipConfig, Positions, TokenGrid
from amd.exchange.layouts import PATCHES, State
from amd.exchange.load import fill, match_position_grid
from amd.exchange.positions import fixed_kind, grid_of, resample
from amd.exchange.source import Source, config_mismatches, open_source
from amd.models.encoder import Encoder
from amd.tokens import position_table

logger = logging.getLogger(__name__)

NORM = ("norm.weight", "norm.bias")


class StartingPoint(NamedTuple):
    """Weights from which an encoder was initialised."""

    source: str
    """Name, path or URL, as passed by the caller."""
    layout: str
    weights_license: str | None
    """Licence of the weights, if stated."""
    pooling: Pooling
    """Where the last norm is applied: to each token, or to their mean (mean_then_norm), as in fine-tuned models."""
    position_grid: tuple[int, int] | None
    """Grid of the position table before interpolation; None if it is not interpolated."""
    lineage: dict[str, Any]
    """Origin of the weights, as recorded in the resulting encoder's card."""


def load_starting_point(
    encoder: Encoder,
    weights: str,
    storage: str | None,
    clip: ClipConfig,
    *,
    section: str = "encoder",
    final_norm: bool = True,
) -> StartingPoint:
    """Initialise an encoder from weights, in place.

    `weights`: the ID or folder of a published encoder, a file or URI of any known layout, a Hugging Face folder, or
    `timm:NAME`. `section`: config section of the encoder, for error messages. If `final_norm` is false, the last norm
    keeps its initial values.
    Raises ConfigError listing every mismatch.
    """
    return fill_from(encoder, open_source(weights, storage, clip), clip, section=section, final_norm=final_norm)


def fill_from(
    encoder: Encoder, source: Source, clip: ClipConfig, *, section: str = "encoder", final_norm: bool = True
) -> StartingPoint:
    """Initialise an encoder from weights that are already open."""
    part = "encoder."
    state = {key.removeprefix(part): value for key, value in source.weights.state.items() if key.startswith(part)}
    problems = [*config_mismatches(encoder.config, source, clip, section), *_fit_patches(state, source, clip)]
    problems += _fit_positions(encoder, state, source, section)
    for key in NORM:
        if not final_norm:
            state.pop(key, None)
        elif key not in state and source.is_pooled:
            state[key] = source.weights.state[f"classifier.{key}"]
    absent = set() if final_norm else set(NORM)
    origin = f"{source} ({source.weights.layout})"
    fill(encoder, state, source.weights.unknown, absent, problems, origin, section)
    _warn_of_zero_biases(state, origin)
    return StartingPoint(
        source.name,
        source.weights.layout,
        source.license,
        "mean_then_norm" if source.is_pooled else "mean",
        encoder.config.position_grid,
        _lineage(source),
    )


def _fit_patches(state: State, source: Source, clip: ClipConfig) -> list[str]:
    """Check that the file's token size matches the clip's, and inflate the patch embedding of an image encoder."""
    kernel = source.weights.kernel
    if source.card:
        kernel = (source.card.clip.tubelet, source.card.clip.patch, source.card.clip.patch)
    if not kernel:  # flat and without a card: only shapes can be compared
        return []
    tubelet, patch = (1 if len(kernel) == 2 else kernel[0]), kernel[-2:]
    if patch != (clip.patch, clip.patch):
        return [
            f"its patch is {'x'.join(map(str, patch))}, which the patch embedding determines: set clip.patch={patch[0]}"
        ]
    if tubelet == clip.tubelet:
        return []
    if tubelet > 1:
        return [f"its tubelet is {tubelet} frames, which the patch embedding determines: set clip.tubelet={tubelet}"]
    # All frames of a tubelet get equal weight, so a static clip produces the same output as the image.
    key = PATCHES.removeprefix("encoder.")
    state[key] = state[key].repeat(1, clip.tubelet) / clip.tubelet
    return []


def _fit_positions(encoder: Encoder, state: State, source: Source, section: str) -> list[str]:
    """Add the position table to `state` if the encoder's position embeddings are learned.

    Fixed tables are not stored, but a 2-D table for another grid is interpolated and replaces the encoder's.
    """
    ours = encoder.config
    table = state.pop("positions", None)
    if table is None:
        kind = _kind_without_table(source)
        if ours.positions == "learned" and kind is not None:
            base = source.card.encoder.position_base if source.card else ours.position_base
            state["positions"] = position_table(kind, encoder.grid, ours.width, base, source.position_grid)
        elif kind not in (None, ours.positions):
            return [f"its position embeddings are {kind}, not {ours.positions}: set {section}.positions={kind}"]
        return match_position_grid(encoder, source.position_grid, section)
    table = table[0] if table.ndim == 3 else table  # ([1 +] N, D)
    if table.shape[1] != ours.width:
        return []  # the width differs, which the errors for other tensors explain better
    split = _split_table(table, state, source, encoder.grid)
    if split is None:
        return [
            f"its table of {len(table)} position embeddings does not fit square frames; import it "
            "with its training size (a Hugging Face folder contains it), or set clip.size to that size"
        ]
    table, grid = split
    if not table.any():
        # This is the case for a newly created ViTMAE in transformers 5; published files are filled.
        return ["its position table is all zeros because it was never initialised; initialise it before saving"]
    if ours.positions == "learned":
        state["positions"] = resample(table, grid, encoder.grid)
        return []
    kind = fixed_kind(table, grid, ours.position_base)
    if kind == ours.positions:
        return match_position_grid(encoder, (grid.height, grid.width), section)
    kind = kind or "learned"
    return [f"its position embeddings are {kind}, not {ours.positions}: set {section}.positions={kind}"]


def _kind_without_table(source: Source) -> Positions | None:
    """Return the kind of position embeddings for weights without a position table, or None if unknown.

    Read from the card if there is one; sincos_1d for third-party weights.
    """
    if source.card:
        return source.card.encoder.positions
    return None if source.is_ours else "sincos_1d"


def _split_table(table: Tensor, state: State, source: Source, ours: TokenGrid) -> tuple[Tensor, TokenGrid] | None:
    """Return the position table without the class token's row, and its grid.

    The class token's position embedding is added to the token itself, since only their sum is used. In some timm models
    the class token has no position embedding.
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


def _warn_of_zero_biases(state: State, origin: str) -> None:
    """Warn if all attention biases are zero: transformers 5.0 could lose biases on loading and save zeros."""
    biases = [value for key, value in state.items() if key.endswith(("q_bias", "v_bias"))]
    others = [value for key, value in state.items() if key.endswith("fc1.bias")]
    if not any(value.any() for value in biases) and any(value.any() for value in others):
        logger.warning("%s: all attention biases are zero; the library that saved the file may have lost them", origin)
