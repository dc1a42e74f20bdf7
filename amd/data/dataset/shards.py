"""Tar shards in WebDataset layout: a sample's members share a key, and a `.cls` or `.json` member holds the label.

An index (`x.tar` -> `x.tar.index.json`) stores each sample's byte range for random access; if it is missing or stale,
the tar headers are scanned instead. Decodes nothing.
"""

from __future__ import annotations

import io
import itertools
import json
import posixpath
import re
import tarfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from amd.data.dataset.manifest import NO_LABEL, Manifest, ManifestError, Names, ShardLocations, capped
from amd.data.dataset.record import IMAGE_SUFFIXES, VIDEO_SUFFIXES
from amd.storage import filesystem, is_remote, join, write_bytes

TAR_SUFFIXES = (".tar",)
INDEX_SUFFIX = ".index.json"
SCAN_THREADS = 8
MAX_LABEL_BYTES = 16 << 20  # maximum size of a .cls or .json member, which is read whole
_BRACE = re.compile(r"\{(\d+)\.\.(\d+)\}")


class Member(NamedTuple):
    name: str
    offset: int
    size: int
    label: int


def has_pattern(url: str) -> bool:
    return bool(_BRACE.search(url)) or any(mark in posixpath.basename(url) for mark in "*?[")


def expand(url: str) -> list[str]:
    """Expand a brace pattern (`{000..099}`), a glob, a single tar or a folder of tars to sorted shard URLs.

    Raises ManifestError if nothing matches.
    """
    ranges = _BRACE.findall(url)
    if ranges:
        pieces = _BRACE.split(url)[::3]
        numbers = [_numbers(low, high) for low, high in ranges]
        return ["".join(_interleave(pieces, chosen)) for chosen in itertools.product(*numbers)]
    fs, path = filesystem(url)
    fs.invalidate_cache()
    if has_pattern(url):
        found = fs.glob(path)
    elif fs.isdir(path):
        found = fs.ls(path, detail=False)
    else:
        return [url]
    urls = sorted(_with_protocol(url, str(name)) for name in found if str(name).lower().endswith(TAR_SUFFIXES))
    if not urls:
        raise ManifestError(
            [f"data.train: {url} matches no tar shard; use …/{{000..099}}.tar, a glob, or a folder of tars"]
        )
    return urls


def _numbers(low: str, high: str) -> list[str]:
    if int(low) > int(high):
        raise ManifestError([f"data.train: {{{low}..{high}}} is a descending range; put the smaller number first"])
    width = len(low) if len(low) == len(high) or low.startswith("0") else 0
    return [f"{n:0{width}d}" for n in range(int(low), int(high) + 1)]


def _interleave(pieces: Sequence[str], chosen: Sequence[str]) -> Iterable[str]:
    for piece, number in itertools.zip_longest(pieces, chosen, fillvalue=""):
        yield piece
        yield number


def _with_protocol(url: str, path: str) -> str:
    return f"{url.split('://', 1)[0]}://{path.split('://', 1)[-1]}" if is_remote(url) else path


def open_shards(urls: Sequence[str]) -> Manifest:
    """Open the samples in these shards. Raises a ManifestError listing every missing or invalid shard."""
    with ThreadPoolExecutor(SCAN_THREADS) as pool:  # hide the latency of remote storage
        results = list(pool.map(_members_or_problem, urls))
    problems = [result for result in results if isinstance(result, str)]
    if problems:
        raise ManifestError(capped(problems))
    members_by_shard = [result for result in results if isinstance(result, list)]
    members = list(itertools.chain.from_iterable(members_by_shard))
    shards = ShardLocations(
        tuple(urls),
        np.repeat(np.arange(len(urls), dtype=np.int32), [len(members) for members in members_by_shard]),
        np.fromiter((member.offset for member in members), np.int64, len(members)),
        np.fromiter((member.size for member in members), np.int64, len(members)),
    )
    labels = np.fromiter((member.label for member in members), np.int64, len(members))
    return Manifest(
        Names.of(member.name.encode("utf-8", "surrogateescape") for member in members), labels, shards=shards
    )


def _members_or_problem(url: str) -> list[Member] | str:
    try:
        return shard_members(url)
    except FileNotFoundError:
        return f"data.train: shard {url} does not exist; fix the pattern or add the file"
    except PermissionError as error:
        return f"data.train: shard {url} cannot be read ({error}); fix its permissions or credentials"
    except tarfile.TarError as error:
        remedy = "decompress it if it is compressed: compressed shards do not support random access"
        return f"data.train: {url} is not a plain tar file ({error}); {remedy}"
    except (ValueError, KeyError, TypeError) as error:
        return f"data.train: {url}: {error}"


