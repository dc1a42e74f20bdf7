from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from amd.artifacts.weights import Card, Score, load_card, save_encoder, write_card
from amd.config import ConfigError, ProbeConfig, TrainConfig, validate
from amd.downstream.arrays import Features
from amd.downstream.embedding import cache
from amd.downstream.embedding.features import read_labelled
from amd.downstream.probing.classifiers import probe
from amd.downstream.probing.run import add_scores, run_probe
from amd.models.encoder import Encoder
from amd.storage import listdir, read_json
from tests.amd.downstream.embedding.test_features import write_images
from tests.support.data.videos import pictures, write_video
from tests.support.runs.configs import tiny_image_config, tiny_video_config


def publish(storage: Path, config: TrainConfig, **card: Any) -> Encoder:
    torch.manual_seed(0)
    encoder = Encoder(config.student.encoder, config.clip.grid, config.clip.token_values).eval()
    facts = Card(id="tiny", encoder=config.student.encoder, clip=config.clip, **card)
    save_encoder(str(storage / "encoders" / "tiny"), encoder, facts)
    return encoder


@pytest.fixture
def images(tmp_path: Path) -> Callable[..., ProbeConfig]:
    """Publish a tiny encoder under `tmp_path` and write dark and bright images to probe it on."""
    publish(tmp_path, tiny_image_config())
    write_images(tmp_path / "train", 40)
    write_images(tmp_path / "test", 20, seed=1)

    def config(**overrides: Any) -> ProbeConfig:
        values: dict[str, Any] = {
            "encoder": "tiny",
            "data": {"train": str(tmp_path / "train"), "test": str(tmp_path / "test"), "loader_workers": 0},
            "kinds": ["knn", "linear", "few_shot"],
            "linear": {"epochs": 20, "warmup_epochs": 2},
            "few_shot": {"labels": [1, 5], "draws": 2},
            "scaling": {"device": "cpu"},
            "storage": str(tmp_path),
        }
        for key, value in overrides.items():
            section, _, field = key.rpartition("__")
            (values[section] if section else values)[field] = value
        return validate(ProbeConfig, values)

    return config


def test_scores_of_all_probes_are_written_to_the_card(images: Callable[..., ProbeConfig], tmp_path: Path) -> None:
    report = run_probe(images())
    card = load_card(str(tmp_path / "encoders" / "tiny"))
    assert card.scores == report.scores
    assert [score.protocol for score in card.scores] == ["knn", "linear", "few_shot"]
    values = {name: value for score in card.scores for name, value in score.values.items()}
    assert values["eval/knn_top1"] == values["eval/top1"] == 100  # even a random encoder separates brightness
    assert {"eval/1_shot_top1", "eval/1_shot_top1_std", "eval/5_shot_top1", "eval/5_shot_top1_std"} < set(values)
    assert "eval/top5" not in values  # meaningless for two classes
    for score in card.scores:
        assert (score.data, score.samples, score.views) == (str(tmp_path / "test"), 20, "1x1")
        assert score.settings["learnt_on"]["data"] == str(tmp_path / "train")
        assert score.settings["learnt_on"]["samples"] == 40


def test_a_second_probe_reads_cached_features_and_replaces_its_scores(
    images: Callable[..., ProbeConfig], tmp_path: Path
) -> None:
    first = run_probe(images())
    for file in (*(tmp_path / "train").rglob("*.png"), *(tmp_path / "test").rglob("*.png")):
        file.write_bytes(b"cannot be decoded any more")
    second = run_probe(images(kinds=["linear"]))
    assert second.scores[0].values == first.scores[1].values
    card = load_card(str(tmp_path / "encoders" / "tiny"))
    assert [score.protocol for score in card.scores] == ["knn", "few_shot", "linear"]
    assert len(listdir(str(tmp_path / "features"))) == 2


def test_features_are_not_cached_when_the_cache_is_off(images: Callable[..., ProbeConfig], tmp_path: Path) -> None:
    report = run_probe(images(cache=False, kinds=["knn"]))
    assert listdir(str(tmp_path / "features")) == []
    assert report.scores[0].values["eval/knn_top1"] == 100


def test_scores_on_other_data_or_with_other_protocols_are_preserved(tmp_path: Path) -> None:
    publish(tmp_path, tiny_image_config())
    url = str(tmp_path / "encoders" / "tiny")
    old = [Score(protocol=p, data=d, samples=1, values={}) for p in ("knn", "linear") for d in ("a", "b")]
    write_card(url, load_card(url).model_copy(update={"scores": tuple(old)}))
    new = Score(protocol="knn", data="b", samples=2, values={"eval/knn_top1": 1.0})
    add_scores(url, [new])
    assert load_card(url).scores == (old[0], old[2], old[3], new)


