"""Sweep history: trials and their scores by rung. Only scores at the same rung are compared."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from amd.config import ConfigError, overridden, validate
from amd.storage import exists, join, read_json
from tune_spaces.config import SearchConfig
from tune_spaces.ledger import Ledger, Rung, TrialRecord
from tune_spaces.report.formatting import share


class TrialHistory(NamedTuple):
    """A trial's record and its scores by level."""

    record: TrialRecord
    rungs: dict[int, Rung]  # by level, from 0

    @property
    def number(self) -> int:
        return self.record.number

    @property
    def reach(self) -> int:
        """Highest level at which the trial was scored; -1 if there is none."""
        return max(self.rungs, default=-1)

    @property
    def failed(self) -> bool:
        return self.record.state == "failed"


class SweepHistory(NamedTuple):
    """A sweep's config and its trials, ordered by number."""

    config: SearchConfig
    trials: tuple[TrialHistory, ...]

    @property
    def levels(self) -> int:
        return len(self.config.fractions())

    @property
    def scored(self) -> list[TrialHistory]:
        """Trials that were scored and did not fail."""
        return [trial for trial in self.trials if trial.rungs and not trial.failed]

    @property
    def top_level(self) -> int:
        """Highest level that any scored trial reached; -1 if there is none."""
        return max((trial.reach for trial in self.scored), default=-1)

    def at(self, level: int) -> list[TrialHistory]:
        """Return the trials scored at a level, best first."""
        found = [trial for trial in self.scored if level in trial.rungs]
        return sorted(found, key=lambda trial: (-trial.rungs[level].score, trial.number))

    @property
    def compared(self) -> list[TrialHistory]:
        return self.at(self.top_level)

    @property
    def best(self) -> TrialHistory | None:
        return next(iter(self.compared), None)

    @property
    def baseline(self) -> TrialHistory | None:
        found = [trial for trial in self.trials if trial.record.baseline]
        return max(found, key=lambda trial: (not trial.failed, trial.reach, -trial.number), default=None)

    def ancestry(self, trial: TrialHistory) -> list[TrialHistory]:
        """Return a trial's ancestors, oldest first, followed by the trial itself."""
        by_number = {other.number: other for other in self.trials}
        line = [trial]
        while (parent := line[0].record.parent) is not None:
            line.insert(0, by_number[parent])
        return line

    @property
    def widest_level(self) -> int:
        """Level at which the most trials can be compared; in a tie, the highest such level."""
        return max(range(self.levels), key=lambda level: (len(self.at(level)), level))

    @property
    def plotted_levels(self) -> list[int]:
        """Levels to plot: the level with the most trials, and the highest level."""
        return (
            sorted({self.widest_level, self.top_level}) if len(self.compared) < len(self.scored) else [self.top_level]
        )

    def seeds(self, rung: Rung) -> tuple[float, ...]:
        """Return the metric's values at a rung, one per seed."""
        return rung.figures.get(self.config.metric) or (rung.score,)

    def describe_level(self, level: int) -> str:
        """Describe a level, for example "after 1/3 of training"."""
        fraction = self.config.fractions()[level]
        return "after full training" if fraction == 1 else f"after {share(fraction)} of training"


def read_sweep(run_folder: str) -> SweepHistory:
    """Read the sweep in a folder. Raises ConfigError if there is none, or if no trial has been scored yet."""
    path = join(run_folder, "config.json")
    if not exists(path):
        raise ConfigError([f"{run_folder}: not a sweep, because it has no config.json; pass a sweep folder"])
    try:
        config = validate(SearchConfig, read_json(path))
    except (ConfigError, ValueError, TypeError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError([f"{run_folder}: config.json is not a sweep config ({reason})"]) from None
    records = Ledger(run_folder).records
    sweep = SweepHistory(config, tuple(_trial(config, records[number]) for number in sorted(records)))
    if not any(trial.rungs for trial in sweep.trials):
        trials = f"{len(records)} {'trial' if len(records) == 1 else 'trials'} started, none" if records else "no trial"
        raise ConfigError(
            [f"{run_folder}: nothing to report yet, {trials} has been scored; retry after the first rung"]
        )
    return sweep


def _trial(config: SearchConfig, record: TrialRecord) -> TrialHistory:
    fractions = config.fractions()

    def level(rung: Rung) -> int:  # fractions are rounded to whole steps in some records
        return min(range(len(fractions)), key=lambda level: abs(fractions[level] - rung.fraction))

    return TrialHistory(record, {level(rung): rung for rung in record.rungs})


def resolved_config(sweep: SweepHistory, trial: TrialHistory) -> dict[str, Any]:
    """Return a trial's training config as plain values."""
    return overridden(sweep.config.train.model_dump(mode="json"), trial.record.overrides)


def dimensions(sweep: SweepHistory) -> dict[str, str]:
    """Return the dimensions that vary between trials, with a short name for each."""
    names = list(dict.fromkeys(name for trial in sweep.trials for name in trial.record.point))
    points = [trial.record.point for trial in sweep.trials]
    varying = [name for name in names if len({key(point.get(name)) for point in points}) > 1] or names
    last = [name.rpartition(".")[2] for name in varying]
    return {name: short if last.count(short) == 1 else name for name, short in zip(varying, last, strict=True)}


def key(value: Any) -> str:
    """Return a string that is the same for equal values."""
    return json.dumps(value, sort_keys=True, default=str)
