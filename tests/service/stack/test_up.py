"""Tests for `up` on a stack that is already running."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from service.stack import StackError, up
from service.stack.ports import free_ports
from service.stack.processes import _service_environment, changed_settings
from service.stack.state import SUPERVISED, PartProcess, RayPorts, StackFolder, StackState
from tests.support.service.control_plane import wait_for

WAITING = [sys.executable, "-c", "import time; time.sleep(600)"]


@pytest.fixture
def running(tmp_path: Path) -> Iterator[StackFolder]:
    """A stack whose parts are processes that only wait."""
    folder = StackFolder(tmp_path / "data")
    folder.prepare()
    environment = {"AMD_ALLOWED_URIS": "s3://clips", "AMD_STORAGE": str(tmp_path), "AMD_PORT": "1"}
    waiting = {part: subprocess.Popen(WAITING, env=environment) for part in SUPERVISED}
    found = {part: psutil.Process(process.pid) for part, process in waiting.items()}
    wait_for(lambda: all(process.environ() for process in found.values()))  # not before the programs are loaded
    folder.write(
        StackState(
            port=free_ports(1)[0],
            storage=str(tmp_path),
            num_cpus=1,
            ray=RayPorts(**dict.fromkeys(RayPorts.model_fields, 1)),
            key_file=tmp_path / "key",
            processes={
                part: PartProcess(pid=process.pid, started=process.create_time()) for part, process in found.items()
            },
        )
    )
    yield folder
    for process in waiting.values():
        process.kill()
        process.wait()


def test_a_setting_that_a_running_stack_lacks_is_rejected(
    running: StackFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AMD_ALLOWED_URIS", "s3://clips,s3://labels")
    monkeypatch.setenv("AMD_DATABASE_URL", "postgresql://user:secret@db/amd")
    with pytest.raises(StackError, match=r"AMD_ALLOWED_URIS.*AMD_DATABASE_URL.*another value; run `amd down`") as error:
        up(running.path)
    assert "secret" not in str(error.value)


def test_locations_that_jobs_may_read_are_remembered_and_restart_the_control_plane(
    running: StackFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[str] = []
    monkeypatch.setattr("service.stack.start", lambda folder, state, part, report: started.append(part))
    monkeypatch.setattr("service.stack._wait_until_ready", lambda *_: None)
    monkeypatch.setenv("AMD_ALLOWED_URIS", "s3://clips")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    lines: list[str] = []
    stack = up(running.path, allowed=["images", "s3://labels"], on_progress=lines.append)
    allowed = (str(tmp_path / "images"), "s3://labels")
    assert (stack.allowed, started) == (allowed, ["control-plane"])
    assert "restarting control-plane, because jobs may read other locations now" in lines
    state = running.read()
    assert state is not None
    assert _service_environment(running, state)["AMD_ALLOWED_URIS"] == ",".join(("s3://clips", *allowed))
    assert up(running.path).allowed == allowed
    assert up(running.path, allowed=["s3://more", "images"]).allowed == (*allowed, "s3://more")
    assert up(running.path, allowed=["", "images"]).allowed == allowed[:1]
    assert up(running.path, allowed=[""]).allowed == ()


@pytest.mark.parametrize("text", ["/nowhere/images", "a,b", "s3://bucket/../x"])
def test_a_location_that_jobs_cannot_read_is_rejected(
    text: str, running: StackFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("service.stack.start")  # nothing must be started
    with pytest.raises(StackError, match=f"allow: .*{text}"):
        up(running.path, allowed=[text])


def test_only_settings_that_are_set_here_are_compared(running: StackFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    state = running.read()
    assert state is not None
    monkeypatch.delenv("AMD_ALLOWED_URIS", raising=False)
    assert "AMD_ALLOWED_URIS" not in changed_settings(running, state)
    for value, changed in (("s3://clips", []), ("", ["AMD_ALLOWED_URIS"])):
        monkeypatch.setenv("AMD_ALLOWED_URIS", value)
        assert changed_settings(running, state) == changed, "the stack's own settings are not compared"
