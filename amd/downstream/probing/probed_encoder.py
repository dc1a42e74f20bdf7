"""A frozen encoder and its labelled data: the features and tokens on which probes are trained and scored.

Shapes: B batch, N tokens, D width.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from amd.config import ConfigError, DataConfig, ProbeDataConfig
from amd.data.dataset.manifest import Manifest
from amd.data.faults import BadSampleLedger, UnreadableSample
from amd.downstream.arrays import Features, Labels
from amd.downstream.embedding.cache import Part
from amd.downstream.embedding.features import Embedder, gather, whole_samples
from amd.downstream.probing.labels import LabelledSets, check_several

logger = logging.getLogger(__name__)
Log = Callable[[str], None]
Split = Literal["train", "test"]


class ProbedEncoder:
    """A frozen encoder and its labelled data; features are computed on first access."""

    def __init__(
        self,
        data: ProbeDataConfig,
        sets: LabelledSets,
        embedder: Embedder,
        parts: Callable[[DataConfig, Manifest], Iterable[Part]],
        log: Log,
    ) -> None:
        self.data, self.sets, self.embedder, self.log = data, sets, embedder, log
        self._parts = parts
        self._bad = {"train": BadSampleLedger(), "test": BadSampleLedger()}

    @property
    def left_out(self) -> list[UnreadableSample]:
        return [*self._bad["train"], *self._bad["test"]]

    @property
    def scored(self) -> int:
        """Number of test samples that could be read; valid once a probe has run."""
        return len(self.sets.test) - len(self._bad["test"])

    @cached_property
    def train(self) -> Features:
        features = self._features("train")
        check_several(features.labels, self.data.train)
        return features

    @cached_property
    def test(self) -> Features:
        return self._features("test")

    def tokens(self, split: Split) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield tokens (B, N, D) and labels (B,) for a split's readable samples, in order.

        The encoder runs in this process.
        """
        data, manifest, labels = self._split(split)
        self.log(f"computing tokens of data.{split}={data.train}: {len(manifest)} samples")
        ledger = self._bad[split]
        for batch in whole_samples(self.embedder, data, manifest):
            for bad in ledger.add(batch.bad):
                logger.warning("skipped: %s: %s", bad["location"], bad["reason"])
            if ledger.exceeds(data.max_bad_fraction, len(manifest)) or len(ledger) == len(manifest):
                raise ledger.fault(data.max_bad_fraction, len(manifest))
            if len(batch.clips):
                tokens = self.embedder.tokens(batch.clips)
                self._check_finite(split, data, bool(tokens.isfinite().all()))
                yield tokens, torch.from_numpy(labels[batch.records.numpy()])

    def _split(self, split: Split) -> tuple[DataConfig, Manifest, Labels]:
        if split == "train":
            return self.data, self.sets.train, self.sets.train_labels
        return self.data.model_copy(update={"train": self.data.test}), self.sets.test, self.sets.test_labels

    def _features(self, split: Split) -> Features:
        data, manifest, labels = self._split(split)
        self.log(f"computing features of data.{split}={data.train}: {len(manifest)} samples")
        embedded = gather(self._parts(data, manifest), len(manifest), data.max_bad_fraction)
        self._bad[split].add(embedded.bad)
        self._check_finite(split, data, bool(np.isfinite(embedded.values).all()))
        return Features(embedded.values, labels[embedded.records])

    def _check_finite(self, split: Split, data: DataConfig, finite: bool) -> None:
        if not finite:
            raise ConfigError(
                [
                    f"encoder: produces NaN or infinite features on data.{split}={data.train}; its training "
                    "probably diverged; choose another encoder"
                ]
            )
