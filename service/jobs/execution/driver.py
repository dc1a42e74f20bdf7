"""`python -m service.jobs.runner JOB ATTEMPT ROOT`: a job's driver on the cluster, and all that Ray is asked to run.

Starts the program of the job's kind as its child, ships what it prints to the storage root, says now and then that it
lives and how far it is, passes a stop on, and leaves the outcome: so a job can be watched, and its end is known,
whatever becomes of Ray's head. Knows nothing of the control plane, its database or HTTP.
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
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

from amd.storage import StorageError, join, listdir, read_bytes, read_json, write_bytes
from amd.training.lease import Lease
from amd.training.reporting.progress import PROGRESS_FILE
from amd.training.run_folder import run_folder
from service.jobs.execution.protocol import JobFolder, Outcome
from service.jobs.kinds import KINDS

logger = logging.getLogger(__name__)

CHUNK_BYTES = 256 * 1024
TAIL_LINES, TAIL_CHARS = 40, 8000
PATIENCE_S = 600.0  # how long an outcome waits for a storage that is away
BAD_INPUT = 2
# Ray's core ends a process whose cluster has gone or was replaced, with a last line of its severity C and a stack.
RAY_FATAL = re.compile(r"\[[\d-]+ [\d:,]+ C \d+ \d+\] (.*)")


class LogShipper:
    """Bytes of an attempt's log to immutable chunks, named by their first byte. One writer; any thread may `write`."""

    def __init__(self, folder: str, pause_s: float) -> None:
        self._folder, self._pause_s = folder, pause_s
        self._lock = threading.Lock()
        self._waiting = bytearray()
        self._offset = next_offset(folder)
        self._closing = threading.Event()
        self.tail: deque[str] = deque(maxlen=TAIL_LINES)
        self._thread = threading.Thread(target=self._work, name="log-shipper", daemon=True)
        self._thread.start()

    def write(self, line: bytes) -> None:
        with self._lock:
            self._waiting += line
        self.tail.append(line.decode(errors="replace").rstrip("\n"))

    def close(self) -> None:
        self._closing.set()
        self._thread.join()

    def _work(self) -> None:
        while not self._closing.wait(self._pause_s):
            self._ship()
        until = time.monotonic() + PATIENCE_S
        while self._waiting and time.monotonic() < until and not self._ship():
            time.sleep(self._pause_s)

    def _ship(self) -> bool:
        """Send what waits; whether all of it is there. What could not be sent is kept."""
        while self._waiting:
            with self._lock:
                part = bytes(self._waiting[:CHUNK_BYTES])
            try:
                write_bytes(join(self._folder, f"{self._offset:016d}.log"), part)
            except Exception as error:  # the store may be away; the job itself must not suffer
                logger.warning("the log cannot be kept for now: %s", error)
                return False
            with self._lock:
                del self._waiting[: len(part)]
            self._offset += len(part)
        return True


def next_offset(folder: str) -> int:
    """Where a log goes on: an attempt that Ray began twice writes behind the first."""
    names = [name for name in listdir(folder) if name.endswith(".log")]
    return int(names[-1].removesuffix(".log")) + len(read_bytes(join(folder, names[-1]))) if names else 0


def main(words: Sequence[str] | None = None) -> int:
    job_id, number, root = list(sys.argv[1:] if words is None else words)
    folder, attempt = JobFolder(root, job_id), int(number)
    said = folder.hear(attempt)
    if said is not None and said.outcome is not None:
        return said.outcome.exit_code or 0  # Ray began it again; it has ended
    wait_for_turn(folder, attempt)
    kind = read_json(folder.request)["kind"]
    program = [sys.executable, "-m", *KINDS[kind].module, "--config", folder.config, *KINDS[kind].words]
    outcome = run(program, folder, attempt)
    patiently_say(folder, attempt, outcome)
    return 0 if outcome.state == "succeeded" else outcome.exit_code or 1


def wait_for_turn(folder: JobFolder, attempt: int) -> None:
    """Until the attempt before this one, whose node may only seem lost, has let go of the run."""
    lease = Lease(join(run_folder(folder.root, folder.job_id), "lease.json"))
    while (holder := lease.taken_by()) is not None:
        folder.say(attempt, None)
        print(f"waiting for the attempt on {holder['host']} to let go of the run", file=sys.stderr, flush=True)
        time.sleep(folder.pause_s)


