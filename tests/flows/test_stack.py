"""Tests for `amd up`, `status` and `down` with a real Ray head and control plane, which are killed and restarted."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from amd.downstream.embedding.features import embed_file
from service.client import Client
from service.jobs.execution.protocol import JobFolder
from service.stack import StackError, down, find_stack, status, up
from service.stack.ports import free_ports, is_free
from service.stack.processes import find_problem
from service.stack.state import MARK, PartProcess, StackFolder, StackState
from tests.support.encoders.published_encoders import picture, publish

TIMEOUT_S = 900
JOB = (
    *("train", "--preset", "demo-image-mae", "schedule.steps=300", "schedule.warmup_steps=10"),
    *("checkpoint.every_steps=20", "tracking.log_every_steps=5", "--submit", "--json"),
)
STOPPED = StackState.model_validate(
    {
        "port": 1,
        "storage": "/nowhere",
        "num_cpus": 1,
        "ray": {"gcs": 1, "dashboard": 1, "agent": 1, "metrics": 1, "client": 1, "serve": 1},
        "key_file": "/nowhere",
    }
)


class StackCommand:
    """Runs the `amd` command with a separate data directory."""

    def __init__(self, folder: Path) -> None:
        self.data, self.storage = folder / "data", folder / "storage"
        removed = ("AMD_URL", "AMD_KEY", "AMD_KEY_FILE", "RAY_ADDRESS", "AMD_STORAGE")
        self.environment = {name: value for name, value in os.environ.items() if name not in removed} | {
            "AMD_DATA_DIR": str(self.data),
            "AMD_DEMO_DIR": str(folder / "demo"),
            "AMD_SILENCE_S": "10",
            "AWS_SECRET_ACCESS_KEY": "a-secret",
        }

    def start(self, *args: str) -> subprocess.Popen[str]:
        command, pipe = [sys.executable, "-m", "service.cli", *args], subprocess.PIPE
        return subprocess.Popen(command, env=self.environment, stdout=pipe, stderr=pipe, text=True)

    def amd(self, *args: str, code: int = 0) -> str:
        """Run the command, check its exit code, and return its output."""
        process = self.start(*args)
        out, err = process.communicate(timeout=TIMEOUT_S)
        assert process.returncode == code, f"{args} exited with {process.returncode}:\n{out}{err}"
        return out if code == 0 else out + err

    def json(self, *args: str, code: int = 0) -> Any:
        return json.loads(self.amd(*args, code=code).splitlines()[0])

    def client(self, stack: Any) -> Client:
        """Return a client for the stack described by the output of `amd up --json`."""
        return Client(stack["url"], Path(stack["key_file"]).read_text().strip())

    def processes(self) -> list[psutil.Process]:
        """Return all processes of the stack, found as descendants of its two parts (Ray and the control plane)."""
        state = json.loads((self.data / "stack.json").read_text())
        parts = [psutil.Process(part["pid"]) for part in state["processes"].values()]
        return parts + [child for part in parts for child in part.children(recursive=True)]


@pytest.fixture
def stack_command(tmp_path: Path) -> Iterator[StackCommand]:
    command = StackCommand(tmp_path)
    yield command
    command.amd("down")


def until(condition: Any) -> Any:
    """Poll a condition until it returns a truthy value, and return that value."""
    end = time.monotonic() + TIMEOUT_S
    while not (found := condition()):
        assert time.monotonic() < end
        time.sleep(0.2)
    return found


def is_open(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def listening_addresses(process: psutil.Process) -> set[str]:
    try:
        connections = process.net_connections()
    except psutil.NoSuchProcess:  # Ray ends idle workers
        return set()
    return {connection.laddr.ip for connection in connections if connection.status == psutil.CONN_LISTEN}


@pytest.mark.ray
@pytest.mark.timeout(3 * TIMEOUT_S)
def test_a_job_continues_from_its_checkpoint_after_every_process_is_killed(stack_command: StackCommand) -> None:
    encoder = publish(stack_command.storage / "encoders" / "tiny")

    # Two concurrent `up` commands start a single stack.
    args = ("up", "--port", "0", "--storage", str(stack_command.storage), "--num-cpus", "2", "--json")
    processes = [stack_command.start(*args) for _ in range(2)]
    outputs = [process.communicate(timeout=TIMEOUT_S) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    first, second = (json.loads(out) for out, _ in outputs)
    assert first == second
    assert first["data_dir"] == str(stack_command.data)
    assert os.stat(first["key_file"]).st_mode & 0o777 == 0o600
    assert os.stat(stack_command.data / "ray-token").st_mode & 0o777 == 0o600

    # An existing encoder is deployed.
    file = stack_command.data / "picture.png"
    file.write_bytes(picture())
    expected = embed_file(encoder, str(file))
    with stack_command.client(first) as client:
        until(lambda: list(client.encoders.list()))
    assert stack_command.json("encoders", "deploy", "tiny", "--json")["state"] == "healthy"
    with stack_command.client(first) as client:
        np.testing.assert_allclose(client.embeddings("tiny", [file])[0].embedding, expected, atol=1e-5)

    # All parts are healthy and listen only on loopback.
    addresses = {ip for process in stack_command.processes() for ip in listening_addresses(process)}
    assert {address.removeprefix("::ffff:") for address in addresses} == {"127.0.0.1"}
    found = stack_command.json("status", "--json")
    assert {part["name"]: part["health"] for part in found["parts"]} == {"ray": "ok", "control-plane": "ok"}
    assert found["url"] == first["url"]

    # For a running stack, `up` returns its description and rejects changes.
    assert stack_command.json("up", "--json") == first
    assert stack_command.json("status", "--json") == found
    assert "amd down" in stack_command.amd("up", "--storage", str(stack_command.storage / "other"), code=1)

    # All processes are killed after the job's first checkpoint.
    job = stack_command.json(*JOB)["id"]
    with stack_command.client(first) as client:
        saved = until(lambda: client.jobs.checkpoints(job))[0].step
    everything = stack_command.processes()
    for process in everything:
        with suppress(psutil.NoSuchProcess):  # it ended together with its parent
            process.send_signal(signal.SIGKILL)
    psutil.wait_procs(everything, timeout=TIMEOUT_S)
    stopped = stack_command.json("status", "--json", code=1)
    assert {part["health"] for part in stopped["parts"]} == {"down"}

    # `up` reuses ports and data, and the job continues.
    assert stack_command.json("up", "--json") == first
    again = stack_command.json("status", "--json")
    assert [part["port"] for part in again["parts"]] == [part["port"] for part in found["parts"]]
    with stack_command.client(first) as client:
        ended = client.jobs.wait(job, TIMEOUT_S)
        assert (ended.state, ended.attempt) == ("succeeded", 2), ended
        log = "".join(client.jobs.logs(job, attempt=2))
        steps = [int(line.split()[1].split("/")[0]) for line in log.splitlines() if line.startswith("step ")]
        assert min(steps) > saved, "the job must continue from its checkpoint"
        loss = client.jobs.metrics(job, ["loss/total"]).series[0]
        assert loss.steps == list(range(5, 301, 5)), "no step may be missing or repeated"
        assert "a-secret" not in stack_command.amd("jobs", "show", job, "--json"), "a job must not contain credentials"

        # The encoder is served again.
        assert client.deployments.wait("tiny", TIMEOUT_S).state == "healthy"
        np.testing.assert_allclose(client.embeddings("tiny", [file])[0].embedding, expected, atol=1e-5)

        # `down` lets a running job save a checkpoint and report that it was stopped externally.
        job = stack_command.json(*JOB, "schedule.steps=100000", "checkpoint.every_steps=100000")["id"]
        until(lambda: (found := client.jobs.get(job).progress) is not None and found.step)

    # `down` ends all processes and keeps all data.
    everything, ports = stack_command.processes(), [part["port"] for part in again["parts"]]
    temp = Path(json.loads((stack_command.data / "stack.json").read_text())["ray_temp"])
    assert temp.is_dir()
    stack_command.amd("down")
    heartbeat = JobFolder(str(stack_command.storage), job).read_heartbeat(1)
    assert heartbeat is not None
    assert heartbeat.outcome is not None
    assert (heartbeat.outcome.state, heartbeat.outcome.asked_to_stop) == ("cancelled", True)
    assert list((stack_command.storage / "runs" / job / "checkpoints").glob("*/manifest.json"))
    assert not [process for process in everything if process.is_running()]
    assert not [port for port in ports if is_open(port)]
    assert not temp.exists()
    assert (stack_command.data / "control-plane.db").exists()
    assert "nothing was running" in stack_command.amd("down")


def test_a_port_in_use_is_reported(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(StackError, match=f"port {port} is in use by another program; choose another with --port"):
            up(tmp_path / "data", port=port, storage=str(tmp_path / "storage"))
    assert find_stack(tmp_path / "data") is None


class Listener:
    """A process with the given environment that occupies Ray's dashboard port."""

    CODE = "import socket, sys, time; s = socket.create_server(('127.0.0.1', int(sys.argv[1]))); time.sleep(600)"

    def __init__(self, **environment: str) -> None:
        self.port = free_ports(1)[0]
        command = [sys.executable, "-c", self.CODE, str(self.port)]
        self.process = subprocess.Popen(command, env={**os.environ, **environment})
        while is_free(self.port):
            time.sleep(0.02)


