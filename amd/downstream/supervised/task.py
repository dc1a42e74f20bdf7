"""Interface that each kind of supervised run implements: the model to train, its data, and how it is scored."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, Literal

from torch import Tensor

from amd.artifacts.weights import HeadCard, Pooling
from amd.data.loading.clip_dataset import Records
from amd.downstream.supervised.evaluation import EvaluationContext, EvaluationData, EvaluationScores
from amd.downstream.supervised.learner import SupervisedConfig, SupervisedLearner
from amd.models.classifier import EncoderWithHead
from amd.training.checkpoints.store import CheckpointStore, Snapshot
from amd.training.process_group import ProcessGroup


class SupervisedTask(ABC):
    """A kind of supervised run together with its data, which the constructor opens."""

    name: ClassVar[str]  # in run.json and in run IDs
    config_type: ClassVar[type[SupervisedConfig]]
    objective: ClassVar[Literal["finetune", "detection"]]
    protocol: ClassVar[Literal["test", "detection"]]
    pooling: ClassVar[Pooling] = "mean"
    final_norm: ClassVar[bool] = True  # whether the encoder's last norm starts from the pre-trained weights too
    unit: ClassVar[str]  # name of the samples in messages
    unreadable_as: ClassVar[str]  # what an unreadable sample counts as, in messages
    score_settings: ClassVar[tuple[str, ...]]  # test result fields that the card records with the score

    config: Any
    train: Records
    validation: EvaluationData | None  # evaluated during training
    test: EvaluationData | None  # predicted by the best or last checkpoint at the end

    @abstractmethod
    def __init__(self, config: Any) -> None:
        """Open the data. Raises ConfigError if it is invalid."""

    @property
    def selected_on_test(self) -> bool:
        """Whether the best checkpoint is chosen on the test set itself, which inflates its score."""
        if self.config.evaluation.checkpoint == "last" or self.validation is None or self.test is None:
            return False
        return self.validation is self.test or self.validation.digest() == self.test.digest()

    def load_tested(self, store: CheckpointStore, last: int) -> tuple[int, Snapshot] | None:
        """Load the checkpoint to test and publish: step `last` or the best one. Returns None if there is none."""
        return (last, store.load(last)) if self.config.evaluation.checkpoint == "last" else store.load_best()

    @abstractmethod
    def digest(self) -> str:
        """Digest of all the run's data sets."""

    def check(self) -> None:
        """Run further checks on the data before training. Raises ConfigError if one fails."""

    def completed_config(self) -> Any:
        """Return the config with data-dependent values filled in."""
        return self.config

    def loader_options(self) -> dict[str, Any]:
        """Return additional arguments for the training data loader."""
        return {}

    @abstractmethod
    def new_learner(self, group: ProcessGroup, start: Callable[[Any], Any]) -> SupervisedLearner[Any]: ...

    @abstractmethod
    def restore(self, tensors: dict[str, dict[str, Tensor]]) -> EncoderWithHead:
        """Rebuild a checkpoint's model for testing and publishing."""

    @abstractmethod
    def head_card(self) -> HeadCard: ...

    @abstractmethod
    def train_digest(self) -> str: ...

    @abstractmethod
    def score(self, network: Any, data: Any, on: EvaluationContext) -> EvaluationScores:
        """Evaluate a model during training. All ranks must call this."""

    def score_test(self, network: Any, data: Any, on: EvaluationContext, folder: str) -> EvaluationScores:
        """Evaluate a model in the final test; each rank may write its predictions to `folder`."""
        return self.score(network, data, on)

    @abstractmethod
    def test_note(self, data: Any) -> str:
        """Describe what the test covers, as a suffix to "testing step 12"."""

    @abstractmethod
    def write_reports(self, folder: str, scored: Any, data: Any) -> dict[str, Any]:
        """Write the test reports; return the settings of the test for its result. Called on rank 0."""
