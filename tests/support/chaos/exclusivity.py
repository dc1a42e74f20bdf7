"""Detect jobs that run twice at the same time, by checking their leases, programs and training workers."""

from __future__ import annotations

import json
import threading
from collections import defaultdict
from pathlib import Path

import psutil

from tests.support.chaos.victims import has_role, job_of, training_worker_of

INTERVAL_S = 0.5
REPEATS = 3  # a process may live for a moment after its parent has been killed


class ExclusivityObserver:
    """Samples the processes on this machine and the leases under a storage root, and collects violations."""

    def __init__(self, storage: Path) -> None:
        self.violations: list[str] = []
        self._storage = storage
        self._holders: dict[str, tuple[int, float]] = {}  # by run: pid and start time of the last lease holder
        self._overlaps: dict[tuple[str, str, frozenset[int]], int] = defaultdict(int)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="observer", daemon=True)

    def __enter__(self) -> ExclusivityObserver:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()

    def _work(self) -> None:
        while not self._stop.wait(INTERVAL_S):
            self._check_leases()
            self._check_processes(list(psutil.process_iter()))

    def _check_leases(self) -> None:
        """Report leases whose holder has changed while the previous holder is still alive."""
        for file in self._storage.glob("runs/*/lease.json"):
            try:
                entry = json.loads(file.read_text())
                holder = (entry["pid"], psutil.Process(entry["pid"]).create_time())
            except (OSError, ValueError, psutil.NoSuchProcess):
                continue
            run = file.parent.name
            before = self._holders.get(run)
            if before is not None and before != holder and _is_alive(before):
                self._report(f"{run}: process {holder[0]} took the lease of process {before[0]}, which is still alive")
            self._holders[run] = holder

    def _check_processes(self, processes: list[psutil.Process]) -> None:
        """Report jobs with several programs or training workers. Every job in the campaign trains with one worker."""
        programs, workers = defaultdict[str, set[int]](set), defaultdict[str, set[int]](set)
        for process in processes:
            if has_role("program", process) and (job := job_of(process)):
                programs[job].add(process.pid)
            elif has_role("decoder", process) and (job := job_of(process)):
                worker = training_worker_of(process)
                if worker is not None:
                    workers[job].add(worker.pid)
        for what, found in (("programs", programs), ("training workers", workers)):
            for job, pids in found.items():
                if len(pids) > 1 and (self._storage / "jobs" / job).exists():  # ignores other stacks' jobs
                    key = (job, what, frozenset(pids))
                    self._overlaps[key] += 1
                    if self._overlaps[key] == REPEATS:
                        self._report(f"{job}: {what} {', '.join(map(str, sorted(pids)))} run at the same time")

    def _report(self, violation: str) -> None:
        if violation not in self.violations:
            self.violations.append(violation)


def _is_alive(holder: tuple[int, float]) -> bool:
    try:
        process = psutil.Process(holder[0])
        return process.create_time() == holder[1] and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
