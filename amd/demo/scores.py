"""Collect probe scores per arm and seed as rows of the demo's table, and add them to the encoders' cards."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from torch.nn import functional

from amd.artifacts.card import Score
from amd.config import ClipConfig, KnnConfig, LinearConfig, Section
from amd.demo.arms import TITLES
from amd.demo.report import DemoRow
from amd.downstream.arrays import Features
from amd.downstream.embedding.features import LabelledClips, embed
from amd.downstream.probing.classifiers import probe
from amd.downstream.probing.run import add_scores
from amd.models.encoder import Encoder


class DemoSamples(NamedTuple):
    """Labelled samples in memory, and the data set that they were read from."""

    clips: LabelledClips
    data: str
    """Location of the data set, such as demo:digits/test."""
    digest: str
    """Digest of the data set's manifest."""


class DemoScores:
    """Scores of all arms. Probes are trained on `train` and scored on `test`, with the same samples for every arm."""

    def __init__(self, train: DemoSamples, test: DemoSamples) -> None:
        self.train, self.test = train, test
        self._rows: dict[str, DemoRow] = {}

    def add_pixels(self) -> None:
        """Add the scores of raw pixels used as features."""
        self._probe("pixels", pixel_features(self.train.clips), pixel_features(self.test.clips))

    def add(
        self,
        key: str,
        encoder: Encoder,
        clip: ClipConfig,
        *,
        steps: int | None = None,
        seconds: float | None = None,
        folder: str | None = None,
        picture: str | None = None,
    ) -> None:
        """Score the encoder of one arm and seed. `folder`: the encoder's folder; its card receives the scores."""
        figures = self._probe(key, embed(encoder, clip, self.train.clips), embed(encoder, clip, self.test.clips))
        if folder is not None:
            add_scores(folder, self._card_scores(figures))
        row = self._rows[key]
        updates = {
            "steps": row.steps + (() if steps is None else (steps,)),
            "seconds": row.seconds + (() if seconds is None else (seconds,)),
            "encoders": row.encoders + (() if folder is None else (folder,)),
            "pictures": row.pictures + (() if picture is None else (picture,)),
        }
        self._rows[key] = row.model_copy(update=updates)

    def add_finetuned(self, key: str, top1: float) -> None:
        """Add the fine-tuned top-1 accuracy to the row of an existing arm."""
        row = self._rows[key]
        self._rows[key] = row.model_copy(update={"finetuned": (*row.finetuned, top1)})

    def row(self, key: str) -> DemoRow:
        return self._rows[key]

    def rows(self) -> tuple[DemoRow, ...]:
        """Return the rows in table order."""
        return tuple(self._rows[key] for key in TITLES if key in self._rows)

    def _probe(self, key: str, train: Features, test: Features) -> dict[str, float]:
        figures = probe(train, test)
        row = self._rows.get(key) or DemoRow(key=key, title=TITLES[key])
        self._rows[key] = row.model_copy(
            update={"knn": (*row.knn, figures["eval/knn_top1"]), "linear": (*row.linear, figures["eval/top1"])}
        )
        return figures

    def _card_scores(self, figures: dict[str, float]) -> tuple[Score, Score]:
        """Return the scores in the format that `amd probe` with linear.method=logistic adds to a card."""
        train, test = self.train, self.test
        learnt_on = {"data": train.data, "digest": train.digest, "samples": len(train.clips.labels)}
        shared = {"data": test.data, "digest": test.digest, "samples": len(test.clips.labels), "views": "1x1"}

        def settings(section: Section) -> dict[str, object]:
            return {**section.model_dump(mode="json"), "pooling": "mean", "learnt_on": learnt_on}

        knn = {name: figures[name] for name in ("eval/knn_top1", "eval/knn_centred_top1")}
        linear = {"eval/top1": figures["eval/top1"]}
        return (
            Score(protocol="knn", values=knn, settings=settings(KnnConfig()), **shared),
            Score(protocol="linear", values=linear, settings=settings(LinearConfig(method="logistic")), **shared),
        )


def pixel_features(labelled: LabelledClips) -> Features:
    """Return flattened grey pixels in [0, 1]; frames of video clips are halved in size."""
    grey = labelled.clips.float().mean(dim=1) / 255  # (n, T, H, W)
    if grey.shape[1] > 1:
        grey = functional.avg_pool2d(grey, 2)
    return Features(np.ascontiguousarray(grey.flatten(1).numpy()), labelled.labels)
