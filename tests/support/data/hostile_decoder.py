"""Decoding process whose decoder misbehaves like a broken library.

The file name, or the text after the last colon in its content, selects the behaviour. If the name ends in `_once`, the
decoder misbehaves only in the first process that opens the file.
"""

from __future__ import annotations

import ctypes
import os
import signal
import time
from pathlib import Path
from typing import Any

from amd.data.decoding import worker
from amd.data.decoding.isolation import DecodingChild
from amd.data.decoding.reader import SampleReader
from amd.data.decoding.video import open_video


def _misbehave(source: Any, *options: Any) -> Any:
    name = source.stem if isinstance(source, Path) else source[-16:].rpartition(b":")[2].decode("latin-1")
    if name.endswith("_once") and _is_first(source.with_suffix(".opened")):
        name = name.removesuffix("_once")
    if name == "hangs":
        time.sleep(3600)
    if name == "spins":  # blocks in C while holding the GIL, so no Python thread of the child runs again
        ctypes.PyDLL(None).pause()
    if name == "segfaults":
        ctypes.string_at(0)
    if name == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if name == "exits":
        os._exit(7)
    if name == "eats":
        return bytearray(1 << 34)
    if name == "raises":
        raise ZeroDivisionError("unexpected")
    return open_video(source, *options)


def _is_first(mark: Path) -> bool:
    try:
        mark.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def _die_at_start() -> None:
    """Kill this process if the file named by KILLED_STARTS is not empty; each call removes one byte from the file."""
    path = Path(os.environ.get("KILLED_STARTS", os.devnull))
    if left := path.read_bytes():
        path.write_bytes(left[1:])
        os.kill(os.getpid(), signal.SIGKILL)


class HostileChild(DecodingChild):
    module = "tests.support.data.hostile_decoder"


class HostileReader(SampleReader):
    child = HostileChild


if __name__ == "__main__":
    _die_at_start()
    worker.open_video = _misbehave
    worker.main()
