"""Fine-tuning runs: what they check and publish. `finetune` is the entry point."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from amd.artifacts.weights import HeadCard
from amd.config import FinetuneConfig, with_overrides
from amd.data.loading.rand_augment import check_rand_augment
from amd.downstream.supervised.classification.data import check_splits, count_classes, open_splits
from amd.downstream.supervised.classification.learner import restore_classifier
from amd.downstream.supervised.classification.worker import Finetuning, work
from amd.downstream.supervised.run import SupervisedKind, TrainedNetwork
from amd.training.run_folder import RunResult
from amd.training.runs.checks import DataFacts, check_counts
from amd.training.runs.launch import launch


def finetune(config: FinetuneConfig, **options: Any) -> RunResult:
    """Fine-tune to the end, test the best checkpoint and publish it; `options` are passed to `launch`."""
    return launch(config, FINETUNING, **options)


class FinetuneKind(SupervisedKind[FinetuneConfig]):
    name, objective, protocol = "finetune", "finetune", "test"
    pooling = "mean_then_norm"
    training = Finetuning
    score_settings = ("sampling", "unreadable", "step")

    def check_data(self, config: FinetuneConfig) -> DataFacts:
        check_rand_augment(config.data.rand_augment)
        splits = open_splits(config)
        samples, digest = len(splits["data.train"].manifest), "-".join(split.digest() for split in splits.values())
        facts = check_counts(config, samples, digest)
        check_splits(config, splits)
        return facts

    def complete(self, config: FinetuneConfig) -> FinetuneConfig:
        """Fill in the number of classes."""
        return with_overrides(config, {"head.classes": count_classes(config, open_splits(config)["data.train"])})

    def restore(self, config: FinetuneConfig, tensors: dict[str, dict[str, Tensor]]) -> TrainedNetwork:
        classifier, train = restore_classifier(config, tensors), open_splits(config)["data.train"]
        classes, multi_label = classifier.head.out_features, config.head.multi_label
        head = HeadCard(classes=classes, multi_label=multi_label, labels=train.names)
        return TrainedNetwork(classifier, head, train.digest())


FINETUNING = FinetuneKind().run_kind(work)
