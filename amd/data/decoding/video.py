"""Chosen frames of a video: the right ones, as a decoder that starts at the beginning would give them, or an error.

Frame n is the n-th shown: edit lists, variable frame rates and B-frames change nothing in that count; a display matrix
is applied. PyAV decodes. Where packets tell which frames depend on which (packets.py) only what is needed is decoded;
other files are decoded from the start. Damage that the decoder notices is an error, also in a frame that a wanted one
builds on. Knows nothing of configs, storage or processes.
Shapes: T frames, H, W after rotation.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import av
from av.stream import Disposition

from amd.data.decoding.frames import Allocate, Output, Pixels, Source, ToRGB, VideoError, pixels
from amd.data.decoding.packets import PacketMap, Span, map_packets

# What a data set may hold. Others (playlists, images, consoles, network protocols) could make a file open other files.
FORMATS = "mov,mp4,matroska,webm,avi,mpeg,mpegvideo,mpegts,flv,asf,ogg,mxf,h264,hevc,m4v,obu,ivf,nut,dv,gif"
KEEP_PACKETS = 128 << 20  # bytes of packets kept from the first pass; larger files are read twice
KEEP_FRAMES = 256 << 20  # bytes of decoded frames kept where everything must be decoded to count


class NotOpened(VideoError):
    """FFmpeg does not even find a container."""


class Video(Protocol):
    frames: int

    def read(self, indices: Sequence[int], allocate: Allocate = pixels) -> Pixels:
        """Frames by number, in any order, repeats allowed: (T, H, W, 3). Raises VideoError."""
        ...

    def each(self, indices: Sequence[int]) -> Iterator[Pixels]:
        """The same one at a time, for ascending numbers: (H, W, 3), valid until the next."""
        ...

    def close(self) -> None: ...


class VideoLimits(NamedTuple):
    """What a video may have at most; one that has more is refused before its frames are decoded."""

    pixels: int
    """Of a frame."""
    frames: int
    duration_s: float
    """As its header tells."""


def open_video(source: Source, decoder: str = "pyav", limits: VideoLimits | None = None) -> Video:
    """Open a file or its bytes. `decoder="decord"` reads with decord what it is known to read rightly.

    Raises VideoError with the reason.
    """
    container = _open(source)
    try:
        stream = _video_stream(container)
        _limit(stream.codec_context, limits)
        if limits is not None:
            _check_limits(container, stream, limits)
        _check_whole(source, container.format.name)
        packets, kept = _read_packets(container, stream)
        context = stream.codec_context
        map_ = (
            map_packets(packets, context.codec.canonical_name, container.format.name, context.extradata)
            if packets
            else None
        )
        if map_ is None:
            container.close()
            return WholeVideo(source, limits)
        if decoder == "decord":
            from amd.data.decoding.decord_video import DecordVideo, reads_rightly

            if reads_rightly(container, stream, map_):
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
    """Frames per second, the mean where it varies. Raises VideoError."""
    container = _open(source)
    with container:
        stream = _video_stream(container)
        rate = stream.average_rate or stream.guessed_rate
    if not rate:
        raise VideoError("does not tell its frame rate")
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
        raise NotOpened(f"is not a video that can be opened ({error.strerror}); it may be cut short") from None


def _video_stream(container: Any) -> Any:
    for stream in container.streams.video:
        if not stream.disposition & Disposition.attached_pic:
            if stream.codec_context is None:
                raise VideoError("holds video of a kind that this build of FFmpeg cannot decode")
            return stream
    raise VideoError("has no video stream")


def _reopen(source: Source, limits: VideoLimits | None) -> tuple[Any, Any]:
    container = _open(source)
    stream = _video_stream(container)
    _limit(stream.codec_context, limits)
    return container, stream


def _limit(context: Any, limits: VideoLimits | None) -> None:
    context.thread_count = 1
    if limits is not None:  # a stream may grow after its header: the decoder itself must refuse that
        context.options = {**context.options, "max_pixels": str(limits.pixels)}


def _check_limits(container: Any, stream: Any, limits: VideoLimits) -> None:
    """Raises VideoError for what the header alone tells."""
    width, height = stream.codec_context.width, stream.codec_context.height
    if width * height > limits.pixels:
        raise VideoError(f"has {width}x{height} pixels a frame, more than {limits.pixels}")
    times = [container.duration / 1e6] if container.duration else []
    times += [float(stream.duration * stream.time_base)] if stream.duration and stream.time_base else []
    if times and max(times) > limits.duration_s:
        raise VideoError(f"is {max(times):.0f} s long, more than {limits.duration_s:g} s")


def _read_packets(container: Any, stream: Any) -> tuple[list[Any], bool]:
    """All packets of the stream in decoding order, and whether they hold on to their data.

    Raises VideoError for a file whose index names more data than there is.
    """
    packets: list[Any] = []
    total = 0
    for packet in container.demux(stream):
        if not packet.size:
            continue
        if packet.is_corrupt:
            raise VideoError(f"is cut short: packet {len(packets)} is not complete")
        packets.append(packet)
        total += packet.size
    promised = stream.frames
    if promised > len(packets) and not any(packet.is_discard for packet in packets):
        raise VideoError(f"is cut short: it holds {len(packets)} of {promised} frames")
    return packets, total <= KEEP_PACKETS


def _check_whole(source: Source, container: str) -> None:
    """A Matroska or WebM file says how long it is, but its demuxer does not mind. Raises VideoError."""
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
        raise VideoError(f"is cut short: {size} of {at + width + length} bytes")


class MappedVideo:
    """A video whose packets are known to be one frame each: decodes the spans that hold wanted frames."""

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
        # Pictures that H.264 marks as never referred to can be skipped without a change to others.
        self._skips = stream.codec_context.name == "h264"

    def read(self, indices: Sequence[int], allocate: Allocate = pixels) -> Pixels:
        _check(indices, self.frames)
        output = Output(indices, allocate)
        for span in self._map.spans(indices):
            for skip in (True, False) if self._skips else (False,):
                for number, frame in self._decode(span, skip):
                    if output.lacks(number):
                        output.put(number, frame)
                missing = [n for n in span.frames if output.lacks(n)]
                if not missing:
                    break
            else:
                raise VideoError(f"frame {missing[0]} cannot be decoded: the file is damaged there")
        return output.done()

    def each(self, indices: Sequence[int]) -> Iterator[Pixels]:
        _check(indices, self.frames)
        to_rgb = ToRGB()
        for span in self._map.spans(indices):
            come = 0
            for number, frame in self._decode(span, False):
                if number != span.frames[come]:
                    break
                come += 1
                yield to_rgb(frame)
            if come < len(span.frames):
                raise VideoError(f"frame {span.frames[come]} cannot be decoded: the file is damaged there")

    def _decode(self, span: Span, skip: bool) -> Iterator[tuple[int, Any]]:
        """The span's wanted frames that come, as shown; `skip` leaves out pictures that none of them needs."""
        if self._packets is not None:
            yield from self._decoded(span, self._packets[span.start : span.stop], self._stream.codec_context, skip)
            return
        container, stream = _reopen(self._source, self._limits)
        try:
            every = (packet for packet in container.demux(stream) if packet.size)
            yield from self._decoded(span, islice(every, span.start, span.stop), stream.codec_context, skip)
        finally:
            container.close()

    def _decoded(self, span: Span, packets: Iterable[Any], context: Any, skip: bool) -> Iterator[tuple[int, Any]]:
        wanted = {self._map.pts[n]: n for n in span.frames}
        context.flush_buffers()
        first: int | None = None
        mode = None
        for packet in chain(packets, (None,)):
            if packet is not None:
                first = packet.pts if first is None else first
                needed = "NONREF" if skip and packet.pts not in wanted else "DEFAULT"
                if needed != mode:
                    context.skip_frame = mode = needed
            try:
                frames = context.decode(packet)
            except av.error.FFmpegError as error:
                raise VideoError(f"is damaged near frame {span.frames[0]} ({error.strerror})") from None
            for frame in frames:
                # Frames shown before an open entry point look back beyond it: expected, and not wanted.
                if frame.is_corrupt and (frame.pts is None or first is None or frame.pts >= first):
                    raise VideoError(f"is damaged near frame {span.frames[0]}")
                if frame.pts in wanted:
                    yield wanted[frame.pts], frame

    def close(self) -> None:
        self._packets = None
        self._container.close()


