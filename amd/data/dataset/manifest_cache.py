"""Cache manifests, so that a run lists each data set only once: in memory for later calls, in files for workers.

The launching process lists the data and moves the manifests, including tar members, to the run folder, from which
workers load them. Manifests are keyed by a digest of the URL, format and root. Files contain arrays and JSON, never
pickled objects. Does not list data itself.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import numpy as np

from amd.config import DataConfig
from amd.data.dataset.manifest import Manifest, Names, ShardLocations
from amd.storage import is_remote, join, local_path, read_bytes, write_bytes

SUFFIX = ".npz"

logger = logging.getLogger(__name__)


class ManifestCache:
    """Stores manifests opened while the cache is active, in memory or in a folder that other processes can read."""

    def __init__(self, folder: str | None = None, outer: ManifestCache | None = None) -> None:
        self._folder, self._outer = folder, outer
        self._kept: dict[str, Manifest] = {}

    def get(self, key: str) -> Manifest | None:
        if (kept := self._kept.get(key)) is not None:
            return kept
        if self._outer is not None and (found := self._outer.get(key)) is not None:
            self._kept[key] = found
            return found
        return None if self._folder is None else read_manifest(join(self._folder, key + SUFFIX))

    def put(self, key: str, manifest: Manifest) -> None:
        self._kept[key] = manifest

    def move_to(self, folder: str) -> None:
        """Write the manifests to files in a folder and free their memory; later calls read these files."""
        for key, manifest in self._kept.items():
            write_bytes(join(folder, key + SUFFIX), manifest_bytes(manifest))
        self._kept.clear()
        self._folder = folder


_active: ContextVar[ManifestCache | None] = ContextVar("active_manifest_cache", default=None)


@contextmanager
def keep_manifests(folder: str | None = None) -> Iterator[ManifestCache]:
    """Cache the manifests that `open_manifest` opens inside the block, and use manifests stored in `folder`.

    A nested cache also uses manifests from the outer cache.
    """
    cache = ManifestCache(folder, _active.get())
    token = _active.set(cache)
    try:
        yield cache
    finally:
        _active.reset(token)


def active_cache() -> ManifestCache | None:
    return _active.get()


def request_key(url: str, data: DataConfig) -> str:
    """Return a digest of the resolved URL, the format and the root, which determine what `open_manifest` lists."""
    root = data.root if not data.root or is_remote(data.root) else str(local_path(data.root))
    return hashlib.sha256(json.dumps([url, data.format, root]).encode()).hexdigest()[:24]


def manifest_bytes(manifest: Manifest) -> bytes:
    """Serialise a manifest as a compressed .npz file."""
    names, shards = manifest.names, manifest.shards
    arrays: dict[str, Any] = {
        "names": np.frombuffer(names.blob, np.uint8),
        "lengths": np.diff(names.offsets).astype(np.int32),
        "labels": manifest.labels,
    }
    if manifest.frames is not None:
        arrays["frames"] = manifest.frames
    if shards is not None:
        arrays |= {"shard": shards.shard, "offsets": shards.offsets, "sizes": shards.sizes}
    facts = {
        "root": manifest.root,
        "classes": manifest.classes,
        "notes": manifest.notes,
        "urls": None if shards is None else shards.urls,
    }
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr("facts.json", json.dumps(facts))
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array(file, np.ascontiguousarray(array), allow_pickle=False)
    return content.getvalue()


def parse_manifest(content: bytes) -> Manifest:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        facts = json.loads(archive.read("facts.json"))
        arrays = {
            name.removesuffix(".npy"): np.lib.format.read_array(io.BytesIO(archive.read(name)), allow_pickle=False)
            for name in archive.namelist()
            if name.endswith(".npy")
        }
    shards = None
    if facts["urls"] is not None:
        shards = ShardLocations(tuple(facts["urls"]), arrays["shard"], arrays["offsets"], arrays["sizes"])
    return Manifest(
        Names(arrays["names"].tobytes(), arrays["lengths"]),
        arrays["labels"],
        root=facts["root"],
        frames=arrays.get("frames"),
        shards=shards,
        classes=None if facts["classes"] is None else tuple(facts["classes"]),
        notes=facts["notes"],
    )


def read_manifest(url: str) -> Manifest | None:
    """Read a stored manifest. Returns None if it does not exist or cannot be parsed; the data must then be listed."""
    try:
        content = read_bytes(url)
    except FileNotFoundError:
        return None
    try:
        return parse_manifest(content)
    except (ValueError, KeyError, zipfile.BadZipFile) as error:
        logger.warning("%s is not a stored manifest (%s: %s); listing the data again", url, type(error).__name__, error)
        return None
