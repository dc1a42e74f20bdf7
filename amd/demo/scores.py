"""Figures gathered arm by arm and seed by seed, then turned into rows of the table."""

from __future__ import annotations

import numpy as np
from torch.nn import functional

from amd.config import ClipConfig
from amd.demo.arms import TITLES
from amd.demo.report import Row
from amd.downstream.arrays import Features
from amd.downstream.embedding.features import LabelledClips, embed
from amd.downstream.probing.classifiers import probe
from amd.models.encoder import Encoder


class Scores:
    """Probes learn on `known` and are scored on `asked`, for every arm the same samples."""

    def __init__(self, known: LabelledClips, asked: LabelledClips) -> None:
        self.known, self.asked = known, asked
        self._rows: dict[str, Row] = {}

    def add_pixels(self) -> None:
        """Pixels themselves as features."""
        self._probe("pixels", pixel_features(self.known), pixel_features(self.asked))

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
        """Score one arm of one seed."""
        self._probe(key, embed(encoder, clip, self.known), embed(encoder, clip, self.asked))
        row = self._rows[key]
        more = {
            "steps": row.steps + (() if steps is None else (steps,)),
            "seconds": row.seconds + (() if seconds is None else (seconds,)),
            "encoders": row.encoders + (() if folder is None else (folder,)),
            "pictures": row.pictures + (() if picture is None else (picture,)),
        }
        self._rows[key] = row.model_copy(update=more)

    def add_finetuned(self, key: str, top1: float) -> None:
        """What fine-tuning made of an arm that was added."""
        row = self._rows[key]
        self._rows[key] = row.model_copy(update={"finetuned": (*row.finetuned, top1)})

    def row(self, key: str) -> Row:
        return self._rows[key]

    def rows(self) -> tuple[Row, ...]:
        """In the order of the table."""
        return tuple(self._rows[key] for key in TITLES if key in self._rows)

    def _probe(self, key: str, known: Features, asked: Features) -> None:
        found = probe(known, asked)
        row = self._rows.get(key) or Row(key=key, title=TITLES[key])
        self._rows[key] = row.model_copy(
            update={"knn": (*row.knn, found["eval/knn_top1"]), "linear": (*row.linear, found["eval/top1"])}
        )


def pixel_features(labelled: LabelledClips) -> Features:
    """Grey pixels in [0, 1], flat; of clips every frame at half its size."""
    grey = labelled.clips.float().mean(dim=1) / 255  # (n, T, H, W)
    if grey.shape[1] > 1:
        grey = functional.avg_pool2d(grey, 2)
    return Features(np.ascontiguousarray(grey.flatten(1).numpy()), labelled.labels)
