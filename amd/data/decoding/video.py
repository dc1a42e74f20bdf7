"""Decode given frames of a video with the same result as sequential decoding, or raise an error.

Frame n is the n-th in presentation order, regardless of edit lists, variable frame rates and B-frames; the display
matrix is applied. Uses PyAV. If the packets reveal frame dependencies (packets.py), only the required packets are
decoded; other files are decoded from the start. If the decoder detects damage in a requested frame or its references,
an error is raised. With `min_decoded_share`, damaged frames are excluded instead, and frame n is the n-th frame that
decodes. Does not import configs or storage.
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
from amd.data.decoding.map_cache import load_map, save_map, seek_packets
from amd.data.decoding.packets import PacketMap, PacketRange, map_packets
from amd.data.decoding.sequential import SequentialVideo, check_indices, tolerable

__all__ = ["MappedVideo", "SequentialVideo", "UnknownContainer", "Video", "frame_rate", "open_video"]

MAX_KEPT_PACKET_BYTES = 128 << 20  # bytes of packets kept from the first pass; larger files are read twice


class Video(Protocol):
    """An open video."""

    @property
    def frames(self) -> int: ...

    @property
    def damage(self) -> Damage | None: ...

    @property
    def decoder(self) -> str:
        """Decoder used for the most recent read: pyav or decord."""
        ...

    @property
    def numbers(self) -> Sequence[int]:
        """Frame numbers in presentation order; the numbering includes frames that are excluded because of damage."""
        ...

    def read(self, indices: Sequence[int], allocate: Allocate = new_pixels) -> Pixels:
        """Decode frames by number, in any order and with repeats, to (T, H, W, 3).

        Raises VideoError, or DamagedFrames if the read may succeed after `exclude_damaged`.
        """
        ...

    def iter_frames(self, indices: Sequence[int]) -> Iterator[Pixels]:
        """Decode frames one at a time, in ascending order; each (H, W, 3) array is valid only until the next frame."""
        ...

    def exclude_damaged(self) -> None:
        """Find the frames that decode, and number only those frames. Raises VideoError if there are too few."""
        ...

    def close(self) -> None: ...


def open_video(
    source: Source, decoder: str = "pyav", limits: VideoLimits | None = None, min_decoded_share: float | None = None
) -> Video:
    """Open a video from a path or bytes. `decoder="decord"` uses decord for streams that it decodes correctly.

    `min_decoded_share`: minimum share of a damaged file's frames that must decode; None rejects damaged files. Raises
    VideoError with the reason.
    """
    container, stream = open_stream(source, limits)
    try:
        if limits is not None:
            check_limits(container, stream, limits)
        elif (known := load_map(source)) is not None:
            return _preferred(MappedVideo(source, container, stream, known, None, limits, min_decoded_share), decoder)
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
            raise VideoError(f"has {map_.frames} frames, more than the limit of {limits.frames}")
        kept = packets if read.size <= MAX_KEPT_PACKET_BYTES else None
        video = MappedVideo(source, container, stream, map_, kept, limits, min_decoded_share)
        if fault is not None:
            video.exclude(read.incomplete, fault)
            return video
        if limits is None:
            save_map(source, map_)
        return _preferred(video, decoder)
    except av.error.FFmpegError as error:
        container.close()
        raise VideoError(f"cannot be read as a video ({error.strerror})") from None
    except VideoError:
        container.close()
        raise


def _preferred(video: MappedVideo, decoder: str) -> Video:
    """Return a decord reader if decord is preferred and decodes the stream correctly, else `video`."""
    if decoder == "decord":
        from amd.data.decoding.decord_video import DecordVideo, decord_supports

        if decord_supports(video.container, video.stream, video.packet_map):
            return DecordVideo(video.source, video)
    return video


def frame_rate(source: Source) -> float:
    """Return the average frame rate in frames per second. Raises VideoError if it cannot be determined."""
    with open_container(source) as container:
        stream = video_stream(container)
        rate = stream.average_rate or stream.guessed_rate
    if not rate:
        raise VideoError("does not specify its frame rate")
    return float(rate)


class MappedVideo:
    """A video with exactly one frame per packet; decodes only packet ranges that contain requested frames."""

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
        self.source, self.container, self.stream, self._limits = source, container, stream, limits
        self.packet_map, self._packets, self._packet_count = map_, packets, map_.packets
        self._total, self._min_share = map_.frames, min_decoded_share
        self._broken = set[int]()  # positions of packets that do not decode
        self._is_complete = True  # whether frames that do not decode may still be numbered
        # Pictures that H.264 marks as non-reference can be skipped without affecting others.
        self._can_skip = stream.codec_context.name == "h264"

    @property
    def numbers(self) -> Sequence[int]:
        return self.packet_map.numbers

    def read(self, indices: Sequence[int], allocate: Allocate = new_pixels) -> Pixels:
        check_indices(indices, self.frames)
        output = FrameBuffer(indices, allocate)
        for packet_range in self.packet_map.ranges(indices):
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
        for packet_range in self.packet_map.ranges(indices):
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
            raise VideoError("is damaged and decodes to different frames each time")
        self._is_complete = False
        broken = self._broken_packets()
        self.exclude(broken, f"is damaged: packet {min(broken)} does not decode" if broken else "is damaged")

    def exclude(self, broken: Iterable[int], reason: str) -> None:
        """Number only the frames that do not depend on `broken` packets. Raises VideoError if there are too few."""
        assert self._min_share is not None, "damaged videos are rejected"
        self.packet_map = self.packet_map.without(broken)
        self.frames = self.packet_map.frames
        self._broken |= set(broken)
        reason = reason if self.damage is None else self.damage.reason
        damage = Damage(reason, self.frames, self._total - len(self._broken), self._total)
        self.damage = tolerable(damage, self._min_share)

    def _broken_packets(self) -> set[int]:
        """Return the positions of the packets that do not decode."""
        missing, broken = self.packet_map.positions, set[int]()
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
        """Return packets in decoding order, and the codec context that decodes them."""
        if self._packets is not None:
            yield self._packets[start:stop], self.stream.codec_context
            return
        container, stream = open_stream(self.source, self._limits)
        with container:
            found = seek_packets(container, stream, self.packet_map, start, stop)
            if found is not None:
                yield found, stream.codec_context
                return
        container, stream = open_stream(self.source, self._limits)
        with container:
            yield islice(stored_packets(container, stream), start, stop), stream.codec_context

    def _decode(self, packet_range: PacketRange, skip: bool) -> Iterator[tuple[int, Any]]:
        """Yield the requested frames of the range in presentation order; `skip` omits non-reference pictures."""
        with self._packets_between(packet_range.start, packet_range.stop) as (packets, context):
            yield from self._requested_frames(packet_range, packets, context, skip)

    def _requested_frames(
        self, packet_range: PacketRange, packets: Iterable[Any], context: Any, skip: bool
    ) -> Iterator[tuple[int, Any]]:
        requested = {self.packet_map.pts[n]: n for n in packet_range.frames}
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
        self.container.close()
