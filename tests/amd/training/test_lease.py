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


def test_only_one_holds_it_until_it_is_given_back(url: str) -> None:
    first, second = Lease(url), Lease(url)
    assert first.acquire()
    assert not second.acquire()
    assert second.taken_by()["pid"] == os.getpid()
    first.release()
    assert second.acquire()
    second.release()


def test_a_dead_process_of_this_machine_has_lost_it(url: str) -> None:
    child = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    lease = Lease(url)
    assert lease.acquire()
    held = read_json(url)
    lease._stop.set()
    write_bytes(url, json.dumps({**held, "token": "other", "pid": int(child.stdout)}).encode())
    other = Lease(url)
    assert other.acquire()
    other.release()


def test_a_holder_elsewhere_that_no_longer_renews_has_lost_it(url: str) -> None:
    held = {"token": "x", "host": "elsewhere", "pid": 1, "born": None, "renewed": time.time()}
    write_bytes(url, json.dumps(held).encode())
    assert not Lease(url).acquire()
    write_bytes(url, json.dumps({**held, "renewed": time.time() - STALE_S - 1}).encode())
    lease = Lease(url)
    assert lease.acquire()
    lease.release()
