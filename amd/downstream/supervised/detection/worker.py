"""Action detection on one rank: key frames with their boxes, scored by frame-mAP."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from amd.config import DetectionConfig
from amd.data.loading.loader import ClipLoader, Records
from amd.downstream.supervised.detection import report
from amd.downstream.supervised.detection.augment import TrainingTransform
from amd.downstream.supervised.detection.data import EvaluationSet, open_data, reader_of
from amd.downstream.supervised.detection.evaluation import DetectionScores, predict, score
from amd.downstream.supervised.detection.learner import DetectionLearner, restore_detector
from amd.downstream.supervised.detection.model import Detector
from amd.downstream.supervised.worker import SupervisedTraining
from amd.training.process_group import ProcessGroup
from amd.training.run_folder import RunSpec
from amd.training.trainer.loop import LoopResult, RunHooks


def work(spec: RunSpec, group: ProcessGroup, hooks: RunHooks) -> LoopResult:
    """Train from the newest checkpoint and test the best one, unless stopped earlier."""
    return DetectionTraining(spec, group, hooks).run()


class DetectionTraining(SupervisedTraining[Detector, EvaluationSet, DetectionScores]):
    config: DetectionConfig
    learner: DetectionLearner
    unit, unreadable_as = "key frames", "missed"

    def __init__(self, spec: RunSpec, group: ProcessGroup, hooks: RunHooks) -> None:
        self.config = config = spec.parsed(DetectionConfig)
        self.data = open_data(config)
        super().__init__(spec, config, group, hooks)
        self.learner = DetectionLearner(config, group, self.data.label_map.classes, self.load_start, self.data.train)

    def open_manifest(self) -> Records:
        return self.data.train

    def open_loader(self, **more: Any) -> ClipLoader:
        clip = self.config.clip
        return super().open_loader(
            transform=TrainingTransform(self.config.data, clip), open_reader=reader_of(clip), **more
        )

    def validation_data(self) -> EvaluationSet | None:
        return self.data.val

    def restore(self, tensors: dict[str, dict[str, Tensor]]) -> Detector:
        return restore_detector(self.config, self.data.label_map.classes, tensors)

    def score(self, network: Detector, data: EvaluationSet) -> DetectionScores:
        precision, stopped = self.learner.precision, self.hooks.stop_requested
        predictions = predict(network, self.config, data, self.group, precision, stopped)
        return score(predictions, data, self.data.evaluated, self.group)

    def test_note(self, data: EvaluationSet) -> str:
        return f" on {len(data.key_frames)} key frames"

    def write_report(self, folder: str, scored: DetectionScores, data: EvaluationSet, step: int) -> None:
        report.write_report(folder, scored, data, self.data, self.config, step)