def run(program: Sequence[str], folder: JobFolder, attempt: int) -> Outcome:
    """The program to its end, watched: what it came to."""
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
            start_new_session=True,  # a stop comes once, through here, and not from Ray's signal to the group as well
            preexec_fn=die_with_parent,
        )

        def pass_on(number: int, frame: object) -> None:
            if not stop.is_set():
                stop.set()
                threading.Thread(target=_stop, args=(child, folder, attempt, forced), daemon=True).start()

        signal.signal(signal.SIGTERM, pass_on)
        signal.signal(signal.SIGINT, pass_on)
        shipper = LogShipper(folder.logs(attempt), folder.pause_s)
        printed: deque[str] = deque(maxlen=1)
        assert child.stdout is not None
        assert child.stderr is not None
        readers = [
            _reading(child.stdout, shipper.write, printed),
            _reading(child.stderr, shipper.write),
        ]
        beat = threading.Thread(target=_beat, args=(folder, attempt, progress_file, child), daemon=True)
        beat.start()
        code = child.wait()
        for reader in readers:
            reader.join(30.0)  # a grandchild may hold the pipe open
        beat.join()
        shipper.close()
    return judge(code, printed[0] if printed else None, list(shipper.tail), stop.is_set(), forced.is_set())


def judge(code: int, printed: str | None, tail: Sequence[str], asked_to_stop: bool, by_force: bool = False) -> Outcome:
    """What an exit code and the last words come to."""
    result: dict[str, Any] | None = json.loads(printed) if printed else None
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
        return Outcome(state=state, reason=reason, message=result.get("message", ""), result=result, **facts)
    if code == 0:
        return Outcome(state="succeeded", result=result, **facts)
    if by_force:
        message = "ended by force, for it did not stop in time: its newest checkpoint is what it left"
        return Outcome(state="cancelled", reason="deadline_exceeded", message=message, **facts)
    if asked_to_stop:
        return Outcome(state="cancelled", reason="cancelled_by_user", message="stopped", **facts)
    if code < 0:
        name = signal.Signals(-code).name
        message = f"the job's driver was ended by {name}"
        if -code == signal.SIGKILL:
            message += ": the node ran out of memory, or somebody killed it"
        return Outcome(state="failed", reason="node_lost", message=message, **facts)
    fatal = next((found[1] for line in tail if (found := RAY_FATAL.match(line))), None)
    if fatal is not None:
        message = f"Ray ended the job's driver: {fatal[:300]}"
        return Outcome(state="failed", reason="node_lost", message=message, **facts)
    if code == BAD_INPUT:
        return Outcome(state="failed", reason="config_invalid", message="\n".join(errors) or "bad input", **facts)
    last = next((line for line in reversed(tail) if line.strip()), "no word in its log")
    message = "\n".join(errors) or f"the job's driver ended with exit code {code}: {last}"
    return Outcome(state="failed", reason="dataset_invalid" if errors else "user_code_error", message=message, **facts)


def patiently_say(folder: JobFolder, attempt: int, outcome: Outcome) -> None:
    """The outcome is the one thing that must arrive."""
    until = time.monotonic() + PATIENCE_S
    while True:
        try:
            folder.say(attempt, None, outcome)
            return
        except StorageError as error:
            logger.warning("the outcome cannot be kept for now: %s", error)
            if time.monotonic() > until:
                raise
            time.sleep(5.0)


def _stop(child: subprocess.Popen[bytes], folder: JobFolder, attempt: int, forced: threading.Event) -> None:
    """Ask the program to end; end it where it takes longer than it may."""
    child.terminate()
    try:
        limit = folder.stop_limit(attempt)
    except StorageError:  # Ray ends a driver that lasts too long
        limit = None
    try:
        child.wait(limit)
    except subprocess.TimeoutExpired:
        forced.set()
        child.kill()


def die_with_parent() -> None:
    """Linux: a driver whose runner was killed must not go on training unseen."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _reading(pipe: IO[bytes], take: Callable[[bytes], None], results: deque[str] | None = None) -> threading.Thread:
    def work() -> None:
        for line in pipe:
            take(line)
            if results is not None:
                _keep_json(line, results)
            with contextlib.suppress(OSError, ValueError):  # Ray's own log of the job
                sys.stdout.buffer.write(line)
                sys.stdout.buffer.flush()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def _keep_json(line: bytes, kept: deque[str]) -> None:
    if line.startswith(b"{"):
        with contextlib.suppress(ValueError):
            if isinstance(json.loads(line), dict):
                kept.append(line.decode())


def _beat(folder: JobFolder, attempt: int, progress_file: Path, child: subprocess.Popen[bytes]) -> None:
    while child.poll() is None:
        try:
            progress = json.loads(progress_file.read_text())
        except (OSError, ValueError):
            progress = None
        try:
            folder.say(attempt, progress)
        except Exception as error:  # told by its silence
            logger.warning("no sign of life can be left for now: %s", error)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(folder.pause_s)


def _rank(message: str) -> int | None:
    found = re.search(r"\brank (\d+)\b", message)
    return int(found[1]) if found else None
