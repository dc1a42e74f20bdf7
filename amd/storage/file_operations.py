"""Read, write, list and remove local and remote files by URL, and retry during outages."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import math
import os
import posixpath
import re
import time
import uuid
from collections.abc import Callable, Iterable, Sequence, Set
from contextlib import suppress
from datetime import datetime
from itertools import chain, repeat
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from amd.storage.errors import StorageError, StorageUnreachable
from amd.storage.filesystems import filesystem, is_remote, join, local_path

OUTAGE_LIMIT_S = 60.0  # longest outage of a remote store that operations wait for
_PAUSES_S = (0.5, 1.0, 2.0, 4.0, 8.0)
_REFUSALS = {errno.EINVAL, errno.EPERM, errno.ENOSYS, errno.EMSGSIZE, 78}  # of s3fs for a 3xx or 4xx; 78 is EREMCHG
STALE_AFTER_S = 60.0  # a temporary file that has not changed for this long was abandoned by its writer
TEMPORARY_NAME = re.compile(r"\..+\.[0-9a-f]{8}")
"""Names that writers give to unfinished files."""

T = TypeVar("T")
logger = logging.getLogger(__name__)


def retry_on_outage(url: str, operation: Callable[[], T]) -> T:
    """Return the result of `operation`, retried while a remote store does not respond.

    Raises StorageUnreachable after OUTAGE_LIMIT_S, or immediately for a local disk. Other errors, such as 403 and 404,
    are raised immediately.
    """
    until = time.monotonic() + OUTAGE_LIMIT_S
    for pause in chain(_PAUSES_S, repeat(_PAUSES_S[-1])):
        try:
            return operation()
        except Exception as error:  # every backend raises its own exceptions
            if not is_outage(error):
                raise
            reason = f"{type(error).__name__}: {error}"
            if not is_remote(url):
                raise StorageUnreachable(
                    f"{url}: the disk cannot be used ({reason}); fix the disk, then run the command again"
                ) from None
            if time.monotonic() + pause > until:
                message = (
                    f"{url}: the store has not responded for {OUTAGE_LIMIT_S:.0f} s ({reason}); "
                    "run again once it responds"
                )
                raise StorageUnreachable(message) from None
            logger.warning("%s: the store does not respond (%s); retrying", url, reason)
            time.sleep(pause)
    raise AssertionError("unreachable: pauses never run out")


def is_outage(error: Exception) -> bool:
    """Return whether an error means that a store is temporarily unavailable, not that it refused the request."""
    if isinstance(
        error, FileNotFoundError | PermissionError | FileExistsError | IsADirectoryError | NotADirectoryError
    ):
        return False
    status = getattr(error, "code", getattr(error, "status", None))  # of gcsfs, or of aiohttp
    if isinstance(status, int) and status >= 400:
        return status >= 500 or status in (408, 429)
    if isinstance(error, OSError) and error.errno in _REFUSALS:
        return False
    names = {cls.__name__ for cls in type(error).__mro__}
    return isinstance(error, OSError) or bool(names & {"ConnectionError", "HTTPClientError", "ClientConnectionError"})


def exists(url: str) -> bool:
    fs, path = filesystem(url)
    fs.invalidate_cache()
    return retry_on_outage(url, lambda: bool(fs.exists(path)))


def read_bytes(url: str) -> bytes:
    fs, path = filesystem(url)
    data: bytes = retry_on_outage(url, lambda: fs.cat_file(path))
    return data


def read_range(url: str, start: int, stop: int) -> bytes:
    """Read bytes [start, stop) of a file; fewer if the file is shorter.

    Raises FileNotFoundError, or StorageUnreachable without retrying, because callers answer requests.
    """
    fs, path = filesystem(url)
    try:
        data: bytes = fs.cat_file(path, start=start, end=stop) if start < stop else b""  # S3 has no empty ranges
        return data
    except FileNotFoundError:
        raise
    except Exception as error:  # every backend raises its own exceptions
        if isinstance(error, OSError) and error.errno == errno.EINVAL:
            return b""  # the range starts beyond the end
        raise StorageUnreachable(f"{url}: {type(error).__name__}: {error}") from None


def write_bytes(url: str, data: bytes) -> None:
    """Write a file atomically: readers never see a partial file, locally or in an object store."""
    retry_on_outage(url, lambda: _write_once(url, data))


def create(url: str, data: bytes) -> bool:
    """Write a file atomically unless it exists; return whether it was written.

    In stores without conditional writes, the last of several concurrent writers wins.
    """
    return retry_on_outage(url, lambda: _create_once(url, data))


def _create_once(url: str, data: bytes) -> bool:
    if not is_remote(url):
        path = local_path(url)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
        temporary.write_bytes(data)
        try:
            os.link(temporary, path)
        except FileExistsError:
            return False
        finally:
            temporary.unlink()
        return True
    fs, path_in_store = filesystem(url)
    try:
        fs.pipe_file(path_in_store, data, mode="create")
    except FileExistsError:
        return False
    except (TypeError, NotImplementedError):  # a store without conditional writes
        if fs.exists(path_in_store):
            return False
        fs.pipe_file(path_in_store, data)
    return True


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


def read_file_manifest(url: str, keys: Set[str]) -> dict[str, Any] | None:
    """Read a JSON object whose `files` maps file names to entries, each with at least these keys.

    Returns None if the content is damaged. Raises FileNotFoundError if there is no such file.
    """
    try:
        manifest: dict[str, Any] = read_json(url)
        is_complete = all(keys <= entry.keys() for entry in manifest["files"].values())
    except (ValueError, LookupError, TypeError, AttributeError):  # not JSON, or JSON of another form
        return None
    return manifest if is_complete else None


def write_json(url: str, value: Any) -> None:
    write_bytes(url, (json.dumps(value, indent=2, sort_keys=False) + "\n").encode())


def write_json_lines(url: str, values: Iterable[Any]) -> None:
    """Write one line of JSON per value."""
    write_bytes(url, "".join(json.dumps(value) + "\n" for value in values).encode())


def listdir(url: str) -> list[str]:
    """Return the sorted names in a folder; an empty list if the folder does not exist."""
    fs, path = filesystem(url)
    fs.invalidate_cache()
    try:
        found = retry_on_outage(url, lambda: fs.ls(path, detail=False))
        names = {posixpath.basename(str(entry).rstrip("/")) for entry in found}
    except FileNotFoundError:
        return []
    return sorted(name for name in names if name and name != posixpath.basename(path.rstrip("/")))


class FileFacts(NamedTuple):
    """Size and version of a file, as listed by the store."""

    size: int
    """Size in bytes."""
    stamp: str
    """Fingerprint of the file; changes with its content."""


def files(url: str) -> dict[str, FileFacts]:
    """Return all files under a folder except hidden ones, keyed by relative path; empty if the folder does not exist.

    Sends one list request. Raises StorageUnreachable without retrying, because callers poll.
    """
    fs, path = filesystem(url)
    fs.invalidate_cache()
    try:
        found: dict[str, dict[str, Any]] = fs.find(path, detail=True)
    except FileNotFoundError:
        return {}
    except Exception as error:  # every backend raises its own exceptions
        raise StorageUnreachable(f"{url}: {type(error).__name__}: {error}") from None
    named = {name.removeprefix(path.rstrip("/") + "/"): info for name, info in found.items()}
    return {
        name: FileFacts(int(info["size"]), _stamp(info))
        for name, info in named.items()
        if not posixpath.basename(name).startswith(".")
    }


class StoredFile(NamedTuple):
    """A file in a listing: its size and modification time."""

    size: int
    """Bytes."""
    modified: float
    """Modification time by the store's clock, in seconds since the Unix epoch; infinite if the store reports none."""