def shard_members(url: str) -> list[Member]:
    """Return the samples in one shard, from its index if the index matches the tar, else from the tar headers."""
    fs, path = filesystem(url)
    size = int(fs.size(path))
    try:
        index = json.loads(fs.cat_file(path + INDEX_SUFFIX))
    except FileNotFoundError:
        index = None
    if index is not None and index.get("size") == size:
        members = [Member(str(name), int(at), int(length), int(label)) for name, at, length, label in index["members"]]
        if all(0 <= member.offset <= member.offset + member.size <= size for member in members):
            return members
    with fs.open(path, "rb") as file:
        return scan(file, url)


def scan(file: Any, url: str) -> list[Member]:
    """Scan tar headers; return a Member per media file, labelled by the `.cls` or `.json` member with the same key."""
    media: dict[str, tarfile.TarInfo] = {}  # by key; the first media file with a key is the sample
    labels: dict[str, int] = {}
    with tarfile.open(fileobj=file, mode="r:") as tar:
        try:
            for info in tar:
                key, suffix = _split(info.name)
                if not info.isfile() or posixpath.basename(info.name).startswith("."):
                    continue
                if suffix.endswith((*IMAGE_SUFFIXES, *VIDEO_SUFFIXES)):
                    media.setdefault(key, info)
                elif suffix.endswith((".cls", ".json")):
                    if info.size > MAX_LABEL_BYTES:
                        raise ValueError(
                            f"{url}::{info.name} has {info.size} bytes, more than {MAX_LABEL_BYTES} for a label file; "
                            "rename files that are not labels to use another suffix"
                        )
                    content = tar.extractfile(info)
                    label = None if content is None else _label(content.read(), suffix, f"{url}::{info.name}")
                    if label is not None:
                        labels[key] = label
        except tarfile.ReadError:
            if not media:
                raise  # a truncated tar: members past its end fail when they are read
    return [Member(info.name, info.offset_data, info.size, labels.get(key, NO_LABEL)) for key, info in media.items()]


def _split(name: str) -> tuple[str, str]:
    """Split a name into WebDataset's key (up to the first dot of the file name) and its suffix."""
    folder, base = posixpath.split(name)
    stem, dot, suffix = base.partition(".")
    return posixpath.join(folder, stem), (dot + suffix).lower()


def _label(content: bytes, suffix: str, where: str) -> int | None:
    try:
        value = int(content) if suffix.endswith(".cls") else json.loads(content)
    except ValueError:
        raise ValueError(f'{where} has no label: write an integer (.cls) or {{"label": number}} (.json)') from None
    if isinstance(value, dict):
        value = value.get("label")
    return value if isinstance(value, int) and not isinstance(value, bool) else None


class ShardWriter:
    """Builds one shard in memory; the same samples always produce the same bytes."""

    def __init__(self) -> None:
        self._bytes = io.BytesIO()
        self._tar = tarfile.open(fileobj=self._bytes, mode="w:", format=tarfile.USTAR_FORMAT)  # noqa: SIM115
        self.members: list[Member] = []

    def add(self, key: str, suffix: str, content: bytes, label: int | None) -> None:
        self._put(key + suffix, content)
        offset = self._bytes.tell() - -(-len(content) // 512) * 512
        if label is not None:
            self._put(f"{key}.cls", str(label).encode())
        self.members.append(Member(key + suffix, offset, len(content), NO_LABEL if label is None else label))

    def _put(self, name: str, content: bytes) -> None:
        info = tarfile.TarInfo(name)
        info.size = len(content)
        self._tar.addfile(info, io.BytesIO(content))

    def finish(self) -> bytes:
        self._tar.close()
        return self._bytes.getvalue()


def write_index(url: str, size: int, members: Sequence[Member], extra: dict[str, Any] | None = None) -> None:
    """Write the shard's index, which marks a prepared shard as complete and is therefore written last."""
    lines = ",\n".join(json.dumps(list(member)) for member in members)
    head = json.dumps({"size": size, **(extra or {})})[:-1]
    write_bytes(url + INDEX_SUFFIX, f'{head}, "members": [\n{lines}\n]}}\n'.encode())


def shard_url(folder: str, number: int) -> str:
    return join(folder, f"{number:06d}.tar")
