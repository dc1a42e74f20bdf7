"""Tests for detection runs on synthetic videos: training, frame mAP, result files, resumption and invalid input."""

from __future__ import annotations

import csv
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from amd.artifacts.model_card import model_card
from amd.artifacts.weights import load_classifier, whole_clips
from amd.config import ConfigError, DetectionConfig, with_overrides
from amd.downstream.__main__ import main
from amd.downstream.supervised.detection.frame_map import AnnotatedActions, DetectedActions, average_precisions
from amd.downstream.supervised.detection.model import load_detector
from amd.downstream.supervised.detection.run import detect
from amd.storage import join, read_json
from amd.training.reporting.metrics_reader import read_metrics
from amd.training.run_folder import RunResult
from tests.amd.training.runs.test_launch import send_signal_at_step
from tests.support.data.ava_videos import DOWN, NAMES, RIGHT, draw, label_map, tiny_detection
from tests.support.runs.tiny_runs import assert_same_bits, final_state


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[DetectionConfig, RunResult]:
    config = tiny_detection(draw(tmp_path_factory.mktemp("scenes")), name="whole")
    return config, detect(config, local=True, quiet=True)


def test_a_run_publishes_a_detector_with_its_score(whole: tuple[DetectionConfig, RunResult]) -> None:
    config, result = whole
    assert (result.state, result.steps) == ("succeeded", 6)
    assert result.encoder_folder is not None
    detector, card = load_detector(result.encoder_folder)
    assert (card.objective, card.pooling, card.final_norm) == ("detection", "mean", True)
    assert card.head is not None
    assert (card.head.classes, card.head.multi_label, card.head.labels) == (3, True, tuple(NAMES.values()))
    (score,) = card.scores
    assert (score.protocol, score.samples) == ("detection", 4)
    assert score.values["eval/map"] == result.figures["test/map"]
    assert card.best_score == ("eval/map", score.values["eval/map"])
    clips = torch.zeros(2, 3, 4, 32, 32, dtype=torch.uint8)
    boxes = torch.tensor([[0.0, 0, 0, 16, 16], [1.0, 0, 0, 32, 32], [1.0, 8, 8, 16, 16]])
    assert detector(*whole_clips(detector.encoder, config.clip, clips), boxes).shape == (3, 3)
    assert "load_detector" in model_card(card)
    with pytest.raises(ConfigError, match="this head classifies boxes"):
        load_classifier(result.encoder_folder)


def test_every_epoch_is_scored_and_the_best_checkpoint_is_tested(whole: tuple[DetectionConfig, RunResult]) -> None:
    _, result = whole
    lines = read_metrics(result.run_folder)
    scored = {line["step"]: line["eval/map"] for line in lines if "eval/map" in line}
    assert list(scored) == [3, 6]
    assert result.figures["test/map"] == max(scored.values())


