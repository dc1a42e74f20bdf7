"""Open a data set of any format as a manifest; `format=auto` detects the format from the files.

Reads only file names and lists, never samples. Inside `keep_manifests`, each data set is listed only once. Raises
ManifestError if the data does not match the config.
"""

from __future__ import annotations

import os
import posixpath
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt

from amd.config import DataConfig, DataFormat
from amd.data.dataset.lists import BLOCK, parse_list
from amd.data.dataset.manifest import (
    MAX_PROBLEMS,
    NO_LABEL,
    Manifest,
    ManifestError,
    Names,
)
from amd.data.dataset.manifest_cache import active_cache, request_key
from amd.data.dataset.record import IMAGE_SUFFIXES, VIDEO_SUFFIXES, BadSample, Record, kind_of
from amd.data.dataset.shards import TAR_SUFFIXES, expand, has_pattern, open_shards
from amd.storage import StorageError, filesystem, is_remote, local_path

__all__ = ["BadSample", "Manifest", "ManifestError", "Record", "kind_of", "open_manifest"]


def open_manifest(data: DataConfig, url: str | None = None) -> Manifest:
    """Open `url` (default: data.train) with the format and root of `data`.

    Raises ManifestError if the data does not exist, contains no samples of that format, or has invalid lines.
    """
    requested = data.train if url is None else url
    with manifest_errors(requested):
        real = resolve_url(requested)
        cache, key = active_cache(), request_key(real, data)
        if cache is not None and (known := cache.get(key)) is not None:
            return known
        listing = _Listing(real)
        name: DataFormat = _detect(listing, requested) if data.format == "auto" else data.format
        manifest = OPENERS[name](listing, data)
    if not len(manifest):
        raise ManifestError(
            [f"data.train: {requested} has no samples (read as {name}); set data.format if that format is wrong"]
        )
    if cache is not None:
        cache.put(key, manifest)
    return manifest


@contextmanager
def manifest_errors(requested: str) -> Iterator[None]:
    """Convert file errors raised inside the block to a ManifestError that mentions `requested`."""
    try:
        yield
    except StorageError as error:
        raise ManifestError([f"data.train: {error}"]) from None
    except FileNotFoundError as error:
        raise ManifestError(
            [f"data.train: {requested} does not exist ({error}); specify a folder, a list file or tar shards"]
        ) from None
    except PermissionError as error:
        raise ManifestError(
            [f"data.train: {requested} cannot be read ({error}); fix the permissions or credentials"]
        ) from None
    except ManifestError:
        raise
    except Exception as error:  # remote backends raise their own types: no credentials, no network, unknown host
        if not is_remote(requested):
            raise
        reason = f"{type(error).__name__}: {error}"
        raise ManifestError(
            [f"data.train: {requested} cannot be reached ({reason}); fix the URL or the credentials"]
        ) from None


def is_generated(url: str) -> bool:
    """Return whether `url` refers to demo data, which each machine generates locally."""
    return url.startswith("demo:")


def list_url(data: DataConfig, manifest: Manifest) -> str | None:
    """Return the URL of the list file that data.train refers to; None for folders and shards."""
    if manifest.shards is not None:
        return None
    url = resolve_url(data.train)
    fs, path = filesystem(url)
    return None if fs.isdir(path) else url


def resolve_url(url: str) -> str:
    """Resolve a location to an absolute URL or path without a trailing slash; demo data is written on first use."""
    if is_generated(url):
        from amd.data.dataset.demo import ensure_demo  # imports scikit-learn, so imported only on demand

        name, _, split = url.removeprefix("demo:").partition("/")
        try:
            url = ensure_demo(name, split or "train")
        except ValueError as error:
            raise ManifestError([str(error)]) from None
    if not url.strip():
        raise ManifestError(["data.train is empty; specify a folder, a list file or tar shards"])
    return url.rstrip("/") if is_remote(url) else str(local_path(url))


