"""Decode given frames of a video exactly as sequential decoding does, or raise an error.

Frame n is the n-th in presentation order, regardless of edit lists, variable frame rates and B-frames; the display
matrix is applied. Uses PyAV. If the packets reveal frame dependencies (packets.py), only the needed ones are decoded;
other files are decoded from the start. Damage that the decoder detects in a requested frame or its references is an
error, or, with `min_decoded_share`, excludes the frame: frame n is then the n-th that decodes. Does not import configs
or storage.
Shapes: T frames, H, W after rotation.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, islice
from typing import Any, Protocol

import av

from amd.data.decoding.containers import (
    UnknownContainer,
    Unreadable,
    check_limits,
    find_truncation,
    open_container,
    open_stream,
    read_packets,
    stored_packets,
    video_stream,
)
from amd.data.decoding.damage import Damage
from amd.data.decoding.frames import (
    Allocate,
    DamagedFrames,
    FrameBuffer,
    Pixels,
    Source,
    ToRGB,
    VideoError,
    new_pixels,
)
from amd.data.decoding.limits import VideoLimits
from amd.data.decoding.packets import PacketMap, PacketRange, map_packets

__all__ = ["MappedVideo", "SequentialVideo", "UnknownContainer", "Video", "frame_rate", "open_video"]

MAX_KEPT_PACKET_BYTES = 128 << 20  # bytes of packets kept from the first pass; larger files are read twice
MAX_KEPT_FRAME_BYTES = 256 << 20  # bytes of decoded frames kept when counting frames requires decoding


class Video(Protocol):
    """An open video."""

    @property
    def frames(self) -> int: ...

    @property
    def damage(self) -> Damage | None: ...

    @property
    def decoder(self) -> str:
        """Decoder of the last frames read: pyav or decord."""
        ...

    @property
    def numbers(self) -> Sequence[int]:
        """Number of each frame in presentation order, counting those that damage excludes."""
        ...

    def read(self, indices: Sequence[int], allocate: Allocate = new_pixels) -> Pixels:
        """Decode frames by number, in any order and with repeats, to (T, H, W, 3).

        Raises VideoError; DamagedFrames if `exclude_damaged` may help.
        """
        ...

    def iter_frames(self, indices: Sequence[int]) -> Iterator[Pixels]:
        """Decode frames one at a time, in ascending order; each (H, W, 3) array is valid only until the next one."""
        ...

    def exclude_damaged(self) -> None:
        """Find the frames that decode, and number only those. Raises VideoError if they are too few."""
        ...

    def close(self) -> None: ...


def open_video(
    source: Source, decoder: str = "pyav", limits: VideoLimits | None = None, min_decoded_share: float | None = None
) -> Video:
    """Open a file or its bytes. `decoder="decord"` uses decord for streams it decodes correctly.

    `min_decoded_share`: share of the frames in a damaged file that must decode for it to be used; None rejects damaged
    files. Raises VideoError with the reason.
    """
    container, stream = open_stream(source, limits)
    try:
        if limits is not None:
            check_limits(container, stream, limits)
        read = read_packets(container, stream)
        fault = find_truncation(source, container, stream, read)
        if fault is not None and min_decoded_share is None:
            raise VideoError(fault)
        packets, context = read.packets, stream.codec_context
        codec, extradata = context.codec.canonical_name, context.extradata
        map_ = map_packets(packets, codec, container.format.name, extradata) if packets else None
        if map_ is None:
            container.close()
            return SequentialVideo(source, limits, min_decoded_share, fault)
        if limits is not None and map_.frames > limits.frames:
            raise VideoError(f"has {map_.frames} frames, more than {limits.frames}")
        kept = packets if read.size <= MAX_KEPT_PACKET_BYTES else None
        video = MappedVideo(source, container, stream, map_, kept, limits, min_decoded_share)
        if fault is not None:
            video.exclude(read.incomplete, fault)
        elif decoder == "decord":
            from amd.data.decoding.decord_video import DecordVideo, decord_supports

            if decord_supports(container, stream, map_):
                return DecordVideo(source, video)
        return video
    except av.error.FFmpegError as error:
        container.close()
        raise VideoError(f"cannot be read as a video ({error.strerror})") from None
    except VideoError:
        container.close()
        raise


def frame_rate(source: Source) -> float:
    """Return the frame rate, on average if it varies, in frames per second. Raises VideoError."""
    with open_container(source) as container:
        stream = video_stream(container)
        rate = stream.average_rate or stream.guessed_rate
    if not rate:
        raise VideoError("does not specify its frame rate")
    return float(rate)


class MappedVideo:
    """A video with exactly one frame per packet; decodes only the ranges with requested frames."""

    decoder = "pyav"

    def __init__(
        self,
        source: Source,
        container: Any,
        stream: Any,
        map_: PacketMap,
        packets: list[Any] | None,
        limits: VideoLimits | None = None,
        min_decoded_share: float | None = None,
    ) -> None:
        self.frames = map_.frames
        self.damage: Damage | None = None
        self._source, self._container, self._stream, self._limits = source, container, stream, limits
        self._map, self._packets, self._packet_count = map_, packets, map_.packets
        self._total, self._min_share = map_.frames, min_decoded_share
        self._broken = set[int]()  # positions of packets that do not decode
        self._is_complete = True  # whether frames that do not decode may still be numbered
        # Pictures that H.264 marks as non-reference can be skipped without affecting others.
        self._can_skip = stream.codec_context.name == "h264"

    @property
    def numbers(self) -> Sequence[int]:
        return self._map.numbers

    def read(self, indices: Sequence[int], allocate: Allocate = new_pixels) -> Pixels:
        check_indices(indices, self.frames)
        output = FrameBuffer(indices, allocate)
        for packet_range in self._map.ranges(indices):
            for skip in (True, False) if self._can_skip else (False,):
                for number, frame in self._decode(packet_range, skip):
                    if output.is_missing(number):
                        output.put(number, frame)
                missing = [n for n in packet_range.frames if output.is_missing(n)]
                if not missing:
                    break
            else:
                raise DamagedFrames(f"frame {missing[0]} cannot be decoded: the file is damaged there")
        return output.result()

    def iter_frames(self, indices: Sequence[int]) -> Iterator[Pixels]:
        check_indices(indices, self.frames)
        to_rgb = ToRGB()
        for packet_range in self._map.ranges(indices):
            decoded = 0
            for number, frame in self._decode(packet_range, False):
                if number != packet_range.frames[decoded]:
                    break
                decoded += 1
                yield to_rgb(frame)
            if decoded < len(packet_range.frames):
                raise DamagedFrames(
                    f"frame {packet_range.frames[decoded]} cannot be decoded: the file is damaged there"
                )

    def exclude_damaged(self) -> None:
        assert self._min_share is not None, "damaged videos are rejected"
        if not self._is_complete:
            raise VideoError("is damaged, and decodes differently each time")
        self._is_complete = False
        broken = self._broken_packets()
        self.exclude(broken, f"is damaged: packet {min(broken)} does not decode" if broken else "is damaged")

    def exclude(self, broken: Iterable[int], reason: str) -> None:
        """Number only the frames that need none of the `broken` packets. Raises VideoError if they are too few."""
        assert self._min_share is not None, "damaged videos are rejected"
        self._map = self._map.without(broken)
        self.frames = self._map.frames
        self._broken |= set(broken)
        reason = reason if self.damage is None else self.damage.reason
        damage = Damage(reason, self.frames, self._total - len(self._broken), self._total)
        self.damage = _tolerable(damage, self._min_share)

    def _broken_packets(self) -> set[int]:
        """Return the positions of the packets that do not decode."""
        missing, broken = self._map.positions, set[int]()
        positions = dict(missing)
        with self._packets_between(0, self._packet_count) as (packets, context):
            context.flush_buffers()
            context.skip_frame = "DEFAULT"
            for position, packet in enumerate(chain(packets, (None,))):
                try:
                    frames = context.decode(packet)
                except av.error.FFmpegError:
                    broken.add(min(position, self._packet_count - 1))
                    continue
                for frame in frames:
                    missing.pop(frame.pts, None)
                    if frame.is_corrupt and frame.pts in positions:
                        broken.add(positions[frame.pts])
        return broken | set(missing.values())

    @contextmanager
    def _packets_between(self, start: int, stop: int) -> Iterator[tuple[Iterable[Any], Any]]:
        """Return packets in decoding order, and the context that decodes them."""
        if self._packets is not None:
            yield self._packets[start:stop], self._stream.codec_context
            return
        container, stream = open_stream(self._source, self._limits)
        with container:
            yield islice(stored_packets(container, stream), start, stop), stream.codec_context

    def _decode(self, packet_range: PacketRange, skip: bool) -> Iterator[tuple[int, Any]]:
        """Yield the requested frames of the range in presentation order; `skip` omits non-reference pictures."""
        with self._packets_between(packet_range.start, packet_range.stop) as (packets, context):
            yield from self._requested_frames(packet_range, packets, context, skip)

    def _requested_frames(
        self, packet_range: PacketRange, packets: Iterable[Any], context: Any, skip: bool
    ) -> Iterator[tuple[int, Any]]:
        requested = {self._map.pts[n]: n for n in packet_range.frames}
        context.flush_buffers()
        first: int | None = None
        mode = None
        for packet in chain(packets, (None,)):
            if packet is not None:
                first = packet.pts if first is None else first
                needed = "NONREF" if skip and packet.pts not in requested else "DEFAULT"
                if needed != mode:
                    context.skip_frame = mode = needed
            try:
                frames = context.decode(packet)
            except av.error.FFmpegError as error:
                raise DamagedFrames(f"is damaged near frame {packet_range.frames[0]} ({error.strerror})") from None
            for frame in frames:
                # Leading frames of an open entry point reference earlier packets: corrupt, and not requested.
                if frame.is_corrupt and (frame.pts is None or first is None or frame.pts >= first):
                    raise DamagedFrames(f"is damaged near frame {packet_range.frames[0]}")
                if frame.pts in requested:
                    yield requested[frame.pts], frame

    def close(self) -> None:
        self._packets = None
        self._container.close()


class SequentialVideo:
    """A video that must be decoded from the start to count its frames. Those of small videos are kept in memory."""

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
        self._intact: list[bool] = []  # for each frame and each packet that does not decode
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
                self.damage = _tolerable(damage, min_decoded_share)
        self.frames = len(self.numbers)

    def _count(self) -> None:
        """Decode all frames; find those that may be wrong because they or their references are damaged."""
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
        """Frames that do not decode were excluded when the frames were counted."""

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
        """Yield all frames in presentation order, and None for a packet that does not decode."""
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
        """Note why a packet does not decode. Raises VideoError unless damaged files are used."""
        if not self._tolerant:
            raise VideoError(fault)
        self._fault = self._fault or fault

    def close(self) -> None:
        self._kept = None


def _tolerable(damage: Damage, min_share: float) -> Damage:
    """Return the damage if enough frames decode. Raises VideoError if not."""
    if damage.is_above(min_share):
        raise VideoError(f"{damage}, fewer than data.min_decoded_share={min_share:g} requires")
    return damage


def check_indices(indices: Iterable[int], frames: int) -> None:
    for n in indices:
        if not 0 <= n < frames:
            raise IndexError(f"frame {n} of a video of {frames} frames")
