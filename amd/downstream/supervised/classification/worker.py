"""Fine-tuning on one rank: central views in validation, all views in the test."""

from __future__ import annotations

from torch import Tensor

from amd.config import FinetuneConfig, ViewsConfig
from amd.data.dataset.manifest import Manifest
from amd.downstream.supervised.classification import report
from amd.downstream.supervised.classification.data import LabelledSplit, open_splits
from amd.downstream.supervised.classification.evaluation import ClassificationScores, ViewPredictions, predict, score
from amd.downstream.supervised.classification.learner import Finetuner, restore_classifier
from amd.downstream.supervised.worker import SupervisedTraining
from amd.models.classifier import Classifier
from amd.storage import remove
from amd.training.process_group import ProcessGroup
from amd.training.run_folder import RunSpec
from amd.training.trainer.loop import LoopResult, RunHooks


def work(spec: RunSpec, group: ProcessGroup, hooks: RunHooks) -> LoopResult:
    """Fine-tune from the newest checkpoint and test the best one, unless stopped earlier."""
    return Finetuning(spec, group, hooks).run()


class Finetuning(SupervisedTraining[Classifier, LabelledSplit, ClassificationScores]):
    config: FinetuneConfig
    learner: Finetuner
    final_norm = False
    unit, unreadable_as = "samples", "wrong"

    def __init__(self, spec: RunSpec, group: ProcessGroup, hooks: RunHooks) -> None:
        self.config = config = spec.parsed(FinetuneConfig)
        self.splits = open_splits(config)
        super().__init__(spec, config, group, hooks)
        train, classes = self.splits["data.train"], config.head.classes or 0
        self.learner = Finetuner(config, group, self.load_start, lambda batch: train.targets(batch, classes))

    def open_manifest(self) -> Manifest:
        return self.splits["data.train"].manifest

    def validation_data(self) -> LabelledSplit | None:
        return self.splits.get("data.val")

    def test_data(self) -> LabelledSplit | None:
        return self.splits.get("data.test") or self.validation_data()

    def restore(self, tensors: dict[str, dict[str, Tensor]]) -> Classifier:
        return restore_classifier(self.config, tensors)

    def score(self, network: Classifier, data: LabelledSplit) -> ClassificationScores:
        views = self.config.evaluation.views.model_copy(update={"segments": 1, "crops": 1})
        return score(self._predict(network, data, views), data, self.config, self.group)

    def score_test(self, network: Classifier, data: LabelledSplit, folder: str) -> ClassificationScores:
        views = self.config.evaluation.views
        self.group.broadcast_from_main(lambda: remove(folder))  # left by an interrupted test, possibly on more workers
        predictions = self._predict(network, data, views)
        report.write_views(folder, predictions, data, views, self.group.rank)
        return score(predictions, data, self.config, self.group)

    def test_note(self, data: LabelledSplit) -> str:
        return f": {self.config.evaluation.views} views of {len(data.manifest)} samples"

    def write_report(self, folder: str, scored: ClassificationScores, data: LabelledSplit, step: int) -> None:
        report.write_report(folder, scored, data, self.config, step)

    def _predict(self, network: Classifier, data: LabelledSplit, views: ViewsConfig) -> ViewPredictions:
        stopped = self.hooks.stop_requested
        return predict(network, self.config, data, views, self.group, self.learner.precision, stopped)
