"""The runner with real processes: what it leaves behind, whatever becomes of its child."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from amd.storage import StorageUnreachable, write_json
from service.jobs import logs
from service.jobs.execution.driver import LogShipper, judge, patiently_say, run
from service.jobs.execution.protocol import JobFolder, Outcome, Word
from tests.support.runs.tiny_runs import in_a_process, tiny_run
from tests.support.s3 import S3Server
from tests.support.service.control_plane import wait_for


def program(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def ran(root: Path, code: str, attempt: int = 1) -> Outcome:
    """In a process of its own: the runner takes the signals of its main thread."""
    return in_a_process(run, program(code), JobFolder(str(root), "job"), attempt)


def test_what_a_program_prints_is_kept_in_order_and_its_result_is_its_last_json_line(tmp_path: Path) -> None:
    result = {"state": "succeeded", "message": "", "encoder_folder": "e"}
    outcome = ran(tmp_path, f"print('one'); print('two ä'); print({json.dumps(result)!r})")
    assert (outcome.state, outcome.exit_code, outcome.result) == ("succeeded", 0, result)
    folder = JobFolder(str(tmp_path), "job")
    assert "".join(logs.pieces(folder, 1)).splitlines()[:2] == ["one", "two ä"]


@pytest.mark.parametrize(
    ("code", "reason", "message", "retryable"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "node_lost", "ended by SIGKILL", True),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "node_lost", "ended by SIGSEGV", True),
        ("import sys; sys.exit('error: data.train: no such folder')", "dataset_invalid", "data.train", False),
        ("raise ValueError('odd')", "user_code_error", "ValueError: odd", False),
        ("import sys; print('error: a', file=sys.stderr); sys.exit(2)", "config_invalid", "a", False),
    ],
)
def test_every_end_has_a_reason_and_a_message(
    tmp_path: Path, code: str, reason: str, message: str, retryable: bool
) -> None:
    outcome = ran(tmp_path, code)
    assert (outcome.state, outcome.reason, outcome.retryable) == ("failed", reason, retryable)
    assert message in outcome.message


def test_the_runs_own_verdict_stands_with_its_rank() -> None:
    printed = json.dumps({"state": "failed", "reason": "nan_loss", "message": "step 7 on rank 3: the loss is nan"})
    outcome = judge(1, printed, ["…"], asked_to_stop=False)
    assert (outcome.reason, outcome.rank, outcome.retryable) == ("nan_loss", 3, False)
    assert judge(1, None, [], asked_to_stop=True).state == "cancelled"


def test_a_driver_that_ray_ended_was_not_its_owners_mistake() -> None:
    line = "[2026-11-26 20:58:37,892 C 15124 15360] accessor.h:238:  An unexpected system state has occurred."
    outcome = judge(1, None, ["step 5/400", line, "*** StackTrace Information ***", "libc.so.6"], asked_to_stop=False)
    assert (outcome.reason, outcome.retryable) == ("node_lost", True)
    assert "An unexpected system state" in outcome.message


def test_a_stop_is_passed_on_once_and_the_outcome_tells(tmp_path: Path) -> None:
    config = tiny_run(tmp_path, name="job", schedule__steps=100_000)
    job = start(tmp_path, config.model_dump(mode="json"))
    wait_for(lambda: (heard(tmp_path).progress or {}).get("step", 0) > 3)
    job.send_signal(signal.SIGTERM)
    job.wait(60)
    outcome = heard(tmp_path).outcome
    assert outcome is not None
    assert (outcome.state, outcome.reason, outcome.asked_to_stop) == ("cancelled", "cancelled_by_user", True)
    assert outcome.result is not None
    assert outcome.result["steps"] > 3
    text = "".join(logs.pieces(JobFolder(str(tmp_path), "job"), 1))
    assert "stopped after step" in text


def test_what_does_not_stop_in_its_time_is_ended_by_force(tmp_path: Path) -> None:
    folder = JobFolder(str(tmp_path), "job")
    folder.limit_stop(1, 0.5)
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf'); time.sleep(600)"
    code = (
        "import sys; from service.jobs.execution import driver as runner;"
        "from service.jobs.execution.protocol import JobFolder;"
        f"folder = JobFolder({str(tmp_path)!r}, 'job');"
        f"runner.patiently_say(folder, 1, runner.run([sys.executable, '-c', {deaf!r}], folder, 1))"
    )
    with subprocess.Popen([sys.executable, "-c", code]) as job:
        wait_for(lambda: "deaf" in "".join(logs.pieces(folder, 1)))
        job.send_signal(signal.SIGTERM)
    outcome = heard(tmp_path).outcome
    assert outcome is not None
    assert (outcome.state, outcome.reason, outcome.asked_to_stop) == ("cancelled", "deadline_exceeded", True)


def test_a_killed_runner_takes_its_program_along_and_leaves_no_outcome(tmp_path: Path) -> None:
    config = tiny_run(tmp_path, name="job", schedule__steps=100_000)
    job = start(tmp_path, config.model_dump(mode="json"))
    wait_for(lambda: heard(tmp_path).progress is not None)
    children = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
    assert children
    job.kill()
    job.wait()
    wait_for(lambda: not any(alive(int(child)) for child in children))
    assert heard(tmp_path).outcome is None


def test_a_log_larger_than_a_chunk_comes_back_whole_and_from_any_offset(tmp_path: Path) -> None:
    folder = JobFolder(str(tmp_path), "job")
    lines = [f"{number} ünïcödé {'x' * (number % 200)}\n".encode() for number in range(20_000)]
    shipper = LogShipper(folder.logs(1), 0.01)
    for line in lines:
        shipper.write(line)
    shipper.close()
    whole = b"".join(lines)
    assert "".join(logs.pieces(folder, 1)).encode() == whole
    place = len(b"".join(lines[:12_345]))
    assert "".join(logs.pieces(folder, 1, place)).encode() == whole[place:]
    assert "".join(logs.pieces(folder, 1, logs.tail_offset(folder, 1, 3))).encode() == b"".join(lines[-3:])
    again = LogShipper(folder.logs(1), 0.01)
    again.write(b"more\n")
    again.close()
    assert "".join(logs.pieces(folder, 1)).encode() == whole + b"more\n"


def test_a_store_that_is_away_for_a_while_gets_the_whole_log_and_the_outcome(monkeypatch: pytest.MonkeyPatch) -> None:
    import boto3

    server = S3Server()
    for name, value in {
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL_S3": server.url,
        "AWS_MAX_ATTEMPTS": "1",  # boto's own patience would only make this longer
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
                folder.hear(1)
        time.sleep(0.02)
    telling = threading.Thread(target=patiently_say, args=(folder, 1, Outcome(state="succeeded")))
    telling.start()
    time.sleep(1.0)
    server.start()
    shipper.close()
    telling.join()
    assert "".join(logs.pieces(folder, 1)) == "".join(lines)
    word = folder.hear(1)
    assert word is not None
    assert word.outcome is not None
    assert word.outcome.state == "succeeded"
    server.stop()


def start(root: Path, config: dict[str, Any]) -> subprocess.Popen[bytes]:
    """A training without Ray, for which the real entry point has no word."""
    folder = JobFolder(str(root), "job")
    write_json(folder.request, {"kind": "train"})
    write_json(folder.config, config)
    code = (
        "import sys; from service.jobs import kinds; from service.jobs.execution import driver as runner;"
        "kinds.KINDS['train'] = kinds.KINDS['train']._replace(words=('--json', '--local'));"
        f"sys.exit(runner.main(['job', '1', {str(root)!r}]))"
    )
    return subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "OMP_NUM_THREADS": "1"})


def heard(root: Path) -> Word:
    return JobFolder(str(root), "job").hear(1) or Word(at=0.0)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False
