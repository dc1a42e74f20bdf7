"""The decoding process, `python -m amd.data.decoding.worker`: started by isolation.py, apart from training.

Light imports only. One JSON request at a time comes over a socket; answers go back the same way, pixels and files
through shared memory. It ends when its parent is gone, even in the middle of a decoder that does not return.
"""

from __future__ import annotations

import json
import mmap
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import av
import numpy as np
import numpy.typing as npt
from PIL import Image

from amd.data.dataset.record import Record
from amd.data.decoding.cache import LocalCache
from amd.data.decoding.fetch import Fetcher, FetchError
from amd.data.decoding.frames import VideoError
from amd.data.decoding.images import MAX_PIXELS, ImageError, is_image, read_image
from amd.data.decoding.limits import FileLimits
from amd.data.decoding.video import NotOpened, Video, frame_rate, open_video

Pixels = npt.NDArray[np.uint8]
_GRACE_S = 30  # beyond the parent's own time limit


class SharedMemory:
    """An anonymous file that both processes map; the child makes it as large as an answer needs."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._map: mmap.mmap | None = None

    def allocate(self, shape: tuple[int, ...]) -> Pixels:
        size = int(np.prod(shape, dtype=np.int64))
        if self._map is None or len(self._map) < size:
            self._map = None  # the old map goes when the last array over it does
            os.ftruncate(self._fd, max(size, 1))
            self._map = mmap.mmap(self._fd, max(size, 1))
        return np.frombuffer(self._map, np.uint8, size).reshape(shape)

    def put(self, content: bytes) -> int:
        self.allocate((len(content),))[:] = np.frombuffer(content, np.uint8)
        return len(content)


class Worker:
    """Answers requests: open a sample, read frames of it, transcode it."""

    def __init__(self, options: dict[str, Any], memory: SharedMemory, inbox: int = -1) -> None:
        cache = None
        if options["limits"] is not None:
            Image.init()  # a stranger's first WebP must not pay for the imports
        self._limits = None if options["limits"] is None else FileLimits(**options["limits"])
        self.memory_limit = "data.read_memory_mib" if self._limits is None else "one file"
        if options["cache_dir"]:
            cache = LocalCache(options["cache_dir"], options["cache_limit_mib"] << 20)
        self._fetcher = Fetcher(options["retries"], cache, max_bytes=self._limits and self._limits.bytes)
        self._frame_name, self._decoder = options["frame_name"], options["decoder"]
        self._memory, self._inbox = memory, inbox
        self._video: Video | None = None
        self._held: Path | bytes | None = None
        self._picture: Pixels | None = None

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        task = request["task"]
        if task == "open":  # a video: its length is known only now
            self._drop()
            record = Record(*request["record"])
            self._video = open_video(self._fetcher.fetch(record.location, record.offset, record.size), self._decoder)
            return {"frames": self._video.frames}
        if task == "hold":  # a file of any kind: its bytes lie in the inbox, or are fetched
            self._drop()
            size = request["content"]
            self._held = self._fetcher.fetch(request["location"]) if size is None else _all(self._inbox, size)
            return {}
        if task == "look":
            return {"frames": self._look()}
        if task == "frames":
            try:
                return {"shape": self._frames(request["indices"]).shape}
            finally:
                self._drop()
        if task == "rate":
            record = Record(*request["record"])
            return {"fps": frame_rate(self._fetcher.fetch(record.location, record.offset, record.size))}
        if task == "stills":
            return {"shape": self._stills(Record(*request["record"]), request["indices"]).shape}
        if task == "transcode":
            from amd.data.decoding.transcode import transcode

            record = Record(*request["record"])
            source = self._fetcher.fetch(record.location, record.offset, record.size)
            result = transcode(source, record.kind, **request["settings"])
            return {"size": self._memory.put(result.content), "suffix": result.suffix, "facts": result.facts}
        raise ValueError(f"no task {task!r}")

    def _look(self) -> int:
        """Open what is held as what its content says it is; its number of frames."""
        source, limits = self._held, self._limits
        assert source is not None
        if is_image(_head(source)):
            self._picture = read_image(source, MAX_PIXELS if limits is None else limits.pixels)
            return 1
        try:
            self._video = open_video(source, self._decoder, limits and limits.of_video)
        except NotOpened:
            raise VideoError("is neither an image nor a video that can be opened; it may be cut short") from None
        return self._video.frames

    def _frames(self, indices: Sequence[int]) -> Pixels:
        if self._picture is None:
            assert self._video is not None
            return self._video.read(indices, self._allocate)
        output = self._allocate((len(indices), *self._picture.shape))
        output[:] = self._picture
        return output

    def _allocate(self, shape: tuple[int, ...]) -> Pixels:
        size = int(np.prod(shape, dtype=np.int64))
        if self._limits is not None and size > self._limits.decoded_bytes:
            raise VideoError(f"needs {size} bytes for {shape[0]} frames, more than {self._limits.decoded_bytes}")
        return self._memory.allocate(shape)

    def _stills(self, record: Record, indices: Sequence[int]) -> Pixels:
        """An image (any index is the image), or numbered images of a folder; frame 0 is in file number 1."""
        if record.kind == "image":
            pixels = read_image(self._fetcher.fetch(record.location, record.offset, record.size))
            output = self._memory.allocate((len(indices), *pixels.shape))
            output[:] = pixels
            return output
        numbers = sorted(set(indices))
        folder = record.location.rstrip("/").rpartition("/")[2]
        names = [self._frame_name.format(n + 1, folder=folder) for n in numbers]
        pictures: dict[int, Pixels] = {}
        for n, name in zip(numbers, names, strict=True):
            try:
                pictures[n] = read_image(self._fetcher.fetch(f"{record.location}/{name}"))
            except (FetchError, ImageError) as error:
                raise ImageError(f"frame {name} {error}") from None
        shape = pictures[numbers[0]].shape
        for n, name in zip(numbers, names, strict=True):
            if pictures[n].shape != shape:
                raise ImageError(f"frame {name} is {pictures[n].shape[:2]}, others are {shape[:2]} (height, width)")
        output = self._memory.allocate((len(indices), *shape))
        for row, n in enumerate(indices):
            output[row] = pictures[n]
        return output

    def _drop(self) -> None:
        self._held = self._picture = None
        if self._video is not None:
            self._video.close()
            self._video = None


def _all(inbox: int, size: int) -> bytes:
    content = bytearray()
    while len(content) < size:
        content += os.pread(inbox, size - len(content), len(content))
    return bytes(content)


def _head(source: Path | bytes) -> bytes:
    if isinstance(source, bytes):
        return source[:64]
    with source.open("rb") as file:
        return file.read(64)


def serve(connection: Connection, worker: Worker, limit_s: float) -> None:
    """Answer until the other end closes. The reason why a sample is bad is an answer too."""
    while True:
        try:
            request = json.loads(connection.recv_bytes())
        except EOFError:
            return
        # Should the parent be gone while a decoder never returns, the kernel ends this process.
        signal.alarm(int(request.get("limit_s", limit_s)) + _GRACE_S)
        try:
            answer = worker.answer(request)
        except (VideoError, ImageError, FetchError) as error:
            answer = {"bad": " ".join(str(error).split())}
        except MemoryError:
            answer = {"bad": f"needs more memory than {worker.memory_limit} allows"}
        except Exception as error:  # broken files find ways that nobody has listed
            answer = {"bad": " ".join(f"cannot be read ({type(error).__name__}: {error})".split())}
        signal.alarm(0)
        connection.send_bytes(json.dumps(answer).encode())


def main() -> None:
    socket, memory, inbox, parent = map(int, sys.argv[1:5])
    options = json.loads(sys.argv[5])
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    limit = options["read_memory_mib"] << 20
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    av.logging.set_level(None)  # what FFmpeg has to say of a broken file comes back as the reason
    connection = Connection(socket)
    connection.send_bytes(b'{"ready": true}')
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # libraries that write there would fill a disk
    serve(connection, Worker(options, SharedMemory(memory), inbox), options["read_timeout_s"])


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(0)


if __name__ == "__main__":
    main()