@pytest.mark.slow
def test_real_digits_are_probed_as_in_the_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores are the same whether features are streamed through the cache or computed with all clips in memory."""
    monkeypatch.setenv("AMD_DEMO_DIR", str(tmp_path / "demo"))
    monkeypatch.setattr(cache, "ROWS", 150)
    train = tiny_image_config(clip__size=32, clip__patch=8)
    encoder = publish(tmp_path, train)
    config = validate(
        ProbeConfig,
        {
            "encoder": "tiny",
            "data": {"train": "demo:digits/select", "test": "demo:digits/test", "loader_workers": 0},
            "linear": {"method": "logistic"},
            "scaling": {"device": "cpu"},
            "storage": str(tmp_path),
        },
    )
    report = run_probe(config)

    def in_memory(url: str) -> Features:
        labelled = read_labelled(config.data.model_copy(update={"train": url}), train.clip)
        with torch.inference_mode():
            tokens = encoder(*_tokens(encoder, train, labelled.clips)).final
        assert tokens is not None
        return Features(tokens[:, 1:].mean(dim=1).numpy(), labelled.labels)

    expected = probe(in_memory("demo:digits/select"), in_memory("demo:digits/test"))
    found = {name: value for score in report.scores for name, value in score.values.items()}
    assert found == pytest.approx(expected, abs=0.5)  # rounding depends on the batch
    assert found["eval/top1"] > 50


def _tokens(encoder: Encoder, train: TrainConfig, clips: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    from amd.artifacts.weights import whole_clips

    return whole_clips(encoder, train.clip, clips)


def test_pooling_and_interpolation_are_taken_from_the_card(images: Callable[..., ProbeConfig], tmp_path: Path) -> None:
    plain = run_probe(images(kinds=["knn"]))
    publish(tmp_path, tiny_image_config(), pooling="mean_then_norm", interpolation="bicubic")
    other = run_probe(images(kinds=["knn"]))
    assert plain.scores[0].settings["pooling"] == "mean"
    assert other.scores[0].settings["pooling"] == "mean_then_norm"
    keys = [read_json(str(path)) for path in (tmp_path / "features").glob("*/manifest.json")]
    assert {(key["key"]["pooling"], key["key"]["interpolation"]) for key in keys} == {
        ("mean", "bilinear"),
        ("mean_then_norm", "bicubic"),
    }


@pytest.mark.parametrize("augment", ["image", "data"])
def test_a_head_is_trained_on_augmented_images(augment: str, images: Callable[..., ProbeConfig]) -> None:
    settings = {"augment": augment, "epochs": 4, "warmup_epochs": 1, "batch_size": 20, "base_lr": 1.0}
    first, again = (run_probe(images(kinds=["linear"], linear=settings)) for _ in range(2))
    assert first.scores[0].values == again.scores[0].values == {"eval/top1": 100.0}
    assert first.scores[0].settings["augment"] == augment


def test_short_videos_are_padded_and_broken_videos_are_skipped(tmp_path: Path) -> None:
    """A video shorter than the clip is padded; one without frames is skipped, counted and reported."""
    clip = tiny_video_config(clip__sampling_rate_frames=2)  # 4 frames, spanning 7 frames of the video
    publish(tmp_path, clip)
    lines = []
    for n in range(6):
        frames = pictures(2 if n < 2 else 9, seed=n)
        write_video(tmp_path / f"{n}.mp4", [f // 3 + (170 if n % 2 else 0) for f in frames])
        lines.append(f"{n}.mp4 {n % 2}\n")
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "list.txt").write_text("".join([*lines, "empty.mp4 0\n"]))
    config = validate(
        ProbeConfig,
        {
            "encoder": "tiny",
            "data": {
                "train": str(tmp_path / "list.txt"),
                "test": str(tmp_path / "list.txt"),
                "loader_workers": 0,
                "max_bad_fraction": 0.2,
            },
            "kinds": ["knn", "linear"],
            "knn": {"neighbours": 1},
            "linear": {"augment": "video", "epochs": 2, "warmup_epochs": 0, "batch_size": 3},
            "scaling": {"device": "cpu"},
            "storage": str(tmp_path),
        },
    )
    report = run_probe(config)
    assert [score.samples for score in report.scores] == [6, 6]
    assert report.scores[0].values["eval/knn_top1"] == 100
    assert {bad["location"] for bad in report.left_out} == {str(tmp_path / "empty.mp4")}
    manifests = [read_json(str(path)) for path in (tmp_path / "features").glob("*/manifest.json")]
    assert [bad["record"] for facts in manifests[0]["files"].values() for bad in facts["left_out"]] == [6]


def test_a_diverged_encoder_is_rejected(images: Callable[..., ProbeConfig], tmp_path: Path) -> None:
    config = tiny_image_config()
    encoder = Encoder(config.student.encoder, config.clip.grid, config.clip.token_values)
    torch.nn.init.constant_(encoder.norm.weight, float("nan"))
    url = str(tmp_path / "encoders" / "tiny")
    save_encoder(url, encoder, load_card(url))
    with pytest.raises(ConfigError, match="produces NaN or infinite features"):
        run_probe(images())


def test_a_class_with_too_few_samples_is_rejected_before_reading(images: Callable[..., ProbeConfig]) -> None:
    with pytest.raises(ConfigError, match=r"few_shot.labels=\[1, 21\].*class 0 \(a\) has 20, 1 \(b\) has 20"):
        run_probe(images(few_shot__labels=[1, 21]))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"linear": {"method": "logistic", "augment": "image"}}, "linear.augment=image: linear.method=logistic"),
        ({"linear": {"epochs": 5}}, "linear.warmup_epochs=10 must not be above epochs=5"),
        ({"few_shot": {"labels": [0, 5]}}, r"few_shot.labels=\[0, 5\] must be"),
        ({"kinds": []}, "kinds"),
        ({"kinds": ["nearest"]}, "kinds.0='nearest'"),
        ({"data": {"train": "x"}}, "data.test: required"),
    ],
)
def test_invalid_settings_are_rejected(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(ProbeConfig, {"encoder": "e", "data": {"train": "a", "test": "b"}, **values})
