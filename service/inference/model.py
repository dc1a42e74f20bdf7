"""An encoder in memory: what it can be asked, its forward pass, and what becomes of an item's views.

Knows nothing of requests, queues or files of items.
Shapes: B clips of a batch, V views of an item, T frames, H height, W width, N tokens, D width, C classes.
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
from amd.config import ConfigError, Precision, ViewsConfig
from amd.device import autocast
from amd.downstream.supervised.classification.metrics import probabilities
from amd.storage import StorageError
from service.inference.options import Limits, NotPossible, Want

Floats = npt.NDArray[np.float32]
_VIEWS = re.compile(r"([1-9][0-9]?)x([1-9][0-9]?)")


class Plan(NamedTuple):
    """A want that an encoder can fulfil."""

    want: Want
    views: ViewsConfig | None
    clips: int
    """Of an item."""

    @property
    def outputs(self) -> Outputs:
        want = self.want
        if want.task == "classification":
            return Outputs(frozenset(), False, True)
        return Outputs(frozenset(want.layers), want.tokens == "patch", False)


class Outputs(NamedTuple):
    """What a forward pass gives besides embeddings."""

    layers: frozenset[int]
    tokens: bool
    logits: bool


class Seen(NamedTuple):
    """What the encoder made of one clip."""

    embedding: Floats  # (D,)
    tokens: Floats | None  # (N, D)
    layers: dict[int, Floats]  # (N, D) each
    logits: Floats | None  # (C,)


class Batch(NamedTuple):
    """Of a forward pass, still on the device, which may not be done yet."""

    embeddings: Tensor  # (B, D)
    tokens: Tensor | None  # (B, N, D)
    layers: dict[int, Tensor]  # (B, N, D) each
    logits: Tensor | None  # (B, C)


class Loaded:
    def __init__(self, url: str, device: torch.device, precision: Precision) -> None:
        """Raises ConfigError where nothing sound is published at `url`."""
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
        """Of a clip."""

    @property
    def id(self) -> str:
        return self.card.id

    def plan(self, want: Want, limits: Limits) -> Plan:
        """Raises NotPossible for what this encoder cannot do."""
        if want.task == "reconstruction" and self.decoder is None:
            raise NotPossible(
                f"{self.id} was published without its decoder, so it cannot rebuild pixels; ask for embeddings"
            )
        if want.task == "reconstruction" and want.views is not None:
            raise NotPossible("views: pixels are rebuilt of one clip; ask without views")
        if want.task == "classification" and self.head is None:
            boxes = "its head looks at boxes, not at whole clips" if self.card.head else "it has no classifier"
            raise NotPossible(f"{self.id} cannot classify: {boxes}; ask for embeddings, or fine-tune it first")
        depth = len(self.encoder.blocks)
        strange = [layer for layer in want.layers if not 1 <= layer <= depth]
        if strange:
            raise NotPossible(f"layers={strange[0]}: {self.id} has {depth} blocks, counted from 1")
        views = self._views(want.views, limits)
        if views is not None and (want.layers or want.tokens != "none"):
            raise NotPossible("views: tokens belong to one view each; ask for them without views")
        return Plan(want, views, 1 if views is None else views.segments * views.crops)

    def _views(self, word: str | None, limits: Limits) -> ViewsConfig | None:
        if word is None:
            return None
        found = _VIEWS.fullmatch(word)
        if found is None:
            raise NotPossible(f"views={word!r} must be segments x crops, such as 5x3")
        segments, crops = map(int, found.groups())
        if segments * crops > limits.views:
            raise NotPossible(f"views={word}: {segments * crops} views are more than {limits.views}")
        tested = (self.card.config.get("evaluation") or {}).get("views") or {}  # frames as its own test chose them
        try:
            return ViewsConfig(segments=segments, crops=crops, sampling=tested.get("sampling", "dense"))
        except ValidationError as error:
            raise NotPossible(f"views={word}: {error.errors()[0]['msg']}") from None

    def warm_up(self) -> None:
        """A forward pass, so that the first request pays for no start. Not of the decoder, which is asked rarely."""
        clip = self.card.clip
        still = torch.zeros(1, 3, clip.frames, *clip.size, dtype=torch.uint8)
        self.collect(self.forward([still[0]], Outputs(frozenset({1}), True, self.head is not None)))

    @torch.inference_mode()
    def forward(self, clips: Sequence[Tensor], outputs: Outputs) -> Batch:
        """Clips (3, T, H, W) uint8 as one batch. On a GPU it returns before the device is done."""
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
            normed = encoder.norm(kept[last].mean(dim=1)) if last in kept else None  # as a classifier pools
            embeddings = normed if norm_of_mean else None if grid is None else grid.mean(dim=1)
            assert embeddings is not None
            logits = self.head(normed) if outputs.logits and self.head is not None else None
        return Batch(
            embeddings,
            grid if outputs.tokens else None,
            {number: kept[number] for number in outputs.layers},
            logits,
        )

    def on_device(self, clips: Sequence[Tensor]) -> Tensor:
        """(B, 3, T, H, W) uint8; on a GPU it may still be on its way."""
        batch = torch.stack(list(clips))
        return batch.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else batch

    @torch.inference_mode()
    def collect(self, batch: Batch) -> list[Seen]:
        """Wait for the device; what it made of each clip."""
        embeddings, tokens, logits = _array(batch.embeddings), _array(batch.tokens), _array(batch.logits)
        layers = {number: _array(values) for number, values in batch.layers.items()}
        assert embeddings is not None
        return [
            Seen(
                embeddings[row],
                None if tokens is None else tokens[row],
                {number: values[row] for number, values in layers.items() if values is not None},
                None if logits is None else logits[row],
            )
            for row in range(len(embeddings))
        ]

    def finish(self, plan: Plan, seen: Sequence[Seen]) -> dict[str, Any]:
        """An item's answer out of its views."""
        if plan.want.task == "classification":
            return self._classified(plan.want, np.stack([view.logits for view in seen if view.logits is not None]))
        embedding = seen[0].embedding if len(seen) == 1 else np.mean([view.embedding for view in seen], axis=0)
        if plan.want.normalize:
            embedding = embedding / max(float(np.linalg.norm(embedding)), 1e-12)
        # Copies: a slice would keep the arrays of its whole batch alive.
        answer: dict[str, Any] = {"embedding": np.array(embedding, np.float32)}
        if plan.want.tokens == "patch":
            assert seen[0].tokens is not None
            answer["tokens"] = seen[0].tokens.copy()
        if plan.want.layers:
            answer["layers"] = {str(number): seen[0].layers[number].copy() for number in plan.want.layers}
        return answer

    def _classified(self, want: Want, logits: Floats) -> dict[str, Any]:
        """Probabilities are averaged over views, as in the multi-view test; (V, C) logits."""
        head = self.card.head
        assert head is not None
        scores = probabilities(logits, head.multi_label).mean(axis=0)
        best = np.argsort(-scores, kind="stable")[: want.top_k].tolist()
        return {
            "labels": [head.labels[number] if head.labels else str(number) for number in best],
            "scores": scores[best].tolist(),
            "classes": best,
        }


def _classifies(card: Card) -> bool:
    return card.head is not None and card.objective != "detection"


def _array(values: Tensor | None) -> Floats | None:
    return None if values is None else values.float().cpu().numpy()
