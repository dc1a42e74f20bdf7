"""Find the packets needed to decode given frames of a video exactly. Decodes nothing.

Frames are numbered in presentation order. A frame needs all packets from its entry point onwards; the entry point is
the last packet in decoding order at which a decoder can start without any earlier packet. If a packet may not contain
exactly one frame, because of the codec, the container, or missing or duplicate timestamps, the video has no map and is
decoded from the start.
Sources: ITU-T H.264 (7.4.1.2.4, D.2.8), ITU-T H.265 (7.4.2.2), VP9 bitstream (6.2).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import copy
from enum import Enum
from itertools import compress
from typing import Any, NamedTuple

import numpy as np

CONTAINERS = {"mov", "mp4", "matroska", "webm"}
CODECS = {"h264", "hevc", "vp9", "av1"}
_SCAN_BYTES = 4096  # parameter sets and SEI messages precede a key frame's picture


class EntryPoint(Enum):
    NONE = 0
    CLOSED = 1  # no later frame references earlier ones
    OPEN = 2  # frames shown before it may reference earlier ones; later frames do not


class PacketRange(NamedTuple):
    """Packets [start, stop) in decoding order, and the requested frames that they contain, in ascending order."""

    start: int
    stop: int
    frames: tuple[int, ...]


class PacketInfo(NamedTuple):
    pts: int | None
    dts: int | None
    key: bool  # flagged as a key frame, not necessarily correctly
    entry: EntryPoint
    discard: bool


class PacketMap:
    """Maps frame numbers in presentation order to packet ranges."""

    def __init__(self, packets: Sequence[PacketInfo]) -> None:
        indexed = enumerate(packets)
        shown = sorted((packet.pts or 0, position) for position, packet in indexed if not packet.discard)
        self.pts = [pts for pts, _ in shown]  # timestamp of frame n
        self.numbers: Sequence[int] = range(len(shown))  # original number of frame n, before `without` removed any
        self._position = [position for _, position in shown]  # packet position of frame n in decoding order
        self._starts = _starts(packets)
        self.times = _times(packets)
        """The pts of each packet in decoding order, and the time to seek to for it. None unless pts are unique."""
        self.closed = all(packet.entry is EntryPoint.CLOSED for packet in packets if packet.key)
        self.edited = any(packet.discard for packet in packets)

    @property
    def frames(self) -> int:
        return len(self.pts)

    @property
    def positions(self) -> dict[int, int]:
        """Packet position of each frame, keyed by the frame's timestamp."""
        return dict(zip(self.pts, self._position, strict=True))

    @property
    def packets(self) -> int:
        return len(self._starts)

    def without(self, broken: Iterable[int]) -> PacketMap:
        """Return a copy without the frames that depend on these packets; the remaining frames are renumbered."""
        before = np.zeros(len(self._starts) + 1, np.int64)  # broken packets before each position
        before[np.array(list(broken), np.int64) + 1] = 1
        before = before.cumsum()
        intact = [before[position + 1] == before[self._starts[position]] for position in self._position]
        reduced = copy(self)
        reduced.pts = list(compress(self.pts, intact))
        reduced._position = list(compress(self._position, intact))
        reduced.numbers = list(compress(self.numbers, intact))
        return reduced

    def ranges(self, frames: Sequence[int]) -> list[PacketRange]:
        """Return the smallest packet ranges that contain these frames."""
        needs = sorted((self._starts[self._position[n]], self._position[n] + 1, n) for n in set(frames))
        ranges: list[PacketRange] = []
        for start, stop, frame in needs:
            if ranges and start <= ranges[-1].stop:
                last = ranges[-1]
                ranges[-1] = PacketRange(last.start, max(last.stop, stop), (*last.frames, frame))
            else:
                ranges.append(PacketRange(start, stop, (frame,)))
        return [packet_range._replace(frames=tuple(sorted(packet_range.frames))) for packet_range in ranges]

    def to_arrays(self) -> dict[str, np.ndarray] | None:
        """Return the map as arrays that `from_arrays` can restore; None if `times` is missing."""
        if self.times is None:
            return None
        flags = np.array([self.closed, self.edited])
        return {"pts": np.array(self.pts), "position": np.array(self._position), "starts": self._starts} | {
            "times": self.times,
            "flags": flags,
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> PacketMap:
        restored = cls([])
        restored.pts, restored._position = arrays["pts"].tolist(), arrays["position"].tolist()
        restored.numbers = range(len(restored.pts))
        restored._starts, restored.times = arrays["starts"], arrays["times"]
        restored.closed, restored.edited = arrays["flags"].tolist()
        return restored


def _times(packets: Sequence[PacketInfo]) -> np.ndarray | None:
    # FFmpeg seeks by dts in mp4 and by pts in Matroska, where the first dts are unknown.
    times = [(p.pts, min(p.pts, p.pts if p.dts is None else p.dts)) for p in packets if p.pts is not None]
    if len({pts for pts, _ in times}) < len(packets):
        return None
    return np.array(times, np.int64).reshape(-1, 2)


def _starts(packets: Sequence[PacketInfo]) -> np.ndarray:
    """Return the position of each packet's entry point."""
    starts = np.zeros(len(packets), np.int64)
    closed = latest = before = 0  # positions: last closed entry, last entry of any kind, the entry before that
    edited = any(packet.discard for packet in packets)
    for position, packet in enumerate(packets):
        if packet.entry is EntryPoint.CLOSED:
            closed = latest = before = position
        elif packet.entry is EntryPoint.OPEN:
            before, latest = latest, position
        if edited:
            starts[position] = closed  # edit lists may reorder timestamps, which then do not identify leading frames
        else:
            is_leading = packet.pts is not None and packet.pts < (packets[latest].pts or 0)
            starts[position] = before if is_leading else latest
    return starts


def map_packets(packets: Sequence[Any], codec: str, container: str, extradata: bytes | None) -> PacketMap | None:
    """Return a map if every packet is known to contain exactly one frame, else None.

    `packets`: packets in decoding order, including their data.
    """
    if codec not in CODECS or not CONTAINERS & set(container.split(",")) or not packets:
        return None
    infos = [PacketInfo(p.pts, p.dts, p.is_keyframe, entry_point(p, codec, extradata), p.is_discard) for p in packets]
    shown = [info.pts for info in infos if not info.discard]
    if not shown or None in shown or len(set(shown)) < len(shown) or infos[0].entry is EntryPoint.NONE:
        return None
    if infos[0].entry is EntryPoint.OPEN and min(pts for pts in shown if pts is not None) < (infos[0].pts or 0):
        return None  # leading frames reference missing earlier frames; decoders differ in whether they show them
    if codec == "vp9" and any(_hidden(memoryview(p)) for p in packets):
        return None
    return PacketMap(infos)


def entry_point(packet: Any, codec: str, extradata: bytes | None) -> EntryPoint:
    """Classify a packet as a closed entry point for decoding, an open one, or neither."""
    if not packet.is_keyframe:
        return EntryPoint.NONE
    if codec not in ("h264", "hevc"):
        return EntryPoint.CLOSED  # VP9, AV1: a key frame that is shown resets every reference
    data = bytes(memoryview(packet)[:_SCAN_BYTES])
    return _h264_entry(data, extradata) if codec == "h264" else _hevc_entry(data, extradata)


def _h264_entry(data: bytes, extradata: bytes | None) -> EntryPoint:
    """Classify an H.264 packet: IDR pictures are closed, recovery points with exact match and frame count 0 are
    open."""
    recovers = False
    for unit in _units(data, extradata[4] & 3 if extradata and extradata[0] == 1 and len(extradata) > 4 else None):
        kind = unit[0] & 31
        if kind == 5:
            return EntryPoint.CLOSED
        if kind == 6:
            recovers = recovers or _exact_recovery(unit[1:])
        elif 1 <= kind <= 4:
            return EntryPoint.OPEN if recovers else EntryPoint.NONE
    return EntryPoint.NONE


def _hevc_entry(data: bytes, extradata: bytes | None) -> EntryPoint:
    for unit in _units(data, extradata[21] & 3 if extradata and extradata[0] == 1 and len(extradata) > 21 else None):
        kind = (unit[0] >> 1) & 63
        if kind in (19, 20):  # IDR
            return EntryPoint.CLOSED
        if 16 <= kind <= 21:  # BLA, CRA
            return EntryPoint.OPEN
        if kind < 16:
            return EntryPoint.NONE
    return EntryPoint.NONE


def _units(data: bytes, length_size: int | None) -> Iterator[bytes]:
    """Yield a packet's NAL units, delimited by start codes or, in mp4 and mkv, by lengths of length_size + 1 bytes."""
    if length_size is None:
        for piece in data.split(b"\0\0\1")[1:]:
            if piece:
                yield piece
        return
    size, at = length_size + 1, 0
    while at + size < len(data):
        length = int.from_bytes(data[at : at + size], "big")
        if not length:
            return
        yield data[at + size : at + size + length]
        at += size + length


def _exact_recovery(message: bytes) -> bool:
    """Return whether SEI messages contain a recovery point with recovery_frame_cnt 0 and exact_match_flag 1."""
    message = message.replace(b"\0\0\3", b"\0\0")
    at = 0
    while at + 2 <= len(message) and message[at] != 0x80:
        numbers = []
        for _ in range(2):  # type, then length, each a sum of bytes
            value = 0
            while at < len(message) and message[at] == 255:
                value, at = value + 255, at + 1
            if at >= len(message):
                return False
            numbers.append(value + message[at])
            at += 1
        kind, length = numbers
        if kind == 6 and length:
            return at < len(message) and message[at] >> 6 == 3  # first bit 1: count 0 (ue); second: exact match
        at += length
    return False


def _hidden(data: memoryview) -> bool:
    """Return whether a VP9 packet is hidden: a single frame with show_existing_frame 0 and show_frame 0."""
    first, last = data[0], data[-1]
    if last & 0xE0 == 0xC0:
        return False  # a superframe: hidden frames followed by the shown frame
    profile = (first >> 5 & 1) | (first >> 4 & 1) << 1
    existing = 3 if profile < 3 else 2  # bit of show_existing_frame; frame_type and show_frame are the two bits below
    return not first >> existing & 1 and not first >> (existing - 2) & 1
