"""Score a detector on the key frames of data.val, all ranks together. What cannot be read is named, and is missed.

Shapes: n boxes looked at by this rank, or by all of them; C actions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from amd.artifacts.weights import whole_clips
from amd.config import DetectionConfig, Precision
from amd.data.faults import Bad
from amd.data.loading.loader import Batch, ClipLoader
from amd.device import autocast
from amd.downstream.supervised.detection.augment import WholeCut
from amd.downstream.supervised.detection.boxes import Boxes
from amd.downstream.supervised.detection.data import Scene, reader_of
from amd.downstream.supervised.detection.learner import rois_of
from amd.downstream.supervised.detection.metric import Detected, average_precisions
from amd.downstream.supervised.detection.model import Detector, on_size
from amd.training.process_group import Team
from amd.training.trainer.loop import Interrupted

Part = tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.float32]]  # Seen, of one batch


class Seen(NamedTuple):
    """What one rank, or all of them, saw."""

    records: npt.NDArray[np.int64]  # (n,) key frames of scene.looked_at
    numbers: npt.NDArray[np.int64]  # (n,) which of their boxes
    scores: npt.NDArray[np.float32]  # (n, C)
    bad: list[Bad]


class Scored(NamedTuple):
    """The same on all ranks."""

    figures: dict[str, float]
    precisions: dict[int, float]
    """Average precision in percent of every evaluated action that is annotated."""
    seen: Seen


@torch.inference_mode()
def look(
    detector: Detector,
    config: DetectionConfig,
    scene: Scene,
    team: Team,
    precision: Precision,
    stopped: Callable[[], bool] = lambda: False,
) -> Seen:
    """This rank's share of the key frames, through the detector in eval mode.

    Raises Interrupted, on all ranks alike, once one of them is `stopped`.
    """
    clip = config.clip.model_copy(update={"size": config.evaluation.size or config.clip.size})
    parts: list[Part] = []
    bad: list[Bad] = []
    loader = ClipLoader(
        config.data.model_copy(update={"train": scene.url}),
        clip,
        scene.looked_at,
        batch_size=config.evaluation.batch_size,
        rank=team.rank,
        world=team.world,
        train=False,
        cut=WholeCut(config.data, clip, config.evaluation.extend),
        open_reader=reader_of(clip),
    )
    training = detector.training
    tested = on_size(detector.eval(), clip)
    try:
        with loader:
            for step in loader.steps(0, loader.steps_per_epoch):
                for batch in step:
                    bad += batch.bad
                    if len(batch.clips):
                        parts.append(_through(tested, batch, team, precision))
                if any(team.gather(stopped())):
                    raise Interrupted
    finally:
        detector.train(training)
    if not parts:
        none = np.zeros(0, np.int64)
        return Seen(none, none, np.zeros((0, detector.head.out_features), np.float32), bad)
    records, numbers, scores = (np.concatenate(column) for column in zip(*parts, strict=True))
    return Seen(records, numbers, scores, bad)


def _through(detector: Detector, batch: Batch, team: Team, precision: Precision) -> Part:
    clips, rois = batch.clips.to(team.device, non_blocking=True), rois_of(batch.extras).to(team.device)
    with autocast(precision, team.device):
        logits = detector(*whole_clips(detector.encoder, detector.clip, clips), rois)
    records = np.repeat(batch.records.numpy(), [len(placed.boxes) for placed in batch.extras])
    numbers = np.concatenate([placed.numbers for placed in batch.extras])
    return records, numbers, logits.float().sigmoid().cpu().numpy()


def score(seen: Seen, scene: Scene, evaluated: list[int], team: Team) -> Scored:
    """Put together what all ranks saw. Every rank calls it."""
    everyone = team.gather(seen)
    bad = [sample for rank in everyone for sample in rank.bad]
    records, numbers, scores = (
        np.concatenate([getattr(rank, name) for rank in everyone]) for name in ("records", "numbers", "scores")
    )
    order = np.lexsort((numbers, records))  # so that ties do not depend on who saw what
    whole = Seen(records[order], numbers[order], scores[order], bad)
    truth, boxes = scene.truth(scene.numbers()), boxes_of(whole, scene)
    precisions: dict[int, float] = {}
    for action in evaluated:  # one at a time: AVA's 60 together are millions of rows
        found = Detected(whole.records, boxes, np.full(len(boxes), action), whole.scores[:, action - 1])
        precisions |= average_precisions(truth, found, [action])
    precisions = {action: 100 * value for action, value in precisions.items()}
    figures = {"eval/map": float(np.mean(list(precisions.values()))), "eval/unreadable": float(len(bad))}
    return Scored(figures, precisions, whole)


def boxes_of(seen: Seen, scene: Scene) -> Boxes:
    """(n, 4) fractions of the frame, as they were given: neither extended nor rounded to pixels."""
    persons = scene.looked_at.persons
    rows = [persons[r].boxes[i] for r, i in zip(seen.records.tolist(), seen.numbers.tolist(), strict=True)]
    return np.array(rows).reshape(-1, 4)
