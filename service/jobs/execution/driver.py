"""`python -m service.jobs.runner JOB ATTEMPT ROOT`: a job's driver, the entry point of its Ray submission.

Verifies the job's config, starts the program of the job's kind as a child process, ships its output to the storage
root, writes heartbeats with its progress, forwards stop requests, and reports the outcome. A job can therefore be
monitored, and its outcome is known, even if the Ray head is lost. Does not use the database or HTTP.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import logging
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

from amd.config import ConfigError, validate
from amd.storage import CredentialError, StorageError, check_credentials, join, read_json
from amd.training.lease import Lease
from amd.training.reporting.log_chunks import LogShipper
from amd.training.reporting.progress import PROGRESS_FILE
from amd.training.run_folder import LEASE, run_folder
from service.auth.uri_policy import UriPolicy
from service.jobs.execution.protocol import DRIVER_POLICY, AttemptOutcome, DriverPolicy, JobFolder, request_digest
from service.jobs.kinds import KINDS, JobKind
from service.jobs.location_checks import check_locations
from service.web.errors import UriNotAllowed

logger = logging.getLogger(__name__)

TAIL_CHARS = 8000
OUTAGE_S = 600.0  # how long writing the outcome is retried while the storage is unavailable
REPORT_RETRY_S = 5.0
READER_TIMEOUT_S = 30.0  # a grandchild may keep the pipe open
BAD_INPUT = 2
# Ray's core aborts a process whose cluster has disappeared or been replaced. It logs a line of severity C and then a
# stack trace.
RAY_FATAL = re.compile(r"\[[\d-]+ [\d:,]+ C \d+ \d+\] (.*)")


def main(args: Sequence[str] | None = None) -> int:
    job_id, number, root = list(sys.argv[1:] if args is None else args)
    folder, attempt = JobFolder(root, job_id), int(number)
    heartbeat = folder.read_heartbeat(attempt)
    if heartbeat is not None and heartbeat.outcome is not None:
        return heartbeat.outcome.exit_code or 0  # Ray restarted an attempt that has already ended
    wait_for_lease(folder, attempt)
    with tempfile.TemporaryDirectory(prefix="amd-job-") as scratch:
        try:
            check_credentials()
            kind, config = read_request(folder)
        except (ConfigError, CredentialError, UriNotAllowed) as error:
            outcome = AttemptOutcome(
                state="failed", reason="config_invalid", message=str(error), exit_code=BAD_INPUT, ended=time.time()
            )
        else:
            verified = Path(scratch) / "config.json"  # the file on the storage root may still change
            verified.write_text(json.dumps(config))
            program = [sys.executable, "-m", *KINDS[kind].module, "--config", str(verified), *KINDS[kind].args]
            outcome = run(program, folder, attempt)
    report_outcome(folder, attempt, outcome)
    return 0 if outcome.state == "succeeded" else outcome.exit_code or 1


def read_request(folder: JobFolder) -> tuple[JobKind, dict[str, Any]]:
    """Return a job's kind and config, verified before any location in the config is opened.

    Attempts submitted by an older control plane have no policy and are not verified. Raises ConfigError for a config
    that differs from the submitted one, and UriNotAllowed for a location that is not allowed on this machine.
    """
    try:
        kind, config = read_json(folder.request)["kind"], read_json(folder.config)
    except (ValueError, KeyError, TypeError):
        raise ConfigError([_changed(folder)]) from None
    if (given := os.environ.get(DRIVER_POLICY)) is None:
        return kind, config
    policy = DriverPolicy.model_validate_json(given)
    if request_digest(kind, config) != policy.digest:
        raise ConfigError([_changed(folder)])
    allowed = UriPolicy(folder.root, policy.allowed_uris)
    check_locations(validate(KINDS[kind].config, config), allowed.check, folder.root, folder.output)
    return kind, config


def _changed(folder: JobFolder) -> str:
    return (
        f"{folder.config} or {folder.request} differs from what was submitted: it was changed on the storage root; "
        "retry the job, which writes both files again"
    )


def wait_for_lease(folder: JobFolder, attempt: int) -> None:
    """Wait until the previous attempt releases its lease on the run.

    A node that was reported lost may still be running the attempt.
    """
    lease = Lease(join(run_folder(folder.root, folder.job_id), LEASE))
    while (holder := lease.taken_by()) is not None:
        folder.write_heartbeat(attempt, None)
        print(f"waiting for the attempt on {holder['host']} to release the run", file=sys.stderr, flush=True)
        time.sleep(folder.interval_s)


def run(program: Sequence[str], folder: JobFolder, attempt: int) -> AttemptOutcome:
    """Run the program to completion, sending heartbeats and shipping its log. Returns its outcome."""
    with tempfile.TemporaryDirectory(prefix="amd-job-") as scratch:
        progress_file = Path(scratch) / "progress.json"
        environment = {**os.environ, PROGRESS_FILE: str(progress_file), "PYTHONUNBUFFERED": "1"}
        stop, forced = threading.Event(), threading.Event()
        child = subprocess.Popen(
            program,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
            start_new_session=True,  # Ray signals the process group; only this process should stop the program
            preexec_fn=die_with_parent,
        )

        def forward_stop(number: int, frame: object) -> None:
            if not stop.is_set():
                stop.set()
                threading.Thread(target=_stop, args=(child, folder, attempt, forced), daemon=True).start()

        signal.signal(signal.SIGTERM, forward_stop)
        signal.signal(signal.SIGINT, forward_stop)
        shipper = LogShipper(folder.logs(attempt), folder.interval_s, outage_s=OUTAGE_S)
        result = ResultLine(shipper.write)
        assert child.stdout is not None
        assert child.stderr is not None
        readers = [_start_reader(child.stdout, result.write), _start_reader(child.stderr, shipper.write)]
        heartbeats = threading.Thread(
            target=_send_heartbeats, args=(folder, attempt, progress_file, child), daemon=True
        )
        heartbeats.start()
        code = child.wait()
        for reader in readers:
            reader.join(READER_TIMEOUT_S)
        heartbeats.join()
        if not shipper.tail:
            result.log_held()  # an empty log would look like a lost one
        shipper.close()
    return outcome_of_exit(code, result.found, list(shipper.tail), stop.is_set(), forced.is_set())


class ResultLine:
    """The last JSON object that a program prints on a line of its own: its result.

    Forwards every line to `log`, except the result if nothing is printed after it: it is stored with the outcome.
    """

    def __init__(self, log: Callable[[bytes], None]) -> None:
        self.found: dict[str, Any] | None = None
        self._log = log
        self._held = b""

    def log_held(self) -> None:
        """Forward the result to the log after all."""
        if self._held:
            self._log(self._held)
        self._held = b""

    def write(self, line: bytes) -> None:
        self.log_held()
        if (value := _json_object(line)) is None:
            self._log(line)
        else:
            self.found, self._held = value, line


def outcome_of_exit(
    code: int, result: dict[str, Any] | None, tail: Sequence[str], asked_to_stop: bool, killed: bool = False
) -> AttemptOutcome:
    """Derive the outcome from a program's exit code, the result that it printed and the end of its log."""
    log_tail = "\n".join(tail)[-TAIL_CHARS:]
    errors = [line.removeprefix("error: ") for line in tail if line.startswith("error: ")]
    facts: dict[str, Any] = {
        "exit_code": code,
        "asked_to_stop": asked_to_stop,
        "log_tail": "" if code == 0 else log_tail,
        "ended": time.time(),
    }
    if result is not None and result.get("state") in ("succeeded", "failed", "cancelled"):
        state, reason = result["state"], result.get("reason")
        facts["rank"] = _rank(str(result.get("message", "")))
        return AttemptOutcome(state=state, reason=reason, message=result.get("message", ""), result=result, **facts)
    if code == 0:
        return AttemptOutcome(state="succeeded", result=result, **facts)
    if killed:
        message = "killed because it did not stop in time; its newest checkpoint is kept"
        return AttemptOutcome(state="cancelled", reason="deadline_exceeded", message=message, **facts)
    if asked_to_stop:
        return AttemptOutcome(state="cancelled", reason="cancelled_by_user", message="stopped", **facts)
    if code < 0:
        name = signal.Signals(-code).name
        message = f"the job's program was terminated by {name}"
        if -code == signal.SIGKILL:
            message += ": the node ran out of memory, or the process was killed manually"
        return AttemptOutcome(state="failed", reason="node_lost", message=message, **facts)
    fatal = next((found[1] for line in tail if (found := RAY_FATAL.match(line))), None)
    if fatal is not None:
        message = f"Ray terminated the job's program: {fatal[:300]}"
        return AttemptOutcome(state="failed", reason="node_lost", message=message, **facts)
    if code == BAD_INPUT:
        return AttemptOutcome(
            state="failed", reason="config_invalid", message="\n".join(errors) or "bad input", **facts
        )
    last = next((line for line in reversed(tail) if line.strip()), "its log is empty")
    message = "\n".join(errors) or f"the job's program exited with code {code}: {last}"
    return AttemptOutcome(
        state="failed", reason="dataset_invalid" if errors else "user_code_error", message=message, **facts
    )


