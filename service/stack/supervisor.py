"""Keep the parts of a stack alive: restart parts that die, after increasing pauses, and rotate logs that are in use.

`amd up` starts it in the background as `python -m service.stack.supervisor DATA_DIR`, and `amd down` stops it first. It
restarts only parts that `amd up` started, and never while another process is starting or stopping the stack.
"""

from __future__ import annotations

import logging
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from service.stack.processes import LOG_BYTES, start
from service.stack.shutdown import end_leftovers
from service.stack.state import SUPERVISED, Part, ProgressCallback, StackError, StackFolder, StackState

POLL_S = 2.0
STEADY_S = 60.0  # a part that has lived this long has recovered: its next restart is immediate again
MAX_PAUSE_S = 60.0

StartPart = Callable[[StackFolder, StackState, Part, ProgressCallback], None]

logger = logging.getLogger(__name__)


class RestartPauses:
    """Pauses between restarts of one part: none at first, then 1, 2, 4 … seconds while it keeps dying."""

    def __init__(self) -> None:
        self._restarted_at = float("-inf")
        self._restarts = 0

    def is_over(self, now: float) -> bool:
        """Whether the dead part may be restarted now."""
        if now - self._restarted_at > STEADY_S + self._pause_s:
            self._restarts = 0
        return now - self._restarted_at >= self._pause_s

    def note_restart(self, now: float) -> None:
        self._restarted_at = now
        self._restarts += 1

    @property
    def _pause_s(self) -> float:
        return float(min(MAX_PAUSE_S, 2 ** (self._restarts - 1))) if self._restarts else 0.0


class Supervisor:
    """Restarts the parts of one stack that have died."""

    def __init__(
        self, folder: StackFolder, start: StartPart = start, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._folder, self._start, self._clock = folder, start, clock
        self._pauses = {part: RestartPauses() for part in SUPERVISED}

    def step(self) -> bool:
        """Rotate logs and restart dead parts. Returns False once this process is no longer the stack's supervisor."""
        for part in (*SUPERVISED, "supervisor"):
            rotate(self._folder.log(part))
        state = self._folder.read()
        if state is None or not self._is_supervisor_of(state):
            return False
        if self._dead_parts(state):
            with suppress(StackError), self._folder.lock(wait_s=0.0):  # held while `amd up` or `amd down` runs
                state = self._folder.read()
                if state is not None and self._is_supervisor_of(state):
                    self._restart(state, self._dead_parts(state))
        return True

    @staticmethod
    def _is_supervisor_of(state: StackState) -> bool:
        supervisor = state.processes.get("supervisor")
        return supervisor is not None and supervisor.pid == os.getpid()

    @staticmethod
    def _dead_parts(state: StackState) -> list[Part]:
        return [part for part in SUPERVISED if part in state.processes and state.alive(part) is None]

    def _restart(self, state: StackState, parts: Sequence[Part]) -> None:
        for part in parts:
            now = self._clock()
            if self._pauses[part].is_over(now):
                logger.warning("%s has died; restarting it", part)
                end_leftovers(self._folder, state, part)
                self._start(self._folder, state, part, logger.info)
                self._pauses[part].note_restart(now)


def rotate(log: Path, limit: int = LOG_BYTES) -> None:
    """Copy a log that exceeds the limit to `.log.1` and truncate it, because its part keeps it open for appending.

    Lines written between the two steps are lost.
    """
    with suppress(FileNotFoundError):
        if log.stat().st_size > limit:
            shutil.copyfile(log, log.with_suffix(".log.1"))
            os.truncate(log, 0)


def main() -> int:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    supervisor = Supervisor(StackFolder(Path(sys.argv[1])))
    while True:
        try:
            if not supervisor.step():
                return 0
        except Exception:
            logger.exception("supervision failed; will retry")
        time.sleep(POLL_S)


if __name__ == "__main__":
    sys.exit(main())
