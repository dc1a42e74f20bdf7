"""Cache the packet maps of long local files, so that reading a clip does not require reading the whole file.

Building a map requires a pass over all packets in the file, which takes half a second for a feature film. All processes
on a node share maps in a temporary folder. Decodes nothing.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import uuid
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from amd.data.decoding.containers import Unreadable, stored_packets
from amd.data.decoding.frames import Source
from amd.data.decoding.packets import PacketMap

MIN_PACKETS = 2000  # minimum for which a map is kept: about a minute of video
MAX_MAPS = 5000  # maximum number of files in the folder; each takes about 30 bytes per frame
MAX_SOUGHT_PACKETS = 2000  # longer ranges are read from the start of the file


def load_map(source: Source) -> PacketMap | None:
    """Return the saved map of a file, or None if no map is saved or the file has changed since."""
    if not isinstance(source, Path):
        return None
    try:
        with np.load(_path(source), allow_pickle=False) as arrays:
            return PacketMap.from_arrays(arrays)
    except (OSError, ValueError, KeyError, EOFError, BadZipFile):  # no map, or a map truncated by a full disk
        return None


def save_map(source: Source, packet_map: PacketMap) -> None:
    """Save the map of a long file. Failures, such as a full disk, are ignored."""
    if not isinstance(source, Path) or packet_map.packets < MIN_PACKETS:
        return
    arrays = packet_map.to_arrays()
    if arrays is None:
        return
    with suppress(OSError):
        path = _path(source)
        temporary = path.with_suffix(f".{uuid.uuid4().hex[:8]}")
        with temporary.open("wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]  # the stub takes the names for its own options
        os.replace(temporary, path)
        _remove_oldest(path.parent)


def seek_packets(container: Any, stream: Any, packet_map: PacketMap, start: int, stop: int) -> list[Any] | None:
    """Seek to the packets [start, stop) in decoding order and return them.

    Returns None if the packets must be read from the start. Every packet is compared with the map, because a demuxer
    may seek to another position or number packets differently.
    """
    times = packet_map.times
    if times is None or not start or stop - start > MAX_SOUGHT_PACKETS:
        return None
    pts = times[:, 0]
    container.seek(int(times[start, 1]), stream=stream)
    packets = iter(stored_packets(container, stream))
    first = next(packets, None)
    if first is None or isinstance(first, Unreadable) or first.pts is None:
        return None
    landed: list[int] = np.flatnonzero(pts == first.pts).tolist()
    if len(landed) != 1 or not 0 <= start - landed[0] <= MAX_SOUGHT_PACKETS:
        return None
    skipped = start - landed[0]
    found = [first, *islice(packets, stop - landed[0] - 1)][skipped:]
    return found if [getattr(packet, "pts", None) for packet in found] == pts[start:stop].tolist() else None


def _path(source: Path) -> Path:
    """Return the path at which a file's map is stored. Raises OSError if the folder belongs to another user."""
    facts = source.stat()
    name = f"{source.resolve()}\n{facts.st_size}\n{facts.st_mtime_ns}".encode("utf-8", "surrogateescape")
    folder = Path(tempfile.gettempdir()) / f"amd-packet-maps-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.is_symlink() or folder.stat().st_uid != os.getuid():
        raise PermissionError(f"{folder} belongs to another user")
    return folder / f"{hashlib.sha256(name).hexdigest()}.npz"


def _remove_oldest(folder: Path) -> None:
    paths = [path for path in folder.iterdir() if path.suffix == ".npz"]
    if len(paths) > MAX_MAPS:
        for path in sorted(paths, key=lambda path: path.stat().st_mtime)[: len(paths) // 2]:
            path.unlink(missing_ok=True)
