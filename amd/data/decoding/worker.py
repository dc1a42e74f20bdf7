"""Run the decoding process (`python -m amd.data.decoding.worker`), which isolation.py starts.

Imports only light modules. Requests and responses are JSON messages over a socket, one at a time; pixels and files are
passed in shared memory. Exits when its parent dies, even if a decoder hangs.
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
from amd.data.decoding.containers import likely_cause
from amd.data.decoding.frames import DamagedFrames, VideoError
from amd.data.decoding.images import MAX_PIXELS, ImageError, is_image, read_image
from amd.data.decoding.limits import FileLimits
from amd.data.decoding.video import UnknownContainer, Video, frame_rate, open_video
from amd.data.fetching.cache import LocalCache
from amd.data.fetching.fetch import Fetcher, FetchError, StoreOutage
from amd.data.fetching.read_ahead import FileRange, ReadAhead, frame_files

Pixels = npt.NDArray[np.uint8]
_GRACE_S = 30  # in addition to the parent's time limit
_STACK_BYTES = 1 << 20  # per thread; the usual 8 MiB would use up the limited address space


class SharedMemory:
    """An anonymous file mapped by both processes; the child enlarges the file to fit a response."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._map: mmap.mmap | None = None

    def allocate(self, shape: tuple[int, ...]) -> Pixels:
        size = int(np.prod(shape, dtype=np.int64))
        if self._map is None or len(self._map) < size:
            self._map = None  # the old map is freed with the last array over it
            os.ftruncate(self._fd, max(size, 1))
            self._map = mmap.mmap(self._fd, max(size, 1))
        return np.frombuffer(self._map, np.uint8, size).reshape(shape)

    def put(self, content: bytes) -> int:
        self.allocate((len(content),))[:] = np.frombuffer(content, np.uint8)
        return len(content)


class Worker:
    """Handles requests to open a sample, decode its frames or transcode it."""

    def __init__(self, options: dict[str, Any], memory: SharedMemory, inbox: int = -1) -> None:
        cache = None
        if options["limits"] is not None:
            Image.init()  # so that plugin imports do not delay the first untrusted image
        self._limits = None if options["limits"] is None else FileLimits(**options["limits"])
        self.memory_limit = "data.read_memory_mib allows" if self._limits is None else "is allowed for one file"
        if options["cache_dir"]:
            cache = LocalCache(options["cache_dir"], options["cache_limit_mib"] << 20)
        fetcher = Fetcher(options["retries"], cache, max_bytes=self._limits and self._limits.bytes)
        self._fetcher = ReadAhead(fetcher, options["read_ahead_mib"] << 20)
        self._frame_name, self._decoder = options["frame_name"], options["decoder"]
        self._min_share: float | None = options["min_decoded_share"]  # None: damaged videos are rejected
        self._memory, self._inbox = memory, inbox
        self._video: Video | None = None
        self._source: Path | bytes | None = None
        self._image: Pixels | None = None

    def handle(self, request: dict[str, Any]) -> dict[str, Any]:
        task = request["task"]
        if task == "open":  # a video, whose length is known only once it is open
            self._reset()
            record = Record(*request["record"])
            source = self._fetcher.fetch(record.location, record.offset, record.size)
            self._video = open_video(source, self._decoder, None, self._min_share)
            return _frame_numbers(self._video, request)
        if task == "load":  # a file of any kind, from the inbox or its location
            self._reset()
            size = request["content"]
            self._source = self._fetcher.fetch(request["location"]) if size is None else _read_inbox(self._inbox, size)
            return {}
        if task == "probe":
            return {"frames": self._probe()}
        if task == "frames":
            return self._read_frames(request)
        if task == "rate":
            record = Record(*request["record"])
            return {"fps": frame_rate(self._fetcher.fetch(record.location, record.offset, record.size))}
        if task == "expect":
            self._fetcher.expect(FileRange(*file) for file in request["files"])
            return {}
        if task == "stills":
            return {"shape": self._stills(Record(*request["record"]), request["indices"]).shape}
        if task == "touch":
            self._fetcher.fetch(request["location"], 0, 1)
            return {}
        if task == "transcode":
            from amd.data.decoding.transcode import transcode

            record = Record(*request["record"])
            source = self._fetcher.fetch(record.location, record.offset, record.size)
            result = transcode(source, record.kind, min_decoded_share=self._min_share, **request["settings"])
            size = self._memory.put(result.content)
            return {"size": size, "suffix": result.suffix, "facts": result.facts, "damage": result.damage}
        raise ValueError(f"unknown task {task!r}")

    def _probe(self) -> int:
        """Open the loaded file, whose type is detected from its content; return the number of frames."""
        source, limits = self._source, self._limits
        assert source is not None
        if is_image(_head(source)):
            self._image = read_image(source, MAX_PIXELS if limits is None else limits.pixels)
            return 1
        try:
            self._video = open_video(source, self._decoder, limits and limits.video_limits, self._min_share)
        except UnknownContainer:
            raise VideoError(f"is neither an image nor a video that can be opened; {likely_cause(source)}") from None
        return self._video.frames

    def _read_frames(self, request: dict[str, Any]) -> dict[str, Any]:
        """Read the requested frames and close the video.

        If some fail to decode, keep it open and return the numbers of the intact frames, so that the caller can choose
        again.
        """
        video, choose_again = self._video, False
        try:
            response: dict[str, Any] = {"shape": self._frames(request["indices"]).shape}
            if video is not None:
                response |= {"decoder": video.decoder, "damage": video.damage}
            return response
        except DamagedFrames:
            if video is None or self._min_share is None:
                raise
            video.exclude_damaged()
            choose_again = True
            return _frame_numbers(video, request)
        finally:
            if not choose_again:
                self._reset()

    def _frames(self, indices: Sequence[int]) -> Pixels:
        if self._image is None:
            assert self._video is not None
            return self._video.read(indices, self._allocate)
        output = self._allocate((len(indices), *self._image.shape))
        output[:] = self._image
        return output

    def _allocate(self, shape: tuple[int, ...]) -> Pixels:
        size = int(np.prod(shape, dtype=np.int64))
        if self._limits is not None and size > self._limits.decoded_bytes:
            raise VideoError(
                f"needs {size} bytes for {shape[0]} frames, more than the limit of {self._limits.decoded_bytes}"
            )
        return self._memory.allocate(shape)

    def _stills(self, record: Record, indices: Sequence[int]) -> Pixels:
        """Read an image (the same for every index), or numbered images from a folder; frame 0 is file number 1."""
        if record.kind == "image":
            pixels = read_image(self._fetcher.fetch(record.location, record.offset, record.size))
            output = self._memory.allocate((len(indices), *pixels.shape))
            output[:] = pixels
            return output
        numbers = sorted(set(indices))
        files = frame_files(record.location, numbers, self._frame_name)
        names = [file.location.removeprefix(f"{record.location}/") for file in files]
        images: dict[int, Pixels] = {}
        self._fetcher.start(files)
        try:
            for n, name, file in zip(numbers, names, files, strict=True):
                try:
                    images[n] = read_image(self._fetcher.fetch(*file))
                except (FetchError, ImageError) as error:
                    raise ImageError(f"frame {name} {error}") from None
        finally:
            self._fetcher.discard(files)
        shape = images[numbers[0]].shape
        for n, name in zip(numbers, names, strict=True):
            if images[n].shape != shape:
                raise ImageError(
                    f"frame {name} is {images[n].shape[:2]}, but other frames are {shape[:2]} (height, width)"
                )
        output = self._memory.allocate((len(indices), *shape))
        for row, n in enumerate(indices):
            output[row] = images[n]
        return output

    def _reset(self) -> None:
        self._source = self._image = None
        if self._video is not None:
            self._video.close()
            self._video = None


