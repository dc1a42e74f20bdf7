"""A stack's state on disk: its folder, and its ports and processes in `<data_dir>/stack.json`.

A process is identified by its PID and its start time, so that a reused PID is never signalled. Does not start or
terminate processes.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import secrets
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import psutil  # type: ignore[import-untyped]
from pydantic import BaseModel, ValidationError

from amd.storage import write_json
from service.settings import Settings

HOST = "127.0.0.1"
STARTUP_S = 600.0  # generous, because a cold or busy machine is slow
LOCK_S = STARTUP_S + 60.0
SAME_START_S = 2.0  # start times are derived from the system clock, which may be adjusted
MARK = "AMD_STACK"  # in the environment of every process of a stack and of its children

Part = Literal["control-plane", "ray", "supervisor"]
SUPERVISED: tuple[Part, ...] = ("ray", "control-plane")
"""Parts that the supervisor restarts, in the order in which they start."""
ProgressCallback = Callable[[str], None]


class StackError(Exception):
    """Raised when the stack cannot be started or stopped as requested; the message says why and how to fix it."""


class PartProcess(BaseModel):
    """A part's process, identified by its PID and start time."""

    pid: int
    started: float

    def find(self) -> psutil.Process | None:
        """Return the process, or None if it is no longer alive."""
        try:
            found = psutil.Process(self.pid)
            if abs(found.create_time() - self.started) <= SAME_START_S and found.status() != psutil.STATUS_ZOMBIE:
                return found
        except psutil.NoSuchProcess:
            pass
        return None


class RayPorts(BaseModel):
    """Ports of the Ray head and of Ray Serve."""

    gcs: int
    dashboard: int
    agent: int
    metrics: int
    client: int
    serve: int


class StackState(BaseModel):
    """Contents of stack.json, which the next start reuses."""

    port: int
    storage: str
    num_cpus: int
    ray: RayPorts
    key_file: Path
    allowed: tuple[str, ...] = ()
    """URI prefixes that jobs may read, in addition to the storage root and those of AMD_ALLOWED_URIS."""
    ray_temp: str | None = None
    processes: dict[Part, PartProcess] = {}

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.port}"

    @property
    def dashboard(self) -> str:
        return f"http://{HOST}:{self.ray.dashboard}"

    def alive(self, part: Part) -> psutil.Process | None:
        known = self.processes.get(part)
        return known.find() if known is not None else None


class Stack(NamedTuple):
    """Address of a running stack."""

    url: str
    key_file: Path
    data_dir: Path
    allowed: tuple[str, ...] = ()
    """URI prefixes that `amd up --allow` has allowed jobs to read."""


def resolve_data_dir(given: Path | None) -> Path:
    """Return the given data directory, falling back to AMD_DATA_DIR and then the user's default."""
    return (given or Settings().data_dir).expanduser().absolute()


class StackFolder:
    """A stack's data directory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.mark = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]
        self._state = path / "stack.json"
        self.ray_token = path / "ray-token"

    def prepare(self) -> None:
        """Create the folder, readable only by its owner, and store Ray's token in it. Raises StackError on failure."""
        try:
            self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
            (self.path / "logs").mkdir(exist_ok=True)
            with tempfile.TemporaryFile(dir=self.path):
                pass
            with contextlib.suppress(FileExistsError):
                descriptor = os.open(self.ray_token, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
                with os.fdopen(descriptor, "w") as file:
                    file.write(secrets.token_hex(32))
        except OSError as error:
            raise StackError(
                f"data directory {self.path}: cannot be written ({error.strerror}); choose another with --data-dir"
            ) from None

    @contextlib.contextmanager
    def lock(self, wait_s: float = LOCK_S) -> Iterator[None]:
        """Lock the stack against concurrent `up` and `down`. The lock is released when the process ends.

        Raises StackError if another process holds the lock for longer than `wait_s`.
        """
        with (self.path / "stack.lock").open("a+") as file:
            until = time.monotonic() + wait_s
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > until:
                        file.seek(0)
                        raise StackError(
                            f"process {file.read().strip() or '?'} has been starting or stopping this stack for "
                            f"{wait_s:.0f} s; terminate it and retry"
                        ) from None
                    time.sleep(0.2)
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
            yield

    def read(self) -> StackState | None:
        """Return the state, or None before the first start. Raises StackError if it cannot be read."""
        try:
            return StackState.model_validate_json(self._state.read_bytes())
        except FileNotFoundError:
            return None
        except (ValidationError, OSError) as error:
            reason = str(error).splitlines()[0]
            raise StackError(f"{self._state}: cannot be read ({reason}); remove it and run `amd up`") from None

    def write(self, state: StackState) -> None:
        write_json(str(self._state), state.model_dump(mode="json"))

    def stack(self, state: StackState) -> Stack:
        return Stack(state.url, state.key_file, self.path, state.allowed)

    def log(self, part: Part) -> Path:
        return self.path / "logs" / f"{part}.log"
