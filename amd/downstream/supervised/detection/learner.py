"""Learner for detection runs: binary cross entropy per annotated person, with layer decay as in fine-tuning.

Shapes: B clips in a micro-batch, n boxes in these clips, C actions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from amd.artifacts.weights import whole_clips
from amd.config import DetectionConfig
from amd.data.loading.loader import Batch
from amd.downstream.supervised.detection.augment import ClipBoxes
from amd.downstream.supervised.detection.ava import KeyFrames
from amd.downstream.supervised.detection.model import Detector
from amd.downstream.supervised.learner import SupervisedLearner
from amd.training.process_group import ProcessGroup


def new_detector(config: DetectionConfig, actions: int) -> Detector:
    return Detector(config.encoder, config.clip, actions, config.head)


def restore_detector(config: DetectionConfig, actions: int, tensors: dict[str, dict[str, Tensor]]) -> Detector:
    """Build the detector from a checkpoint."""
    detector = new_detector(config, actions)
    detector.load_state_dict(tensors["model"])
    return detector


class DetectionLearner(SupervisedLearner[Detector]):
    """Detector and its optimizer on one rank."""

    def __init__(
        self,
        config: DetectionConfig,
        group: ProcessGroup,
        actions: int,
        start: Callable[[Detector], Any],
        key_frames: KeyFrames,
    ) -> None:
        super().__init__(config, group, lambda: new_detector(config, actions), start)
        self.config, self._key_frames = config, key_frames

    def loss(self, clips: Tensor, batch: Batch, row: int) -> Sequence[Tensor]:
        """Average the loss over each clip's boxes, then over clips; a clip without boxes contributes zero.

        Deviation: the official code averages over all boxes on a GPU, so its loss depends on how the batch is split.
        """
        clip_boxes: Sequence[ClipBoxes] = batch.extras or [_whole(self.config)] * len(clips)  # no boxes during warm-up
        targets = torch.from_numpy(self._targets(batch.records.tolist(), clip_boxes)).to(self.device)
        share = np.concatenate([np.full(len(one.boxes), 1 / max(1, len(one.boxes))) for one in clip_boxes])
        weights = torch.from_numpy(share.astype(np.float32) / len(clips)).to(self.device)  # (n,)
        rois = rois_of(clip_boxes).to(self.device)
        logits = self.model(*whole_clips(self.network.encoder, self.config.clip, clips), rois).float()
        each = functional.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(dim=1)  # (n,)
        return ((each * weights).sum(),)

    def _targets(self, records: list[int], clip_boxes: Sequence[ClipBoxes]) -> Any:
        """Return the multi-hot targets (n, C)."""
        rows = [(record, number) for record, one in zip(records, clip_boxes, strict=True) for number in one.numbers]
        targets = np.zeros((len(rows), self.network.head.out_features), np.float32)
        for row, (record, number) in enumerate(rows):
            targets[row, [action - 1 for action in self._key_frames.persons[record].actions[number]]] = 1
        return targets


def rois_of(clip_boxes: Sequence[ClipBoxes]) -> Tensor:
    """Return the regions of interest (n, 5): clip index, x1, y1, x2, y2."""
    rows = [np.insert(one.boxes.astype(np.float32), 0, row, axis=1) for row, one in enumerate(clip_boxes)]
    return torch.from_numpy(np.concatenate(rows))


def _whole(config: DetectionConfig) -> ClipBoxes:
    height, width = config.clip.size
    return ClipBoxes(np.array([[0, 0, width, height]], np.float32), np.zeros(1, np.int64))