def _frame_numbers(video: Video, request: dict[str, Any]) -> dict[str, Any]:
    """Return the number of decodable frames and, if requested, their numbers in the undamaged video."""
    if video.damage is None or not request.get("timeline"):
        return {"frames": video.frames}
    return {"frames": video.frames, "numbers": list(video.numbers), "total": video.damage.total}


def _read_inbox(inbox: int, size: int) -> bytes:
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
    """Handle requests until the connection is closed. An unreadable sample is reported as a response, not raised."""
    while True:
        try:
            request = json.loads(connection.recv_bytes())
        except EOFError:
            return
        # If the parent dies while a decoder hangs, the kernel kills this process.
        signal.alarm(int(request.get("limit_s", limit_s)) + _GRACE_S)
        try:
            response = worker.handle(request)
        except StoreOutage as error:
            response = {"outage": " ".join(str(error).split())}
        except (VideoError, ImageError, FetchError) as error:
            response = {"bad": " ".join(str(error).split())}
        except MemoryError:
            response = {"bad": f"needs more memory than {worker.memory_limit}"}
        except Exception as error:  # decoders raise arbitrary errors on broken files
            response = {"bad": " ".join(f"cannot be read ({type(error).__name__}: {error})".split())}
        signal.alarm(0)
        connection.send_bytes(json.dumps(response).encode())


def main() -> None:
    socket, memory, inbox, parent = map(int, sys.argv[1:5])
    options = json.loads(sys.argv[5])
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":  # macOS reserves more addresses for every process than any limit allows
        _limit_memory(options["read_memory_mib"] << 20)
    threading.stack_size(_STACK_BYTES)
    threading.Thread(target=_exit_with_parent, args=(parent,), daemon=True).start()
    av.logging.set_level(None)  # FFmpeg errors are returned as reasons
    connection = Connection(socket)
    connection.send_bytes(b'{"ready": true}')
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # library output to stderr would fill a disk
    serve(connection, Worker(options, SharedMemory(memory), inbox), options["read_timeout_s"])


def _limit_memory(limit: int) -> None:
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))


def _exit_with_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(0)


if __name__ == "__main__":
    main()
