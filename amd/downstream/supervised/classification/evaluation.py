"""Score a classifier on labelled data, all ranks together: every sample once, none lost, whatever their number.

Each rank reads its places of every step. A sample's views are all on one rank, which merges them, so that ranks hand
each other one row a sample; figures are made from all rows on every rank alike. A sample that cannot be read is named,
and counts as wrong.
Shapes: n views seen by this rank, m samples, C classes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from amd.artifacts.weights import whole_clips
from amd.config import FinetuneConfig, Precision, ViewsConfig
from amd.data.faults import Bad
from amd.data.loading.loader import Batch, ClipLoader
from amd.device import autocast
from amd.downstream.supervised.classification import metrics
from amd.downstream.supervised.classification.data import Labelled
from amd.models.classifier import Classifier
from amd.training.process_group import Team
from amd.training.trainer.loop import Interrupted


class Seen(NamedTuple):
    """What one rank saw."""

    records: npt.NDArray[np.int64]  # (n,)
    views: npt.NDArray[np.int64]  # (n,) segment x crops + crop
    logits: npt.NDArray[np.float32]  # (n, C)
    bad: list[Bad]


class Scored(NamedTuple):
    """A data set scored; the same on all ranks."""

    figures: dict[str, float]
    merged: metrics.Merged
    truth: npt.NDArray[np.int64]  # (m,) or (m, C), of the merged records
    bad: list[Bad]
    total: int


@torch.inference_mode()
def look(
    classifier: Classifier,
    config: FinetuneConfig,
    split: Labelled,
    views: ViewsConfig,
    team: Team,
    precision: Precision,
    stopped: Callable[[], bool] = lambda: False,
) -> Seen:
    """This rank's share of a data set, through the classifier in eval mode.

    Raises Interrupted, on all ranks alike, once one of them is `stopped`.
    """
    count = views.segments * views.crops
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    bad: list[Bad] = []
    loader = ClipLoader(
        config.data.model_copy(update={"train": split.url, "repeats": 1}),
        config.clip,
        split.manifest,
        batch_size=config.evaluation.batch_size,
        rank=team.rank,
        world=team.world,
        micro_batch=max(1, config.evaluation.batch_size // (count * team.world)),
        train=False,
        views=views,
    )
    training = classifier.training
    classifier.eval()
    try:
        with loader:
            for step in loader.steps(0, loader.steps_per_epoch):
                for batch in step:
                    bad += batch.bad
                    if len(batch.clips):
                        parts.append(_through(classifier, config, batch, count, team, precision))
                if any(team.gather(stopped())):
                    raise Interrupted
    finally:
        classifier.train(training)
    if not parts:
        none = np.zeros(0, np.int64)
        return Seen(none, none, np.zeros((0, classifier.head.out_features), np.float32), bad)
    records, numbers, logits = (torch.cat(column).numpy() for column in zip(*parts, strict=True))
    return Seen(records, numbers, logits, bad)


def _through(
    classifier: Classifier, config: FinetuneConfig, batch: Batch, views: int, team: Team, precision: Precision
) -> tuple[Tensor, Tensor, Tensor]:
    clips = batch.clips.to(team.device, non_blocking=True)
    with autocast(precision, team.device):
        logits = classifier(*whole_clips(classifier.encoder, config.clip, clips))
    return batch.records, torch.arange(len(clips)) % views, logits.float().cpu()


def score(seen: Seen, split: Labelled, config: FinetuneConfig, team: Team) -> Scored:
    """Put the samples of all ranks together. Every rank calls it; the answer is the same on all."""
    several = config.head.multi_label
    mine = metrics.merge(seen.records, seen.views, seen.logits, several)
    everyone = team.gather((mine, seen.bad))
    merged = metrics.join([part for part, _ in everyone])
    bad = [sample for _, met in everyone for sample in met]
    classes, total = merged.probabilities.shape[1], len(split.manifest)
    truth = split.truth(merged.records, classes)
    if several:
        every = np.zeros((total, classes))  # what could not be read comes last, wherever it belongs
        every[merged.records] = merged.probabilities
        figures = metrics.multi_label(every, split.truth(np.arange(total), classes))
    else:
        figures = metrics.single_label(merged.probabilities, truth, total)
        if len(truth):
            figures["eval/loss"] = metrics.cross_entropy(merged.probabilities, truth)
    return Scored(figures | {"eval/unreadable": float(total - len(merged.records))}, merged, truth, bad, total)
