"""A sweep's ledger: one JSON record a trial below the sweep's folder, from which everything is rebuilt.

The searcher, the scheduler and the report read these and nothing else: Tune's own state, a pickle, is never read again.
Only the sweep's driver writes. No torch, no Ray.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from amd.storage import join, listdir, read_json, write_json

TRIALS = "trials"

TrialState = Literal["running", "succeeded", "stopped", "failed"]


class Rung(BaseModel):
    """What a trial was worth when it had come so far."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    fraction: float
    """Of its whole length."""
    step: int
    score: float
    """The metric, the mean over seeds."""
    figures: dict[str, tuple[float, ...]]
    """Every figure of the probe, by seed."""
    clips: int
    """Learnt from up to here, over all seeds; what a parent learnt is not counted."""
    seconds: float
    """Of training up to here, the mean over seeds; probes and starts not counted, nor a parent's."""
    time: float
    """When it was told, seconds since 1970."""

    @property
    def clips_per_s(self) -> float:
        """Of one run."""
        seeds = max((len(by_seed) for by_seed in self.figures.values()), default=1)
        return self.clips / seeds / self.seconds if self.seconds else 0.0


class TrialRecord(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    number: int
    """From 0."""
    point: dict[str, Any]
    """Of the space: the chosen value of each dimension."""
    overrides: dict[str, Any]
    """What that is in the training config, dotted keys."""
    baseline: bool = False
    """The config that the sweep starts from: the paper's default in our presets."""
    digest: str = ""
    """Of that training config."""
    parent: int | None = None
    """The trial whose weights it began from; only in population based training."""
    inherited: int = 0
    """Steps that its weights had learnt by then."""
    born: int = 0
    """The level of its first rung; at those before it was still its parent."""
    state: TrialState = "running"
    """running: not ended yet, wherever its processes are. stopped: ended early at a rung, or replaced there."""
    reason: str | None = None
    message: str = ""
    runs: tuple[str, ...] = ()
    """Run ids, by seed."""
    encoders: tuple[str, ...] = ()
    """Folders of published encoders, by seed; of trials that came to their end."""
    rungs: tuple[Rung, ...] = ()
    costs: dict[str, float] = {}
    """teacher_gflops and step_gflops, for each clip."""
    attempts: int = 1
    began: float
    ended: float | None = None
    sweep_seconds: float = 0.0
    """How long the sweep had lasted when this was written, over restarts, down times not counted."""

    @property
    def ended_well(self) -> bool:
        return self.state in ("succeeded", "stopped")

    @property
    def level(self) -> int:
        """Of its next rung, from 0."""
        return self.born + len(self.rungs)

    @property
    def score(self) -> float | None:
        """At its last rung."""
        return self.rungs[-1].score if self.rungs else None


def first_line(message: str) -> str:
    return message.partition("\n")[0]


class Ledger:
    """The records of one sweep, in memory and on storage alike."""

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

    def told(self) -> list[tuple[TrialRecord, Rung]]:
        """All rungs in the order in which they were told."""
        rungs = [(record, rung) for record in self.records.values() for rung in record.rungs]
        return sorted(rungs, key=lambda told: (told[1].time, told[0].number))
