"""Sweep state held by the driver: the next trials, trial results and the budget.

Every change is written to the ledger immediately. Does not import Ray; `ray_tune` connects this state to Ray Tune.
"""

from __future__ import annotations

import contextlib
import threading
import time
from typing import Any

from amd.config import with_overrides
from amd.flops import step_flops
from amd.storage import StorageUnreachable
from amd.training.checkpoints.listing import newest_step
from amd.training.run_folder import run_folder, spec_of
from tune_spaces.config import SearchConfig
from tune_spaces.ledger import STOPPED_BY_USER, Ledger, Rung, TrialRecord, trial_run_id
from tune_spaces.search.population import make_child, replacements
from tune_spaces.search.progress import SearchProgress
from tune_spaces.search.sampler import next_point
from tune_spaces.spaces.parameter import Point
from tune_spaces.spaces.space import Space, config_of, overrides_of


class Sweep:
    """State of one sweep: the trials recorded in the ledger, and those still to start."""

    def __init__(self, config: SearchConfig, space: Space, root: str, name: str, progress: SearchProgress) -> None:
        self.config, self.space, self.root, self.name, self.progress = config, space, root, name, progress
        self.folder = run_folder(root, name)
        self.ledger = Ledger(self.folder)
        self.train = config.train  # the teacher is replaced by its weights once trained
        self.stopping, self.grace_expired = threading.Event(), threading.Event()
        self.gpus = 0
        """Number of GPUs that concurrent trials reserve."""
        self.workers: dict[int, str] = {}
        """Placement group of each running trial's workers, by trial number."""
        self._stop_requests: dict[int, str] = {}  # by trial: who requested the stop; replaced, never modified
        self._population = config.algorithm == "pbt"
        self._population_created = False
        self._restarted_at: dict[int, int] = {}  # by trial: newest checkpoint step at its last restart, over all seeds
        self._running: set[int] = set()
        self._previous_seconds = max((record.sweep_seconds for record in self.ledger.records.values()), default=0.0)
        self._began = time.monotonic()
        self._to_resume = [record.number for record in self._unfinished()]
        for number in self._to_resume:
            record = self.ledger.records[number]
            self._write(record.model_copy(update={"attempts": record.attempts + 1}))

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle the sweep by reference, because Tune copies its arguments into state that is never read."""
        _live_sweeps[self.name] = self
        return _live_sweep, (self.name,)

    # Next trials, requested by Tune

    def next_trial(self) -> TrialRecord | None:
        """Return the next trial: an interrupted one, a new point, or a population member that is due for its next rung.

        Returns None if no trial can start now; a trial can start later only while `is_waiting` is true.
        """
        if self.stopping.is_set():
            return None
        for number in self._stop_requests.keys() - self._running:
            self._end_on_request(number)
        if self.budget_spent():
            self._stop_waiting_trials()
            return None
        record = self._next_in_population() if self._population else self._next_independent()
        if record is not None:
            self._running.add(record.number)
        return record

    def is_waiting(self) -> bool:
        """Whether more trials can start once the running trials reach their next rung."""
        return self._population and bool(self._running) and not self.stopping.is_set()

    def _next_independent(self) -> TrialRecord | None:
        while self._to_resume:
            record = self.ledger.records[self._to_resume.pop(0)]
            if record.state == "running":
                return record
        return self._start_new() if len(self.ledger.records) < self.config.budget.trials else None

    def _start_new(self) -> TrialRecord | None:
        point = next_point(self.config, self.space, self.ledger)
        return self._create_record(point) if point is not None else None

    def _create_record(self, point: Point, **fields: Any) -> TrialRecord:
        number = len(self.ledger.records)
        config = config_of(self.space, point)
        digest, flops = config.digest(), step_flops(config)
        record = TrialRecord(
            number=number,
            point=point,
            overrides=overrides_of(self.space, point),
            digest=digest,
            baseline=digest == self.config.train.digest() and "parent" not in fields,
            runs=tuple(trial_run_id(self.name, number, config.seed + seed) for seed in range(self.config.seeds)),
            costs={"teacher_gflops": flops.teacher / 1e9, "step_gflops": flops.total / 1e9},
            began=time.time(),
            **fields,
        )
        self._write(record)
        return record

    # Population: all running trials reach a rung, the worst are replaced, and all continue

    def _next_in_population(self) -> TrialRecord | None:
        self._create_population()
        if not (unfinished := self._unfinished()):
            return None
        level = min(record.level for record in unfinished)
        if 0 < level < len(self.config.fractions()):
            self._replace_worst(level - 1)
        ready = (r for r in self._unfinished() if r.level == level and r.number not in self._running)
        return next(ready, None)

    def _create_population(self) -> None:
        """Sample the whole first generation, which is smaller if the space has too few points."""
        founders = sum(record.parent is None for record in self.ledger.records.values())
        while not self._population_created and founders < self.config.budget.trials and self._start_new() is not None:
            founders += 1
        self._population_created = True

    def _replace_worst(self, level: int) -> None:
        """Replace the worst trials with children, unless the ledger already contains them."""
        existing = sum(record.born == level + 1 for record in self.ledger.records.values())
        for number, (replaced, parents) in enumerate(replacements(self.ledger, level)):
            if number >= existing:
                child = make_child(self.config, self.space, level, replaced, parents)
                step = child.parent.rungs[level - child.parent.born].step
                record = self._create_record(child.point, parent=child.parent.number, inherited=step, born=level + 1)
                self.progress.log(
                    f"trial {record.number} continues from trial {record.parent} and replaces trial {replaced.number}"
                )
            if self.ledger.records[replaced.number].state == "running":
                self._end(self.ledger.records[replaced.number], "stopped")

    def _stop_waiting_trials(self) -> None:
        for record in self._unfinished() if self._population else ():
            if record.number not in self._running:
                self._end(record, "stopped")

    def _unfinished(self) -> list[TrialRecord]:
        return [record for _, record in sorted(self.ledger.records.items()) if record.state == "running"]

    def task(self, record: TrialRecord) -> dict[str, Any]:
        """Return the task that Tune passes to the trial, as described in `trial.run_rungs`."""
        train = config_of(self.space, record.point)
        if train.teacher == self.config.train.teacher and self.train.teacher is not None:
            teacher = self.train.teacher
            train = with_overrides(
                train, {"teacher.weights": teacher.weights, "teacher.preset": None, "teacher.overrides": {}}
            )
        # Local paths become absolute, because each trial has its own working directory.
        spec = spec_of(record.runs[0], self.root, train, "")
        fractions = self.config.fractions()
        parent = self.ledger.records[record.parent].runs[0] if record.parent is not None else None
        return {
            "number": record.number,
            "train": spec.config,
            "runs": list(record.runs),
            "fractions": list(fractions[: record.level + 1] if self._population else fractions),
            "completed_rungs": record.level,
            "parent": (parent, record.inherited) if parent is not None else None,
            "has_children": self._population,
        }

    # Results, reported by Tune

    def record_result(self, number: int, result: dict[str, Any]) -> None:
        """Record a rung or a failure. A rung that is reported again is ignored."""
        record = self.ledger.records[number]
        if "failed" in result:
            self._end(record, "failed", reason=result["failed"], message=result["message"])
        elif result["level"] >= record.level:
            rung = Rung(
                fraction=result["fraction"],
                step=result["step"],
                score=result[self.config.metric],
                figures={name: tuple(values) for name, values in result["figures"].items()},
                clips=result["clips"],
                seconds=result["seconds"],
                time=result["time"],
            )
            record = record.model_copy(
                update={"rungs": (*record.rungs, rung), "encoders": tuple(result["encoders"]) or record.encoders}
            )
            self._write(record)
            self.progress.on_rung(record)

    def record_end(self, number: int) -> None:
        """Record that Tune stopped the trial, at its last rung or earlier."""
        record = self.ledger.records[number]
        self._running.discard(number)
        if record.state != "running":
            return
        if record.rungs and record.rungs[-1].fraction == 1:
            self._end(record, "succeeded")
        elif number in self._stop_requests:
            self._end_on_request(number)
        elif not self.stopping.is_set() and (not self._population or self.budget_spent()):
            self._end(record, "stopped")

    def record_loss(self, number: int, message: str) -> None:
        """Record that the trial's processes were lost more often than `retries` allows."""
        record = self.ledger.records[number]
        self._running.discard(number)
        if record.state == "running" and not self.stopping.is_set():
            self._end(record, "failed", reason="node_lost", message=message)

    def record_retry(self, number: int) -> bool:
        """Record that Tune is restarting the trial; return whether it has saved a checkpoint since the last restart."""
        record = self.ledger.records[number]
        self._write(record.model_copy(update={"attempts": record.attempts + 1}))
        self.progress.log(f"trial {number}: its process was lost; resuming from its latest checkpoints")
        before = self._restarted_at.get(number, 0)
        with contextlib.suppress(StorageUnreachable):
            self._restarted_at[number] = sum(newest_step(run_folder(self.root, run)) for run in record.runs)
        return self._restarted_at.get(number, 0) > before

    def request_stop(self, number: int, actor: str) -> None:
        """Record a user's request to stop a trial. May be called from any thread.

        A running trial ends once its runs have stopped; any other ends when the next trial is requested.
        """
        self._stop_requests = {**self._stop_requests, number: actor}

    @property
    def stop_requests(self) -> frozenset[int]:
        """Numbers of the trials that users have asked to stop."""
        return frozenset(self._stop_requests)

    def _end_on_request(self, number: int) -> None:
        """End a trial at the request of a user, unless it has already ended. Its rungs are kept."""
        record = self.ledger.records.get(number)
        if record is not None and record.state == "running":
            self._end(record, "stopped", reason=STOPPED_BY_USER, message=f"requested by {self._stop_requests[number]}")

    def _end(self, record: TrialRecord, state: Any, reason: str | None = None, message: str = "") -> None:
        record = record.model_copy(update={"state": state, "reason": reason, "message": message, "ended": time.time()})
        self._write(record)
        self.progress.on_trial_end(record)

    def _write(self, record: TrialRecord) -> None:
        self.ledger.write(record.model_copy(update={"sweep_seconds": self.seconds()}))

    # Budget

    def budget_spent(self) -> bool:
        """Whether the limit on wall time, GPU-hours or clips has been reached."""
        budget, hours = self.config.budget, self.seconds() / 3600
        if budget.hours is not None and hours >= budget.hours:
            return True
        if budget.gpu_hours is not None and hours * self.gpus >= budget.gpu_hours:
            return True
        return budget.clips is not None and self.clips() >= budget.clips

    def clips(self) -> int:
        """Return the number of training clips, summed over all trials."""
        return sum(record.rungs[-1].clips for record in self.ledger.records.values() if record.rungs)

    def seconds(self) -> float:
        """Return the wall time of the sweep, summed over restarts."""
        return self._previous_seconds + time.monotonic() - self._began

    @property
    def records(self) -> dict[int, TrialRecord]:
        return self.ledger.records

    def unstarted(self) -> int:
        """Return how many points the budget still allows; children do not count."""
        return max(0, self.config.budget.trials - sum(r.parent is None for r in self.ledger.records.values()))

    def remaining_trials(self) -> int:
        """Return how many trials can still be started or resumed."""
        return self.unstarted() + len(self._unfinished() if self._population else self._to_resume)


_live_sweeps: dict[str, Sweep] = {}


def _live_sweep(name: str) -> Sweep:
    return _live_sweeps[name]