def walk_files(url: str) -> dict[str, StoredFile]:
    """Return all files under a folder, hidden ones included, keyed by relative path; empty if there is no folder.

    Symbolic links in it are neither followed nor returned.
    """
    fs, path = filesystem(url)
    if not is_remote(url):
        path = os.path.realpath(path)  # the folder itself may be a link, such as to another disk
    fs.invalidate_cache()
    try:
        found: dict[str, dict[str, Any]] = retry_on_outage(url, lambda: fs.find(path, detail=True))
    except FileNotFoundError:
        return {}
    prefix = path.rstrip("/") + "/"
    return {
        name.removeprefix(prefix): StoredFile(int(info["size"] or 0), _modified(info))
        for name, info in found.items()
        if info["type"] == "file" and not info.get("islink") and name.startswith(prefix)
    }


def _modified(info: dict[str, Any]) -> float:
    for key in ("mtime", "LastModified", "last_modified", "modified", "created"):  # the name depends on the backend
        value = info.get(key)
        if isinstance(value, datetime):
            return value.timestamp()
        if isinstance(value, int | float):
            return float(value)
    return math.inf


def read_many(urls: Sequence[str]) -> dict[str, bytes]:
    """Return file contents by URL, read concurrently from a remote store. Missing files are omitted."""
    if not urls:
        return {}
    fs, _ = filesystem(urls[0])
    paths = {filesystem(url)[1]: url for url in urls}
    found: dict[str, bytes | Exception] = retry_on_outage(urls[0], lambda: fs.cat(list(paths), on_error="return"))
    contents = {}
    for path, content in found.items():
        if isinstance(content, bytes):
            contents[paths[path]] = content
        elif not isinstance(content, FileNotFoundError):
            raise StorageUnreachable(f"{paths[path]}: {type(content).__name__}: {content}")
    return contents


