"""Tests for complete in-process fine-tuning runs: published classifiers, test results and interruptions."""

from __future__ import annotations

import csv
import io
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from amd.artifacts.weights import Card, load_classifier, load_encoder, save_encoder, whole_clips
from amd.config import ClipConfig, ConfigError, EncoderConfig, FinetuneConfig, validate, with_overrides
from amd.downstream.supervised.classification.learner import EMA
from amd.downstream.supervised.classification.run import finetune
from amd.models.classifier import Classifier
from amd.models.encoder import Encoder
from amd.storage import join, listdir, read_bytes, read_json, write_bytes
from amd.tokens import position_table
from amd.training.checkpoints.store import CheckpointStore
from amd.training.reporting.metrics_reader import read_metrics
from amd.training.reporting.progress import Event, NullWatcher
from amd.training.run_folder import RunResult
from amd.training.runs import launch
from tests.amd.downstream.supervised.classification.test_evaluation import multi_label_config
from tests.support.runs.finetuning import CLASSES, shaded_clips, shaded_images, tiny_finetuning
from tests.support.runs.tiny_runs import assert_same_bits, final_state


def run(config: FinetuneConfig) -> RunResult:
    return finetune(config, local=True, quiet=True)


def reversed_validation_config(folder: Path, **overrides: Any) -> FinetuneConfig:
    """Return a config whose validation labels are swapped, so that validation accuracy falls during training."""
    shaded_images(folder / "train", 24)
    shaded_images(folder / "val", 10, names=CLASSES[::-1], seed=1)
    shaded_images(folder / "test", 11, seed=2)
    return tiny_finetuning(
        folder,
        **{
            "name": "uninterrupted",
            "data__test": str(folder / "test"),
            "optim__ema_decay": 0.5,
            "evaluation__views": {"segments": 1, "crops": 3},
            **overrides,
        },
    )


