"""Tests for `up` on a stack that is already running."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from service.stack import StackError, up
from service.stack.processes import changed_settings
from service.stack.state import PartProcess, RayPorts, StackFolder, StackState
from tests.support.service.control_plane import wait_for

WAITING = [sys.executable, "-c", "import time; time.sleep(600)"]


@pytest.fixture
def running(tmp_path: Path) -> Iterator[StackFolder]:
    """A stack whose control plane is a process that only waits."""
    folder = StackFolder(tmp_path / "data")
    folder.prepare()
    names = dict.fromkeys(RayPorts.model_fields, 1)
    environment = {"AMD_ALLOWED_URIS": "s3://clips", "AMD_STORAGE": str(tmp_path), "AMD_PORT": "1"}
    with subprocess.Popen(WAITING, env=environment) as process:
        wait_for(lambda: bool(psutil.Process(process.pid).environ()))  # not before the program is loaded
        started = PartProcess(pid=process.pid, started=psutil.Process(process.pid).create_time())
        state = StackState(
            port=1,
            storage=str(tmp_path),
            num_cpus=1,
            ray=RayPorts(**names),
            key_file=tmp_path / "key",
            processes={"control-plane": started},
        )
        folder.write(state)
        yield folder
        process.kill()


def test_a_setting_that_a_running_stack_lacks_is_rejected(
    running: StackFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AMD_ALLOWED_URIS", "s3://clips,s3://labels")
    monkeypatch.setenv("AMD_DATABASE_URL", "postgresql://user:secret@db/amd")
    with pytest.raises(StackError, match=r"AMD_ALLOWED_URIS.*AMD_DATABASE_URL.*another value; run `amd down`") as error:
        up(running.path)
    assert "secret" not in str(error.value)


def test_only_settings_that_are_set_here_are_compared(running: StackFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    state = running.read()
    assert state is not None
    monkeypatch.delenv("AMD_ALLOWED_URIS", raising=False)
    assert "AMD_ALLOWED_URIS" not in changed_settings(running, state)
    for value, changed in (("s3://clips", []), ("", ["AMD_ALLOWED_URIS"])):
        monkeypatch.setenv("AMD_ALLOWED_URIS", value)
        assert changed_settings(running, state) == changed, "the stack's own settings are not compared"
