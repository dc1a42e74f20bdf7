"""A complete stack (`amd up`) whose parts are restarted when they die, as systemd or Kubernetes would."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from service.client import Client, Patience
from service.stack import StackError, down, up
from service.stack.state import Part, Stack, StackFolder, StackState

POLL_S = 0.5
START_TRIES = 3  # on a busy machine, Ray's own timeouts may expire before its processes have started
PARTS: tuple[Part, ...] = ("control-plane", "ray")
PATIENCE = Patience(tries=60, most_s=5.0)  # outlives a restart of both parts on a busy machine
UNSET = ("RAY_ADDRESS", "AMD_URL", "AMD_KEY", "AMD_KEY_FILE", "AMD_DATABASE_URL")

logger = logging.getLogger(__name__)


class SupervisedStack:
    """A stack with its own data directory and storage root, and a thread that restarts parts that have died."""

    def __init__(self, folder: Path, cpus: int) -> None:
        self.storage, self.restarts = folder / "storage", dict.fromkeys(PARTS, 0)
        self._folder, self._cpus = StackFolder(folder / "data"), cpus
        self._stack: Stack | None = None
        self._stop, self._steady = threading.Event(), threading.Event()
        self._supervisor = threading.Thread(target=self._supervise, name="supervisor", daemon=True)

    def start(self) -> None:
        for tries_left in reversed(range(START_TRIES)):
            try:
                self._stack = self._up()
                break
            except StackError:
                down(self._folder.path, drain_s=0)
                if not tries_left:
                    raise
        self._supervisor.start()

    def stop(self) -> None:
        self._stop.set()
        if self._supervisor.is_alive():
            self._supervisor.join()
        down(self._folder.path, drain_s=0)

    def client(self) -> Client:
        assert self._stack is not None, "the stack has been started"
        return Client(self._stack.url, self._stack.key_file.read_text().strip(), patience=PATIENCE)

    def part(self, part: Part) -> psutil.Process | None:
        return self._state().alive(part)

    @property
    def is_up(self) -> bool:
        """Whether both parts are alive and no restart is in progress."""
        return self._steady.is_set() and all(self.part(part) is not None for part in PARTS)

    def processes(self) -> list[psutil.Process]:
        """Return the processes of all parts, and all of their descendants."""
        parts = [process for part in PARTS if (process := self.part(part)) is not None]
        found = []
        for process in parts:
            try:
                found += [process, *process.children(recursive=True)]
            except psutil.NoSuchProcess:
                continue
        return found

    def _state(self) -> StackState:
        state = self._folder.read()
        assert state is not None, "the stack has been started"
        return state

    def _up(self) -> Stack:
        self._steady.clear()
        try:
            return up(
                self._folder.path,
                port=0 if self._stack is None else None,
                storage=str(self.storage),
                num_cpus=self._cpus,
            )
        finally:
            self._steady.set()

    def _supervise(self) -> None:
        while not self._stop.wait(POLL_S):
            dead = [part for part in PARTS if self.part(part) is None]
            for part in dead:
                self.restarts[part] += 1
            if dead:
                try:
                    self._up()
                except StackError as error:
                    logger.warning("the stack could not be restarted; will retry: %s", error)


@contextmanager
def environment(**values: str) -> Iterator[None]:
    """Set variables that the stack's processes inherit, and unset any that would connect them to other services."""
    saved = dict(os.environ)
    for name in UNSET:
        os.environ.pop(name, None)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(saved)
