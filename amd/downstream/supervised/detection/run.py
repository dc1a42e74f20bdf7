"""Action detection runs: key frames with boxes, scored by frame-mAP. `detect` is the entry point."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from amd.artifacts.weights import HeadCard
from amd.config import DetectionConfig
from amd.downstream.supervised.detection import report
from amd.downstream.supervised.detection.augment import TrainingTransform
from amd.downstream.supervised.detection.data import EvaluationSet, open_data, reader_of
from amd.downstream.supervised.detection.evaluation import DetectionScores, predict, score
from amd.downstream.supervised.detection.learner import DetectionLearner, restore_detector
from amd.downstream.supervised.detection.model import Detector
from amd.downstream.supervised.evaluation import EvaluationContext
from amd.downstream.supervised.run import supervised_kind
from amd.downstream.supervised.task import SupervisedTask
from amd.downstream.supervised.worker import work_on
from amd.training.process_group import ProcessGroup
from amd.training.run_folder import RunResult, RunSpec
from amd.training.runs.launch import launch
from amd.training.trainer.run_hooks import LoopResult, RunHooks


def detect(config: DetectionConfig, **options: Any) -> RunResult:
    """Train to completion, then test the best or last checkpoint and publish it; `options` are passed to `launch`."""
    return launch(config, DETECTION, **options)


class DetectionTask(SupervisedTask):
    config: DetectionConfig
    name, config_type = "detect", DetectionConfig
    objective, protocol = "detection", "detection"
    unit, unreadable_as = "key frames", "missed"
    score_settings = ("boxes", "size", "unreadable", "step")

    def __init__(self, config: DetectionConfig) -> None:
        self.config, self.data = config, open_data(config)
        self.train = self.data.train
        self.validation = self.test = self.data.val

    def digest(self) -> str:
        return self.data.digest()

    def loader_options(self) -> dict[str, Any]:
        clip = self.config.clip
        return {"transform": TrainingTransform(self.config.data, clip), "open_reader": reader_of(clip)}

    def new_learner(self, group: ProcessGroup, start: Callable[[Detector], Any]) -> DetectionLearner:
        return DetectionLearner(self.config, group, self.data.label_map.classes, start, self.data.train)

    def restore(self, tensors: dict[str, dict[str, Tensor]]) -> Detector:
        return restore_detector(self.config, self.data.label_map.classes, tensors)

    def head_card(self) -> HeadCard:
        label_map = self.data.label_map
        return HeadCard(classes=label_map.classes, multi_label=True, labels=label_map.labels())

    def train_digest(self) -> str:
        return self.data.train.digest()

    def score(self, network: Detector, data: EvaluationSet, on: EvaluationContext) -> DetectionScores:
        predictions = predict(network, self.config, data, on)
        return score(predictions, data, self.data.evaluated, on.group)

    def test_note(self, data: EvaluationSet) -> str:
        return f" on {len(data.records)} key frames"

    def write_reports(self, folder: str, scored: DetectionScores, data: EvaluationSet) -> dict[str, Any]:
        report.write_reports(folder, scored, data, self.data)
        size = list(self.config.evaluation.size or self.config.clip.size)
        return {"boxes": self.config.data.boxes or "annotated", "size": size}


def work(spec: RunSpec, group: ProcessGroup, hooks: RunHooks) -> LoopResult:
    """Train from the newest checkpoint and test the result, unless stopped earlier."""
    return work_on(DetectionTask, spec, group, hooks)


DETECTION = supervised_kind(DetectionTask, work)