@pytest.mark.parametrize("remains", [True, False], ids=["leftover Ray process", "another program"])
def test_the_control_plane_is_restarted_if_ray_ports_change(
    tmp_path: Path, sleeper: psutil.Process, monkeypatch: pytest.MonkeyPatch, remains: bool
) -> None:
    started: list[str] = []
    monkeypatch.setattr("service.stack.start", lambda folder, state, part, on_progress: started.append(part))
    monkeypatch.setattr("service.stack._wait_until_ready", lambda *args: None)
    listener = Listener(**{MARK: f"{StackFolder(tmp_path).mark}:ray"} if remains else {})
    alive = PartProcess(pid=sleeper.pid, started=sleeper.create_time())
    ray = STOPPED.ray.model_copy(update={name: free_ports(1)[0] for name in type(STOPPED.ray).model_fields})
    values = {"storage": str(tmp_path / "root"), "processes": {"control-plane": alive}}
    state = STOPPED.model_copy(update={**values, "ray": ray.model_copy(update={"dashboard": listener.port})})
    (tmp_path / "stack.json").write_text(state.model_dump_json())
    try:
        up(tmp_path)
    finally:
        listener.process.kill()
        listener.process.wait()
    found = StackFolder(tmp_path).read()
    assert found is not None
    if remains:  # they are ended first, so Ray keeps its port, and the control plane keeps running
        assert (found.ray, started, sleeper.is_running()) == (state.ray, ["ray"], True)
    else:
        assert found.ray.dashboard != listener.port
        assert sorted(started) == ["control-plane", "ray"]
        assert not sleeper.is_running()


