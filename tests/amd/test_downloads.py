"""Files are downloaded once per node, even if a process is killed during a download."""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path

import pytest

from amd.downloads import KEEP_S, shared_copy
from amd.storage import StorageError
from tests.support.data import remote_folder
from tests.support.processes import run_ranks

RANKS = 4


@pytest.fixture(autouse=True)
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Simulate a node with an empty temporary folder and a store that records requests."""
    remote_folder.register()
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setenv(remote_folder.REQUESTS, str(tmp_path / "requests"))
    (tmp_path / "requests").touch()
    return tmp_path


def download(url: str, content: bytes) -> None:
    remote_folder.register()
    tempfile.tempdir = None
    assert shared_copy(url).read_bytes() == content


def gets(node: Path) -> int:
    return (node / "requests").read_text().count("get ")


def test_ranks_on_a_node_share_one_download(node: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(remote_folder.LATENCY, "0.05")
    content = os.urandom(100_000)
    (node / "weights").write_bytes(content)
    assert run_ranks(download, [(f"remote://{node}/weights", content)] * RANKS) == [0] * RANKS
    assert gets(node) == 1


def test_a_killed_download_neither_blocks_nor_corrupts_the_next_one(node: Path) -> None:
    content = os.urandom(100_000)
    (node / "kill-once").write_bytes(content)
    codes = run_ranks(download, [(f"remote://{node}/kill-once", content)] * RANKS)
    assert sorted(code or 0 for code in codes) == [-9] + [0] * (RANKS - 1)
    assert gets(node) == 2
    folder = Path(tempfile.gettempdir()) / f"amd-downloads-{os.getuid()}"
    assert not list(folder.glob("*.incoming"))


def test_a_changed_file_is_downloaded_again(node: Path) -> None:
    url = f"remote://{node}/weights"
    for content in (b"old", b"newer"):
        (node / "weights").write_bytes(content)
        download(url, content)
        download(url, content)
    assert gets(node) == 2


def test_copies_that_are_no_longer_requested_are_removed(node: Path) -> None:
    (node / "a").write_bytes(b"a")
    (node / "b").write_bytes(b"b")
    old = shared_copy(f"remote://{node}/a")
    os.utime(old, (0, time.time() - KEEP_S - 1))
    recent = shared_copy(f"remote://{node}/b")
    assert not old.exists()
    assert recent.exists()


def test_store_errors_are_raised_and_local_files_are_not_copied(node: Path) -> None:
    with pytest.raises(FileNotFoundError):
        shared_copy(f"remote://{node}/missing")
    assert shared_copy(str(node / "missing")) == node / "missing"


def test_a_download_folder_that_is_a_symlink_is_rejected(node: Path) -> None:
    (Path(tempfile.gettempdir()) / f"amd-downloads-{os.getuid()}").symlink_to(node)
    (node / "a").write_bytes(b"a")
    with pytest.raises(StorageError, match="remove it, or set TMPDIR"):
        shared_copy(f"remote://{node}/a")
