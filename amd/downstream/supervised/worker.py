"""A supervised run on one rank: the training loop, periodic validation and the test of the best checkpoint."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar, Generic, TypeVar

from torch import Tensor

from amd.downstream.supervised.evaluation import EvaluationData, EvaluationScores
from amd.downstream.supervised.learner import SupervisedConfig, SupervisedLearner, load_start
from amd.downstream.supervised.report import TEST, unreadable_warning
from amd.flops import encoder_flops
from amd.models.classifier import EncoderWithHead
from amd.storage import join
from amd.training.trainer.loop import Training

N = TypeVar("N", bound=EncoderWithHead)
D = TypeVar("D", bound=EvaluationData)
R = TypeVar("R", bound=EvaluationScores)


class SupervisedTraining(Training, Generic[N, D, R]):
    """Trains a network N, evaluates it on data D, and reports scores R.

    Subclasses set `config` before this constructor, because it opens the data, and `learner` after it.
    """

    config: SupervisedConfig
    learner: SupervisedLearner[Any]
    final_norm: ClassVar[bool] = True
    """Whether the encoder's last norm starts from the pre-trained weights too."""
    unit: ClassVar[str]
    """Name of the samples in messages."""
    unreadable_as: ClassVar[str]
    """Result that an unreadable sample counts as, in messages."""

    @abstractmethod
    def validation_data(self) -> D | None:
        """Return the data to evaluate on during training."""

    def test_data(self) -> D | None:
        """Return the data to test the best checkpoint on."""
        return self.validation_data()

    @abstractmethod
    def restore(self, tensors: dict[str, dict[str, Tensor]]) -> N:
        """Build the network to test from a checkpoint."""

    @abstractmethod
    def score(self, network: N, data: D) -> R:
        """Evaluate a network during training. All ranks must call it."""

    def score_test(self, network: N, data: D, folder: str) -> R:
        """Evaluate a network in the final test; each rank may write its predictions to `folder`."""
        return self.score(network, data)

    @abstractmethod
    def test_note(self, data: D) -> str:
        """Return what the test covers, to follow "testing step 12"."""

    @abstractmethod
    def write_report(self, folder: str, scored: R, data: D, step: int) -> None:
        """Write the reports of the test. Called on rank 0."""

    def load_start(self, network: N) -> None:
        """Load the pre-trained weights of the config, if there are any."""
        load_start(network.encoder, self.config, final_norm=self.final_norm)

    def flops_per_clip(self) -> float:
        """Return three times the FLOPs of a forward pass, twice for the patch embedding, as pixels need no gradient."""
        clip = self.config.clip
        embedding, blocks = encoder_flops(self.config.encoder, clip.grid.tokens, clip.token_values)
        return 2 * embedding + 3 * blocks

    def evaluate(self, done: int) -> dict[str, float]:
        every = self.config.evaluation.every_epochs * self.loader.steps_per_epoch
        data = self.validation_data()
        if data is None or (done % every and done != self.steps):
            return {}
        scored = self.score(self.learner.tested, data)
        self._warn_of_unreadable(scored, data)
        shown = "  ".join(f"{name} {value:.4g}" for name, value in scored.figures.items())
        self.emit("note", text=f"step {done}: {shown}")
        return scored.figures

    def finalize(self, done: int) -> dict[str, float]:
        """Test the best checkpoint and write reports to the run's folder."""
        data, group = self.test_data(), self.group
        if data is None:
            return {}
        found = self.store.load_best() if group.is_main else None
        best = group.broadcast_from_main(lambda: found[0] if found else 0)
        network = self.restore((found[1] if found else self.store.load(best)).tensors)
        self.emit("note", text=f"testing step {best}{self.test_note(data)}")
        folder = join(self.spec.folder, TEST)
        scored = self.score_test(network.to(group.device), data, folder)
        self._warn_of_unreadable(scored, data)
        if group.is_main:
            self.write_report(folder, scored, data, best)
        return {name.replace("eval/", "test/"): value for name, value in scored.figures.items()}

    def _warn_of_unreadable(self, scored: R, data: D) -> None:
        if scored.bad:
            self.emit("warning", text=unreadable_warning(data, scored.bad, self.unit, self.unreadable_as))
