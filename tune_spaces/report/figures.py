"""The numbers of a sweep's report: differences, the cheapest, who shares a choice, what mattered.

Values in, values out. Knows nothing of pictures or pages.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean, stdev
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict

from tune_spaces.ledger import TrialState
from tune_spaces.report.formatting import short, title
from tune_spaces.report.sweep import Sweep, Trial, dimensions, key, resolved

CONFIDENCE = 0.95
FEW = 4  # comparable trials below which nothing is said of importance


class Row(BaseModel):
    """One trial, as the table shows it."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    number: int
    title: str
    """Its point in words."""
    state: TrialState
    baseline: bool = False
    parent: int | None = None
    """The trial whose weights it began from."""
    best: bool = False
    compared: bool = False
    """It reached the rung at which the best was chosen."""
    rung: int | None = None
    """The furthest it reached, from 1."""
    fraction: float | None = None
    score: float | None = None
    """There, the mean over seeds."""
    by_seed: tuple[float, ...] = ()
    difference: float | None = None
    """To the baseline, at the furthest rung that both reached."""
    interval: tuple[float, float] | None = None
    """95 % interval of that difference, paired by seed; none for one seed."""
    difference_rung: int | None = None
    clips_per_s: float | None = None
    """Measured while training, of one run."""
    teacher_gflops: float | None = None
    on_front: bool = False
    """No compared trial is both better and faster."""
    reason: str = ""
    """Of a trial that failed."""
    overrides: dict[str, Any] = {}
    runs: tuple[str, ...] = ()
    encoders: tuple[str, ...] = ()


class Report(BaseModel):
    """What is known of a sweep so far."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    verdict: str
    best: int | None
    """Number of the best trial; none where all that were scored failed."""
    metric: str
    rungs: int
    rows: tuple[Row, ...]
    """Compared trials first, the best on top; then those that ended earlier; failed ones last."""
    folder: str
    """Where the report is."""
    files: tuple[str, ...]
    """In that folder."""


class Difference(NamedTuple):
    """Ours less theirs."""

    value: float
    interval: tuple[float, float] | None  # none: it cannot be known


class Importance(NamedTuple):
    level: int
    trials: int
    shares: dict[str, float]  # of the score's variance, the highest first


def rows(sweep: Sweep) -> tuple[Row, ...]:
    compared = {trial.number for trial in sweep.compared}
    best, front = sweep.best, {trial.number for trial in fastest(sweep)}
    names = dimensions(sweep)

    def row(trial: Trial) -> Row:
        record, rung = trial.record, trial.rungs.get(trial.reach)
        seen: dict[str, Any] = {}
        if rung is not None:
            seen = {"rung": trial.reach + 1, "fraction": rung.fraction, "score": rung.score}
            seen |= {"by_seed": sweep.seeds(rung), "clips_per_s": rung.clips_per_s or None}
        level, difference = to_baseline(sweep, trial)
        if difference is not None:
            seen |= {"difference": difference.value, "interval": difference.interval, "difference_rung": level + 1}
        return Row(
            number=trial.number,
            title=title(record.point, names),
            state=record.state,
            baseline=record.baseline,
            parent=record.parent,
            best=trial is best,
            compared=trial.number in compared,
            teacher_gflops=record.costs.get("teacher_gflops"),
            on_front=trial.number in front,
            reason=": ".join(part for part in (record.reason, record.message) if part) if trial.failed else "",
            overrides=record.overrides,
            runs=record.runs,
            encoders=record.encoders,
            **seen,
        )

    def order(trial: Trial) -> tuple[bool, int, float, int]:
        score = trial.rungs[trial.reach].score if trial.rungs else 0.0
        return trial.failed, -trial.reach, -score, trial.number

    return tuple(row(trial) for trial in sorted(sweep.trials, key=order))


def to_baseline(sweep: Sweep, trial: Trial, confidence: float = CONFIDENCE) -> tuple[int, Difference | None]:
    """A trial's difference to the baseline at the furthest level that both reached, and that level."""
    base = sweep.baseline
    if base is None or base.failed or trial.failed or trial.number == base.number:
        return -1, None
    level = max(set(base.rungs) & set(trial.rungs), default=-1)
    if level < 0:
        return -1, None
    return level, difference(sweep.seeds(trial.rungs[level]), sweep.seeds(base.rungs[level]), confidence)


