from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from amd.storage import join, read_json, write_bytes
from amd.training.lease import STALE_S, Lease


@pytest.fixture(params=["local", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    root = str(tmp_path) if request.param == "local" else request.getfixturevalue("s3_root")
    return join(root, "lease.json")


def test_a_lease_has_one_holder_until_it_is_released(url: str) -> None:
    first, second = Lease(url), Lease(url)
    assert first.acquire()
    assert not second.acquire()
    assert second.taken_by()["pid"] == os.getpid()
    first.release()
    assert second.acquire()
    second.release()


def test_a_lease_held_by_a_dead_local_process_can_be_acquired(url: str) -> None:
    child = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    lease = Lease(url)
    assert lease.acquire()
    entry = read_json(url)
    lease._stop.set()
    write_bytes(url, json.dumps({**entry, "token": "other", "pid": int(child.stdout)}).encode())
    other = Lease(url)
    assert other.acquire()
    other.release()


def test_a_lease_that_is_no_longer_renewed_expires(url: str) -> None:
    entry = {"token": "x", "host": "elsewhere", "pid": 1, "born": None, "renewed": time.time()}
    write_bytes(url, json.dumps(entry).encode())
    assert not Lease(url).acquire()
    write_bytes(url, json.dumps({**entry, "renewed": time.time() - STALE_S - 1}).encode())
    lease = Lease(url)
    assert lease.acquire()
    lease.release()
