"""Evaluate a detector on the key frames of data.val across ranks. Unreadable frames are reported and count as missed.

Shapes: n boxes on one rank or all ranks, C actions.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from amd.artifacts.weights import whole_clips
from amd.config import DetectionConfig
from amd.data.faults import FaultySamples
from amd.data.loading.loader import Batch
from amd.device import autocast
from amd.downstream.supervised.detection.augment import EvaluationTransform
from amd.downstream.supervised.detection.boxes import Boxes
from amd.downstream.supervised.detection.data import EvaluationSet, reader_of
from amd.downstream.supervised.detection.frame_map import DetectedActions, average_precisions
from amd.downstream.supervised.detection.learner import rois_of
from amd.downstream.supervised.detection.model import Detector, resized_detector
from amd.downstream.supervised.evaluation import EvaluationContext, Predictions, Rows, evaluation_loader, predict_rows
from amd.training.process_group import ProcessGroup


class DetectionScores(NamedTuple):
    """Metrics on a data set, identical on all ranks."""

    figures: dict[str, float]
    precisions: dict[int, float]
    """Average precision, in percent, of each evaluated action with annotations."""
    predictions: Predictions
    faults: FaultySamples


def predict(detector: Detector, config: DetectionConfig, val: EvaluationSet, on: EvaluationContext) -> Predictions:
    """Predict this rank's share of the key frames with the detector in eval mode; the outputs are probabilities.

    Raises Interrupted on all ranks once `on.stopped` is true on any of them.
    """
    clip = config.clip.model_copy(update={"size": config.evaluation.size or config.clip.size})
    transform = EvaluationTransform(config.data, clip, config.evaluation.extend)
    loader = evaluation_loader(config, val, clip, on.group, transform=transform, open_reader=reader_of(clip))
    tested = resized_detector(detector, clip)

    def forward(batch: Batch) -> Rows:
        clips, rois = batch.clips.to(on.group.device, non_blocking=True), rois_of(batch.extras).to(on.group.device)
        with autocast(on.precision, on.group.device):
            logits = tested(*whole_clips(tested.encoder, tested.clip, clips), rois)
        records = np.repeat(batch.records.numpy(), [len(clip_boxes.boxes) for clip_boxes in batch.extras])
        numbers = np.concatenate([clip_boxes.numbers for clip_boxes in batch.extras])
        return records, numbers, logits.float().sigmoid().cpu().numpy()

    return predict_rows(tested, loader, forward, on)


def score(predictions: Predictions, val: EvaluationSet, evaluated: list[int], group: ProcessGroup) -> DetectionScores:
    """Merge the predictions from all ranks and score them. All ranks must call this."""
    gathered = group.gather(predictions)
    faults = FaultySamples.merge(rank.faults for rank in gathered)
    records, numbers, outputs = (
        np.concatenate([getattr(rank, name) for rank in gathered]) for name in ("records", "numbers", "outputs")
    )
    order = np.lexsort((numbers, records))  # ties must not depend on the distribution over ranks
    whole = Predictions(records[order], numbers[order], outputs[order], faults)
    truth, boxes = val.truth(val.numbers()), boxes_of(whole, val)
    precisions: dict[int, float] = {}
    for action in evaluated:  # one at a time: AVA's 60 actions together make millions of rows
        found = DetectedActions(whole.records, boxes, np.full(len(boxes), action), whole.outputs[:, action - 1])
        precisions |= average_precisions(truth, found, [action])
    precisions = {action: 100 * value for action, value in precisions.items()}
    figures = {"eval/map": float(np.mean(list(precisions.values()))), "eval/unreadable": float(len(faults.bad))}
    return DetectionScores(figures, precisions, whole, faults)


def boxes_of(predictions: Predictions, val: EvaluationSet) -> Boxes:
    """Return the original boxes (n, 4) as fractions of the frame, neither extended nor rounded to pixels."""
    persons = val.records.persons
    rows = [
        persons[r].boxes[i] for r, i in zip(predictions.records.tolist(), predictions.numbers.tolist(), strict=True)
    ]
    return np.array(rows).reshape(-1, 4)
