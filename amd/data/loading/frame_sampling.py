"""Which frames of a sample make a clip. Pure functions: a frame count and a source of draws in, frame numbers out.

Frames count from 0. Knows nothing of files or pixels. The rules are those of VideoMAE and AMD (`dataset/datasets.py`),
their indices reproduced number by number in tests/golden/frame_sampling.json.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
import numpy.typing as npt

from amd.config import ClipConfig, DataConfig, FrameSampling, ViewsConfig

Indices = npt.NDArray[np.int64]
Choose = Callable[[int], Indices]  # total frames of a sample -> the frames of one clip


class Draws(Protocol):
    """A source of integers, such as random.Random."""

    def randrange(self, stop: int, /) -> int:
        """Uniform in [0, stop)."""
        ...


def strided(total: int, frames: int, step: int, draws: Draws) -> Indices:
    """Every `step`-th frame from a random start: K400 pre-training.

    A sample shorter than frames x step starts at 0, and the index stops advancing when the next one would reach the
    last frame or beyond, so that late frames repeat. (The official code stops one frame early: of 41 frames the last,
    40, is never taken. Kept, since released weights were trained so.)
    """
    _check(total)
    slack = total - frames * step + 1
    start = draws.randrange(slack) if slack > 0 else 0
    last = start + max(0, (total - 2 - start) // step) * step
    return (start + np.arange(frames, dtype=np.int64) * step).clip(max=last)


def window(total: int, frames: int, step: int, draws: Draws) -> Indices:
    """`frames` frames spread evenly over a random window of frames x step: SSv2 pre-training, K400 fine-tuning.

    The stride is not quite `step`: 16 frames over a window of 32 lie 32 / 15 apart. Of a shorter sample total // step
    frames are spread over the whole of it, and the last is repeated.
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
    """One random frame out of each of `frames` equal segments: SSv2 fine-tuning. A short sample repeats its first."""
    _check(total)
    length = total // frames
    if length > 0:
        return np.array([i * length + draws.randrange(length) for i in range(frames)], dtype=np.int64)
    return np.concatenate([np.zeros(frames - total, dtype=np.int64), np.arange(total, dtype=np.int64)])


def dense_views(total: int, frames: int, step: int, views: int) -> list[Indices]:
    """`views` clips of every `step`-th frame, evenly over the sample: K400 testing. A short one repeats its last.

    One view is the middle of the sample; the official code divides by zero there.
    """
    _check(total)
    index = np.arange(0, total, step, dtype=np.int64)
    index = np.pad(index, (0, max(0, frames - len(index))), mode="edge")
    room = len(index) - frames
    starts = [int(i * room / (views - 1)) for i in range(views)] if views > 1 else [room // 2]
    return [index[start : start + frames] for start in starts]


def segment_views(total: int, frames: int, views: int) -> list[Indices]:
    """`views` interleaved clips over the whole sample, one frame out of each segment: SSv2 testing.

    View 1 takes the segments' starts, a second one their middles, and so on; more views than official runs used
    (2) follow the same rule: sorted together, every `views`-th from i is view i.
    """
    _check(total)
    tick = total / frames
    starts = [int(tick * x) for x in range(frames)]
    between = [int(tick / y + tick * x) for y in range(2, views + 1) for x in range(frames)]
    index = np.sort(np.array(starts + between, dtype=np.int64))
    return [index[view::views] for view in range(views)]


SAMPLERS: dict[FrameSampling, Callable[[int, int, int, Draws], Indices]] = {
    "strided": strided,
    "window": window,
    "segments": lambda total, frames, step, draws: segments(total, frames, draws),
}


def chooser(data: DataConfig, clip: ClipConfig, draws: Draws) -> Choose:
    """What a reader asks once it knows how many frames a sample has. Each call draws anew."""
    sample = SAMPLERS[data.sampling]
    return lambda total: sample(total, clip.frames, clip.sampling_rate_frames, draws)


def middle_chooser(clip: ClipConfig) -> Choose:
    """The middle clip, without a draw: for evaluation."""
    return lambda total: dense_views(total, clip.frames, clip.sampling_rate_frames, views=1)[0]


def views_chooser(clip: ClipConfig, views: ViewsConfig) -> Choose:
    """The frames of all temporal views of a test, one view after the other: (segments * T,)."""

    def choose(total: int) -> Indices:
        if views.sampling == "segments":
            return np.concatenate(segment_views(total, clip.frames, views.segments))
        return np.concatenate(dense_views(total, clip.frames, clip.sampling_rate_frames, views.segments))

    return choose


def _check(total: int) -> None:
    if total <= 0:
        # The official code returns frame -1 here, fails on it, and puts another sample in its place.
        raise ValueError(f"a sample of {total} frames has none to choose")
