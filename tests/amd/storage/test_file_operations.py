"""Tests that requests are retried during short storage outages, and that long outages raise an error.

Uses a real S3 server, which is stopped and restarted.
"""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from amd.storage import (
    StorageUnreachable,
    file_operations,
    is_outage,
    join,
    read_bytes,
    read_many,
    read_range,
    remove_empty_folders,
    remove_file,
    remove_leftovers,
    walk_files,
    write_bytes,
)
from amd.training.reporting.progress import Event, NullWatcher
from amd.training.runs import launch
from tests.support.runs.tiny_runs import tiny_run
from tests.support.s3 import S3Server


@pytest.fixture
def store(s3_root: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    """Start an S3 server that also serves the bucket of `s3_root`, because moto keeps a single state per process."""
    server = S3Server()
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", server.url)
    # Each retry of s3fs and of botocore takes seconds.
    monkeypatch.setattr("s3fs.core.S3FileSystem.retries", 1)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    fsspec.filesystem("s3").clear_instance_cache()
    yield server
    server.stop()


def test_requests_are_retried_during_a_short_outage(store: S3Server, s3_root: str) -> None:
    write_bytes(f"{s3_root}/before", b"1")
    store.stop()
    threading.Timer(2.0, store.start).start()
    write_bytes(f"{s3_root}/after", b"2")
    assert read_bytes(f"{s3_root}/before") == b"1"
    assert read_bytes(f"{s3_root}/after") == b"2"


def test_a_long_outage_raises(store: S3Server, s3_root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    write_bytes(f"{s3_root}/before", b"1")
    monkeypatch.setattr(file_operations, "OUTAGE_LIMIT_S", 1.0)
    store.stop()
    with pytest.raises(StorageUnreachable, match=f"{s3_root}/before: the store has not responded for 1 s .*run again"):
        read_bytes(f"{s3_root}/before")
    store.start()


def test_a_missing_file_raises_immediately(s3_root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail_on_sleep(seconds: float) -> None:
        raise AssertionError("a missing file must not be retried")

    monkeypatch.setattr(file_operations.time, "sleep", fail_on_sleep)
    with pytest.raises(FileNotFoundError):
        read_bytes(f"{s3_root}/nothing")


class ResponseError(OSError):
    """An error of gcsfs, which has the status of the response."""

    def __init__(self, code: int) -> None:
        super().__init__(f"status {code}")
        self.code = code


class HttpResponseError(Exception):
    """An error of aiohttp, which has the status of the response."""

    def __init__(self, status: int) -> None:
        super().__init__(f"status {status}")
        self.status = status


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(errno.EBUSY, "SlowDown"), True),
        (OSError(errno.EREMOTEIO, "InternalError"), True),
        (TimeoutError("slow"), True),
        (ConnectionRefusedError("refused"), True),
        (ResponseError(503), True),
        (ResponseError(429), True),
        (HttpResponseError(503), True),
        (HttpResponseError(403), False),
        (OSError(errno.EINVAL, "InvalidRange"), False),
        (ResponseError(416), False),
        (PermissionError("denied"), False),
        (FileNotFoundError("missing"), False),
        (ValueError("decoder"), False),
    ],
)
def test_requests_that_a_store_refuses_are_not_outages(error: Exception, expected: bool) -> None:
    assert is_outage(error) == expected


class StoreStopper(NullWatcher):
    """Stops the store once, after the sixth step."""

    def __init__(self, stop: Callable[[], None]) -> None:
        self._stop: Any = stop

    def on_event(self, event: Event) -> None:
        if event["kind"] == "step" and event["step"] >= 6 and self._stop:
            stop, self._stop = self._stop, None
            stop()


