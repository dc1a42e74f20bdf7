"""Sweep ledger: one JSON record per trial in the sweep's folder.

The searcher, the scheduler and the report rebuild their state from these records only; Ray Tune's pickled state is
never read. Only the sweep's driver writes. Imports neither torch nor Ray.
"""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from amd.storage import join, listdir, read_json, write_json

TRIALS = "trials"

STOPPED_BY_USER = "stopped_by_user"
"""Reason of a trial that a user has stopped."""

_TRIAL_RUN = re.compile(r"(.+)-[0-9]{4,}-s[0-9]+")

TrialState = Literal["running", "succeeded", "stopped", "failed"]


class Rung(BaseModel):
    """Score of a trial at one rung."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    fraction: float
    """Position of the rung, as a fraction of the trial's length."""
    step: int
    score: float
    """Value of the sweep's metric, averaged over seeds."""
    figures: dict[str, tuple[float, ...]]
    """Probe metrics by name, one value per seed."""
    clips: int
    """Number of training clips so far, summed over seeds and excluding a parent's training."""
    seconds: float
    """Training time so far, averaged over seeds, excluding probes, startup and a parent's training."""
    time: float
    """Time at which the rung was reported, in seconds since the epoch."""

    @property
    def clips_per_s(self) -> float:
        """Training speed of a single run, in clips per second."""
        seeds = max((len(by_seed) for by_seed in self.figures.values()), default=1)
        return self.clips / seeds / self.seconds if self.seconds else 0.0


class TrialRecord(BaseModel):
    """State of one trial."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    number: int
    """Trial number, starting at 0."""
    point: dict[str, Any]
    """Chosen value of each dimension of the space."""
    overrides: dict[str, Any]
    """Overrides of the training config for this point, by dotted key."""
    baseline: bool = False
    """Whether the point equals the sweep's base config."""
    digest: str = ""
    """Digest of the resulting training config."""
    parent: int | None = None
    """Number of the trial whose weights this one starts from; only in population-based training."""
    inherited: int = 0
    """Number of steps for which the inherited weights were trained."""
    born: int = 0
    """Level of the trial's first rung; earlier rungs belong to its parent."""
    state: TrialState = "running"
    """State of the trial. running: not finished, although its processes may have died. stopped: stopped early,
    by a user, or replaced at a rung."""
    reason: str | None = None
    message: str = ""
    runs: tuple[str, ...] = ()
    """Run IDs, one per seed."""
    encoders: tuple[str, ...] = ()
    """Folders of published encoders, one per seed; empty unless the trial reached its last rung."""
    rungs: tuple[Rung, ...] = ()
    costs: dict[str, float] = {}
    """Costs per clip: teacher_gflops and step_gflops."""
    attempts: int = 1
    began: float
    ended: float | None = None
    sweep_seconds: float = 0.0
    """Duration of the sweep in seconds when this record was written, summed over restarts and excluding downtime."""

    @property
    def completed(self) -> bool:
        """Whether the trial succeeded or was stopped early."""
        return self.state in ("succeeded", "stopped")

    @property
    def level(self) -> int:
        """Level of the next rung, starting at 0."""
        return self.born + len(self.rungs)

    @property
    def score(self) -> float | None:
        """Score at the latest rung."""
        return self.rungs[-1].score if self.rungs else None


def trial_run_id(sweep: str, number: int, seed: int) -> str:
    """Return the ID of the run that trains a trial with one seed."""
    return f"{sweep}-{number:04d}-s{seed}"


def sweep_of(run_id: str) -> str | None:
    """Return the sweep that a trial's run belongs to, according to the run's ID; None for other runs."""
    found = _TRIAL_RUN.fullmatch(run_id)
    return found[1] if found else None


def first_line(message: str) -> str:
    return message.partition("\n")[0]


class Ledger:
    """Records of one sweep, held in memory and mirrored to storage."""

    def __init__(self, run_folder: str) -> None:
        self._folder = join(run_folder, TRIALS)
        self.records: dict[int, TrialRecord] = {}
        for name in sorted(listdir(self._folder)):
            if name.endswith(".json"):
                record = TrialRecord.model_validate(read_json(join(self._folder, name)))
                self.records[record.number] = record

    def write(self, record: TrialRecord) -> None:
        write_json(join(self._folder, f"{record.number:04d}.json"), record.model_dump(mode="json"))
        self.records[record.number] = record

    def rungs_by_time(self) -> list[tuple[TrialRecord, Rung]]:
        """Return all rungs in the order they were reported."""
        rungs = [(record, rung) for record in self.records.values() for rung in record.rungs]
        return sorted(rungs, key=lambda pair: (pair[1].time, pair[0].number))