UninterruptedRun = tuple[Path, FinetuneConfig, RunResult]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> UninterruptedRun:
    """Run once without interruptions, as the reference for the other tests."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    config = reversed_validation_config(folder)
    return folder, config, run(config)


def store_of(result: RunResult, config: FinetuneConfig) -> CheckpointStore:
    return CheckpointStore(join(result.run_folder, "checkpoints"), config.checkpoint)


def evaluations(result: RunResult) -> dict[int, float]:
    return {line["step"]: line["eval/top1"] for line in read_metrics(result.run_folder) if "eval/top1" in line}


def test_the_best_checkpoint_rather_than_the_last_is_tested_and_published(uninterrupted: UninterruptedRun) -> None:
    _, config, result = uninterrupted
    assert (result.state, result.steps) == ("succeeded", 12)
    figures = evaluations(result)
    assert list(figures) == [3, 6, 9, 12], "after every epoch"
    best = max(figures, key=lambda step: (figures[step], step))
    assert figures[best] > figures[12]
    assert best in store_of(result, config).committed()
    assert result.encoder_folder is not None
    classifier, card = load_classifier(result.encoder_folder)
    assert card.steps == best
    average = store_of(result, config).load(best).tensors[EMA]
    for name, value in classifier.state_dict().items():
        assert torch.equal(value, average[f"module.{name}"]), "the moving average is published"
    assert not torch.equal(classifier.head.weight, store_of(result, config).load(best).tensors["model"]["head.weight"])


def test_the_last_checkpoint_is_tested_and_published_on_request(tmp_path: Path) -> None:
    config = reversed_validation_config(tmp_path, evaluation__checkpoint="last", data__test=None)
    result = run(config)
    assert result.state == "succeeded", result.message
    figures = evaluations(result)
    assert figures[12] < max(figures.values()), "an earlier checkpoint is better on data.val"
    classifier, card = load_classifier(str(result.encoder_folder))
    average = store_of(result, config).load(12).tensors[EMA]
    assert torch.equal(classifier.head.weight, average["module.head.weight"])
    (score,) = card.scores
    assert (card.steps, score.settings["step"]) == (12, 12)
    assert (score.settings["checkpoint"], score.settings["selected_on_test"]) == ("last", False)


def test_the_card_records_the_head_the_score_and_the_pooling(uninterrupted: UninterruptedRun) -> None:
    folder, _, result = uninterrupted
    _, card = load_encoder(str(result.encoder_folder))
    assert (card.objective, card.pooling, card.run) == ("finetune", "mean_then_norm", "uninterrupted")
    assert card.head is not None
    assert (card.head.classes, card.head.labels, card.head.multi_label) == (2, ("bright", "dark"), False)
    (score,) = card.scores
    assert (score.protocol, score.samples, score.views) == ("test", 11, "1x3")
    assert score.data == str(folder / "test")
    assert score.settings["step"] == card.steps
    assert (score.settings["checkpoint"], score.settings["selected_on_test"]) == ("best", False)
    line = [line for line in read_metrics(result.run_folder) if "test/top1" in line][-1]
    assert line["test/top1"] == score.values["eval/top1"]


def accuracy(classifier: Classifier, card: Card, folder: Path) -> float:
    """Return the accuracy on 20x20 images resized with PIL; the three official crops of a square are identical."""
    correct = []
    names = sorted(path.name for path in folder.iterdir())
    for path in sorted(folder.rglob("*.png")):
        pixels = np.asarray(Image.open(path).resize((16, 16), Image.Resampling.BILINEAR))
        clip = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None, :, None]
        with torch.no_grad():
            prediction = classifier(*whole_clips(classifier.encoder, card.clip, clip)).argmax()
        correct.append(int(prediction) == names.index(path.parent.name))
    return 100 * sum(correct) / len(correct)


def test_the_published_classifier_reproduces_the_test_accuracy(uninterrupted: UninterruptedRun) -> None:
    folder, _, result = uninterrupted
    classifier, card = load_classifier(str(result.encoder_folder))
    assert accuracy(classifier, card, folder / "test") == pytest.approx(card.scores[0].values["eval/top1"])


def test_predictions_are_stored_per_view_sample_and_class(uninterrupted: UninterruptedRun) -> None:
    folder, _, result = uninterrupted
    found = join(result.run_folder, "test")
    views = pq.read_table(io.BytesIO(read_bytes(join(found, "views-0000.parquet")))).to_pylist()
    assert [(row["record"], row["segment"], row["crop"]) for row in views] == [
        (record, 0, crop) for record in range(11) for crop in range(3)
    ]
    samples = pq.read_table(io.BytesIO(read_bytes(join(found, "samples.parquet")))).to_pylist()
    assert [Path(row["sample"]).name for row in samples] == sorted_names(folder / "test")
    assert all(row["views"] == 3 and sum(row["probabilities"]) == pytest.approx(1) for row in samples)
    correct = sum(row["prediction"] == row["label"] for row in samples)
    figures = read_json(join(found, "result.json"))["figures"]
    assert figures["eval/top1"] == pytest.approx(100 * correct / 11)
    rows = list(csv.DictReader(io.StringIO(read_bytes(join(found, "classes.csv")).decode())))
    assert [(row["name"], row["samples"]) for row in rows] == [("bright", "5"), ("dark", "6")]
    matrix = [list(map(int, line.split(","))) for line in read_bytes(join(found, "confusion.csv")).decode().split()]
    assert sum(map(sum, matrix)) == 11
    assert matrix[0][0] + matrix[1][1] == correct


def sorted_names(folder: Path) -> list[str]:
    return [path.name for path in sorted(folder.rglob("*.png"))]


# Interruptions


class StopSender(NullWatcher):
    """Sends SIGTERM to this process at the first matching event."""

    def __init__(self, when: Callable[[Event], bool]) -> None:
        self._when: Callable[[Event], bool] | None = when
        self.warnings: list[str] = []

    def on_event(self, event: Event) -> None:
        if event["kind"] == "warning":
            self.warnings.append(event["text"])
        if self._when is not None and self._when(event):
            self._when = None
            os.kill(os.getpid(), signal.SIGTERM)


def run_until(config: FinetuneConfig, monkeypatch: pytest.MonkeyPatch, when: Callable[[Event], bool]) -> RunResult:
    with monkeypatch.context() as patched:
        patched.setattr(launch, "choose_watcher", lambda quiet: StopSender(when))
        return finetune(config, local=True)


def assert_same_run(uninterrupted: UninterruptedRun, config: FinetuneConfig, result: RunResult) -> None:
    _, reference_config, whole = uninterrupted
    assert (result.state, result.steps) == ("succeeded", 12)
    assert evaluations(result) == evaluations(whole)
    assert_same_bits(final_state(result.run_folder, config), final_state(whole.run_folder, reference_config))
    ours, theirs = load_classifier(str(result.encoder_folder)), load_classifier(str(whole.encoder_folder))
    assert_same_bits(dict(ours[0].state_dict()), dict(theirs[0].state_dict()))
    assert ours[1].scores[0].values == theirs[1].scores[0].values
    assert ours[1].steps == theirs[1].steps


def test_resuming_after_a_stop_during_training_validation_or_test_is_bit_identical(
    uninterrupted: UninterruptedRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = with_overrides(uninterrupted[1], {"name": "stopped"})
    # A stop sent after step 4 takes effect in step 5; one sent after step 6 takes effect in the following validation.
    for steps, when in (
        (5, lambda event: event["kind"] == "step" and event["step"] == 4),
        (6, lambda event: event["kind"] == "step" and event["step"] == 6),
        (12, lambda event: event["kind"] == "note" and event["text"].startswith("testing")),
    ):
        result = run_until(config, monkeypatch, when)
        assert (result.state, result.reason, result.steps) == ("cancelled", "cancelled_by_user", steps)
        assert (6 in evaluations(result)) is (steps == 12), "a stop does not wait for validation"
        assert store_of(result, config).committed()[-1] == steps
    assert_same_run(uninterrupted, config, run(config))


def test_a_run_that_crashed_during_the_test_repeats_the_test(uninterrupted: UninterruptedRun, tmp_path: Path) -> None:
    folder, config, result = uninterrupted
    shutil.copytree(folder / "storage", tmp_path / "storage")
    config = with_overrides(config, {"storage": str(tmp_path / "storage")})
    crashed = tmp_path / "storage" / "runs" / "uninterrupted"
    shutil.rmtree(tmp_path / "storage" / "encoders")
    (crashed / "result.json").unlink()
    (crashed / "test" / "result.json").unlink()
    write_bytes(str(crashed / "test" / "views-0003.parquet"), b"of a removed fourth worker")
    repeated = run(config)
    assert_same_run(uninterrupted, config, repeated)
    assert listdir(str(crashed / "test")) == listdir(join(result.run_folder, "test"))


def test_a_damaged_best_checkpoint_is_replaced_by_the_second_best(
    uninterrupted: UninterruptedRun, tmp_path: Path
) -> None:
    folder, config, _ = uninterrupted
    shutil.copytree(folder / "storage", tmp_path / "storage")
    config = with_overrides(config, {"storage": str(tmp_path / "storage")})
    store = CheckpointStore(str(tmp_path / "storage" / "runs" / "uninterrupted" / "checkpoints"), config.checkpoint)
    best, second, *_ = store.ranked(store.committed())
    (Path(store.url(best)) / "ema.safetensors").write_bytes(b"damaged")
    (tmp_path / "storage" / "runs" / "uninterrupted" / "result.json").unlink()
    _, card = load_classifier(str(run(config).encoder_folder))
    assert card.steps == card.scores[0].settings["step"] == second


def test_a_finished_run_returns_its_result_and_rejects_a_different_config(uninterrupted: UninterruptedRun) -> None:
    _, config, result = uninterrupted
    assert run(config) == result
    with pytest.raises(ConfigError, match=r"name=uninterrupted: .*augment\.mixup was 0\.8, now 0\.2.*another name"):
        run(with_overrides(config, {"augment.mixup": 0.2}))


# Other data and initial weights


def publish(folder: Path, encoder: dict[str, Any], clip: dict[str, Any]) -> Encoder:
    """Publish a pre-trained encoder, as a run would, and return it."""
    shape, config = validate(ClipConfig, clip), validate(EncoderConfig, encoder)
    torch.manual_seed(3)
    network = Encoder(config, shape.grid, shape.token_values)
    card = Card(id=folder.name, encoder=config, clip=shape, objective="amd", weights_license="CC-BY-NC-4.0")
    save_encoder(str(folder), network, card)
    return network


def test_a_video_classifier_can_start_from_an_encoder_trained_on_fewer_and_smaller_frames(tmp_path: Path) -> None:
    small = {"frames": 2, "size": 8, "patch": 4, "tubelet": 2}
    encoder = {"width": 24, "depth": 2, "heads": 3}
    initial = publish(tmp_path / "storage" / "encoders" / "pretrained", encoder, small)
    shaded_clips(tmp_path / "clips", 8)
    config = tiny_finetuning(
        tmp_path,
        name="clips",
        weights="pretrained",
        clip={"frames": 4, "size": 16, "patch": 4, "tubelet": 2, "sampling_rate_frames": 1},
        data__train=str(tmp_path / "clips"),
        data__val=None,
        data__test=str(tmp_path / "clips"),
        data__repeats=2,
        data__sampling="window",
        data__rand_augment="rand-m7-n4-mstd0.5-inc1",
        optim__batch_size=4,
        optim__base_lr=1e-9,
        scaling__micro_batch=3,
        schedule={"steps": 3, "warmup_steps": 1},
        evaluation__views={"segments": 2, "crops": 3, "sampling": "segments"},
    )
    result = run(config)
    assert result.state == "succeeded", result.message
    classifier, card = load_classifier(str(result.encoder_folder))
    assert (card.weights_license, card.steps) == ("CC-BY-NC-4.0", 3)
    assert card.start is not None
    assert card.start["id"] == "pretrained"
    assert card.scores[0].views == "2x3"
    assert read_json(join(result.run_folder, "test", "result.json"))["samples"] == 8
    for name, value in initial.state_dict().items():
        if not name.startswith("norm."):
            torch.testing.assert_close(classifier.encoder.state_dict()[name], value, rtol=0, atol=1e-6)


def test_an_image_classifier_starts_from_a_class_token_encoder_of_a_different_size(tmp_path: Path) -> None:
    encoder = {"width": 24, "depth": 2, "heads": 3, "class_token": True, "positions": "sincos_2d"}
    publish(tmp_path / "elsewhere", encoder, {"frames": 1, "size": 24, "patch": 4, "tubelet": 1})
    config = tiny_finetuning(
        tmp_path, name="token", weights=str(tmp_path / "elsewhere"), encoder=encoder, schedule={"steps": 2}
    )
    result = run(config)
    assert result.state == "succeeded", result.message
    classifier, card = load_classifier(str(result.encoder_folder))
    assert classifier.encoder.class_token is not None
    assert card.encoder.position_grid == (6, 6), "of the initial weights"
    expected = position_table("sincos_2d", config.clip.grid, 24, origin=(6, 6))
    assert torch.equal(classifier.encoder.positions, expected)
    assert accuracy(classifier, card, tmp_path / "val") == pytest.approx(card.scores[0].values["eval/top1"])


def test_a_multi_label_classifier_is_trained_scored_and_published(tmp_path: Path) -> None:
    config = multi_label_config(tmp_path, name="several", schedule={"steps": 3})
    assert config.checkpoint.best_metric == "eval/map"
    result = run(config)
    assert result.state == "succeeded", result.message
    _, card = load_classifier(str(result.encoder_folder))
    assert card.head is not None
    assert (card.head.classes, card.head.multi_label) == (3, True)
    assert list(card.scores[0].values) == ["eval/map", "eval/unreadable"]
    assert listdir(join(result.run_folder, "test")) == [
        "bad_samples.jsonl",
        "damaged_samples.jsonl",
        "result.json",
        "samples.parquet",
        "views-0000.parquet",
    ]
    samples = pq.read_table(io.BytesIO(read_bytes(join(result.run_folder, "test", "samples.parquet")))).to_pylist()
    assert [row["label"] for row in samples] == [[0], [0, 1], [2], []]


def test_classes_are_counted_and_matched_by_folder_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shaded_images(tmp_path / "train", 24)
    shaded_images(tmp_path / "val", 6, names=("dark", "dark"), seed=1)  # class 1 only
    (tmp_path / "val" / "dark" / "000.png").write_bytes(b"not a picture")
    config = tiny_finetuning(tmp_path, name="named", head__classes=None, schedule={"steps": 3})
    watcher = StopSender(lambda event: False)
    monkeypatch.setattr(launch, "choose_watcher", lambda quiet: watcher)
    result = finetune(config, local=True)
    assert result.state == "succeeded", result.message
    classifier, card = load_classifier(str(result.encoder_folder))
    assert classifier.head.out_features == 2
    samples = pq.read_table(io.BytesIO(read_bytes(join(result.run_folder, "test", "samples.parquet")))).to_pylist()
    assert {row["label"] for row in samples} == {1}
    classes = read_bytes(join(result.run_folder, "test", "classes.csv")).decode().splitlines()
    assert [line.split(",")[1:3] for line in classes[1:]] == [["bright", "0"], ["dark", "5"]]
    assert card.scores[0].settings["unreadable"] == 1
    assert card.scores[0].settings["selected_on_test"] is True
    assert any("is also the validation set: the best checkpoint was chosen on it" in text for text in watcher.warnings)
    assert watcher.warnings
    assert "data.val: 1 of 6 samples cannot be read and count as wrong" in watcher.warnings[0]
    assert "000.png" in watcher.warnings[0]
