"""Entry point to decoding: read the frames of a record, or raise BadSample with the reason.

Anything that can hang, crash or exhaust memory (remote reads, FFmpeg, Pillow) runs in a child process with time and
memory limits (isolation.py). Images are decoded there too: a request costs 0.5 ms, decoding a photograph 5 ms. A
process may die for reasons unrelated to the sample, such as a lack of memory, so a sample is bad only if a fresh
process also dies on it. Does not import a decoder.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from importlib.util import find_spec
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from amd.config import ConfigError, DataConfig
from amd.data.dataset.manifest import ManifestError
from amd.data.dataset.record import BadSample, FrameChooser, Record
from amd.data.decoding.damage import Damage
from amd.data.decoding.isolation import ChildFailed, ChildTimeout, DecodingChild
from amd.data.decoding.limits import FileLimits
from amd.data.fetching.read_ahead import FileRange, frame_files
from amd.storage import StorageUnreachable, is_remote, retry_on_outage

__all__ = ["BadSample", "DecodedFrames", "ManifestError", "ReadFacts", "SampleReader", "check_decoder"]

T = TypeVar("T")


class _Outage(OSError):
    """Raised if the store of a remote sample does not respond."""


class DecodedFrames(NamedTuple):
    """Distinct frames of a file, and their order in the clip; clips from short files repeat frames."""

    pixels: npt.NDArray[np.uint8]  # (U, H, W, 3)
    order: npt.NDArray[np.int64]  # (T,) index into pixels for each clip frame


class ReadFacts(NamedTuple):
    """Decoder that read a video, and the damage that it found."""

    decoder: str
    """Decoder that was used: pyav or decord."""
    damage: Damage | None


def check_decoder(data: DataConfig) -> None:
    """Raise ConfigError if data.decoder is not installed: decord has no wheels for Linux on arm64 or for macOS."""
    if data.decoder == "decord" and find_spec("decord") is None:
        raise ConfigError(
            [
                "data.decoder=decord: decord is not installed; its wheels support only Linux on x86-64; "
                "use data.decoder=pyav, which is exact and faster, or build decord from source"
            ]
        )


class SampleReader:
    """Reads samples one at a time through a child process.

    While a remote store does not respond, reads of a trusted data set wait, and then raise StorageUnreachable: its
    samples are not bad. Reads of an untrusted file raise it at once, because a caller is waiting.
    The child starts on the first read and lives until `close()` or garbage collection; a copy of the reader in a forked
    or spawned process starts a separate child.
    """

    child: type[DecodingChild] = DecodingChild

    def __init__(self, data: DataConfig, limits: FileLimits | None = None) -> None:
        """Create a reader. `limits` apply to untrusted files; None for data sets, which are trusted.

        Raises ConfigError if the decoder is not installed.
        """
        check_decoder(data)
        self._is_trusted = limits is None
        names = (
            "retries",
            "read_ahead_mib",
            "cache_dir",
            "cache_limit_mib",
            "frame_name",
            "decoder",
            "read_timeout_s",
            "read_memory_mib",
        )
        self._limit, self._frame_name = data.read_timeout_s, data.frame_name
        self._min_share = data.min_decoded_share if data.damage == "tolerant" else None
        options = {name: getattr(data, name) for name in names} | {"min_decoded_share": self._min_share}
        self.last_read: ReadFacts | None = None
        """How the last sample was read; None if it was not a video."""
        self._child = self.child({**options, "limits": None if limits is None else limits._asdict()})

    def read_clip(self, record: Record, choose: FrameChooser, *, timeline: bool = False) -> npt.NDArray[np.uint8]:
        """Decode the frames that `choose(total_frames)` returns, (T, H, W, 3) uint8.

        For a damaged video, the frame numbers that `choose` returns count only the frames that decode, and `choose` is
        called again if damage is found later. With `timeline`, they count all frames, so that numbers correspond to
        times, and a frame that does not decode is replaced by the last decodable frame before it.
        Raises BadSample if the sample cannot be read.
        """
        return self._read(record, lambda: self._clip(record, choose, timeline))

    def _clip(self, record: Record, choose: FrameChooser, timeline: bool) -> npt.NDArray[np.uint8]:
        deadline = self._deadline(self._limit)
        self.last_read = None
        if record.kind == "video":
            opened = self._request(record, {"task": "open", "record": record, "timeline": timeline}, deadline)

            def indices(found: dict[str, Any]) -> list[int]:
                if "numbers" not in found:
                    return _chosen_indices(choose, found["frames"])
                return self._on_timeline(record, choose, found)

            response = self._read_frames(record, opened, indices, deadline, timeline=timeline)
        else:
            total = record.frames if record.kind == "frames" else 1
            if not total:
                raise BadSample(record, "has no frames")
            message = {"task": "stills", "record": record, "indices": _chosen_indices(choose, total)}
            response = self._request(record, message, deadline)
        return self._pixels(response["shape"])

    def read_file(
        self, location: str, choose: FrameChooser, content: bytes | None = None, fetch_limit_s: float | None = None
    ) -> DecodedFrames:
        """Decode frames of any image or video file, detected by its content rather than its name.

        `content`: the file's bytes; if given, `location` is only a display name. `fetch_limit_s`: time limit for
        fetching a remote file, separate from the limit for decoding.
        Raises BadSample if the file cannot be read, or StorageUnreachable if its store does not respond.
        """
        record = Record(location, None, "video")
        return self._read(record, lambda: self._file(record, choose, content, fetch_limit_s))

    def _file(
        self, record: Record, choose: FrameChooser, content: bytes | None, fetch_limit_s: float | None
    ) -> DecodedFrames:
        deadline = self._deadline(self._limit)
        load: dict[str, Any] = {"task": "load", "location": record.location, "content": None}
        if content is not None:
            self._request(record, {**load, "content": len(content)}, deadline, content)
        elif fetch_limit_s is not None and is_remote(record.location):
            self._request_remote(record, {**load, "limit_s": fetch_limit_s}, fetch_limit_s)
            deadline = time.monotonic() + self._limit
        else:
            self._request(record, load, deadline)
        self.last_read = None
        opened = self._request(record, {"task": "probe"}, deadline)
        order = np.zeros(0, np.int64)

        def indices(found: dict[str, Any]) -> list[int]:
            nonlocal order
            distinct, order = np.unique(_chosen_indices(choose, found["frames"]), return_inverse=True)
            numbers: list[int] = distinct.tolist()
            return numbers

        response = self._read_frames(record, opened, indices, deadline)
        return DecodedFrames(self._pixels(response["shape"]), order)

    def expect(self, samples: Iterable[tuple[Record, FrameChooser]]) -> None:
        """Prefetch remote files for the next samples, in this order; samples from earlier calls are dropped."""
        files: list[FileRange] = []
        for record, choose in samples:
            if record.kind != "frames":
                files.append(FileRange(record.location, record.offset, record.size))
            elif record.frames:
                with suppress(BadSample):  # no frame can be chosen; raised again when the sample is read
                    numbers = sorted(set(_chosen_indices(choose, record.frames)))
                    files += frame_files(record.location, numbers, self._frame_name)
        with suppress(ChildFailed):  # the next read starts a new process, which fetches what it reads
            self._child.request({"task": "expect", "files": files}, self._deadline(self._limit))

    def _read_frames(
        self,
        record: Record,
        opened: dict[str, Any],
        choose: Callable[[dict[str, Any]], list[int]],
        deadline: float,
        **options: Any,
    ) -> dict[str, Any]:
        """Return the response with the chosen frames. Frames are chosen again if damage leaves fewer frames."""
        found = opened
        while "shape" not in found:
            found = self._request(record, {"task": "frames", "indices": choose(found), **options}, deadline)
        if "decoder" in found:
            self.last_read = ReadFacts(found["decoder"], _damage(found["damage"]))
        return found

    def _on_timeline(self, record: Record, choose: FrameChooser, found: dict[str, Any]) -> list[int]:
        """Convert frame numbers that count all frames to numbers that count only decodable frames.

        Raises BadSample if too few of the chosen frames decode.
        """
        chosen, numbers = _chosen_indices(choose, found["total"]), np.array(found["numbers"])
        decoded = int(np.isin(chosen, numbers).sum())
        if decoded < (self._min_share or 0) * len(chosen):
            raise BadSample(record, f"is damaged in the requested range: only {decoded} of {len(chosen)} frames decode")
        before: list[int] = (np.searchsorted(numbers, chosen, side="right") - 1).clip(min=0).tolist()
        return before

    def start(self) -> None:
        """Start the child immediately rather than on the next read."""
        self._child.ensure_running()

    def _pixels(self, shape: list[int]) -> npt.NDArray[np.uint8]:
        """Copy the last response's pixels from shared memory."""
        pixels = np.frombuffer(self._child.shared_bytes(int(np.prod(shape))), np.uint8).reshape(shape).copy()
        self._child.release()
        return pixels

    def frame_rate(self, record: Record) -> float:
        """Return the frame rate in a video's header, in frames per second. Raises BadSample if it cannot be read."""
        message = {"task": "rate", "record": record}
        return self._read(record, lambda: float(self._request(record, message, self._deadline(self._limit))["fps"]))

    def transcode(self, record: Record, settings: dict[str, Any], limit_s: float) -> tuple[bytes, str, dict[str, Any]]:
        """Transcode a sample; return its bytes, file suffix and facts (frames, width, height).

        Raises BadSample if the sample cannot be read or transcoded.
        """
        message = {"task": "transcode", "record": record, "settings": settings, "limit_s": limit_s}

        def read() -> tuple[bytes, str, dict[str, Any]]:
            self.last_read = None
            response = self._request(record, message, self._deadline(limit_s))
            self.last_read = ReadFacts("pyav", _damage(response["damage"])) if record.kind == "video" else None
            return bytes(self._child.shared_bytes(response["size"])), response["suffix"], response["facts"]

        return self._read(record, read)

    def close(self) -> None:
        """Stop the child process."""
        self._child.close()

    def _deadline(self, limit_s: float) -> float:
        self._child.ensure_running()
        return time.monotonic() + limit_s

    def _read(self, record: Record, read: Callable[[], T]) -> T:
        """Return the result of `read`, retried while a remote store does not respond.

        Raises BadSample on failure, or StorageUnreachable if the outage lasts too long.
        """
        if self._is_trusted:
            return retry_on_outage(record.location, lambda: self._read_once(record, read))
        try:
            return self._read_once(record, read)
        except _Outage as error:
            raise StorageUnreachable(f"{record.location} {error}; try again once its store responds") from None

    def _read_once(self, record: Record, read: Callable[[], T]) -> T:
        """Return the result of `read`, which is retried in a fresh process if the first process dies or stalls.

        A stall on an untrusted file is not retried. Raises BadSample or _Outage on failure.
        """
        try:
            return read()
        except ChildFailed as error:
            if isinstance(error, ChildTimeout) and not self._is_trusted:
                raise BadSample(record, str(error)) from None
        try:
            return read()
        except ChildFailed as error:
            if isinstance(error, ChildTimeout) and is_remote(record.location):
                self._touch(record)
                with suppress(ChildFailed):
                    return read()  # the store may have stalled until now
            raise BadSample(record, f"{error}; a retry in a fresh process also failed") from None

    def _touch(self, record: Record) -> None:
        """Read one byte of a remote record. Raises _Outage if the store does not respond."""
        location = record.location
        if record.kind == "frames":
            location = frame_files(location, [0], self._frame_name)[0].location
        self._request_remote(record, {"task": "touch", "location": location}, self._limit)

    def _request_remote(self, record: Record, message: dict[str, Any], limit_s: float) -> None:
        """Send a request that only reads from a remote store. Raises _Outage if it takes longer than `limit_s`."""
        try:
            self._request(record, message, self._deadline(limit_s))
        except ChildTimeout:
            raise _Outage(f"could not be fetched within {limit_s:g} s") from None

    def _request(
        self, record: Record, message: dict[str, Any], deadline: float, content: bytes | None = None
    ) -> dict[str, Any]:
        """Return the child's response.

        Raises _Outage if a remote store does not respond, BadSample if the child reports a bad sample, or ChildFailed
        if the child dies or times out.
        """
        try:
            response = self._child.request(message, deadline, content)
        except ChildTimeout:
            limit = message.get("limit_s", self._limit)
            raise ChildTimeout(f"took longer than its limit of {limit:g} s to read and decode") from None
        if "outage" in response:
            raise _Outage(response["outage"])
        if "bad" in response:
            raise BadSample(record, response["bad"])
        return response


def _damage(fields: list[Any] | None) -> Damage | None:
    return None if fields is None else Damage(*fields)


def _chosen_indices(choose: FrameChooser, total: int) -> list[int]:
    indices = [int(n) for n in choose(total)]
    if not indices or not 0 <= min(indices) <= max(indices) < total:
        raise IndexError(f"chosen frames {indices} are out of range for a sample of {total} frames")
    return indices