def file_version(url: str) -> str:
    """Return a fingerprint of a remote file's size and version, using a single request. Raises the store's errors."""
    fs, path = filesystem(url)
    fs.invalidate_cache()
    return _stamp(fs.info(path))


def _stamp(info: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(info, sort_keys=True, default=str).encode()).hexdigest()


def remove(url: str) -> None:
    """Remove a file or folder, if it exists."""
    fs, path = filesystem(url)
    fs.invalidate_cache()
    if retry_on_outage(url, lambda: fs.exists(path)):
        retry_on_outage(url, lambda: fs.rm(path, recursive=True) if fs.exists(path) else None)


def remove_file(url: str) -> None:
    """Remove a single file, if it exists."""
    fs, path = filesystem(url)
    with suppress(FileNotFoundError):
        retry_on_outage(url, lambda: fs.rm_file(path))


def remove_empty_folders(url: str) -> None:
    """Remove a local folder and its subfolders if they are empty; object stores have no folders."""
    if is_remote(url):
        return
    for folder, _, _ in os.walk(local_path(url), topdown=False):
        with suppress(OSError):
            os.rmdir(folder)


def remove_leftovers(folder: str) -> None:
    """Remove temporary files that killed writers left behind in a local folder; object stores have none."""
    if is_remote(folder):
        return
    for path in local_path(folder).glob(".*"):
        with suppress(FileNotFoundError):
            if TEMPORARY_NAME.fullmatch(path.name) and time.time() - path.stat().st_mtime > STALE_AFTER_S:
                path.unlink()


def check_writable(root: str) -> None:
    """Write, read and remove one small file. Raises StorageError with the reason on failure."""
    probe = join(root, f".amd-write-test-{uuid.uuid4().hex[:8]}")
    try:
        _write_once(probe, b"amd")  # no retries: a store that does not respond at startup is misconfigured
        if read_bytes(probe) != b"amd":
            raise StorageError(
                f"storage={root}: a test file was read back with different content; choose another storage root"
            )
        remove(probe)
    except StorageError:
        raise
    except Exception as error:  # every backend raises its own exceptions
        raise StorageError(
            f"storage={root} cannot be written ({type(error).__name__}: {error}); "
            "choose another storage root with storage=… or AMD_STORAGE, or fix its permissions or credentials"
        ) from None
