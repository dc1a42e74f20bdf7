"""Decode a video from its start, for files whose packets do not reveal the frame dependencies. Uses PyAV."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Any

import av

from amd.data.decoding.containers import Unreadable, open_stream, stored_packets
from amd.data.decoding.damage import Damage
from amd.data.decoding.frames import Allocate, FrameBuffer, Pixels, Source, ToRGB, VideoError, new_pixels
from amd.data.decoding.limits import VideoLimits

MAX_KEPT_FRAME_BYTES = 256 << 20  # bytes of decoded frames kept when counting frames requires decoding


class SequentialVideo:
    """A video that must be decoded from the start to count its frames. Frames of small videos are kept in memory."""

    decoder = "pyav"

    def __init__(
        self,
        source: Source,
        limits: VideoLimits | None = None,
        min_decoded_share: float | None = None,
        fault: str | None = None,
    ) -> None:
        self._source, self._limits, self._tolerant, self._fault = source, limits, min_decoded_share is not None, fault
        self._kept: list[Any] | None = []
        self._intact: list[bool] = []  # one entry per frame, and per packet that does not decode
        self._undecodable = 0
        self._count()
        self.numbers: Sequence[int] = range(len(self._intact))
        self.damage: Damage | None = None
        if min_decoded_share is not None:
            self.numbers = [number for number, intact in enumerate(self._intact) if intact]
            if self._fault is not None or len(self.numbers) < len(self._intact):
                total = len(self._intact)
                fault = self._fault or "is damaged"
                damage = Damage(fault, len(self.numbers), total - self._undecodable, total)
                self.damage = tolerable(damage, min_decoded_share)
        self.frames = len(self.numbers)

    def _count(self) -> None:
        """Decode all frames, and mark frames that may be wrong because they or their references are damaged."""
        size = decoded = start = 0  # start: the last key frame
        intact, clean = self._intact, True
        for frame in self._all_frames():
            if frame is None:
                self._undecodable += 1
                clean = False
            else:
                decoded += 1
                if self._limits is not None and decoded > self._limits.frames:
                    raise VideoError(f"has more than {self._limits.frames} frames")
                if frame.key_frame:
                    start, clean = len(intact), True
                if frame.is_corrupt:
                    self._undecodable += 1
                    self._fault = self._fault or f"is damaged near frame {len(intact)}"
                    intact[start:] = [False] * (len(intact) - start)  # frames shown before may refer to this one
                    clean = False
                size += sum(plane.buffer_size for plane in frame.planes)
            intact.append(clean)
            if size > MAX_KEPT_FRAME_BYTES:
                self._kept = None
            if self._kept is not None:
                self._kept.append(frame)
        if not decoded:
            raise VideoError("has no frame that can be decoded")

    def read(self, indices: Sequence[int], allocate: Allocate = new_pixels) -> Pixels:
        output = FrameBuffer(indices, allocate)
        for number, frame in self._select(indices):
            output.put(number, frame)
        return output.result()

    def iter_frames(self, indices: Sequence[int]) -> Iterator[Pixels]:
        to_rgb = ToRGB()
        for _, frame in self._select(indices):
            yield to_rgb(frame)

    def exclude_damaged(self) -> None:
        """No-op: frames that do not decode were already excluded while counting the frames."""

    def _select(self, indices: Sequence[int]) -> Iterator[tuple[int, Any]]:
        check_indices(indices, self.frames)
        requested = {self.numbers[n]: n for n in indices}
        last = max(requested)
        for number, index in requested.items():
            if not self._intact[number]:
                raise VideoError(f"is damaged near frame {index}")
        for number, frame in enumerate(self._kept if self._kept is not None else self._all_frames()):
            if number in requested:
                yield requested[number], frame
            if number >= last:
                return

    def _all_frames(self) -> Iterator[Any]:
        """Yield all frames in presentation order, and None for each packet that does not decode."""
        container, stream = open_stream(self._source, self._limits)
        with container:
            for packet in chain(stored_packets(container, stream), (None,)):
                frames: list[Any] = [None]
                if isinstance(packet, Unreadable):
                    self._note(f"is damaged: reading stops ({packet.reason})")
                elif packet is not None and packet.is_corrupt:
                    self._note("is truncated: its last packet is incomplete")
                else:
                    try:
                        frames = stream.codec_context.decode(packet)
                    except av.error.FFmpegError as error:
                        self._note(f"is damaged: decoding stops with {error.strerror}")
                yield from frames

    def _note(self, fault: str) -> None:
        """Record why a packet does not decode, or raise VideoError if damaged files are rejected."""
        if not self._tolerant:
            raise VideoError(fault)
        self._fault = self._fault or fault

    def close(self) -> None:
        self._kept = None


def tolerable(damage: Damage, min_share: float) -> Damage:
    """Return the damage if enough frames decode, else raise VideoError."""
    if damage.is_above(min_share):
        raise VideoError(f"{damage}, which is below data.min_decoded_share={min_share:g}")
    return damage


def check_indices(indices: Iterable[int], frames: int) -> None:
    for n in indices:
        if not 0 <= n < frames:
            raise IndexError(f"frame {n} is out of range for a video of {frames} frames")
