from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from amd.config import ClipConfig, DataConfig
from amd.data.loading import frame_sampling


class OfficialDraws:
    """Draws numbers with a NumPy random state, as the official code does with np.random.seed and np.random.randint."""

    def __init__(self, seed: int) -> None:
        self.state = np.random.RandomState(seed)

    def randrange(self, stop: int, /) -> int:
        return int(self.state.randint(stop))


@pytest.fixture(scope="module")
def cases(golden: Path) -> dict[str, list[dict[str, Any]]]:
    return dict(json.loads((golden / "frame_sampling.json").read_text()))


def test_strided_sampling_matches_official_k400_pretraining(cases: dict[str, list[dict[str, Any]]]) -> None:
    for case in cases["pretrain_k400"]:
        got = frame_sampling.strided(case["num_frames"], 16, case["step"], OfficialDraws(case["np_seed"]))
        assert got.tolist() == case["frames"], case


def test_window_sampling_matches_official_ssv2_pretraining_and_k400_finetuning(
    cases: dict[str, list[dict[str, Any]]],
) -> None:
    for case in cases["ssv2_raw_pretrain"] + cases["finetune_train"]:
        got = frame_sampling.window(case["num_frames"], 16, case["step"], OfficialDraws(case["np_seed"]))
        assert case.get("error") is None
        assert got.tolist() == case["frames"], case


def test_segment_sampling_matches_official_ssv2_finetuning(cases: dict[str, list[dict[str, Any]]]) -> None:
    for case in cases["ssv2_raw_finetune_train"]:
        got = frame_sampling.segments(case["num_frames"], 16, OfficialDraws(case["np_seed"]))
        assert got.tolist() == case["frames"], case


def test_evaluation_views_match_the_official_code(cases: dict[str, list[dict[str, Any]]]) -> None:
    for case in cases["finetune_test"]:
        views = frame_sampling.dense_views(case["num_frames"], 16, case["step"], case["num_segment"])
        assert [view.tolist() for view in views] == case["clips"], case
    for case in cases["ssv2_raw_finetune_test"]:
        views = frame_sampling.segment_views(case["num_frames"], 16, 2)
        assert [view.tolist() for view in views] == case["clips"], case
        assert sorted(np.concatenate(views).tolist()) == case["frames"]


def _reference_strided(total: int, frames: int, step: int, start: int) -> list[int]:
    """Apply the official rule: advance a 1-based offset as long as the next offset is below `total`."""
    offset, index = start + 1, []
    for _ in range(frames):
        index.append(offset - 1)
        if offset + step < total:
            offset += step
    return index


@given(st.integers(1, 200), st.integers(1, 20), st.integers(1, 8), st.integers(0, 1000))
def test_strided_sampling_matches_the_official_loop(total: int, frames: int, step: int, seed: int) -> None:
    got = frame_sampling.strided(total, frames, step, random.Random(seed))
    assert got.tolist() == _reference_strided(total, frames, step, int(got[0]))


@given(st.integers(1, 400), st.integers(1, 32), st.integers(1, 8), st.integers(1, 5), st.integers(0, 1000))
def test_every_sampler_returns_the_requested_number_of_valid_frames_in_order(
    total: int, frames: int, step: int, views: int, seed: int
) -> None:
    draws = random.Random(seed)
    clips = [
        frame_sampling.strided(total, frames, step, draws),
        frame_sampling.window(total, frames, step, draws),
        frame_sampling.segments(total, frames, draws),
        *frame_sampling.dense_views(total, frames, step, views),
        *frame_sampling.segment_views(total, frames, views),
    ]
    for clip in clips:
        assert clip.dtype == np.int64
        assert clip.shape == (frames,)
        assert clip.min() >= 0
        assert clip.max() < total
        assert (np.diff(clip) >= 0).all()


def test_a_sample_without_frames_is_rejected() -> None:
    draws = random.Random(0)
    for choose in (
        lambda: frame_sampling.strided(0, 16, 4, draws),
        lambda: frame_sampling.window(0, 16, 4, draws),
        lambda: frame_sampling.dense_views(0, 16, 4, 5),
    ):
        with pytest.raises(ValueError, match="0 frames"):
            choose()


def test_the_sampling_option_selects_the_sampler() -> None:
    clip = ClipConfig(frames=16, sampling_rate_frames=2)
    for name, sampler in frame_sampling.SAMPLERS.items():
        choose = frame_sampling.training_chooser(DataConfig(train="x", sampling=name), clip, random.Random(5))
        assert choose(60).tolist() == sampler(60, 16, 2, random.Random(5)).tolist()
    assert frame_sampling.middle_chooser(clip)(60).tolist() == list(range(14, 46, 2))