class WholeVideo:
    """A video that must be decoded from its start to know its frames. Small ones are decoded once and kept."""

    def __init__(self, source: Source, limits: VideoLimits | None = None) -> None:
        self._source, self._limits = source, limits
        self._kept: list[Any] | None = []
        self._damaged: list[tuple[int, int]] = []  # frames [start, stop) from a key frame to the next
        size = start = number = 0
        hurt = False
        for number, frame in enumerate(self._every_frame()):
            if limits is not None and number >= limits.frames:
                raise VideoError(f"has more than {limits.frames} frames")
            if frame.key_frame:
                if hurt:
                    self._damaged.append((start, number))
                start, hurt = number, False
            hurt = hurt or frame.is_corrupt
            size += sum(plane.buffer_size for plane in frame.planes)
            if size > KEEP_FRAMES:
                self._kept = None
            if self._kept is not None:
                self._kept.append(frame)
        self.frames = number + 1 if size else 0
        if not self.frames:
            raise VideoError("holds no frame that can be decoded")
        if hurt:
            self._damaged.append((start, self.frames))

    def read(self, indices: Sequence[int], allocate: Allocate = pixels) -> Pixels:
        _check(indices, self.frames)
        self._refuse_damage(indices)
        output = Output(indices, allocate)
        for number, frame in self._chosen(indices):
            output.put(number, frame)
        return output.done()

    def each(self, indices: Sequence[int]) -> Iterator[Pixels]:
        _check(indices, self.frames)
        self._refuse_damage(indices)
        to_rgb = ToRGB()
        for _, frame in self._chosen(indices):
            yield to_rgb(frame)

    def _chosen(self, indices: Sequence[int]) -> Iterator[tuple[int, Any]]:
        wanted, last = set(indices), max(indices)
        for number, frame in enumerate(self._kept if self._kept is not None else self._every_frame()):
            if number in wanted:
                yield number, frame
            if number >= last:
                return

    def _refuse_damage(self, indices: Sequence[int]) -> None:
        for start, stop in self._damaged:
            if any(start <= n < stop for n in indices):
                raise VideoError(f"is damaged between frames {start} and {stop}")

    def _every_frame(self) -> Iterator[Any]:
        container, stream = _reopen(self._source, self._limits)
        try:
            for packet in container.demux(stream):
                if packet.is_corrupt:
                    raise VideoError("is cut short: its last packet is not complete")
                yield from packet.decode()
        except av.error.FFmpegError as error:
            raise VideoError(f"is damaged: decoding stops with {error.strerror}") from None
        finally:
            container.close()

    def close(self) -> None:
        self._kept = None


def _check(indices: Iterable[int], frames: int) -> None:
    for n in indices:
        if not 0 <= n < frames:
            raise IndexError(f"frame {n} of a video of {frames} frames")