class _Listing:
    """All file names under a folder, relative to it. Remote folders are listed once, and their names are reused."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._names: list[str] | None = None

    def __iter__(self) -> Iterator[str]:
        if not is_remote(self.url):
            return _walk(self.url)
        if self._names is None:
            self._names = list(_walk(self.url))
        return iter(self._names)


def _detect(listing: _Listing, requested: str) -> DataFormat:
    url = listing.url
    fs, path = filesystem(url)
    fs.invalidate_cache()
    if has_pattern(url) or url.lower().endswith(TAR_SUFFIXES):
        return "shards"
    if not fs.isdir(path):
        with fs.open(path, "rb") as file:
            return _detect_list(file.read(1 << 16), requested)
    names = [posixpath.basename(str(entry).rstrip("/")).lower() for entry in fs.ls(path, detail=False)]
    if any(name.endswith(TAR_SUFFIXES) for name in names):
        return "shards"
    for count, name in enumerate(listing):
        lowered = name.lower()
        if lowered.endswith(IMAGE_SUFFIXES):
            return "image_folder"
        if lowered.endswith(VIDEO_SUFFIXES):
            return "video_folder"
        if count > 10_000:
            break
    raise ManifestError(
        [
            f"data.train: {requested} is a folder without images ({', '.join(IMAGE_SUFFIXES[:3])} …), videos "
            f"({', '.join(VIDEO_SUFFIXES[:3])} …) or tar shards; specify the folder that contains them, or a list file"
        ]
    )


def _detect_list(head: bytes, requested: str) -> DataFormat:
    """Detect a frame list, which has names without a media suffix and a frame count before the label."""
    if b"\0" in head:
        raise ManifestError([f"data.train: {requested} is a binary file; specify a folder, a list file or tar shards"])
    lines = [line for line in head.decode("utf-8", "replace").splitlines()[:100] if line.strip()]
    counted = 0
    for line in lines:
        path, *numbers = line.rsplit(maxsplit=2)
        media = path.lower().endswith((*IMAGE_SUFFIXES, *VIDEO_SUFFIXES))
        counted += len(numbers) == 2 and numbers[0].isdigit() and not media
    return "frame_list" if counted and counted == len(lines) else "list"


def _open_list(listing: _Listing, data: DataConfig, *, with_frames: bool = False) -> Manifest:
    url = listing.url
    parsed = parse_list(text_blocks(url), url, with_frames=with_frames)
    root = data.root or posixpath.dirname(url)
    root = root.rstrip("/") if is_remote(root) else str(local_path(root))
    return Manifest(parsed.names, parsed.labels, root=root, frames=parsed.frames)


def _open_frame_list(listing: _Listing, data: DataConfig) -> Manifest:
    return _open_list(listing, data, with_frames=True)


def _open_folder(listing: _Listing, suffixes: tuple[str, ...]) -> Manifest:
    """Open files with one of the suffixes. Sorted subfolders become classes unless the folder itself has files."""
    url = listing.url
    fs, path = filesystem(url)
    if not fs.isdir(path):
        raise ManifestError([f"data.train: {url} is not a folder; set data.format to the actual format, or to auto"])
    all_names = [os.fsencode(name) for name in listing]
    encoded_suffixes = tuple(suffix.encode() for suffix in suffixes)
    names = sorted(name for name in all_names if name.lower().endswith(encoded_suffixes))
    notes = []
    if len(names) < len(all_names):
        ignored = (name for name in all_names if not name.lower().endswith(encoded_suffixes))
        notes.append(f"{url}: files with other suffixes are ignored: {_suffixes(ignored)}")
    folders = [name.partition(b"/")[0] if b"/" in name else None for name in names]
    if any(folder is None for folder in folders):
        if any(folder is not None for folder in folders):
            notes.append(f"{url}: the folder itself contains files, so its sub-folders are not used as classes")
        return Manifest(Names.of(names), np.full(len(names), NO_LABEL, np.int64), root=url, notes=notes)
    classes = sorted(set(folders) - {None})  # type: ignore[type-var]
    number = {folder: n for n, folder in enumerate(classes)}
    labels: npt.NDArray[np.int64] = np.fromiter((number[folder] for folder in folders), np.int64, len(names))
    class_names = tuple(os.fsdecode(folder) for folder in classes if folder is not None)
    return Manifest(Names.of(names), labels, root=url, classes=class_names, notes=notes)


def _suffixes(names: Iterable[bytes]) -> str:
    """Return file suffixes with their counts, most frequent first."""
    counts = Counter(os.path.splitext(os.fsdecode(name))[1].lower() or "no suffix" for name in names)
    shown = [f"{suffix} {count}" for suffix, count in counts.most_common(MAX_PROBLEMS)]
    return ", ".join(shown) + (", …" if len(counts) > len(shown) else "")


def _open_images(listing: _Listing, data: DataConfig) -> Manifest:
    return _open_folder(listing, IMAGE_SUFFIXES)


def _open_videos(listing: _Listing, data: DataConfig) -> Manifest:
    return _open_folder(listing, VIDEO_SUFFIXES)


def _open_shards(listing: _Listing, data: DataConfig) -> Manifest:
    return open_shards(expand(listing.url))


OPENERS: dict[DataFormat, Callable[[_Listing, DataConfig], Manifest]] = {
    "image_folder": _open_images,
    "video_folder": _open_videos,
    "list": _open_list,
    "frame_list": _open_frame_list,
    "shards": _open_shards,
}


def text_blocks(url: str) -> Iterator[bytes]:
    """Read a text file in blocks. Raises ManifestError for a folder or a binary file."""
    fs, path = filesystem(url)
    if fs.isdir(path):
        raise ManifestError(
            [f"data.train: {url} is a folder, not a list file; set data.format to the actual format, or to auto"]
        )
    with fs.open(path, "rb") as file:
        while block := file.read(BLOCK):
            if b"\0" in block[:4096]:
                raise ManifestError([f"data.train: {url} is not a text file with lines of the form `path label`"])
            yield block


def _walk(url: str) -> Iterator[str]:
    """Yield all file names under a folder, relative to it; skip hidden entries and follow each symlink once."""
    fs, path = filesystem(url)
    if is_remote(url):
        start = len(path.rstrip("/")) + 1
        for found in fs.find(path):
            name = str(found)[start:]
            if name and not any(part.startswith(".") for part in name.split("/")):
                yield name
        return
    visited: set[str] = set()
    for folder, folders, files in os.walk(path, followlinks=True):
        here = os.path.realpath(folder)
        folders[:] = sorted(name for name in folders if not name.startswith(".") and here not in visited)
        if here in visited:
            continue
        visited.add(here)
        below = os.path.relpath(folder, path)
        prefix = "" if below == "." else f"{below}/"
        yield from (prefix + name for name in sorted(files) if not name.startswith("."))
