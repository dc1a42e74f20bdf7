"""Damage video files as transfers and recorders do: truncate them, overwrite packets, declare wrong frame counts."""

from __future__ import annotations

import random
import struct
from collections.abc import Iterable
from pathlib import Path

import av


def cut(path: Path, share: float) -> Path:
    """Truncate a file to the fraction `share` of its size."""
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    return path


def overwrite_packets(path: Path, numbers: Iterable[int]) -> Path:
    """Overwrite these video packets, in decoding order, with noise."""
    with av.open(str(path)) as container:
        packets = [(p.pos, p.size) for p in container.demux(video=0) if p.size]
    content, draws = bytearray(path.read_bytes()), random.Random(0)
    for number in numbers:
        at, size = packets[number]
        content[at : at + size] = draws.randbytes(size)
    path.write_bytes(content)
    return path


def declare_frames(path: Path, count: int) -> Path:
    """Set the frame count in an AVI's headers to a value that contradicts its index and packets."""
    content = bytearray(path.read_bytes())
    for box, offset in ((b"avih", 4 + 4 + 16), (b"strh", 4 + 4 + 32)):
        at = content.find(box) + offset
        content[at : at + 4] = struct.pack("<I", count)
    path.write_bytes(content)
    return path
