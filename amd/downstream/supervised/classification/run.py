"""Fine-tuning runs: validation uses central views, and the test uses all views. `finetune` is the entry point."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from amd.artifacts.weights import HeadCard
from amd.config import FinetuneConfig, with_overrides
from amd.data.loading.rand_augment import check_rand_augment
from amd.downstream.supervised.classification import report
from amd.downstream.supervised.classification.data import LabelledSplit, check_splits, count_classes, open_splits
from amd.downstream.supervised.classification.evaluation import ClassificationScores, predict, score
from amd.downstream.supervised.classification.learner import Finetuner, restore_classifier
from amd.downstream.supervised.evaluation import EvaluationContext
from amd.downstream.supervised.run import supervised_kind
from amd.downstream.supervised.task import SupervisedTask
from amd.downstream.supervised.worker import work_on
from amd.models.classifier import Classifier
from amd.storage import remove
from amd.training.process_group import ProcessGroup
from amd.training.run_folder import RunResult, RunSpec
from amd.training.runs.launch import launch
from amd.training.trainer.run_hooks import LoopResult, RunHooks


def finetune(config: FinetuneConfig, **options: Any) -> RunResult:
    """Fine-tune to completion, then test the best or last checkpoint and publish it. Passes `options` to `launch`."""
    return launch(config, FINETUNING, **options)


class FinetuneTask(SupervisedTask):
    config: FinetuneConfig
    name, config_type = "finetune", FinetuneConfig
    objective, protocol, pooling, final_norm = "finetune", "test", "mean_then_norm", False
    unit, unreadable_as = "samples", "wrong"
    score_settings = ("sampling", "unreadable", "step")

    def __init__(self, config: FinetuneConfig) -> None:
        self.config, self.splits = config, open_splits(config)
        self.train = self.splits["data.train"].records
        self.validation = self.splits.get("data.val")
        self.test = self.splits.get("data.test") or self.validation

    def digest(self) -> str:
        return "-".join(split.digest() for split in self.splits.values())

    def check(self) -> None:
        check_rand_augment(self.config.data.rand_augment)
        check_splits(self.config, self.splits)

    def completed_config(self) -> FinetuneConfig:
        """Fill in the number of classes."""
        return with_overrides(self.config, {"head.classes": count_classes(self.config, self.splits["data.train"])})

    def new_learner(self, group: ProcessGroup, start: Callable[[Classifier], Any]) -> Finetuner:
        train, classes = self.splits["data.train"], self.config.head.classes or 0
        return Finetuner(self.config, group, start, lambda batch: train.targets(batch, classes))

    def restore(self, tensors: dict[str, dict[str, Tensor]]) -> Classifier:
        return restore_classifier(self.config, tensors)

    def head_card(self) -> HeadCard:
        head, names = self.config.head, self.splits["data.train"].names
        return HeadCard(classes=head.classes, multi_label=head.multi_label, labels=names)

    def train_digest(self) -> str:
        return self.splits["data.train"].digest()

    def score(self, network: Classifier, data: LabelledSplit, on: EvaluationContext) -> ClassificationScores:
        views = self.config.evaluation.views.model_copy(update={"segments": 1, "crops": 1})
        return score(predict(network, self.config, data, views, on), data, self.config, on.group)

    def score_test(
        self, network: Classifier, data: LabelledSplit, on: EvaluationContext, folder: str
    ) -> ClassificationScores:
        views = self.config.evaluation.views
        on.group.broadcast_from_main(lambda: remove(folder))  # left by an interrupted test, possibly on more workers
        predictions = predict(network, self.config, data, views, on)
        report.write_views(folder, predictions, data, views, on.group.rank)
        return score(predictions, data, self.config, on.group)

    def test_note(self, data: LabelledSplit) -> str:
        return f": {self.config.evaluation.views} views of {len(data.records)} samples"

    def write_reports(self, folder: str, scored: ClassificationScores, data: LabelledSplit) -> dict[str, Any]:
        report.write_reports(folder, scored, data, self.config)
        views = self.config.evaluation.views
        return {"views": str(views), "sampling": views.sampling}


def work(spec: RunSpec, group: ProcessGroup, hooks: RunHooks) -> LoopResult:
    """Fine-tune from the newest checkpoint and test the result, unless stopped earlier."""
    return work_on(FinetuneTask, spec, group, hooks)


FINETUNING = supervised_kind(FinetuneTask, work)
