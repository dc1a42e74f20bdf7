"""Frames of a record, or the reason why not. The one place that a loader asks.

Everything that can hang, crash or blow up (remote reads, FFmpeg, Pillow) happens in a child process under a time and a
memory limit (isolation.py); images too: a request costs half a millisecond where decoding a photograph takes 5, and one
rule for all kinds is simpler than two.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from amd.config import DataConfig
from amd.data.dataset.manifest import ManifestError
from amd.data.dataset.record import BadSample, Record
from amd.data.decoding.isolation import ChildFailed, DecodingChild, TookTooLong
from amd.data.decoding.limits import FileLimits
from amd.storage import is_remote

__all__ = ["BadSample", "Frames", "ManifestError", "SampleReader"]

Choose = Callable[[int], npt.NDArray[Any]]


class Frames(NamedTuple):
    """Frames of a file, each once: an image, or a short video, gives some of them several times to a clip."""

    pixels: npt.NDArray[np.uint8]  # (U, H, W, 3)
    order: npt.NDArray[np.int64]  # (T,) which of them each frame of the clips is


class SampleReader:
    """Reads samples one at a time, in the process that uses it: its child starts with the first read, lives until
    `close()` or garbage collection, and a copy in a forked or spawned process starts its own."""

    child: type[DecodingChild] = DecodingChild

    def __init__(self, data: DataConfig, limits: FileLimits | None = None) -> None:
        """`limits`: of files of strangers, as `read_file` takes them; none: of a data set's, whose owner is trusted."""
        names = (
            "retries",
            "cache_dir",
            "cache_limit_mib",
            "frame_name",
            "decoder",
            "read_timeout_s",
            "read_memory_mib",
        )
        self._limit = data.read_timeout_s
        options = {name: getattr(data, name) for name in names}
        self._child = self.child({**options, "limits": None if limits is None else limits._asdict()})

    def read_clip(self, record: Record, choose: Choose) -> npt.NDArray[np.uint8]:
        """The frames `choose(total_frames)` asks for, (T, H, W, 3) uint8. Raises BadSample."""
        deadline = self._deadline(self._limit)
        if record.kind == "video":
            total = self._ask(record, {"task": "open", "record": record}, deadline)["frames"]
            answer = self._ask(record, {"task": "frames", "indices": _chosen(choose, total)}, deadline)
        else:
            total = record.frames if record.kind == "frames" else 1
            if not total:
                raise BadSample(record, "has no frames")
            message = {"task": "stills", "record": record, "indices": _chosen(choose, total)}
            answer = self._ask(record, message, deadline)
        return self._pixels(answer["shape"])

    def read_file(
        self, location: str, choose: Choose, content: bytes | None = None, fetch_limit_s: float | None = None
    ) -> Frames:
        """The same of any one file, an image or a video as its content says, whatever its name.

        `content`: its bytes; then `location` only names it. `fetch_limit_s`: time to fetch a remote one, beside
        that to decode it. Raises BadSample.
        """
        record = Record(location, None, "video")
        deadline = self._deadline(self._limit)
        held: dict[str, Any] = {"task": "hold", "location": location, "content": None}
        if content is not None:
            self._ask(record, {**held, "content": len(content)}, deadline, content)
        elif fetch_limit_s is not None and is_remote(location):
            self._ask(record, {**held, "limit_s": fetch_limit_s}, self._deadline(fetch_limit_s))
            deadline = time.monotonic() + self._limit
        else:
            self._ask(record, held, deadline)
        total = self._ask(record, {"task": "look"}, deadline)["frames"]
        chosen, order = np.unique(_chosen(choose, total), return_inverse=True)
        answer = self._ask(record, {"task": "frames", "indices": chosen.tolist()}, deadline)
        return Frames(self._pixels(answer["shape"]), order)

    def start(self) -> None:
        """Start the child now, if none lives, rather than with the next read."""
        self._child.revive()

    def _pixels(self, shape: list[int]) -> npt.NDArray[np.uint8]:
        """A copy of what the last answer left in shared memory."""
        pixels = np.frombuffer(self._child.received(int(np.prod(shape))), np.uint8).reshape(shape).copy()
        self._child.release()
        return pixels

    def frame_rate(self, record: Record) -> float:
        """Frames per second of a video, as its file tells. Raises BadSample."""
        return float(self._ask(record, {"task": "rate", "record": record}, self._deadline(self._limit))["fps"])

    def transcode(self, record: Record, settings: dict[str, Any], limit_s: float) -> tuple[bytes, str, dict[str, Any]]:
        """The sample as a small file for training: bytes, ending, facts (frames, width, height). Raises BadSample."""
        message = {"task": "transcode", "record": record, "settings": settings, "limit_s": limit_s}
        answer = self._ask(record, message, self._deadline(limit_s))
        return bytes(self._child.received(answer["size"])), answer["suffix"], answer["facts"]

    def close(self) -> None:
        self._child.close()

    def _deadline(self, limit_s: float) -> float:
        self._child.revive()
        return time.monotonic() + limit_s

    def _ask(
        self, record: Record, message: dict[str, Any], deadline: float, content: bytes | None = None
    ) -> dict[str, Any]:
        try:
            answer = self._child.request(message, deadline, content)
        except TookTooLong:
            limit = message.get("limit_s", self._limit)
            raise BadSample(record, f"took longer than its limit of {limit:g} s to read and decode") from None
        except ChildFailed as error:
            raise BadSample(record, str(error)) from None
        if "bad" in answer:
            raise BadSample(record, answer["bad"])
        return answer


def _chosen(choose: Choose, total: int) -> list[int]:
    indices = [int(n) for n in choose(total)]
    if not indices or not 0 <= min(indices) <= max(indices) < total:
        raise IndexError(f"chose frames {indices} of a sample of {total}")
    return indices
