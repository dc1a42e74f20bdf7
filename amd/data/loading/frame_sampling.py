"""Sample the frames of a clip: pure functions from a frame count and a random generator to frame numbers.

Frames are numbered from 0. The rules follow VideoMAE and AMD (`dataset/datasets.py`); the official indices are recorded
in tests/golden/frame_sampling.json.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
import numpy.typing as npt

from amd.config import ClipConfig, DataConfig, FrameSampling, ViewsConfig
from amd.data.dataset.record import FrameChooser

Indices = npt.NDArray[np.int64]


class Draws(Protocol):
    """A source of random integers, such as random.Random."""

    def randrange(self, stop: int, /) -> int:
        """Return a uniform integer in [0, stop)."""
        ...


def strided(total: int, frames: int, step: int, draws: Draws) -> Indices:
    """Take every `step`-th frame from a random start, as in K400 pre-training.

    For a sample shorter than frames x step, sampling starts at frame 0, and the index stops advancing when the next
    index would reach the last frame, so that late frames repeat. (As in the official code, this is one frame early: in
    a sample of 41 frames, frame 40 is never used. This is preserved because the released weights were trained this
    way.)
    """
    _check(total)
    slack = total - frames * step + 1
    start = draws.randrange(slack) if slack > 0 else 0
    last = start + max(0, (total - 2 - start) // step) * step
    return (start + np.arange(frames, dtype=np.int64) * step).clip(max=last)


def window(total: int, frames: int, step: int, draws: Draws) -> Indices:
    """Spread `frames` frames over a random window of frames x step, as in SSv2 pre-training and K400 fine-tuning.

    The stride is not exactly `step`: 16 frames over a window of 32 are 32 / 15 apart. A shorter sample yields total //
    step frames spread over its whole length, then repeats the last of these frames.
    """
    _check(total)
    span = frames * step
    if total <= span:
        spread = np.linspace(0, total, num=total // step)
        index = np.concatenate([spread, np.full(frames - len(spread), float(total))])
        return index.clip(0, total - 1).astype(np.int64)
    stop = span + draws.randrange(total - span)
    return np.linspace(stop - span, stop, num=frames).clip(stop - span, stop - 1).astype(np.int64)


def segments(total: int, frames: int, draws: Draws) -> Indices:
    """Take a random frame from each of `frames` equal segments (SSv2 fine-tuning); short samples repeat frame 0."""
    _check(total)
    length = total // frames
    if length > 0:
        return np.array([i * length + draws.randrange(length) for i in range(frames)], dtype=np.int64)
    return np.concatenate([np.zeros(frames - total, dtype=np.int64), np.arange(total, dtype=np.int64)])


def dense_views(total: int, frames: int, step: int, views: int) -> list[Indices]:
    """Return `views` evenly spaced clips, each of every `step`-th frame, as in K400 testing.

    Short samples repeat their last frame. A single view is taken from the middle of the sample (the official code
    divides by zero in this case).
    """
    _check(total)
    index = np.arange(0, total, step, dtype=np.int64)
    index = np.pad(index, (0, max(0, frames - len(index))), mode="edge")
    slack = len(index) - frames
    starts = [int(i * slack / (views - 1)) for i in range(views)] if views > 1 else [slack // 2]
    return [index[start : start + frames] for start in starts]


def segment_views(total: int, frames: int, views: int) -> list[Indices]:
    """Interleave `views` clips over the whole sample, with one frame per segment, as in SSv2 testing.

    Each segment contributes the indices at its start and at 1/2, 1/3, … 1/views of its length. All indices are sorted
    together, and view i takes every `views`-th index, starting at i. Official runs use 2 views; larger numbers follow
    the same rule.
    """
    _check(total)
    segment = total / frames
    starts = [int(segment * x) for x in range(frames)]
    between = [int(segment / y + segment * x) for y in range(2, views + 1) for x in range(frames)]
    index = np.sort(np.array(starts + between, dtype=np.int64))
    return [index[view::views] for view in range(views)]


SAMPLERS: dict[FrameSampling, Callable[[int, int, int, Draws], Indices]] = {
    "strided": strided,
    "window": window,
    "segments": lambda total, frames, step, draws: segments(total, frames, draws),
}


def training_chooser(data: DataConfig, clip: ClipConfig, draws: Draws) -> FrameChooser:
    """Return the chooser for training, which samples frames as data.sampling specifies and draws anew on each call."""
    sample = SAMPLERS[data.sampling]
    return lambda total: sample(total, clip.frames, clip.sampling_rate_frames, draws)


def middle_chooser(clip: ClipConfig) -> FrameChooser:
    """Return the chooser for evaluation: the middle clip, without randomness."""
    return lambda total: dense_views(total, clip.frames, clip.sampling_rate_frames, views=1)[0]


def views_chooser(clip: ClipConfig, views: ViewsConfig) -> FrameChooser:
    """Return the chooser for testing: the frames of all temporal views, concatenated to (segments * T,)."""

    def choose(total: int) -> Indices:
        if views.sampling == "segments":
            return np.concatenate(segment_views(total, clip.frames, views.segments))
        return np.concatenate(dense_views(total, clip.frames, clip.sampling_rate_frames, views.segments))

    return choose


def _check(total: int) -> None:
    if total <= 0:
        # The official code returns frame -1 here, fails to read it and substitutes another sample.
        raise ValueError(f"cannot choose a frame from a sample of {total} frames")
