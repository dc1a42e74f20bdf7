"""What a sweep's driver knows of its trials: which to begin, what came of them, and whether the budget is spent.

Everything lasting goes to the ledger at once. Knows nothing of Ray: Tune asks and tells through `ray_tune`.
"""

from __future__ import annotations

import threading
import time
from typing import Any

from amd.config import with_overrides
from amd.flops import step_flops
from amd.training.run_folder import run_folder, spec_of
from tune_spaces.config import SearchConfig
from tune_spaces.ledger import Ledger, Rung, TrialRecord
from tune_spaces.search.population import born, to_replace
from tune_spaces.search.progress import Show
from tune_spaces.search.sampler import next_point
from tune_spaces.spaces.parameter import Point
from tune_spaces.spaces.space import Space, config_of, overrides_of


class Sweep:
    """What the driver knows of its trials: the ledger, and what may still be begun."""

    def __init__(self, config: SearchConfig, space: Space, root: str, name: str, shown: Show) -> None:
        self.config, self.space, self.root, self.name, self.shown = config, space, root, name, shown
        self.folder = run_folder(root, name)
        self.ledger = Ledger(self.folder)
        self.train = config.train  # with the teacher given by weights, once that is made
        self.stopping, self.abandoned = threading.Event(), threading.Event()
        self.workers: dict[int, str] = {}
        """The placement group that holds a running trial's workers, by trial."""
        self._population = config.algorithm == "pbt"
        self._founded = False
        self._under_way: set[int] = set()
        self._earlier = max((record.sweep_seconds for record in self.ledger.records.values()), default=0.0)
        self._began = time.monotonic()
        self._again = [record.number for record in self._living()]
        for number in self._again:
            record = self.ledger.records[number]
            self._write(record.model_copy(update={"attempts": record.attempts + 1}))

    def __reduce__(self) -> tuple[Any, ...]:
        """Tune copies and pickles what it is given, for a state that is never read: a copy is the sweep itself."""
        _living[self.name] = self
        return _alive, (self.name,)

    # For Tune: what to begin

    def begin(self) -> TrialRecord | None:
        """The next trial: one that was under way, or a new point; of a population one that goes on to its next rung.

        None when nothing is to be begun now, and none later unless it `waits`.
        """
        if self.stopping.is_set():
            return None
        if self.spent():
            self._end_waiting()
            return None
        record = self._next_of_population() if self._population else self._next()
        if record is not None:
            self._under_way.add(record.number)
        return record

    def waits(self) -> bool:
        """Whether there may be something to begin once those under way have come to their rung."""
        return self._population and bool(self._under_way) and not self.stopping.is_set()

    def _next(self) -> TrialRecord | None:
        if self._again:
            return self.ledger.records[self._again.pop(0)]
        return self._new() if len(self.ledger.records) < self.config.budget.trials else None

    def _new(self) -> TrialRecord | None:
        point = next_point(self.config, self.space, self.ledger)
        return self._record(point) if point is not None else None

    def _record(self, point: Point, **more: Any) -> TrialRecord:
        number = len(self.ledger.records)
        config = config_of(self.space, point)
        digest, flops = config.digest(), step_flops(config)
        record = TrialRecord(
            number=number,
            point=point,
            overrides=overrides_of(self.space, point),
            digest=digest,
            baseline=digest == self.config.train.digest() and "parent" not in more,
            runs=tuple(f"{self.name}-{number:04d}-s{config.seed + seed}" for seed in range(self.config.seeds)),
            costs={"teacher_gflops": flops.teacher / 1e9, "step_gflops": flops.total / 1e9},
            began=time.time(),
            **more,
        )
        self._write(record)
        return record

    # A population: all that live come to a rung, then it is judged, then all go on

    def _next_of_population(self) -> TrialRecord | None:
        self._found()
        if not (living := self._living()):
            return None
        level = min(record.level for record in living)
        if 0 < level < len(self.config.fractions()):
            self._judge(level - 1)
        ready = (r for r in self._living() if r.level == level and r.number not in self._under_way)
        return next(ready, None)

    def _found(self) -> None:
        """Draw the first generation, all of it at once; a small space has fewer."""
        founders = sum(record.parent is None for record in self.ledger.records.values())
        while not self._founded and founders < self.config.budget.trials and self._new() is not None:
            founders += 1
        self._founded = True

    def _judge(self, level: int) -> None:
        """Let children take the places of the worst; whatever of it the ledger has already stays."""
        there = sum(record.born == level + 1 for record in self.ledger.records.values())
        for number, (replaced, parents) in enumerate(to_replace(self.ledger, level)):
            if number >= there:
                birth = born(self.config, self.space, level, replaced, parents)
                step = birth.parent.rungs[level - birth.parent.born].step
                child = self._record(birth.point, parent=birth.parent.number, inherited=step, born=level + 1)
                self.shown.say(f"trial {child.number} goes on from trial {child.parent} in place of {replaced.number}")
            if self.ledger.records[replaced.number].state == "running":
                self._end(self.ledger.records[replaced.number], "stopped")

    def _end_waiting(self) -> None:
        for record in self._living() if self._population else ():
            if record.number not in self._under_way:
                self._end(record, "stopped")

    def _living(self) -> list[TrialRecord]:
        return [record for _, record in sorted(self.ledger.records.items()) if record.state == "running"]

    def task(self, record: TrialRecord) -> dict[str, Any]:
        """What Tune hands to the trial."""
        train = config_of(self.space, record.point)
        if train.teacher == self.config.train.teacher and self.train.teacher is not None:
            made = self.train.teacher
            train = with_overrides(
                train, {"teacher.weights": made.weights, "teacher.preset": None, "teacher.overrides": {}}
            )
        spec = spec_of(record.runs[0], self.root, train, "")  # local paths in full: trials have folders of their own
        fractions = self.config.fractions()
        parent = self.ledger.records[record.parent].runs[0] if record.parent is not None else None
        return {
            "number": record.number,
            "train": spec.config,
            "runs": list(record.runs),
            "fractions": list(fractions[: record.level + 1] if self._population else fractions),
            "told": record.level,
            "parent": (parent, record.inherited) if parent is not None else None,
            "has_children": self._population,
        }

    # From Tune: what came of it

    def hear(self, number: int, result: dict[str, Any]) -> None:
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
            self.shown.rung(record)

    def ended(self, number: int) -> None:
        """Tune is done with the trial, of its own accord or because it was told to stop."""
        record = self.ledger.records[number]
        self._under_way.discard(number)
        if record.state != "running":
            return
        if record.rungs and record.rungs[-1].fraction == 1:
            self._end(record, "succeeded")
        elif not self.stopping.is_set() and (not self._population or self.spent()):
            self._end(record, "stopped")

    def lost(self, number: int, message: str) -> None:
        """Its processes died more often than `retries` allow."""
        record = self.ledger.records[number]
        self._under_way.discard(number)
        if record.state == "running" and not self.stopping.is_set():
            self._end(record, "failed", reason="node_lost", message=message)

    def retried(self, number: int) -> None:
        record = self.ledger.records[number]
        self._write(record.model_copy(update={"attempts": record.attempts + 1}))
        self.shown.say(f"trial {number}: its process was lost; going on from its newest checkpoints")

    def _end(self, record: TrialRecord, state: Any, reason: str | None = None, message: str = "") -> None:
        record = record.model_copy(update={"state": state, "reason": reason, "message": message, "ended": time.time()})
        self._write(record)
        self.shown.ended(record)

    def _write(self, record: TrialRecord) -> None:
        self.ledger.write(record.model_copy(update={"sweep_seconds": self.seconds()}))

    # The budget

    def spent(self) -> bool:
        budget = self.config.budget
        if budget.hours is not None and self.seconds() >= budget.hours * 3600:
            return True
        return budget.clips is not None and self.clips() >= budget.clips

    def clips(self) -> int:
        return sum(record.rungs[-1].clips for record in self.ledger.records.values() if record.rungs)

    def seconds(self) -> float:
        """Wall time, over restarts."""
        return self._earlier + time.monotonic() - self._began

    @property
    def records(self) -> dict[int, TrialRecord]:
        return self.ledger.records

    def unbegun(self) -> int:
        """Points that the budget still has, at most; children take places and use up none."""
        return max(0, self.config.budget.trials - sum(r.parent is None for r in self.ledger.records.values()))

    def open(self) -> int:
        """Trials that may still be begun, or begun again."""
        return self.unbegun() + len(self._living() if self._population else self._again)


_living: dict[str, Sweep] = {}


def _alive(name: str) -> Sweep:
    return _living[name]