def test_the_written_results_reproduce_the_score(whole: tuple[DetectionConfig, RunResult]) -> None:
    """Recompute the published score from results.csv and the annotations."""
    config, result = whole
    assert config.data.val is not None
    truth = list(csv.reader(Path(config.data.val).read_text().splitlines()))
    found = list(csv.reader(Path(result.run_folder, "test", "results.csv").read_text().splitlines()))
    assert len(found) == 4 * 2 * 3  # key frames x boxes above the minimum score x actions
    assert {tuple(row[:2]) for row in found} == {tuple(row[:2]) for row in truth}
    frames = {key: number for number, key in enumerate(sorted({tuple(row[:2]) for row in truth}))}

    def columns(rows: list[list[str]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        boxes = np.array([[float(value) for value in row[2:6]] for row in rows])
        return np.array([frames[row[0], row[1]] for row in rows]), boxes, np.array([int(row[6]) for row in rows])

    scores = np.array([float(row[7]) for row in found])
    precisions = average_precisions(
        AnnotatedActions(*columns(truth)), DetectedActions(*columns(found), scores), [1, 2, 3]
    )
    assert 100 * np.mean(list(precisions.values())) == pytest.approx(result.figures["test/map"])
    classes = list(csv.DictReader(Path(result.run_folder, "test", "classes.csv").read_text().splitlines()))
    assert [row["annotated"] for row in classes] == ["4", "0", "4"]
    assert classes[1]["average_precision"] == ""  # never annotated, so not scored
    assert float(classes[0]["average_precision"]) == pytest.approx(100 * precisions[RIGHT], abs=1e-3)
    assert set(precisions) == {RIGHT, DOWN}
    assert read_json(join(result.run_folder, "test", "result.json"))["samples"] == 4


def test_resuming_a_stopped_run_is_bit_identical(
    whole: tuple[DetectionConfig, RunResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, uninterrupted = whole
    stopped = with_overrides(config, {"name": "stopped"})
    with monkeypatch.context() as patched:
        send_signal_at_step(patched, 2, signal.SIGTERM)
        result = detect(stopped, local=True)
    assert result.state == "cancelled"
    assert 2 <= result.steps < 6
    result = detect(stopped, local=True, quiet=True)
    assert (result.state, result.steps) == ("succeeded", 6)
    assert_same_bits(final_state(result.run_folder, stopped), final_state(uninterrupted.run_folder, config))
    assert result.figures["test/map"] == uninterrupted.figures["test/map"]


def test_loader_workers_do_not_change_the_run(whole: tuple[DetectionConfig, RunResult]) -> None:
    config, uninterrupted = whole
    with_workers = with_overrides(
        config, {"name": "apart", "data.loader_workers": 1, "data.val": None, "data.boxes": None}
    )
    result = detect(with_workers, local=True, quiet=True)
    assert_same_bits(final_state(result.run_folder, with_workers), final_state(uninterrupted.run_folder, config))


def test_a_detector_starts_from_a_published_encoder(whole: tuple[DetectionConfig, RunResult]) -> None:
    config, _ = whole
    short = {"schedule.steps": 1, "schedule.warmup_steps": 0, "data.val": None, "data.boxes": None}
    result = detect(with_overrides(config, {"name": "next", "weights": "whole", **short}), local=True, quiet=True)
    assert result.encoder_folder is not None
    _, card = load_detector(result.encoder_folder)
    assert card.start is not None
    assert card.start["id"] == "whole"
    assert card.scores == ()  # there is no data to evaluate it on


def test_key_frames_of_a_broken_video_are_listed_and_count_as_missed(tmp_path: Path) -> None:
    draw(tmp_path)
    (tmp_path / "v7.mp4").write_bytes((tmp_path / "v7.mp4").read_bytes()[:900])
    config = tiny_detection(tmp_path, name="broken", schedule__steps=3, data__boxes=None)
    result = detect(config, local=True, quiet=True)
    assert result.figures["test/unreadable"] == 2
    assert result.figures["test/map"] <= 50 + 1e-9  # half of the annotations cannot be detected
    listed = Path(result.run_folder, "test", "bad_samples.jsonl").read_text()
    assert "v7.mp4@1" in listed
    assert "v7.mp4@2" in listed


def test_too_many_broken_videos_stop_the_run(tmp_path: Path) -> None:
    draw(tmp_path)
    (tmp_path / "v0.mp4").write_bytes(b"no video")
    result = detect(tiny_detection(tmp_path, name="broken"), local=True, quiet=True)
    assert result.state == "failed"
    assert "data.max_bad_fraction" in result.message
    assert "v0.mp4@1" in result.message


def test_the_command_runs_a_config_and_reports_invalid_input(
    whole: tuple[DetectionConfig, RunResult], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config, _ = whole
    file = tmp_path / "detect.json"
    file.write_text(config.model_dump_json())
    assert main(["detect", "--config", str(file), "--local", "--json"]) == 0  # the run has already succeeded
    assert '"run_id":"whole"' in capfd.readouterr().out
    (tmp_path / "map.pbtxt").write_text(label_map(RIGHT))
    args = [f"data.label_map={tmp_path / 'map.pbtxt'}", "name=other", "--local"]
    assert main(["detect", "--config", str(file), *args]) == 2
    assert "train.csv:2: action '3' is not in data.label_map, which contains 1" in capfd.readouterr().err
    assert main(["detect", "--preset", "ava-vit-s"]) == 2
    stderr = capfd.readouterr().err
    assert "data.label_map: presets contain no data; set data.label_map=<ava_action_list_v2.2.pbtxt>" in stderr
    assert "weights: this preset needs an AMD ViT-S pre-trained on K400" in stderr
