"""Files under one root, local or remote alike: URLs in, bytes and JSON out. The one place that asks for a filesystem.

Knows nothing of what the files mean.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import posixpath
import re
import sys
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from itertools import chain, repeat
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import fsspec

PATIENCE_S = 60.0  # how long a remote store may be away before it is given up
_PAUSES_S = (0.5, 1.0, 2.0, 4.0, 8.0)
LEFTOVER_S = 60.0  # a temporary file that has not grown for so long has lost its writer
_LEFTOVER = re.compile(r"\..+\.[0-9a-f]{8}")  # as _write_once names them

T = TypeVar("T")
logger = logging.getLogger(__name__)


class StorageError(Exception):
    """Storage that cannot be used as asked. The message names the URL, the reason and the remedy."""


class StorageUnreachable(StorageError):
    """A remote store that has not answered for PATIENCE_S, or a disk that is full or broken."""


def default_root() -> str:
    """AMD_STORAGE, else a folder in the user's data directory."""
    if root := os.environ.get("AMD_STORAGE"):
        return root
    if sys.platform == "darwin":
        return str(Path.home() / "Library" / "Application Support" / "amd")
    return str(Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "amd")


def resolve_root(storage: str | None) -> str:
    """The storage root as a URL or an absolute path: Ray moves its workers into folders of their own."""
    root = storage or default_root()
    return root.rstrip("/") if is_remote(root) else str(local_path(root))


def is_remote(url: str) -> bool:
    return "://" in url and not url.startswith(("file://", "local://"))


def local_path(url: str) -> Path:
    """The absolute path of a local URL or path."""
    return Path(url.removeprefix("file://").removeprefix("local://")).expanduser().absolute()


def join(url: str, *parts: str) -> str:
    return posixpath.join(url, *parts)


def filesystem(url: str) -> tuple[Any, str]:
    """The fsspec filesystem of a URL, and the path in it. S3 endpoints come from AWS_ENDPOINT_URL_S3, as for boto3."""
    if not is_remote(url):
        return fsspec.filesystem("file"), str(local_path(url))
    options: dict[str, Any] = {}
    if url.startswith(("s3://", "s3a://")):
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        if endpoint:
            options["endpoint_url"] = endpoint
    try:
        fs, path = fsspec.core.url_to_fs(url, **options)
    except (ImportError, ValueError) as error:
        raise StorageError(
            f"{url}: no filesystem for this URL ({error}); install the fsspec package it needs"
        ) from None
    return fs, path


def patiently(url: str, act: Callable[[], T]) -> T:
    """What `act` gives, tried again while a remote store does not answer. Raises StorageUnreachable after PATIENCE_S.

    A store that answers with a no (not found, not allowed) has answered: that is raised at once. A disk is not waited
    for.
    """
    until = time.monotonic() + PATIENCE_S
    for pause in chain(_PAUSES_S, repeat(_PAUSES_S[-1])):
        try:
            return act()
        except Exception as error:  # every backend raises its own kinds
            if not _is_outage(error):
                raise
            reason = f"{type(error).__name__}: {error}"
            if not is_remote(url):
                raise StorageUnreachable(f"{url}: the disk cannot be used ({reason}); run again once it can") from None
            if time.monotonic() + pause > until:
                message = f"{url}: the store has not answered for {PATIENCE_S:.0f} s ({reason}); run again once it does"
                raise StorageUnreachable(message) from None
            logger.warning("%s: the store does not answer (%s); trying again", url, reason)
            time.sleep(pause)
    raise AssertionError("the pauses never end")


def _is_outage(error: Exception) -> bool:
    """Whether a store did not answer, or answered that it cannot now."""
    if isinstance(
        error, FileNotFoundError | PermissionError | FileExistsError | IsADirectoryError | NotADirectoryError
    ):
        return False
    names = {cls.__name__ for cls in type(error).__mro__}
    return isinstance(error, OSError) or bool(names & {"ConnectionError", "HTTPClientError", "ClientConnectionError"})