def difference(ours: Sequence[float], theirs: Sequence[float], confidence: float = CONFIDENCE) -> Difference:
    """The mean difference and Student's t interval of differences paired by seed; none for one seed.

    Different numbers of seeds cannot be paired.
    """
    value = mean(ours) - mean(theirs)
    if len(ours) != len(theirs) or len(ours) < 2:
        return Difference(value, None)
    from scipy.stats import t  # type: ignore[import-untyped]  # scikit-learn brings it

    pairs = [a - b for a, b in zip(ours, theirs, strict=True)]
    half = float(t.ppf((1 + confidence) / 2, len(pairs) - 1)) * stdev(pairs) / len(pairs) ** 0.5
    return Difference(value, (value - half, value + half))


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Which points no other beats: as high in both, higher in one."""

    def beaten(point: tuple[float, float]) -> bool:
        return any(a >= point[0] and b >= point[1] and (a, b) != point for a, b in points)

    return [number for number, point in enumerate(points) if not beaten(point)]


def fastest(sweep: Sweep) -> list[Trial]:
    """The compared trials that no other beats in both score and measured speed."""
    timed = [trial for trial in sweep.compared if trial.rungs[sweep.top].clips_per_s]
    points = [(trial.rungs[sweep.top].score, trial.rungs[sweep.top].clips_per_s) for trial in timed]
    return [timed[number] for number in front(points)]


class Group(NamedTuple):
    """Trials that share a choice."""

    label: str
    trials: list[Trial]

    @property
    def reach(self) -> int:
        return max(trial.reach for trial in self.trials)

    def at(self, level: int) -> list[Trial]:
        return [trial for trial in self.trials if level in trial.rungs]

    def score(self, level: int) -> float:
        return mean(trial.rungs[level].score for trial in self.at(level))


def groups(sweep: Sweep, labels: Mapping[int, str]) -> list[Group]:
    """Comparable trials by label: those that came furthest first, among them the best first."""
    sharing: dict[str, list[Trial]] = {}
    for trial in sweep.alive:
        sharing.setdefault(labels[trial.number], []).append(trial)
    found = [Group(label, trials) for label, trials in sharing.items()]
    return sorted(found, key=lambda group: (-group.reach, -group.score(group.reach), group.label))


def by_layers(sweep: Sweep) -> list[Group]:
    """Trials by their aligned layer pairs; empty where all have the same."""
    found = groups(sweep, {trial.number: short(resolved(sweep, trial)["objective"]["layers"]) for trial in sweep.alive})
    return found if len(found) > 1 else []


def by_variant(sweep: Sweep) -> list[Group]:
    """Trials of a study by variant."""
    if sweep.config.space.study is None:
        return []
    return groups(sweep, {trial.number: short(trial.record.point.get("variant", "?")) for trial in sweep.alive})


def importance(sweep: Sweep) -> Importance | None:
    """How much of the score's variance each dimension explains, by fANOVA, at the level where most can be compared.

    None for fewer than 4 trials, fewer than 2 dimensions, or equal scores, and for a population: a score is that of a
    whole line of points.
    """
    if sweep.config.algorithm == "pbt":
        return None
    level = sweep.fullest
    trials = sweep.at(level)
    values: dict[str, list[Any]] = {}
    for name in dimensions(sweep):
        column = [trial.record.point[name] for trial in trials if name in trial.record.point]
        if len(column) == len(trials) and len({key(value) for value in column}) > 1:
            values[name] = column
    scores = [trial.rungs[level].score for trial in trials]
    if len(trials) < FEW or len(values) < 2 or len(set(scores)) == 1:
        return None
    import optuna

    domains: dict[str, Any] = {}
    for name, column in values.items():
        if numeric(column):
            log = logarithmic(sweep, name, column)
            values[name] = [float(value) for value in column]
            domains[name] = optuna.distributions.FloatDistribution(min(values[name]), max(values[name]), log=log)
        else:
            values[name] = [key(value) for value in column]
            domains[name] = optuna.distributions.CategoricalDistribution(sorted(set(values[name])))
    level_of_talk = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        study = optuna.create_study(direction="maximize")
        for at, score in enumerate(scores):
            point = {name: column[at] for name, column in values.items()}
            study.add_trial(optuna.trial.create_trial(params=point, distributions=domains, value=score))
        evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
        shares = optuna.importance.get_param_importances(study, evaluator=evaluator, params=list(domains))
    finally:
        optuna.logging.set_verbosity(level_of_talk)
    return Importance(level, len(trials), dict(sorted(shares.items(), key=lambda item: -item[1])))


def numeric(values: Sequence[Any]) -> bool:
    return all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)


def logarithmic(sweep: Sweep, name: str, values: Sequence[Any]) -> bool:
    """Whether a dimension is one of orders of magnitude."""
    asked = sweep.config.space.dimensions.get(name)
    return min(values) > 0 and (bool(asked and asked.log) or max(values) / min(values) >= 30)