def test_a_run_fails_with_one_message_after_a_long_outage(
    store: S3Server, s3_root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_run(tmp_path, name="lost", storage=f"{s3_root}/storage", scaling__retries={"infrastructure": 0})
    monkeypatch.setattr(launch, "choose_watcher", lambda quiet: StoreStopper(store.stop))
    monkeypatch.setattr(file_operations, "OUTAGE_LIMIT_S", 1.0)
    result = launch.train(config, local=True)
    assert (result.state, result.reason, result.exit_code) == ("failed", "storage_unreachable", 1)
    assert "the store has not responded" in result.message
    assert result.run_folder == join(f"{s3_root}/storage", "runs", "lost")
    store.start()


def test_a_run_fails_with_one_message_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace = os.replace

    def replace_on_full_disk(source: Any, target: Any) -> None:
        if Path(target).name == "result.json":
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(file_operations.os, "replace", replace_on_full_disk)
    result = launch.train(tiny_run(tmp_path, name="full"), local=True, quiet=True)
    assert (result.state, result.reason, result.exit_code) == ("failed", "storage_unreachable", 1)
    assert "result.json: the disk cannot be used" in result.message
    assert "No space left on device" in result.message


def test_only_stale_temporary_files_are_removed(tmp_path: Path) -> None:
    long_ago = time.time() - 3600
    names = {".a.tar.0123abcd": long_ago, ".b.tar.0123abcd": time.time(), ".hidden": long_ago, "c.0123abcd": long_ago}
    for name, at in names.items():
        (tmp_path / name).write_bytes(b"")
        os.utime(tmp_path / name, (at, at))
    remove_leftovers(str(tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == {".b.tar.0123abcd", ".hidden", "c.0123abcd"}
    remove_leftovers(str(tmp_path / "nowhere"))


@pytest.mark.parametrize("kind", ["local", "s3"])
def test_files_are_listed_read_in_bulk_and_removed(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    root = str(tmp_path / "root") if kind == "local" else request.getfixturevalue("s3_root")
    began = time.time()
    for path, content in {"a/b/one": b"1", "a/.hidden": b"22", "two": b"333"}.items():
        write_bytes(join(root, path), content)
    found = walk_files(root)
    assert {path: file.size for path, file in found.items()} == {"a/b/one": 1, "a/.hidden": 2, "two": 3}
    assert all(abs(file.modified - began) < 60 for file in found.values())
    assert read_many([join(root, path) for path in ("two", "missing", "a/b/one")]) == {
        join(root, "two"): b"333",
        join(root, "a/b/one"): b"1",
    }
    for path in ("a/b/one", "missing"):
        remove_file(join(root, path))
    remove_empty_folders(join(root, "a"))
    assert walk_files(root).keys() == {"a/.hidden", "two"}
    assert walk_files(join(root, "missing")) == {}


@pytest.mark.parametrize("kind", ["tmp_path", "s3_root"])
def test_a_byte_range_is_truncated_at_the_end_of_the_file(kind: str, request: pytest.FixtureRequest) -> None:
    root = str(request.getfixturevalue(kind))
    write_bytes(f"{root}/digits", b"0123456789")
    ranges = [(2, 5), (8, 20), (10, 12), (2**60, 2**60 + 1), (5, 5)]
    assert [read_range(f"{root}/digits", *one) for one in ranges] == [b"234", b"89", b"", b"", b""]
    with pytest.raises(FileNotFoundError):
        read_range(f"{root}/nothing", 0, 1)


def test_symbolic_links_below_the_root_are_not_followed(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    write_bytes(str(outside / "file"), b"1")
    write_bytes(str(tmp_path / "root" / "inside"), b"1")
    (tmp_path / "root" / "folder").symlink_to(outside)
    (tmp_path / "root" / "link").symlink_to(outside / "file")
    assert walk_files(str(tmp_path / "root")).keys() == {"inside"}
    (tmp_path / "moved").symlink_to(tmp_path / "root")  # the root itself may be on another disk
    assert walk_files(str(tmp_path / "moved")).keys() == {"inside"}
