"""Run a model in eval mode on labelled data across ranks; each rank reads its share of each step's samples.

Shapes: n rows on this rank (sample views or boxes), C classes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch

from amd.config import ClipConfig, Precision
from amd.data.faults import FaultySamples
from amd.data.loading.clip_dataset import Records
from amd.data.loading.loader import Batch, ClipLoader
from amd.downstream.supervised.learner import SupervisedConfig
from amd.models.classifier import EncoderWithHead
from amd.training.process_group import ProcessGroup
from amd.training.trainer.run_hooks import Interrupted

Rows = tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.float32]]
"""Record (n,), number within the record (n,) and outputs (n, C) of each row."""


class Predictions(NamedTuple):
    """Rows of one rank or of all ranks, and the samples that could not be read completely."""

    records: npt.NDArray[np.int64]  # (n,)
    numbers: npt.NDArray[np.int64]  # (n,) number of the view or box within the record
    outputs: npt.NDArray[np.float32]  # (n, C)
    faults: FaultySamples


class EvaluationContext(NamedTuple):
    """Settings of an evaluation: the process group, the precision, and a callback that returns whether to stop."""

    group: ProcessGroup
    precision: Precision
    stopped: Callable[[], bool] = lambda: False


class EvaluationData(Protocol):
    """A labelled data set to evaluate on."""

    @property
    def field(self) -> str:
        """Config field that specifies the data set, such as data.val."""

    @property
    def url(self) -> str: ...

    @property
    def records(self) -> Records:
        """Samples to predict."""

    def digest(self) -> str: ...


class EvaluationScores(Protocol):
    """Metrics on a data set, identical on all ranks."""

    @property
    def figures(self) -> dict[str, float]: ...

    @property
    def faults(self) -> FaultySamples: ...


def evaluation_loader(
    config: SupervisedConfig, data: EvaluationData, clip: ClipConfig, group: ProcessGroup, **more: Any
) -> ClipLoader:
    """Open a loader for this rank's share of a data set; `more` is passed to ClipLoader.

    At every step, each rank reads up to evaluation.batch_size samples, regardless of the number of ranks.
    """
    return ClipLoader(
        config.data.model_copy(update={"train": data.url, "repeats": 1}),
        clip,
        data.records,
        batch_size=config.evaluation.batch_size * group.world,
        rank=group.rank,
        world=group.world,
        train=False,
        node_ranks=group.node_ranks,
        **more,
    )


@torch.inference_mode()
def predict_rows(
    network: EncoderWithHead, loader: ClipLoader, forward: Callable[[Batch], Rows], on: EvaluationContext
) -> Predictions:
    """Call `forward` on every batch with the model in eval mode; return all rows and the faulty samples.

    Raises Interrupted on all ranks once `on.stopped` is true on any of them.
    """
    none = np.zeros(0, np.int64)
    parts: list[Rows] = [(none, none, np.zeros((0, network.head.out_features), np.float32))]
    faults = FaultySamples([], [])
    training = network.training
    network.eval()
    try:
        with loader:
            for step in loader.steps(0, loader.steps_per_epoch):
                for batch in step:
                    faults.bad.extend(batch.bad)
                    faults.damaged.extend(batch.damaged)
                    if len(batch.clips):
                        parts.append(forward(batch))
                if any(on.group.gather(on.stopped())):
                    raise Interrupted
    finally:
        network.train(training)
    records, numbers, outputs = (np.concatenate(column) for column in zip(*parts, strict=True))
    return Predictions(records, numbers, outputs, faults)
