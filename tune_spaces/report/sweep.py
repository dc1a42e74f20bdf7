"""A sweep as its report sees it: trials by the rungs they reached. Only scores of the same rung are ever compared."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from amd.config import ConfigError, overridden, validate
from amd.storage import exists, join, read_json
from tune_spaces.config import SearchConfig
from tune_spaces.ledger import Ledger, Rung, TrialRecord
from tune_spaces.report.formatting import share


class Trial(NamedTuple):
    record: TrialRecord
    rungs: dict[int, Rung]  # by level, from 0

    @property
    def number(self) -> int:
        return self.record.number

    @property
    def reach(self) -> int:
        """The furthest level it was scored at; -1: none."""
        return max(self.rungs, default=-1)

    @property
    def failed(self) -> bool:
        return self.record.state == "failed"


class Sweep(NamedTuple):
    config: SearchConfig
    trials: tuple[Trial, ...]

    @property
    def levels(self) -> int:
        return len(self.config.fractions())

    @property
    def alive(self) -> list[Trial]:
        """Scored and not failed: what may be compared, rung by rung."""
        return [trial for trial in self.trials if trial.rungs and not trial.failed]

    @property
    def top(self) -> int:
        """The furthest level that any of them reached; -1: none."""
        return max((trial.reach for trial in self.alive), default=-1)

    def at(self, level: int) -> list[Trial]:
        """Comparable trials of a level, the best first."""
        found = [trial for trial in self.alive if level in trial.rungs]
        return sorted(found, key=lambda trial: (-trial.rungs[level].score, trial.number))

    @property
    def compared(self) -> list[Trial]:
        return self.at(self.top)

    @property
    def best(self) -> Trial | None:
        return next(iter(self.compared), None)

    @property
    def baseline(self) -> Trial | None:
        found = [trial for trial in self.trials if trial.record.baseline]
        return max(found, key=lambda trial: (not trial.failed, trial.reach, -trial.number), default=None)

    def line(self, trial: Trial) -> list[Trial]:
        """A trial's forebears, the founder first, and itself: whose rungs its weights came through."""
        by_number = {other.number: other for other in self.trials}
        line = [trial]
        while (parent := line[0].record.parent) is not None:
            line.insert(0, by_number[parent])
        return line

    @property
    def fullest(self) -> int:
        """The level that most trials reached, the furthest of those: where most can be compared."""
        return max(range(self.levels), key=lambda level: (len(self.at(level)), level))

    @property
    def telling(self) -> list[int]:
        """The levels worth a picture: where most can be compared, and the furthest."""
        return sorted({self.fullest, self.top}) if len(self.compared) < len(self.alive) else [self.top]

    def seeds(self, rung: Rung) -> tuple[float, ...]:
        """The metric by seed."""
        return rung.figures.get(self.config.metric) or (rung.score,)

    def place(self, level: int) -> str:
        """A level in words: after 1/3 of training."""
        fraction = self.config.fractions()[level]
        return "after the whole training" if fraction == 1 else f"after {share(fraction)} of training"


def read(run_folder: str) -> Sweep:
    """The sweep in a folder. Raises ConfigError where there is none, or nothing was scored yet."""
    path = join(run_folder, "config.json")
    if not exists(path):
        raise ConfigError([f"{run_folder}: no sweep is here (it has no config.json); give a sweep's folder"])
    try:
        config = validate(SearchConfig, read_json(path))
    except (ConfigError, ValueError, TypeError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError([f"{run_folder}: config.json is not that of a sweep ({reason})"]) from None
    records = Ledger(run_folder).records
    sweep = Sweep(config, tuple(_trial(config, records[number]) for number in sorted(records)))
    if not any(trial.rungs for trial in sweep.trials):
        begun = f"{len(records)} {'trial' if len(records) == 1 else 'trials'} begun, none" if records else "no trial"
        raise ConfigError([f"{run_folder}: nothing to report yet, {begun} has been scored; ask again after a rung"])
    return sweep


def _trial(config: SearchConfig, record: TrialRecord) -> Trial:
    fractions = config.fractions()

    def level(rung: Rung) -> int:  # a fraction is rounded to whole steps in places
        return min(range(len(fractions)), key=lambda level: abs(fractions[level] - rung.fraction))

    return Trial(record, {level(rung): rung for rung in record.rungs})


def resolved(sweep: Sweep, trial: Trial) -> dict[str, Any]:
    """A trial's training config as plain values."""
    return overridden(sweep.config.train.model_dump(mode="json"), trial.record.overrides)


def dimensions(sweep: Sweep) -> dict[str, str]:
    """Names of the space that vary among the trials, with a short name of each."""
    told = list(dict.fromkeys(name for trial in sweep.trials for name in trial.record.point))
    points = [trial.record.point for trial in sweep.trials]
    varying = [name for name in told if len({key(point.get(name)) for point in points}) > 1] or told
    last = [name.rpartition(".")[2] for name in varying]
    return {name: short if last.count(short) == 1 else name for name, short in zip(varying, last, strict=True)}


def key(value: Any) -> str:
    """A value as text, equal for equal values."""
    return json.dumps(value, sort_keys=True, default=str)
