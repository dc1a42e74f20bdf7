"""A loaded encoder: validate options, run the forward pass, and combine the views of an item.

Reads no input files; clips arrive decoded.
Shapes: B clips per batch, V views per item, T frames, H height, W width, N tokens, D width, C classes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from pydantic import ValidationError
from torch import Tensor

from amd.artifacts.weights import Card, load_decoder, load_encoder, load_head, whole_clips
from amd.config import ConfigError, Precision, ViewsConfig, broken_rule
from amd.device import autocast
from amd.downstream.supervised.classification.metrics import probabilities
from amd.storage import StorageError
from service.inference.options import InferenceOptions, RequestLimits
from service.web.errors import Refusal

Floats = npt.NDArray[np.float32]
_VIEWS = re.compile(r"([1-9][0-9]?)x([1-9][0-9]?)")


class InferencePlan(NamedTuple):
    """Validated options for one encoder."""

    options: InferenceOptions
    views: ViewsConfig | None
    clips: int
    """Number of clips per item."""

    @property
    def outputs(self) -> RequestedOutputs:
        options = self.options
        if options.task == "classification":
            return RequestedOutputs(frozenset(), False, True)
        return RequestedOutputs(frozenset(options.layers), options.tokens == "patch", False)


class RequestedOutputs(NamedTuple):
    """Outputs of a forward pass in addition to embeddings."""

    layers: frozenset[int]
    tokens: bool
    logits: bool


class ClipOutputs(NamedTuple):
    """Outputs for one clip."""

    embedding: Floats  # (D,)
    tokens: Floats | None  # (N, D)
    layers: dict[int, Floats]  # (N, D) each
    logits: Floats | None  # (C,)


class BatchOutputs(NamedTuple):
    """Outputs of a forward pass, on a device that may still be computing them."""

    embeddings: Tensor  # (B, D)
    tokens: Tensor | None  # (B, N, D)
    layers: dict[int, Tensor]  # (B, N, D) each
    logits: Tensor | None  # (B, C)


class LoadedEncoder:
    """A published encoder on its device, with its classifier head and decoder if it has them."""

    def __init__(self, url: str, device: torch.device, precision: Precision) -> None:
        """Load the encoder published at `url`. Raises ConfigError if there is no valid encoder."""
        try:
            encoder, self.card = load_encoder(url)
            self.head = load_head(url, self.card) if _classifies(self.card) else None
            self.decoder = load_decoder(url, self.card) if self.card.decoder is not None else None
        except StorageError as error:
            raise ConfigError([str(error)]) from None
        self.url, self.device, self.precision = url, device, precision
        self.encoder = encoder.requires_grad_(False).to(device)
        if self.head is not None:
            self.head = self.head.eval().requires_grad_(False).to(device)
        if self.decoder is not None:
            self.decoder = self.decoder.requires_grad_(False).to(device)
        self.tokens = encoder.grid.tokens
        """Number of tokens per clip."""
        self.width = encoder.config.width

    @property
    def id(self) -> str:
        return self.card.id

    def plan(self, options: InferenceOptions, limits: RequestLimits) -> InferencePlan:
        """Validate options. Raises Refusal if the encoder does not support them."""
        if options.task == "reconstruction" and self.decoder is None:
            raise Refusal(
                "not_possible",
                f"{self.id} was published without its decoder, so it cannot reconstruct pixels; request embeddings",
            )
        if options.task == "reconstruction" and options.views is not None:
            raise Refusal("not_possible", "views: a reconstruction uses a single clip; omit `views`")
        if options.task == "classification" and self.head is None:
            reason = "its head classifies boxes, not whole clips" if self.card.head else "it has no classifier"
            raise Refusal(
                "not_possible",
                f"{self.id} cannot classify: {reason}; request embeddings, or fine-tune the encoder first",
            )
        depth = len(self.encoder.blocks)
        invalid = [layer for layer in options.layers if not 1 <= layer <= depth]
        if invalid:
            raise Refusal("not_possible", f"layers={invalid[0]}: {self.id} has {depth} blocks, numbered from 1")
        views = self._parse_views(options.views, limits)
        if views is not None and (options.layers or options.tokens != "none"):
            raise Refusal("not_possible", "views: tokens and layers are per clip and cannot be averaged; omit `views`")
        return InferencePlan(options, views, 1 if views is None else views.segments * views.crops)

    def _parse_views(self, text: str | None, limits: RequestLimits) -> ViewsConfig | None:
        if text is None:
            return None
        found = _VIEWS.fullmatch(text)
        if found is None:
            raise Refusal("not_possible", f"views={text!r} must be segments x crops, such as 5x3")
        segments, crops = map(int, found.groups())
        if segments * crops > limits.views:
            raise Refusal("not_possible", f"views={text}: {segments * crops} views exceed the limit of {limits.views}")
        # Sample frames as in the encoder's evaluation.
        tested = (self.card.config.get("evaluation") or {}).get("views") or {}
        try:
            return ViewsConfig(segments=segments, crops=crops, sampling=tested.get("sampling", "dense"))
        except ValidationError as error:
            raise Refusal("not_possible", f"views={text}: {broken_rule(error.errors()[0])}") from None

    def warm_up(self) -> None:
        """Run one forward pass, so that the first request is not slow. Skips the decoder, which is rarely used."""
        clip = self.card.clip
        blank = torch.zeros(1, 3, clip.frames, *clip.size, dtype=torch.uint8)
        self.collect(self.forward([blank[0]], RequestedOutputs(frozenset({1}), True, self.head is not None)))

    @torch.inference_mode()
    def forward(self, clips: Sequence[Tensor], outputs: RequestedOutputs) -> BatchOutputs:
        """Encode clips (3, T, H, W) uint8 as one batch. Returns without waiting for the GPU."""
        batch = self.on_device(clips)
        encoder, last = self.encoder, len(self.encoder.blocks)
        norm_of_mean = self.card.pooling == "mean_then_norm"
        final = outputs.tokens or not norm_of_mean
        layers = set(outputs.layers) | ({last} if norm_of_mean or outputs.logits else set())
        with autocast(self.precision, self.device):
            tokens, index = whole_clips(encoder, self.card.clip, batch)
            numbers = sorted(layers)
            encoded = encoder(tokens, index, intermediates=numbers, final=final)
            kept = dict(zip(numbers, encoded.intermediates, strict=True))
            grid = None if encoded.final is None else encoded.final[:, -self.tokens :]  # (B, N, D)
            normed = encoder.norm(kept[last].mean(dim=1)) if last in kept else None  # pooled as for the classifier
            embeddings = normed if norm_of_mean else None if grid is None else grid.mean(dim=1)
            assert embeddings is not None
            logits = self.head(normed) if outputs.logits and self.head is not None else None
        return BatchOutputs(
            embeddings,
            grid if outputs.tokens else None,
            {number: kept[number] for number in outputs.layers},
            logits,
        )

    def on_device(self, clips: Sequence[Tensor]) -> Tensor:
        """Stack clips into (B, 3, T, H, W) uint8 on the device. The copy to a GPU is asynchronous."""
        batch = torch.stack(list(clips))
        return batch.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else batch

    @torch.inference_mode()
    def collect(self, batch: BatchOutputs) -> list[ClipOutputs]:
        """Wait for the device and return the outputs for each clip."""
        embeddings, tokens, logits = _array(batch.embeddings), _array(batch.tokens), _array(batch.logits)
        layers = {number: _array(values) for number, values in batch.layers.items()}
        assert embeddings is not None
        return [
            ClipOutputs(
                embeddings[row],
                None if tokens is None else tokens[row],
                {number: values[row] for number, values in layers.items() if values is not None},
                None if logits is None else logits[row],
            )
            for row in range(len(embeddings))
        ]

    def item_result(self, plan: InferencePlan, clips: Sequence[ClipOutputs]) -> dict[str, Any]:
        """Combine the outputs of an item's views."""
        if plan.options.task == "classification":
            return self._classification(
                plan.options, np.stack([view.logits for view in clips if view.logits is not None])
            )
        embedding = clips[0].embedding if len(clips) == 1 else np.mean([view.embedding for view in clips], axis=0)
        if plan.options.normalize:
            embedding = embedding / max(float(np.linalg.norm(embedding)), 1e-12)
        # Copy: a slice would keep the arrays of the whole batch in memory.
        result: dict[str, Any] = {"embedding": np.array(embedding, np.float32)}
        if plan.options.tokens == "patch":
            assert clips[0].tokens is not None
            result["tokens"] = clips[0].tokens.copy()
        if plan.options.layers:
            result["layers"] = {str(number): clips[0].layers[number].copy() for number in plan.options.layers}
        return result

    def _classification(self, options: InferenceOptions, logits: Floats) -> dict[str, Any]:
        """Average the class probabilities over views, given (V, C) logits, as in multi-view evaluation."""
        head = self.card.head
        assert head is not None
        scores = probabilities(logits, head.multi_label).mean(axis=0)
        best = np.argsort(-scores, kind="stable")[: options.top_k].tolist()
        return {
            "labels": [head.labels[number] if head.labels else str(number) for number in best],
            "scores": scores[best].tolist(),
            "classes": best,
        }


def _classifies(card: Card) -> bool:
    return card.head is not None and card.objective != "detection"


def _array(values: Tensor | None) -> Floats | None:
    return None if values is None else values.float().cpu().numpy()
