"""Tests for the prediction loop shared by all supervised runs."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import pytest
import torch

from amd.config import EncoderConfig, TokenGrid
from amd.data.faults import UnreadableSample
from amd.data.loading.loader import Batch
from amd.downstream.supervised.evaluation import EvaluationContext, Predictions, Rows, predict_rows
from amd.models.classifier import Classifier
from amd.training.trainer.run_hooks import Interrupted

BAD: UnreadableSample = {"record": 3, "location": "3.png", "reason": "truncated"}


class BatchList(AbstractContextManager["BatchList"]):
    """A loader that yields the given batches, two per step, and records whether it was closed."""

    def __init__(self, batches: list[Batch]) -> None:
        self.pairs = [batches[i : i + 2] for i in range(0, len(batches), 2)]
        self.steps_per_epoch, self.closed = len(self.pairs), False

    def steps(self, start: int, stop: int) -> list[list[Batch]]:
        return self.pairs[start:stop]

    def __exit__(self, *_: object) -> None:
        self.closed = True


class OtherRank:
    """A group of two ranks whose second rank requests a stop after some steps."""

    def __init__(self, stopped_after: int = 100) -> None:
        self.gathered, self.stopped_after = 0, stopped_after

    def gather(self, value: bool) -> list[bool]:
        self.gathered += 1
        return [value, self.gathered >= self.stopped_after]


def batch(*records: int, bad: list[UnreadableSample] | None = None) -> Batch:
    numbers = torch.tensor(records, dtype=torch.int64)
    return Batch(torch.zeros(len(records), 3, 1, 8, 8, dtype=torch.uint8), -numbers, numbers, bad or [])


@pytest.fixture
def network() -> Classifier:
    return Classifier(EncoderConfig(width=24, depth=1, heads=3), TokenGrid(1, 2, 2), 48, 5)


def predict(network: Classifier, loader: Any, group: Any, modes: list[bool]) -> Predictions:
    def forward(given: Batch) -> Rows:
        modes.append(network.training)
        assert torch.is_inference_mode_enabled()
        records = given.records.numpy()
        return records, np.zeros_like(records), np.ones((len(records), 5), np.float32)

    return predict_rows(network, loader, forward, EvaluationContext(group, "fp32"))


@pytest.mark.parametrize("training", [True, False])
def test_readable_batches_are_predicted_in_eval_mode_and_the_mode_is_restored(
    network: Classifier, training: bool
) -> None:
    loader, modes = BatchList([batch(0, 1), batch(bad=[BAD]), batch(2)]), list[bool]()
    records, numbers, outputs, faults = predict(network.train(training), loader, OtherRank(), modes)
    assert (records.tolist(), numbers.tolist(), outputs.shape) == ([0, 1, 2], [0, 0, 0], (3, 5))
    assert (faults.bad, modes) == ([BAD], [False, False])
    assert network.training is network.encoder.training is training
    assert loader.closed


def test_a_rank_without_readable_samples_returns_empty_arrays_with_one_column_per_class(network: Classifier) -> None:
    records, numbers, outputs, faults = predict(network, BatchList([batch(bad=[BAD])]), OtherRank(), [])
    assert (len(records), len(numbers), outputs.shape, len(faults.bad)) == (0, 0, (0, 5), 1)
    assert (records.dtype, outputs.dtype) == (np.int64, np.float32)


def test_a_stop_on_another_rank_interrupts_prediction_and_restores_the_mode(network: Classifier) -> None:
    loader, modes = BatchList([batch(0), batch(1), batch(2), batch(3), batch(4)]), list[bool]()
    with pytest.raises(Interrupted):
        predict(network.train(), loader, OtherRank(stopped_after=2), modes)
    assert len(modes) == 4, "two steps of two batches"
    assert network.training
    assert loader.closed
