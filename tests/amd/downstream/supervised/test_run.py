"""Tests for the checks that all supervised runs make before training and before publishing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import pytest

from amd.artifacts.weights import load_encoder
from amd.config import ConfigError, with_overrides
from amd.downstream.supervised.classification.learner import new_classifier
from amd.downstream.supervised.classification.run import FINETUNING
from amd.downstream.supervised.detection.learner import new_detector
from amd.downstream.supervised.detection.run import DETECTION
from amd.downstream.supervised.learner import SupervisedConfig
from amd.models.classifier import EncoderWithHead
from amd.storage import join, write_json
from amd.training.checkpoints.store import CheckpointStore, Snapshot
from amd.training.failures import UploadError
from amd.training.run_folder import run_folder
from amd.training.runs.checks import DataFacts
from amd.training.runs.kinds import RunKind
from tests.support.data.ava_videos import draw, tiny_detection
from tests.support.runs.finetuning import tiny_finetuning

FACTS = DataFacts(samples=24, digest="d", steps=6)
Prepare = Callable[[Path], tuple[RunKind, SupervisedConfig, EncoderWithHead]]


def finetuning(folder: Path) -> tuple[RunKind, SupervisedConfig, EncoderWithHead]:
    config = tiny_finetuning(folder)
    return FINETUNING, config, new_classifier(config)


def detection(folder: Path) -> tuple[RunKind, SupervisedConfig, EncoderWithHead]:
    config = tiny_detection(draw(folder, videos=3))
    return DETECTION, config, new_detector(config, 3)


def save(config: SupervisedConfig, network: EncoderWithHead, step: int, score: float) -> None:
    store = CheckpointStore(join(run_folder(str(config.storage), "one"), "checkpoints"), config.checkpoint)
    tensors = {"model": dict(network.state_dict()), "optimizer": {}}
    store.save(step, Snapshot(tensors, {"step": step}), {config.checkpoint.best_metric: score})
    assert store.wait()


def publish(kind: RunKind, config: SupervisedConfig) -> str:
    resolved = kind.resolve(config, str(config.storage), lambda *_: pytest.fail("there is no teacher"))
    return kind.publish(config, resolved, str(config.storage), "one", FACTS)


@pytest.mark.parametrize("prepare", [finetuning, detection])
def test_only_the_best_checkpoint_of_a_finished_run_is_published(prepare: Prepare, tmp_path: Path) -> None:
    kind, config, network = prepare(tmp_path)
    with pytest.raises(UploadError, match="the newest checkpoint of one is not from its final step"):
        publish(kind, config)
    save(config, network, 3, score=90.0)
    with pytest.raises(UploadError, match="the newest checkpoint of one is not from its final step"):
        publish(kind, config)
    save(config, network, 6, score=50.0)
    _, card = load_encoder(publish(kind, config))
    assert (card.steps, card.scores, card.data["samples"]) == (3, (), 24)
    assert (card.start, card.run, card.config) == (None, "one", config.model_dump(mode="json"))
    _, card = load_encoder(publish(kind, with_overrides(config, {"evaluation.checkpoint": "last"})))
    assert card.steps == 6


@pytest.mark.parametrize("prepare", [finetuning, detection])
def test_publishing_fails_if_the_tested_checkpoint_no_longer_exists(prepare: Prepare, tmp_path: Path) -> None:
    kind, config, network = prepare(tmp_path)
    save(config, network, 6, score=50.0)
    write_json(join(run_folder(str(config.storage), "one"), "test", "result.json"), {"step": 3})
    with pytest.raises(UploadError, match="step 3 of one was tested, but its checkpoint can no longer be read"):
        publish(kind, config)


@pytest.mark.parametrize("prepare", [finetuning, detection])
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"data.train": "unset:"}, r"^data\.train: presets contain no data"),
        ({"weights": "unset: an encoder"}, "^weights: this preset needs an encoder; set weights="),
    ],
)
def test_values_that_a_preset_leaves_unset_are_rejected(
    prepare: Prepare, overrides: dict[str, Any], message: str, tmp_path: Path
) -> None:
    kind, config, _ = prepare(tmp_path)
    with pytest.raises(ConfigError, match=message):
        kind.check(with_overrides(config, overrides))


@pytest.mark.parametrize("kind", [FINETUNING, DETECTION], ids=lambda kind: kind.name)
def test_workers_can_import_the_work_function_of_each_kind_by_name(kind: RunKind) -> None:
    assert resolve_name(f"{kind.work.__module__}:{kind.work.__qualname__}") is kind.work
