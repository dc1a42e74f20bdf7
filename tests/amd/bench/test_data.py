from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from amd.bench import data as bench
from amd.bench.tables import data_table
from amd.config import ClipConfig, DataConfig
from amd.data.loading import transforms

CLIP = ClipConfig(frames=4, size=32, patch=16, sampling_rate_frames=2)
VIDEO_ONLY = {"decord_ms", "speed_against_decord", "speed_against_official_repeats_4"}


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench")
    bench.write_videos(folder, gop=6, count=3, seconds=1, size=(48, 64))
    (folder / "clip3.mp4").write_bytes(b"not a video")
    return folder


@pytest.mark.slow
def test_a_video_benchmark_measures_every_stage_and_counts_bad_samples(videos: Path) -> None:
    result = bench.bench_data(DataConfig(train=str(videos), format="video_folder"), CLIP, samples=12, target=1e6)
    (one,) = result["sets"]
    assert json.loads(json.dumps(result)) == result
    assert 0 < one["bad"] < 12
    assert one["samples"] + one["bad"] <= 14
    numbers = {key: value for key, value in one.items() if key not in ("name", "bad", "samples")}
    assert all(value is not None and value > 0 for value in numbers.values()), numbers
    assert one["loader_workers"] == bench.recommend_workers(1e6, one["clips_per_s"]) > 1
    assert "speed-up over bare decord" in str(data_table(result))


def test_a_benchmark_without_decord_omits_the_comparison(videos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "decord", None)
    (one,) = bench.bench_data(DataConfig(train=str(videos), format="video_folder"), CLIP, samples=4)["sets"]
    assert {key for key, value in one.items() if value is None} == {*VIDEO_ONLY, "loader_workers"}


def test_an_image_benchmark_omits_the_comparison_with_decord(tmp_path: Path) -> None:
    for number in range(4):
        pixels = np.random.default_rng(number).integers(0, 256, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    clip = ClipConfig(frames=1, size=32, patch=16, tubelet=1)
    (one,) = bench.bench_data(DataConfig(train=str(tmp_path), crop="random_resized"), clip, samples=4)["sets"]
    assert {key for key, value in one.items() if value is None} == {*VIDEO_ONLY, "loader_workers"}


def test_unreadable_data_yields_counts_but_no_rates(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"")
    (one,) = bench.bench_data(DataConfig(train=str(tmp_path), format="video_folder"), CLIP, samples=2, target=10)[
        "sets"
    ]
    assert one["bad"] == 4
    assert one["clips_per_s"] is one["loader_workers"] is None


def test_augmentation_matches_the_official_code() -> None:
    frames = np.random.default_rng(0).integers(0, 256, (4, 60, 80, 3), dtype=np.uint8)
    official = bench._official_clip(frames, CLIP, random.Random(1))
    ours = transforms.augment(torch.from_numpy(frames), DataConfig(train="x"), CLIP, random.Random(1))
    mean, std = (torch.tensor(values)[:, None, None, None] for values in (CLIP.mean, CLIP.std))
    normalised = (transforms.clip_view(ours).float() / 255 - mean) / std
    assert (official - normalised).abs().max() < 1.01 / 255 / min(CLIP.std)


def test_recommended_workers_include_25_percent_headroom() -> None:
    assert bench.recommend_workers(100, 50) == 3
    assert bench.recommend_workers(1, 500) == 1
