"""Decode given frames of a video exactly as sequential decoding does, or raise an error.

Frame n is the n-th in presentation order, regardless of edit lists, variable frame rates and B-frames; the display
matrix is applied. Uses PyAV. If the packets reveal frame dependencies (packets.py), only the needed ones are decoded;
other files are decoded from the start. Damage that the decoder detects in a requested frame or its references is an
error. Does not import configs or storage.
Shapes: T frames, H, W after rotation.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any, Protocol

import av
from av.stream import Disposition

from amd.data.decoding.frames import Allocate, FrameBuffer, Pixels, Source, ToRGB, VideoError, new_pixels
from amd.data.decoding.limits import VideoLimits
from amd.data.decoding.packets import PacketMap, PacketRange, map_packets

# Accepted containers. Other demuxers (playlists, image sequences, devices, network protocols) could open other files.
FORMATS = "mov,mp4,matroska,webm,avi,mpeg,mpegvideo,mpegts,flv,asf,ogg,mxf,h264,hevc,m4v,obu,ivf,nut,dv,gif"
MAX_KEPT_PACKET_BYTES = 128 << 20  # bytes of packets kept from the first pass; larger files are read twice
MAX_KEPT_FRAME_BYTES = 256 << 20  # bytes of decoded frames kept when counting frames requires decoding


class UnknownContainer(VideoError):
    """Raised when FFmpeg does not recognise the container."""


class Video(Protocol):
    """An open video."""

    frames: int

    def read(self, indices: Sequence[int], allocate: Allocate = new_pixels) -> Pixels:
        """Decode frames by number, in any order and with repeats, to (T, H, W, 3). Raises VideoError."""
        ...

    def iter_frames(self, indices: Sequence[int]) -> Iterator[Pixels]:
        """Decode frames one at a time, in ascending order; each (H, W, 3) array is valid only until the next one."""
        ...

    def close(self) -> None: ...


def open_video(source: Source, decoder: str = "pyav", limits: VideoLimits | None = None) -> Video:
    """Open a file or its bytes. `decoder="decord"` uses decord for streams it decodes correctly.

    Raises VideoError with the reason.
    """
    container = _open(source)
    try:
        stream = _video_stream(container)
        _configure(stream.codec_context, limits)
        if limits is not None:
            _check_limits(container, stream, limits)
        _check_complete(source, container.format.name)
        packets, kept = _read_packets(container, stream)
        context = stream.codec_context
        map_ = (
            map_packets(packets, context.codec.canonical_name, container.format.name, context.extradata)
            if packets
            else None
        )
        if map_ is None:
            container.close()
            return SequentialVideo(source, limits)
        if decoder == "decord":
            from amd.data.decoding.decord_video import DecordVideo, decord_supports

            if decord_supports(container, stream, map_):
                container.close()
                return DecordVideo(source, map_.frames)
        if limits is not None and map_.frames > limits.frames:
            raise VideoError(f"has {map_.frames} frames, more than {limits.frames}")
        return MappedVideo(source, container, stream, map_, packets if kept else None, limits)
    except av.error.FFmpegError as error:
        container.close()
        raise VideoError(f"cannot be read as a video ({error.strerror})") from None
    except VideoError:
        container.close()
        raise


def frame_rate(source: Source) -> float:
    """Return the frame rate, on average if it varies, in frames per second. Raises VideoError."""
    container = _open(source)
    with container:
        stream = _video_stream(container)
        rate = stream.average_rate or stream.guessed_rate
    if not rate:
        raise VideoError("does not specify its frame rate")
    return float(rate)


def _open(source: Source) -> Any:
    if (isinstance(source, Path) and not source.stat().st_size) or source == b"":
        raise VideoError("is empty (zero bytes)")
    try:
        return av.open(
            str(source) if isinstance(source, Path) else io.BytesIO(source),
            options={"format_whitelist": FORMATS, "protocol_whitelist": "file"},
            metadata_errors="ignore",
        )
    except av.error.FFmpegError as error:
        raise UnknownContainer(f"is not a video that can be opened ({error.strerror}); it may be truncated") from None


def _video_stream(container: Any) -> Any:
    for stream in container.streams.video:
        if not stream.disposition & Disposition.attached_pic:
            if stream.codec_context is None:
                raise VideoError("has a video codec that this build of FFmpeg cannot decode")
            return stream
    raise VideoError("has no video stream")


def _reopen(source: Source, limits: VideoLimits | None) -> tuple[Any, Any]:
    container = _open(source)
    stream = _video_stream(container)
    _configure(stream.codec_context, limits)
    return container, stream


def _configure(context: Any, limits: VideoLimits | None) -> None:
    context.thread_count = 1
    if limits is not None:  # frames may grow after the header, so the decoder enforces the limit too
        context.options = {**context.options, "max_pixels": str(limits.pixels)}


def _check_limits(container: Any, stream: Any, limits: VideoLimits) -> None:
    """Raise VideoError if the header exceeds the limits."""
    width, height = stream.codec_context.width, stream.codec_context.height
    if width * height > limits.pixels:
        raise VideoError(f"has {width}x{height} pixels per frame, more than {limits.pixels}")
    times = [container.duration / 1e6] if container.duration else []
    times += [float(stream.duration * stream.time_base)] if stream.duration and stream.time_base else []
    if times and max(times) > limits.duration_s:
        raise VideoError(f"is {max(times):.0f} s long, more than {limits.duration_s:g} s")


def _read_packets(container: Any, stream: Any) -> tuple[list[Any], bool]:
    """Return all packets of the stream in decoding order, and whether they may be kept in memory.

    Raises VideoError if the index lists more data than the file contains.
    """
    packets: list[Any] = []
    total = 0
    for packet in container.demux(stream):
        if not packet.size:
            continue
        if packet.is_corrupt:
            raise VideoError(f"is truncated: packet {len(packets)} is incomplete")
        packets.append(packet)
        total += packet.size
    declared = stream.frames
    if declared > len(packets) and not any(packet.is_discard for packet in packets):
        raise VideoError(f"is truncated: it has {len(packets)} of {declared} frames")
    return packets, total <= MAX_KEPT_PACKET_BYTES


def _check_complete(source: Source, container: str) -> None:
    """Check the size that Matroska and WebM files declare and their demuxer ignores. Raises VideoError."""
    if "matroska" not in container:
        return
    if isinstance(source, Path):
        size = source.stat().st_size
        with source.open("rb") as file:
            head = file.read(4096)
    else:
        size, head = len(source), source[:4096]
    at = head.find(b"\x18\x53\x80\x67") + 4  # the Segment element, then its size as a variable-length number
    if at < 4 or at + 8 > len(head) or not head[at]:
        return
    width = 9 - head[at].bit_length()
    length = int.from_bytes(head[at : at + width], "big") & ~(1 << 7 * width)
    unknown = length == (1 << 7 * width) - 1
    if not unknown and at + width + length > size:
        raise VideoError(f"is truncated: {size} of {at + width + length} bytes")


class MappedVideo:
    """A video with exactly one frame per packet; decodes only the ranges with requested frames."""

    def __init__(
        self,
        source: Source,
        container: Any,
        stream: Any,
        map_: PacketMap,
        packets: list[Any] | None,
        limits: VideoLimits | None = None,
    ) -> None:
        self.frames = map_.frames
        self._source, self._container, self._stream, self._limits = source, container, stream, limits
        self._map, self._packets = map_, packets
        # Pictures that H.264 marks as non-reference can be skipped without affecting others.
        self._can_skip = stream.codec_context.name == "h264"

    def read(self, indices: Sequence[int], allocate: Allocate = new_pixels) -> Pixels:
        _check_indices(indices, self.frames)
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
                raise VideoError(f"frame {missing[0]} cannot be decoded: the file is damaged there")
        return output.result()

    def iter_frames(self, indices: Sequence[int]) -> Iterator[Pixels]:
        _check_indices(indices, self.frames)
        to_rgb = ToRGB()
        for packet_range in self._map.ranges(indices):
            decoded = 0
            for number, frame in self._decode(packet_range, False):
                if number != packet_range.frames[decoded]:
                    break
                decoded += 1
                yield to_rgb(frame)
            if decoded < len(packet_range.frames):
                raise VideoError(f"frame {packet_range.frames[decoded]} cannot be decoded: the file is damaged there")

    def _decode(self, packet_range: PacketRange, skip: bool) -> Iterator[tuple[int, Any]]:
        """Yield the requested frames of the range in presentation order; `skip` omits non-reference pictures."""
        if self._packets is not None:
            yield from self._requested_frames(
                packet_range, self._packets[packet_range.start : packet_range.stop], self._stream.codec_context, skip
            )
            return
        container, stream = _reopen(self._source, self._limits)
        try:
            packets = (packet for packet in container.demux(stream) if packet.size)
            yield from self._requested_frames(
                packet_range, islice(packets, packet_range.start, packet_range.stop), stream.codec_context, skip
            )
        finally:
            container.close()

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
                raise VideoError(f"is damaged near frame {packet_range.frames[0]} ({error.strerror})") from None
            for frame in frames:
                # Leading frames of an open entry point reference earlier packets: corrupt, and not requested.
                if frame.is_corrupt and (frame.pts is None or first is None or frame.pts >= first):
                    raise VideoError(f"is damaged near frame {packet_range.frames[0]}")
                if frame.pts in requested:
                    yield requested[frame.pts], frame

    def close(self) -> None:
        self._packets = None
        self._container.close()


class SequentialVideo:
    """A video that must be decoded from the start to count its frames. Those of small videos are kept in memory."""

    def __init__(self, source: Source, limits: VideoLimits | None = None) -> None:
        self._source, self._limits = source, limits
        self._kept: list[Any] | None = []
        self._damaged: list[tuple[int, int]] = []  # frames [start, stop) between key frames
        size = start = number = 0
        damaged = False
        for number, frame in enumerate(self._all_frames()):
            if limits is not None and number >= limits.frames:
                raise VideoError(f"has more than {limits.frames} frames")
            if frame.key_frame:
                if damaged:
                    self._damaged.append((start, number))
                start, damaged = number, False
            damaged = damaged or frame.is_corrupt
            size += sum(plane.buffer_size for plane in frame.planes)
            if size > MAX_KEPT_FRAME_BYTES:
                self._kept = None
            if self._kept is not None:
                self._kept.append(frame)
        self.frames = number + 1 if size else 0
        if not self.frames:
            raise VideoError("has no frame that can be decoded")
        if damaged:
            self._damaged.append((start, self.frames))

    def read(self, indices: Sequence[int], allocate: Allocate = new_pixels) -> Pixels:
        _check_indices(indices, self.frames)
        self._check_damage(indices)
        output = FrameBuffer(indices, allocate)
        for number, frame in self._select(indices):
            output.put(number, frame)
        return output.result()

    def iter_frames(self, indices: Sequence[int]) -> Iterator[Pixels]:
        _check_indices(indices, self.frames)
        self._check_damage(indices)
        to_rgb = ToRGB()
        for _, frame in self._select(indices):
            yield to_rgb(frame)

    def _select(self, indices: Sequence[int]) -> Iterator[tuple[int, Any]]:
        requested, last = set(indices), max(indices)
        for number, frame in enumerate(self._kept if self._kept is not None else self._all_frames()):
            if number in requested:
                yield number, frame
            if number >= last:
                return

    def _check_damage(self, indices: Sequence[int]) -> None:
        for start, stop in self._damaged:
            if any(start <= n < stop for n in indices):
                raise VideoError(f"is damaged between frames {start} and {stop}")

    def _all_frames(self) -> Iterator[Any]:
        container, stream = _reopen(self._source, self._limits)
        try:
            for packet in container.demux(stream):
                if packet.is_corrupt:
                    raise VideoError("is truncated: its last packet is incomplete")
                yield from packet.decode()
        except av.error.FFmpegError as error:
            raise VideoError(f"is damaged: decoding stops with {error.strerror}") from None
        finally:
            container.close()

    def close(self) -> None:
        self._kept = None


def _check_indices(indices: Iterable[int], frames: int) -> None:
    for n in indices:
        if not 0 <= n < frames:
            raise IndexError(f"frame {n} of a video of {frames} frames")
