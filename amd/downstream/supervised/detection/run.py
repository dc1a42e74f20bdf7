"""Action detection runs: what they check and publish. `detect` is the entry point."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from amd.artifacts.weights import HeadCard
from amd.config import DetectionConfig
from amd.downstream.supervised.detection.data import open_data
from amd.downstream.supervised.detection.learner import restore_detector
from amd.downstream.supervised.detection.worker import DetectionTraining, work
from amd.downstream.supervised.run import SupervisedKind, TrainedNetwork
from amd.training.run_folder import RunResult
from amd.training.runs.checks import DataFacts, check_counts
from amd.training.runs.launch import launch


def detect(config: DetectionConfig, **options: Any) -> RunResult:
    """Train to the end, test the best checkpoint and publish it; `options` are passed to `launch`."""
    return launch(config, DETECTION, **options)


class DetectionKind(SupervisedKind[DetectionConfig]):
    name, objective, protocol = "detect", "detection", "detection"
    training = DetectionTraining
    score_settings = ("boxes", "size", "unreadable", "step")

    def check_data(self, config: DetectionConfig) -> DataFacts:
        data = open_data(config)
        return check_counts(config, len(data.train), data.digest())

    def restore(self, config: DetectionConfig, tensors: dict[str, dict[str, Tensor]]) -> TrainedNetwork:
        """Restore the encoder and its head, for `model.load_detector`."""
        opened = open_data(config)
        label_map = opened.label_map
        detector = restore_detector(config, label_map.classes, tensors)
        head = HeadCard(classes=label_map.classes, multi_label=True, labels=label_map.labels())
        return TrainedNetwork(detector, head, opened.train.digest())


DETECTION = DetectionKind().run_kind(work)