def report_outcome(folder: JobFolder, attempt: int, outcome: AttemptOutcome) -> None:
    """Write the outcome, retrying for OUTAGE_S while the storage is unavailable: the outcome must not be lost."""
    until = time.monotonic() + OUTAGE_S
    while True:
        try:
            folder.write_heartbeat(attempt, None, outcome)
            return
        except StorageError as error:
            logger.warning("the outcome cannot be written; will retry: %s", error)
            if time.monotonic() > until:
                raise
            time.sleep(REPORT_RETRY_S)


def _stop(child: subprocess.Popen[bytes], folder: JobFolder, attempt: int, forced: threading.Event) -> None:
    """Ask the program to stop, and kill it if it is still running at the attempt's deadline."""
    child.terminate()
    try:
        limit = folder.read_stop_deadline(attempt)
    except StorageError:  # Ray kills a driver that takes too long
        limit = None
    try:
        child.wait(limit)
    except subprocess.TimeoutExpired:
        forced.set()
        child.kill()


def die_with_parent() -> None:
    """Kill the program when its driver dies (Linux only), so that it does not continue unobserved."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _start_reader(pipe: IO[bytes], write: Callable[[bytes], None]) -> threading.Thread:
    def work() -> None:
        for line in pipe:
            write(line)
            with contextlib.suppress(OSError, ValueError):  # copied to Ray's own job log
                sys.stdout.buffer.write(line)
                sys.stdout.buffer.flush()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def _json_object(line: bytes) -> dict[str, Any] | None:
    """Return the JSON object that a line consists of, or None."""
    if line.startswith(b"{"):
        with contextlib.suppress(ValueError):
            value = json.loads(line)
            return value if isinstance(value, dict) else None
    return None


def _send_heartbeats(folder: JobFolder, attempt: int, progress_file: Path, child: subprocess.Popen[bytes]) -> None:
    while child.poll() is None:
        try:
            progress = json.loads(progress_file.read_text())
        except (OSError, ValueError):
            progress = None
        try:
            folder.write_heartbeat(attempt, progress)
        except Exception as error:  # the reconciler notices missing heartbeats
            logger.warning("the heartbeat cannot be written; will retry: %s", error)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(folder.interval_s)


def _rank(message: str) -> int | None:
    found = re.search(r"\brank (\d+)\b", message)
    return int(found[1]) if found else None
