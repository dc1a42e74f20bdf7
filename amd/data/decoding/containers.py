"""Open video containers, read their packets, and detect truncated files. Decodes nothing.

The frame count in a header or an index may be wrong in an intact file, so a file counts as truncated only if its
container declares bytes that the file does not contain, or if the last packet is incomplete.
"""

from __future__ import annotations

import codecs
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import av
from av.stream import Disposition

from amd.data.decoding.frames import Source, VideoError
from amd.data.decoding.limits import VideoLimits

# Accepted containers. Other demuxers (playlists, image sequences, devices, network protocols) could open other files.
FORMATS = "mov,mp4,matroska,webm,avi,mpeg,mpegvideo,mpegts,flv,asf,ogg,rm,mxf,h264,hevc,m4v,obu,ivf,nut,dv,gif"
_UNKNOWN_RIFF_SIZE = 0xFFFFFF00  # writers that cannot seek back store 0 or a value near the maximum


class UnknownContainer(VideoError):
    """Raised when FFmpeg does not recognise the container."""


class Unreadable(NamedTuple):
    """The reason why the remainder of a file cannot be read."""

    reason: str


class StreamPackets(NamedTuple):
    """A stream's packets in decoding order, with any fault found while reading."""

    packets: list[Any]
    incomplete: list[int]  # positions of packets that are cut off by the end of the file
    size: int  # bytes of all packets
    fault: str | None  # why reading stopped before the end of the file


def open_container(source: Source) -> Any:
    """Open a container from a path or bytes. Raises VideoError if it is empty or cannot be opened."""
    if (isinstance(source, Path) and not source.stat().st_size) or source == b"":
        raise VideoError("is empty (zero bytes)")
    try:
        return av.open(
            str(source) if isinstance(source, Path) else io.BytesIO(source),
            options={"format_whitelist": FORMATS, "protocol_whitelist": "file"},
            metadata_errors="ignore",
        )
    except av.error.FFmpegError as error:
        reason = f"is not a video that can be opened ({error.strerror}); {likely_cause(source)}"
        raise UnknownContainer(reason) from None


def likely_cause(source: Source) -> str:
    """Return a phrase for messages: why a file is probably recognised neither as a video nor as an image."""
    if isinstance(source, Path) and source.is_dir():
        return "it is a folder"
    return "it contains text" if _is_text(_head(source)) else "it may be truncated"


def _is_text(head: bytes) -> bool:
    """Return whether the first bytes of a file are UTF-8 text; its last character may be cut off."""
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return False
    return all(character.isprintable() or character.isspace() for character in text.removeprefix("\ufeff"))


def video_stream(container: Any) -> Any:
    """Return the first video stream that is not cover art. Raises VideoError if it is missing or unsupported."""
    for stream in container.streams.video:
        if not stream.disposition & Disposition.attached_pic:
            if stream.codec_context is None:
                raise VideoError("has a video codec that this build of FFmpeg cannot decode")
            return stream
    raise VideoError("has no video stream")


def open_stream(source: Source, limits: VideoLimits | None) -> tuple[Any, Any]:
    """Open a file and return its container and its video stream, configured for decoding.

    Raises VideoError if the file cannot be opened or has no decodable video stream.
    """
    container = open_container(source)
    try:
        stream = video_stream(container)
    except VideoError:
        container.close()
        raise
    context = stream.codec_context
    context.thread_count = 1
    if limits is not None:  # frames may be larger than the header declares, so the decoder enforces it too
        context.options = {**context.options, "max_pixels": str(limits.pixels)}
    return container, stream


def check_limits(container: Any, stream: Any, limits: VideoLimits) -> None:
    """Raise VideoError if the size or duration in the header exceeds the limits."""
    width, height = stream.codec_context.width, stream.codec_context.height
    if width * height > limits.pixels:
        raise VideoError(f"has {width}x{height} pixels per frame, more than the limit of {limits.pixels}")
    times = [container.duration / 1e6] if container.duration else []
    times += [float(stream.duration * stream.time_base)] if stream.duration and stream.time_base else []
    if times and max(times) > limits.duration_s:
        raise VideoError(f"is {max(times):.0f} s long, more than the limit of {limits.duration_s:g} s")


def stored_packets(container: Any, stream: Any) -> Iterator[Any]:
    """Yield all non-empty packets (an empty packet flushes the decoder), then Unreadable if reading failed."""
    try:
        for packet in container.demux(stream):
            if packet.size:
                yield packet
    except av.error.FFmpegError as error:
        yield Unreadable(error.strerror)
    except IndexError:  # raised by PyAV
        yield Unreadable("a stream that the header does not declare")


def read_packets(container: Any, stream: Any) -> StreamPackets:
    """Read all non-empty packets of the stream."""
    packets: list[Any] = []
    incomplete: list[int] = []
    total, fault = 0, None
    for packet in stored_packets(container, stream):
        if isinstance(packet, Unreadable):
            fault = f"is damaged: reading stops after packet {len(packets)} ({packet.reason})"
            break
        if packet.is_corrupt:
            incomplete.append(len(packets))
        packets.append(packet)
        total += packet.size
    return StreamPackets(packets, incomplete, total, fault)


def find_truncation(source: Source, container: Any, stream: Any, read: StreamPackets) -> str | None:
    """Describe how a file is truncated, or return None if it is complete."""
    if read.incomplete:
        first, last = read.incomplete[0], len(read.packets) - 1
        return f"is {'truncated' if first == last else 'damaged'}: packet {first} is incomplete"
    declared = _declared_bytes(source, container.format.name, stream, len(read.packets))
    size = source.stat().st_size if isinstance(source, Path) else len(source)
    if declared <= size:
        return read.fault
    if stream.frames > len(read.packets):
        return f"is truncated: it has {len(read.packets)} of {stream.frames} frames"
    return f"is truncated: {size} of {declared} bytes"


def _declared_bytes(source: Source, container: str, stream: Any, packets: int) -> int:
    """Return the file size in bytes that the container declares; 0 if unknown."""
    if "matroska" in container:
        return _matroska_bytes(_head(source))
    if "mp4" in container.split(",") and stream.frames != packets:  # reading the index takes as long as reading packets
        entries = stream.index_entries
        if not len(entries):
            return 0
        last = entries[len(entries) - 1]
        return int(last.pos + last.size)
    if container == "avi" and stream.frames > packets:
        size = int.from_bytes(_head(source)[4:8], "little")
        return size + 8 if 0 < size < _UNKNOWN_RIFF_SIZE else 0
    return 0


def _matroska_bytes(head: bytes) -> int:
    """Return the declared size of a Matroska or WebM file, which FFmpeg's demuxer ignores; 0 if unknown."""
    at = head.find(b"\x18\x53\x80\x67") + 4  # the Segment element, then its size as a variable-length number
    if at < 4 or at + 8 > len(head) or not head[at]:
        return 0
    width = 9 - head[at].bit_length()
    length = int.from_bytes(head[at : at + width], "big") & ~(1 << 7 * width)
    unknown = length == (1 << 7 * width) - 1
    return 0 if unknown else at + width + length


def _head(source: Source) -> bytes:
    if isinstance(source, bytes):
        return source[:4096]
    with source.open("rb") as file:
        return file.read(4096)