def test_a_ray_head_whose_agent_does_not_respond_is_not_ready(tmp_path: Path) -> None:
    class Head(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b'[{"state": "ALIVE"}]')

    (tmp_path / "ray-token").write_text("token")
    with HTTPServer(("127.0.0.1", 0), Head) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        free = free_ports(1)[0]
        for agent, problem in ((server.server_port, None), (free, f"accepts jobs does not respond on port {free}")):
            ports = STOPPED.ray.model_copy(update={"dashboard": server.server_port, "agent": agent})
            found = find_problem(StackFolder(tmp_path), STOPPED.model_copy(update={"ray": ports}), "ray")
            assert found is None if problem is None else problem in str(found)
        server.shutdown()


def test_an_unwritable_folder_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StackError, match=r"data directory .*file/data: cannot be written .*--data-dir"):
        up(tmp_path / "file" / "data")
    with pytest.raises(StackError, match="storage=/proc/nowhere"):
        up(tmp_path / "data", storage="/proc/nowhere")


def test_a_damaged_state_file_is_reported(tmp_path: Path) -> None:
    (tmp_path / "stack.json").write_text("{")
    with pytest.raises(StackError, match=r"stack\.json: cannot be read"):
        status(tmp_path)


@pytest.fixture
def sleeper(request: pytest.FixtureRequest) -> Iterator[psutil.Process]:
    environment = {**os.environ, **getattr(request, "param", {})}
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], env=environment) as sleeping:
        yield psutil.Process(sleeping.pid)
        sleeping.kill()


def test_a_process_with_a_reused_pid_is_not_signalled(tmp_path: Path, sleeper: psutil.Process) -> None:
    old = PartProcess(pid=sleeper.pid, started=sleeper.create_time() - 3600)
    state = STOPPED.model_copy(update={"processes": {"control-plane": old}})
    (tmp_path / "stack.json").write_text(state.model_dump_json())
    assert find_stack(tmp_path) is None
    assert status(tmp_path).parts[1].health == "down"
    assert down(tmp_path) is False
    assert sleeper.status() != psutil.STATUS_ZOMBIE


def test_leftover_processes_are_terminated_even_without_a_state_file(tmp_path: Path) -> None:
    mark = f"{StackFolder(tmp_path).mark}:control-plane"
    with subprocess.Popen(
        [sys.executable, "-c", "import time; time.sleep(600)"], env={**os.environ, MARK: mark}
    ) as orphan:
        until(lambda: psutil.Process(orphan.pid).environ().get(MARK) == mark)
        assert down(tmp_path) is True
        assert not psutil.pid_exists(orphan.pid)


def test_the_lock_of_a_killed_process_is_released(tmp_path: Path) -> None:
    code = "import fcntl, sys, time; f = open(sys.argv[1], 'a'); fcntl.flock(f, 2); print('held', flush=True)"
    code += "; time.sleep(600)"
    command = [sys.executable, "-c", code, str(tmp_path / "stack.lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        holder.kill()
    assert down(tmp_path) is False
