"""Evaluate a classifier on labelled data across ranks.

Each sample counts exactly once, regardless of the number of ranks. Each rank reads its share of each step's samples.
A sample's views are all on one rank, which merges them, so ranks exchange one row per sample and compute the same
metrics from all rows. Unreadable samples are reported and count as wrong.
Shapes: n views on this rank, m samples, C classes.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from amd.artifacts.weights import whole_clips
from amd.config import FinetuneConfig, ViewsConfig
from amd.data.faults import FaultySamples
from amd.data.loading.loader import Batch
from amd.device import autocast
from amd.downstream.supervised.classification import metrics
from amd.downstream.supervised.classification.data import LabelledSplit
from amd.downstream.supervised.evaluation import EvaluationContext, Predictions, Rows, evaluation_loader, predict_rows
from amd.models.classifier import Classifier
from amd.training.process_group import ProcessGroup


class ClassificationScores(NamedTuple):
    """Metrics on a data set, identical on all ranks."""

    figures: dict[str, float]
    merged: metrics.MergedViews
    truth: npt.NDArray[np.int64]  # (m,) or (m, C), of the merged records
    faults: FaultySamples


def predict(
    classifier: Classifier, config: FinetuneConfig, split: LabelledSplit, views: ViewsConfig, on: EvaluationContext
) -> Predictions:
    """Predict this rank's share of a data set with the classifier in eval mode; the outputs are logits.

    A view's number is segment x crops + crop. Raises Interrupted on all ranks once `on.stopped` is true on any of them.
    """
    count = views.segments * views.crops
    micro_batch = max(1, config.evaluation.batch_size // count)
    loader = evaluation_loader(config, split, config.clip, on.group, micro_batch=micro_batch, views=views)

    def forward(batch: Batch) -> Rows:
        clips = batch.clips.to(on.group.device, non_blocking=True)
        with autocast(on.precision, on.group.device):
            logits = classifier(*whole_clips(classifier.encoder, config.clip, clips))
        return batch.records.numpy(), np.arange(len(clips)) % count, logits.float().cpu().numpy()

    return predict_rows(classifier, loader, forward, on)


def score(
    predictions: Predictions, split: LabelledSplit, config: FinetuneConfig, group: ProcessGroup
) -> ClassificationScores:
    """Merge the samples from all ranks and score them. All ranks must call this, and all get the same result."""
    multi_label = config.head.multi_label
    mine = metrics.merge(predictions.records, predictions.numbers, predictions.outputs, multi_label)
    gathered = group.gather((mine, predictions.faults))
    merged = metrics.join([part for part, _ in gathered])
    faults = FaultySamples.merge(found for _, found in gathered)
    classes, total = merged.probabilities.shape[1], len(split.records)
    truth = split.truth(merged.records, classes)
    if multi_label:
        every = np.zeros((total, classes))  # unreadable samples rank last in every class
        every[merged.records] = merged.probabilities
        figures = metrics.multi_label(every, split.truth(np.arange(total), classes))
    else:
        figures = metrics.single_label(merged.probabilities, truth, total)
        if len(truth):
            figures["eval/loss"] = metrics.cross_entropy(merged.probabilities, truth)
    figures["eval/unreadable"] = float(total - len(merged.records))
    return ClassificationScores(figures, merged, truth, faults)
