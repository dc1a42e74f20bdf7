"""Tests for the driver with real child processes: logs, heartbeats, and an outcome for every kind of exit."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from amd.config import with_overrides
from amd.storage import STORAGE_CREDENTIALS, StorageUnreachable, read_json, write_json
from amd.training.reporting.log_chunks import LogShipper
from service.jobs import logs
from service.jobs.execution.driver import main, outcome_of_exit, report_outcome, run
from service.jobs.execution.protocol import (
    DRIVER_POLICY,
    AttemptOutcome,
    DriverPolicy,
    Heartbeat,
    JobFolder,
    request_digest,
)
from service.jobs.kinds import named
from tests.support.processes import run_in_subprocess
from tests.support.runs.configs import tiny_image_config
from tests.support.runs.tiny_runs import tiny_run
from tests.support.s3 import S3Server
from tests.support.servers.keyed_s3 import KeyedS3Server
from tests.support.service.connections import refused_connections
from tests.support.service.control_plane import wait_for


def python_command(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def run_program(root: Path, code: str, attempt: int = 1) -> AttemptOutcome:
    """Run a program with the driver in a separate process, because the driver handles signals in its main thread."""
    return run_in_subprocess(run, python_command(code), JobFolder(str(root), "job"), attempt)


def test_output_is_logged_in_order_and_the_last_json_line_is_the_result(tmp_path: Path) -> None:
    result = {"state": "succeeded", "message": "", "encoder_folder": "e"}
    printed = ["one", '{"step": 1}', "two ä", json.dumps(result)]
    outcome = run_program(tmp_path, "".join(f"print({line!r});" for line in printed))
    assert (outcome.state, outcome.exit_code, outcome.result) == ("succeeded", 0, result)
    folder = JobFolder(str(tmp_path), "job")
    assert "".join(logs.pieces(folder.logs(1))).splitlines() == printed[:-1], "the result is not part of the log"
    run_program(tmp_path, f"print({printed[-1]!r})", attempt=2)
    assert "".join(logs.pieces(folder.logs(2))).splitlines() == printed[-1:], "unless nothing else was printed"


@pytest.mark.parametrize(
    ("code", "reason", "message", "retryable"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "node_lost", "terminated by SIGKILL", True),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "node_lost", "terminated by SIGSEGV", True),
        ("import sys; sys.exit('error: data.train: no such folder')", "dataset_invalid", "data.train", False),
        ("raise ValueError('odd')", "user_code_error", "ValueError: odd", False),
        ("import sys; print('error: a', file=sys.stderr); sys.exit(2)", "config_invalid", "a", False),
    ],
)
def test_every_failed_exit_maps_to_a_reason_and_a_message(
    tmp_path: Path, code: str, reason: str, message: str, retryable: bool
) -> None:
    outcome = run_program(tmp_path, code)
    assert (outcome.state, outcome.reason, outcome.retryable) == ("failed", reason, retryable)
    assert message in outcome.message


def test_the_reason_and_rank_are_read_from_the_result_that_a_run_prints() -> None:
    printed = {"state": "failed", "reason": "nan_loss", "message": "step 7 on rank 3: the loss is nan"}
    outcome = outcome_of_exit(1, printed, ["…"], asked_to_stop=False)
    assert (outcome.reason, outcome.rank, outcome.retryable) == ("nan_loss", 3, False)
    assert outcome_of_exit(1, None, [], asked_to_stop=True).state == "cancelled"


def test_a_program_terminated_by_ray_is_an_infrastructure_failure() -> None:
    line = "[2026-11-26 20:58:37,892 C 15124 15360] accessor.h:238:  An unexpected system state has occurred."
    outcome = outcome_of_exit(
        1, None, ["step 5/400", line, "*** StackTrace Information ***", "libc.so.6"], asked_to_stop=False
    )
    assert (outcome.reason, outcome.retryable) == ("node_lost", True)
    assert "An unexpected system state" in outcome.message


def test_a_stop_request_is_forwarded_once_and_recorded_in_the_outcome(tmp_path: Path) -> None:
    config = tiny_run(tmp_path, name="job", schedule__steps=100_000)
    job = start(tmp_path, config.model_dump(mode="json"))
    wait_for(lambda: (heartbeat_of(tmp_path).progress or {}).get("step", 0) > 3)
    job.send_signal(signal.SIGTERM)
    job.wait(60)
    outcome = heartbeat_of(tmp_path).outcome
    assert outcome is not None
    assert (outcome.state, outcome.reason, outcome.asked_to_stop) == ("cancelled", "cancelled_by_user", True)
    assert outcome.result is not None
    assert outcome.result["steps"] > 3
    text = "".join(logs.pieces(JobFolder(str(tmp_path), "job").logs(1)))
    assert "stopped after step" in text


def test_a_program_that_misses_its_stop_deadline_is_killed(tmp_path: Path) -> None:
    folder = JobFolder(str(tmp_path), "job")
    folder.write_stop_deadline(1, 0.5)
    program = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('started'); time.sleep(600)"
    code = (
        "import sys; from service.jobs.execution import driver;"
        "from service.jobs.execution.protocol import JobFolder;"
        f"folder = JobFolder({str(tmp_path)!r}, 'job');"
        f"driver.report_outcome(folder, 1, driver.run([sys.executable, '-c', {program!r}], folder, 1))"
    )
    with subprocess.Popen([sys.executable, "-c", code]) as job:
        wait_for(lambda: "started" in "".join(logs.pieces(folder.logs(1))))
        job.send_signal(signal.SIGTERM)
    outcome = heartbeat_of(tmp_path).outcome
    assert outcome is not None
    assert (outcome.state, outcome.reason, outcome.asked_to_stop) == ("cancelled", "deadline_exceeded", True)


def test_killing_the_driver_kills_its_program_and_leaves_no_outcome(tmp_path: Path) -> None:
    config = tiny_run(tmp_path, name="job", schedule__steps=100_000)
    job = start(tmp_path, config.model_dump(mode="json"))
    wait_for(lambda: heartbeat_of(tmp_path).progress is not None)
    children = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
    assert children
    job.kill()
    job.wait()
    wait_for(lambda: not any(alive(int(child)) for child in children))
    assert heartbeat_of(tmp_path).outcome is None


def test_a_log_of_several_chunks_can_be_read_completely_and_from_any_offset(tmp_path: Path) -> None:
    folder = JobFolder(str(tmp_path), "job")
    lines = [f"{number} ünïcödé {'x' * (number % 200)}\n".encode() for number in range(20_000)]
    shipper = LogShipper(folder.logs(1), 0.01)
    for line in lines:
        shipper.write(line)
    shipper.close()
    whole = b"".join(lines)
    assert "".join(logs.pieces(folder.logs(1))).encode() == whole
    offset = len(b"".join(lines[:12_345]))
    assert "".join(logs.pieces(folder.logs(1), offset)).encode() == whole[offset:]
    assert "".join(logs.pieces(folder.logs(1), logs.tail_offset(folder.logs(1), 3))).encode() == b"".join(lines[-3:])
    restarted = LogShipper(folder.logs(1), 0.01)
    restarted.write(b"more\n")
    restarted.close()
    assert "".join(logs.pieces(folder.logs(1))).encode() == whole + b"more\n"


def test_a_storage_outage_loses_neither_log_nor_outcome(monkeypatch: pytest.MonkeyPatch) -> None:
    import boto3

    server = S3Server()
    for name, value in {
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL_S3": server.url,
        "AWS_MAX_ATTEMPTS": "1",  # retries in boto would only slow the test down
    }.items():
        monkeypatch.setenv(name, value)
    boto3.client("s3", endpoint_url=server.url).create_bucket(Bucket="away")
    folder = JobFolder("s3://away/root", "job")
    shipper = LogShipper(folder.logs(1), 0.1)
    lines = [f"line {number}\n" for number in range(100)]
    for number, line in enumerate(lines):
        shipper.write(line.encode())
        if number == 30:
            time.sleep(0.5)
            server.stop()
            with pytest.raises(StorageUnreachable):
                folder.read_heartbeat(1)
        time.sleep(0.02)
    reporting = threading.Thread(target=report_outcome, args=(folder, 1, AttemptOutcome(state="succeeded")))
    reporting.start()
    time.sleep(1.0)
    server.start()
    shipper.close()
    reporting.join()
    assert "".join(logs.pieces(folder.logs(1))) == "".join(lines)
    heartbeat = folder.read_heartbeat(1)
    assert heartbeat is not None
    assert heartbeat.outcome is not None
    assert heartbeat.outcome.state == "succeeded"
    server.stop()


class Submitted(NamedTuple):
    """A job stored under the storage root. Its driver runs in this process and does not start the program."""

    folder: JobFolder
    programs: list[list[str]]
    """Programs that the driver would have started."""
    configs: list[Any]
    """Contents of the files that these programs would have read."""

    def run_driver(self) -> AttemptOutcome | None:
        with refused_connections() as attempted:
            main([self.folder.job_id, "1", self.folder.root])
        assert not attempted
        heartbeat = self.folder.read_heartbeat(1)
        return heartbeat.outcome if heartbeat is not None else None


@pytest.fixture
def submitted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Submitted:
    """Return a job as submitted by the control plane; data under `tmp_path/data` is allowed."""
    job = Submitted(JobFolder(str(tmp_path / "root"), "job"), [], [])

    def record(program: list[str], *_: Any) -> AttemptOutcome:
        job.programs.append(program)
        job.configs.append(json.loads(Path(program[program.index("--config") + 1]).read_text()))
        return AttemptOutcome(state="succeeded")

    monkeypatch.setattr("service.jobs.execution.driver.run", record)
    (tmp_path / "data").mkdir()
    submit(job.folder, monkeypatch, data__train=str(tmp_path / "data"))
    return job


def submit(folder: JobFolder, monkeypatch: pytest.MonkeyPatch, **overrides: Any) -> None:
    """Write a job's files and set its driver's policy, without checking the config."""
    config = named("train", tiny_image_config(**{"teacher__weights": "timm:one", **overrides}), "job", folder.root)
    write_json(folder.request, {"kind": "train"})
    write_json(folder.config, config)
    allowed = (str(Path(folder.root).parent / "data"),)
    policy = DriverPolicy(digest=request_digest("train", config), allowed_uris=allowed)
    monkeypatch.setenv(DRIVER_POLICY, policy.model_dump_json())


def test_the_driver_runs_a_verified_copy_of_the_submitted_config(submitted: Submitted) -> None:
    outcome = submitted.run_driver()
    assert outcome is not None
    assert outcome.state == "succeeded"
    assert submitted.configs == [read_json(submitted.folder.config)]
    assert submitted.folder.config not in submitted.programs[0]  # it may change while the program starts


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("config", {"data": {"train": "/etc"}}),
        ("config", {"seed": 1}),
        ("config", {"data": {"train": "http://169.254.169.254/latest/meta-data"}}),
        ("request", {"kind": "embed"}),
        ("request", {"kind": "no such kind"}),
    ],
)
def test_a_config_or_request_changed_after_submission_is_rejected(submitted: Submitted, file: str, change: Any) -> None:
    url = getattr(submitted.folder, file)
    values = read_json(url)
    write_json(url, values | {key: values[key] | new if key == "data" else new for key, new in change.items()})
    outcome = submitted.run_driver()
    assert outcome is not None
    assert (outcome.state, outcome.reason, outcome.retryable) == ("failed", "config_invalid", False)
    assert "changed on the storage root; retry the job" in outcome.message
    assert not submitted.programs


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null"])
def test_a_damaged_request_is_rejected(submitted: Submitted, content: bytes) -> None:
    Path(submitted.folder.request).write_bytes(content)
    outcome = submitted.run_driver()
    assert outcome is not None
    assert (outcome.state, outcome.reason) == ("failed", "config_invalid")
    assert not submitted.programs


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("data.train", "/etc"),
        ("data.root", "http://169.254.169.254/latest"),
        ("data.cache_dir", "/var/cache"),
        ("teacher.weights", "http://169.254.169.254/latest"),
        ("tracking.mlflow", "http://169.254.169.254/latest"),
    ],
)
def test_a_location_that_is_not_allowed_on_the_cluster_is_rejected(
    submitted: Submitted, monkeypatch: pytest.MonkeyPatch, field: str, value: str
) -> None:
    submit(submitted.folder, monkeypatch, **{field.replace(".", "__"): value})  # as if an older version had accepted it
    outcome = submitted.run_driver()
    assert outcome is not None
    assert (outcome.state, outcome.reason, outcome.exit_code) == ("failed", "config_invalid", 2)
    assert outcome.message.startswith(field)
    assert not submitted.programs


def test_a_symlink_pointing_outside_an_allowed_folder_on_the_node_is_rejected(
    submitted: Submitted, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "data" / "link").symlink_to("/etc")
    submit(submitted.folder, monkeypatch, data__train=str(tmp_path / "data" / "link"))
    outcome = submitted.run_driver()
    assert outcome is not None
    assert outcome.message.startswith("data.train=")
    assert not submitted.programs


def test_a_job_cannot_change_its_storage_root_or_output_folder(
    submitted: Submitted, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = read_json(submitted.folder.config) | {"storage": f"{submitted.folder.root}/runs/other"}
    write_json(submitted.folder.config, config)
    policy = DriverPolicy.model_validate_json(os.environ[DRIVER_POLICY])
    digest = request_digest("train", config)
    monkeypatch.setenv(DRIVER_POLICY, policy.model_copy(update={"digest": digest}).model_dump_json())
    outcome = submitted.run_driver()
    assert outcome is not None
    assert outcome.message.startswith("storage=")
    assert not submitted.programs


def test_an_attempt_submitted_by_an_older_control_plane_still_runs(
    submitted: Submitted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(DRIVER_POLICY)
    assert (submitted.run_driver() or AttemptOutcome(state="failed")).state == "succeeded"
    assert len(submitted.programs) == 1


def test_a_job_reads_its_projects_data_with_the_projects_credential(tmp_path: Path) -> None:
    config = tiny_run(tmp_path, name="job", data__loader_workers=1, schedule__steps=3)
    files = {f"sets/images/{path.name}": path for path in (tmp_path / "images").rglob("*.png")}
    files["open/teacher.safetensors"] = tmp_path / "teacher.safetensors"
    locations = {"data.train": "s3://sets/images", "teacher.weights": "s3://open/teacher.safetensors"}
    with KeyedS3Server({"sets": "key-of-sets", "open": "key-of-node"}) as store:
        for key, path in files.items():
            bucket, _, name = key.partition("/")
            store.client(bucket).upload_file(str(path), bucket, name)
        store.requests.clear()
        references = refer_to_secret(tmp_path / "secret", "s3://sets")
        (tmp_path / "secret").write_text('{"key": "key-of-sets", "secret": "never-written"}')
        values = with_overrides(config, locations).model_dump(mode="json")
        start(tmp_path, values, **store.environment("open"), **{STORAGE_CREDENTIALS: references}).wait(300)
        outcome = heartbeat_of(tmp_path).outcome
        assert outcome is not None
        assert (outcome.state, outcome.message) == ("succeeded", "")
        assert store.requests == {("sets", "key-of-sets"), ("open", "key-of-node")}
    written = [path for path in tmp_path.rglob("*") if path.is_file() and path.name != "secret"]
    assert not [
        path for path in written if b"never-written" in path.read_bytes() or b"key-of-sets" in path.read_bytes()
    ]


def test_a_job_whose_secret_is_missing_on_the_node_is_rejected(
    submitted: Submitted, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(STORAGE_CREDENTIALS, refer_to_secret(tmp_path / "missing", "s3://sets"))
    outcome = submitted.run_driver()
    assert outcome is not None
    assert (outcome.state, outcome.reason, outcome.retryable) == ("failed", "config_invalid", False)
    assert outcome.message.startswith(f"storage credential sets: file:{tmp_path}/missing on {socket.gethostname()} ")
    assert not submitted.programs


def refer_to_secret(file: Path, prefix: str) -> str:
    """Return the value of AMD_STORAGE_CREDENTIALS for one credential named `sets`."""
    return json.dumps({"sets": {"prefixes": [prefix], "secret": f"file:{file}"}})


def start(root: Path, config: dict[str, Any], **environment: str) -> subprocess.Popen[bytes]:
    """Start a training run without Ray, which the real entry point does not allow."""
    folder = JobFolder(str(root), "job")
    write_json(folder.request, {"kind": "train"})
    write_json(folder.config, config)
    code = (
        "import sys; from service.jobs import kinds; from service.jobs.execution import driver;"
        "kinds.KINDS['train'] = kinds.KINDS['train']._replace(args=('--json', '--local'));"
        f"sys.exit(driver.main(['job', '1', {str(root)!r}]))"
    )
    return subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "OMP_NUM_THREADS": "1", **environment})


def heartbeat_of(root: Path) -> Heartbeat:
    return JobFolder(str(root), "job").read_heartbeat(1) or Heartbeat(at=0.0)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False
