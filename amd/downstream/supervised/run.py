"""Supervised runs: check the config, load the initial weights, and publish the best checkpoint with its score.

`SupervisedKind` is what fine-tuning and detection share; each kind adds its data checks and its head.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Generic, Literal, NamedTuple, TypeVar

from torch import Tensor

from amd.artifacts.weights import Card, HeadCard, Pooling, Score, save_encoder
from amd.downstream.supervised.learner import SupervisedConfig, load_start
from amd.downstream.supervised.report import TEST, read_result
from amd.downstream.supervised.worker import SupervisedTraining
from amd.exchange.initialization import StartingPoint
from amd.models.classifier import EncoderWithHead
from amd.models.encoder import Encoder
from amd.presets.load import check_complete
from amd.storage import join
from amd.training.checkpoints.store import CheckpointStore
from amd.training.failures import UploadError
from amd.training.run_folder import run_folder, versions
from amd.training.runs.checks import DataFacts
from amd.training.runs.kinds import RunKind, Work
from amd.training.runs.teachers import TrainTeacher

C = TypeVar("C", bound=SupervisedConfig)


class ResolvedSupervised(NamedTuple):
    config: SupervisedConfig
    """Config with all values filled in that depend on the data."""
    start: StartingPoint | None


class TrainedNetwork(NamedTuple):
    """The network of a checkpoint, as it is published."""

    network: EncoderWithHead
    head: HeadCard
    data_digest: str
    """Digest of data.train."""


class SupervisedKind(ABC, Generic[C]):
    """Checks and publishing of one kind of supervised run."""

    name: ClassVar[str]
    """Name of the kind in run.json and in run ids."""
    objective: ClassVar[Literal["finetune", "detection"]]
    protocol: ClassVar[Literal["test", "detection"]]
    pooling: ClassVar[Pooling] = "mean"
    training: ClassVar[type[SupervisedTraining[Any, Any, Any]]]
    score_settings: ClassVar[tuple[str, ...]]
    """Fields of the test's result that the card records as settings of the score."""

    @abstractmethod
    def check_data(self, config: C) -> DataFacts:
        """Check the config against its data. Raises ConfigError."""

    @abstractmethod
    def restore(self, config: C, tensors: dict[str, dict[str, Tensor]]) -> TrainedNetwork:
        """Build the network to publish from a checkpoint."""

    def complete(self, config: C) -> C:
        """Fill in the values that depend on the data."""
        return config

    def run_kind(self, work: Work) -> RunKind:
        return RunKind(self.name, self._check, self._check_weights, self._resolve, work, self._publish)

    def _check(self, config: C) -> DataFacts:
        check_complete(config)
        return self.check_data(config)

    def _check_weights(self, config: C) -> None:
        self._load_start(config)

    def _load_start(self, config: C) -> StartingPoint | None:
        encoder = Encoder(config.encoder, config.clip.grid, config.clip.token_values)
        return load_start(encoder, config, final_norm=self.training.final_norm)

    def _resolve(self, config: C, root: str, train: TrainTeacher) -> ResolvedSupervised:
        return ResolvedSupervised(self.complete(config), self._load_start(config))

    def _publish(self, config: C, resolved: Any, root: str, run_id: str, data: DataFacts) -> str:
        """Publish the encoder and head of the best checkpoint; return the folder's URL."""
        folder = run_folder(root, run_id)
        store = CheckpointStore(join(folder, "checkpoints"), config.checkpoint)
        found = store.load_best()
        if found is None or store.committed()[-1] < data.steps:
            raise UploadError(f"the last checkpoint of {run_id} is not the final one; start the run again to finish it")
        (best, snapshot), config, start = found, resolved.config, resolved.start
        trained = self.restore(config, snapshot.tensors)
        tested = read_result(join(folder, TEST))
        if tested is not None and tested["step"] != best:
            raise UploadError(
                f"step {tested['step']} of {run_id} was tested but can no longer be read; start the run again"
            )
        card = Card(
            id=run_id,
            encoder=config.encoder,
            clip=config.clip,
            interpolation=config.data.interpolation,
            pooling=self.pooling,
            head=trained.head,
            run=run_id,
            objective=self.objective,
            steps=best,
            start=None if start is None else start.lineage,
            weights_license=config.weights_license or (start.weights_license if start else None),
            data={"train": config.data.train, "samples": data.samples, "digest": trained.data_digest},
            config=config.model_dump(mode="json"),
            versions=versions(),
            scores=() if tested is None else (self._score(tested, run_id),),
        )
        published = join(root, "encoders", run_id)
        save_encoder(published, trained.network.encoder, card, trained.network.head)
        return published

    def _score(self, tested: dict[str, Any], run_id: str) -> Score:
        return Score(
            protocol=self.protocol,
            data=tested["data"],
            digest=tested["digest"],
            samples=tested["samples"],
            views=tested.get("views"),
            values=tested["figures"],
            settings={name: tested[name] for name in self.score_settings},
            run=run_id,
        )
