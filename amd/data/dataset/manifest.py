"""The manifest of a data set: a compact, immutable list of records, for any storage format.

Names are stored in a byte buffer with offsets, and numbers in arrays, so ten million records fit in a gigabyte that
forked readers share. Reads no files.
"""

from __future__ import annotations

import hashlib
import itertools
import posixpath
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from amd.config import ConfigError
from amd.data.dataset.record import VIDEO_PREFIX, Record, kind_of
from amd.storage import join

MAX_PROBLEMS = 20
NO_LABEL = -1


class ManifestError(ConfigError):
    """Raised for data that does not match the config; contains one line per problem, with its location."""


def capped(problems: Sequence[str], total: int | None = None) -> list[str]:
    """Return the first MAX_PROBLEMS problems, followed by the number of omitted problems."""
    total = len(problems) if total is None else total
    shown = list(problems[:MAX_PROBLEMS])
    return shown if total <= len(shown) else [*shown, f"… and {total - len(shown)} more"]


class Names:
    """Strings stored in one byte buffer; `names[i]` takes constant time, and each string has 8 bytes of overhead."""

    def __init__(self, blob: bytes | bytearray, lengths: np.ndarray) -> None:
        self.blob = blob
        self.offsets = np.zeros(len(lengths) + 1, np.int64)
        np.cumsum(lengths, out=self.offsets[1:])

    @classmethod
    def of(cls, names: Iterable[bytes]) -> Names:
        names = list(names)
        return cls(b"".join(names), np.fromiter(map(len, names), np.int64, len(names)))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def raw(self, i: int) -> bytes:
        return bytes(self.blob[self.offsets[i] : self.offsets[i + 1]])

    def __getitem__(self, i: int) -> str:
        return self.raw(i).decode("utf-8", "surrogateescape")

    def hash_into(self, digest: Any) -> None:
        """Update `digest` with the names, omitting the shared folder of absolute names because mount points differ."""
        skip = self._shared_folder()
        digest.update((np.diff(self.offsets) - skip).astype("<i8").tobytes())
        if not skip:
            digest.update(self.blob)
            return
        step = 100_000
        for start in range(0, len(self), step):
            ends = self.offsets[start : start + step + 1].tolist()
            digest.update(b"".join(self.blob[a + skip : b] for a, b in itertools.pairwise(ends)))

    def _shared_folder(self) -> int:
        """Return the length of the folder prefix that all names share; 0 unless all names are absolute."""
        if not len(self):
            return 0
        first = self.raw(0)
        if not (first.startswith(b"/") or b"://" in first):
            return 0
        shared = posixpath.dirname(first) + b"/"
        starts, lengths = self.offsets[:-1], np.diff(self.offsets)
        characters = np.frombuffer(self.blob, np.uint8)
        limit = min(len(shared), int(lengths.min()))
        for k in range(limit):
            if (characters[starts + k] != shared[k]).any():
                limit = k
                break
        return shared[:limit].rfind(b"/") + 1


class ShardLocations(NamedTuple):
    """Byte ranges of records inside tar shards."""

    urls: tuple[str, ...]
    shard: np.ndarray  # (N,) int32, index into urls
    offsets: np.ndarray  # (N,) int64 bytes
    sizes: np.ndarray  # (N,) int64 bytes


class Manifest:
    """Immutable list of a data set's records: `len(manifest)`, `manifest[i]`, `manifest.labels`,
    `manifest.digest()`."""

    def __init__(
        self,
        names: Names,
        labels: np.ndarray,
        *,
        root: str = "",
        frames: np.ndarray | None = None,
        shards: ShardLocations | None = None,
        classes: tuple[str, ...] | None = None,
        notes: Sequence[str] = (),
    ) -> None:
        """Create a manifest. `root` is prepended to relative names; `amd validate` reports `notes` as warnings."""
        self.names = names
        self.labels = labels  # (N,) int64, NO_LABEL for unlabelled records
        self.labels.flags.writeable = False
        self.root = root
        self.frames = frames  # (N,) int32 for frame folders
        self.shards = shards
        self.classes = classes
        self.notes = tuple(notes)
        self._digest: str | None = None

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, i: int) -> Record:
        i = range(len(self))[i]
        name, label = self.names[i], int(self.labels[i])
        known = None if label == NO_LABEL else label
        if self.shards is not None:
            shards = self.shards
            byte_range = (int(shards.offsets[i]), int(shards.sizes[i]))
            return Record(shards.urls[shards.shard[i]], known, kind_of(name), None, name, *byte_range)
        kind = "video" if name.startswith(VIDEO_PREFIX) else kind_of(name)
        name = name.removeprefix(VIDEO_PREFIX)
        location = name if name.startswith("/") or "://" in name or not self.root else join(self.root, name)
        if self.frames is not None:
            return Record(location, known, "frames", int(self.frames[i]))
        return Record(location, known, kind)

    def name_hashes(self) -> np.ndarray:
        """Return hashes of the names, (N,) int64, which are comparable only within this process."""
        return np.fromiter((hash(self.names.raw(i)) for i in range(len(self))), np.int64, len(self))

    def digest(self) -> str:
        """Return the SHA-256 of names, labels, frame counts and shard member sizes; independent of the mount point."""
        if self._digest is None:
            digest = hashlib.sha256(b"amd manifest 1\n")
            self.names.hash_into(digest)
            digest.update(self.labels.astype("<i8").tobytes())
            if self.frames is not None:
                digest.update(self.frames.astype("<i8").tobytes())
            if self.shards is not None:
                digest.update("\n".join(map(posixpath.basename, self.shards.urls)).encode("utf-8", "surrogateescape"))
                for numbers in (self.shards.shard, self.shards.sizes):
                    digest.update(numbers.astype("<i8").tobytes())
            self._digest = digest.hexdigest()
        return self._digest