def exists(url: str) -> bool:
    fs, path = filesystem(url)
    fs.invalidate_cache()
    return patiently(url, lambda: bool(fs.exists(path)))


def read_bytes(url: str) -> bytes:
    fs, path = filesystem(url)
    data: bytes = patiently(url, lambda: fs.cat_file(path))
    return data


def write_bytes(url: str, data: bytes) -> None:
    """Write a file whole or not at all: a local reader never sees half of it, nor does one of an object store."""
    patiently(url, lambda: _write_once(url, data))


def _write_once(url: str, data: bytes) -> None:
    fs, path = filesystem(url)
    if is_remote(url):
        fs.pipe_file(path, data)
        return
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
    temporary.write_bytes(data)
    os.replace(temporary, target)


def read_json(url: str) -> Any:
    return json.loads(read_bytes(url))


def write_json(url: str, value: Any) -> None:
    write_bytes(url, (json.dumps(value, indent=2, sort_keys=False) + "\n").encode())


def listdir(url: str) -> list[str]:
    """Names in a folder, sorted; none if it does not exist."""
    fs, path = filesystem(url)
    fs.invalidate_cache()
    try:
        found = patiently(url, lambda: fs.ls(path, detail=False))
        names = {posixpath.basename(str(entry).rstrip("/")) for entry in found}
    except FileNotFoundError:
        return []
    return sorted(name for name in names if name and name != posixpath.basename(path.rstrip("/")))


class FileFacts(NamedTuple):
    size: int
    """Bytes."""
    stamp: str
    """Changes when the file does."""


def files(url: str) -> dict[str, FileFacts]:
    """All files below a folder, hidden ones left out, by their path from there; none if it does not exist.

    One listing, also of a store. Raises StorageUnreachable at once: whoever watches will look again.
    """
    fs, path = filesystem(url)
    fs.invalidate_cache()
    try:
        found: dict[str, dict[str, Any]] = fs.find(path, detail=True)
    except FileNotFoundError:
        return {}
    except Exception as error:  # every backend raises its own kinds
        raise StorageUnreachable(f"{url}: {type(error).__name__}: {error}") from None
    named = {name.removeprefix(path.rstrip("/") + "/"): info for name, info in found.items()}
    return {
        name: FileFacts(int(info["size"]), _stamp(info))
        for name, info in named.items()
        if not posixpath.basename(name).startswith(".")
    }


def _stamp(info: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(info, sort_keys=True, default=str).encode()).hexdigest()


def remove(url: str) -> None:
    """Remove a file or folder; nothing happens where there is none."""
    fs, path = filesystem(url)
    fs.invalidate_cache()
    if patiently(url, lambda: fs.exists(path)):
        patiently(url, lambda: fs.rm(path, recursive=True) if fs.exists(path) else None)


def remove_leftovers(folder: str) -> None:
    """Remove the hidden temporary files of writers that were killed; an object store keeps none."""
    if is_remote(folder):
        return
    for path in local_path(folder).glob(".*"):
        with suppress(FileNotFoundError):
            if _LEFTOVER.fullmatch(path.name) and time.time() - path.stat().st_mtime > LEFTOVER_S:
                path.unlink()


def check_writable(root: str) -> None:
    """Write, read and remove one small file. Raises StorageError with the reason."""
    probe = join(root, f".amd-write-test-{uuid.uuid4().hex[:8]}")
    try:
        _write_once(probe, b"amd")  # at the start, a store that does not answer is a mistake rather than an outage
        if read_bytes(probe) != b"amd":
            raise StorageError(f"storage={root}: what is written there reads back differently")
        remove(probe)
    except StorageError:
        raise
    except Exception as error:  # any backend raises its own kinds
        raise StorageError(
            f"storage={root} cannot be written ({type(error).__name__}: {error}); "
            "choose another with storage=… or AMD_STORAGE, or mend its rights or credentials"
        ) from None
