"""Statistics for a sweep's report: differences from the baseline, Pareto front, groups and importance.

Pure functions that neither plot nor format.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean, stdev
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict

from tune_spaces.ledger import TrialState
from tune_spaces.report.formatting import short, title
from tune_spaces.report.sweep import SweepHistory, TrialHistory, dimensions, key, resolved_config

CONFIDENCE = 0.95
MIN_IMPORTANCE_TRIALS = 4


class TrialRow(BaseModel):
    """One trial as a row of the report's table."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    number: int
    title: str
    """Title of the trial's point."""
    state: TrialState
    baseline: bool = False
    parent: int | None = None
    """Number of the trial whose weights this one started from."""
    best: bool = False
    compared: bool = False
    """Whether the trial reached the rung at which the best trial was selected."""
    rung: int | None = None
    """Number of the highest rung reached, starting at 1."""
    fraction: float | None = None
    score: float | None = None
    """Score at the highest rung reached, averaged over seeds."""
    by_seed: tuple[float, ...] = ()
    difference: float | None = None
    """Difference from the baseline at the highest rung that both reached."""
    interval: tuple[float, float] | None = None
    """95 % interval of that difference, paired by seed; null if there is only one seed."""
    difference_rung: int | None = None
    clips_per_s: float | None = None
    """Measured training speed of a single run, in clips per second."""
    teacher_gflops: float | None = None
    on_front: bool = False
    """Whether the trial is on the Pareto front: no compared trial is both better and faster."""
    reason: str = ""
    """Why the trial failed: reason and message. Empty if it did not fail."""
    overrides: dict[str, Any] = {}
    runs: tuple[str, ...] = ()
    encoders: tuple[str, ...] = ()


class Importance(BaseModel):
    """Share of the score's variance that each dimension explains."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    level: int
    """Level at which the trials are compared, starting at 0."""
    trials: int
    """Number of trials that are compared."""
    shares: dict[str, float]
    """Share of each dimension, in descending order."""


class Report(BaseModel):
    """Report on a sweep, finished or not."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    verdict: str
    best: int | None
    """Number of the best trial; null if every scored trial failed."""
    metric: str
    rungs: int
    rows: tuple[TrialRow, ...]
    """Trials, best first: compared trials, then trials that stopped earlier, then failed trials."""
    importance: Importance | None = None
    """Importance of the dimensions; null if it cannot be estimated, and for studies."""
    folder: str
    """Folder that contains the report."""
    files: tuple[str, ...]
    """Names of the files in that folder."""


class Difference(NamedTuple):
    """Difference between two means."""

    value: float
    interval: tuple[float, float] | None  # None if there are too few seeds


def trial_rows(sweep: SweepHistory) -> tuple[TrialRow, ...]:
    """Return the rows of the report's table."""
    compared = {trial.number for trial in sweep.compared}
    best, front = sweep.best, {trial.number for trial in speed_front(sweep)}
    names = dimensions(sweep)

    def row(trial: TrialHistory) -> TrialRow:
        record, rung = trial.record, trial.rungs.get(trial.reach)
        scores: dict[str, Any] = {}
        if rung is not None:
            scores = {"rung": trial.reach + 1, "fraction": rung.fraction, "score": rung.score}
            scores |= {"by_seed": sweep.seeds(rung), "clips_per_s": rung.clips_per_s or None}
        level, difference = difference_to_baseline(sweep, trial)
        if difference is not None:
            scores |= {"difference": difference.value, "interval": difference.interval, "difference_rung": level + 1}
        return TrialRow(
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
            **scores,
        )

    def order(trial: TrialHistory) -> tuple[bool, int, float, int]:
        score = trial.rungs[trial.reach].score if trial.rungs else 0.0
        return trial.failed, -trial.reach, -score, trial.number

    return tuple(row(trial) for trial in sorted(sweep.trials, key=order))


def difference_to_baseline(
    sweep: SweepHistory, trial: TrialHistory, confidence: float = CONFIDENCE
) -> tuple[int, Difference | None]:
    """Return the highest level that a trial and the baseline both reached, and their difference there."""
    base = sweep.baseline
    if base is None or base.failed or trial.failed or trial.number == base.number:
        return -1, None
    level = max(set(base.rungs) & set(trial.rungs), default=-1)
    if level < 0:
        return -1, None
    return level, difference(sweep.seeds(trial.rungs[level]), sweep.seeds(base.rungs[level]), confidence)


def difference(ours: Sequence[float], theirs: Sequence[float], confidence: float = CONFIDENCE) -> Difference:
    """Return the mean difference and a Student's t interval of the differences paired by seed.

    The interval is None for a single seed or for unequal numbers of seeds.
    """
    value = mean(ours) - mean(theirs)
    if len(ours) != len(theirs) or len(ours) < 2:
        return Difference(value, None)
    from scipy.stats import t  # type: ignore[import-untyped]  # a dependency of scikit-learn

    pairs = [a - b for a, b in zip(ours, theirs, strict=True)]
    half = float(t.ppf((1 + confidence) / 2, len(pairs) - 1)) * stdev(pairs) / len(pairs) ** 0.5
    return Difference(value, (value - half, value + half))


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Return the indices of the points that no other point dominates; both coordinates are maximised."""

    def dominated(point: tuple[float, float]) -> bool:
        return any(a >= point[0] and b >= point[1] and (a, b) != point for a, b in points)

    return [number for number, point in enumerate(points) if not dominated(point)]


def speed_front(sweep: SweepHistory) -> list[TrialHistory]:
    """Return the compared trials that no other trial beats in both score and measured speed."""
    timed = [trial for trial in sweep.compared if trial.rungs[sweep.top_level].clips_per_s]
    points = [(trial.rungs[sweep.top_level].score, trial.rungs[sweep.top_level].clips_per_s) for trial in timed]
    return [timed[number] for number in pareto_front(points)]


class TrialGroup(NamedTuple):
    """A group of trials that share a value."""

    label: str
    trials: list[TrialHistory]

    @property
    def reach(self) -> int:
        return max(trial.reach for trial in self.trials)

    def at(self, level: int) -> list[TrialHistory]:
        return [trial for trial in self.trials if level in trial.rungs]

    def score(self, level: int) -> float:
        return mean(trial.rungs[level].score for trial in self.at(level))


def groups(sweep: SweepHistory, labels: Mapping[int, str]) -> list[TrialGroup]:
    """Group scored trials by label, ordered by highest level, then by score."""
    by_label: dict[str, list[TrialHistory]] = {}
    for trial in sweep.scored:
        by_label.setdefault(labels[trial.number], []).append(trial)
    found = [TrialGroup(label, trials) for label, trials in by_label.items()]
    return sorted(found, key=lambda group: (-group.reach, -group.score(group.reach), group.label))


def by_layers(sweep: SweepHistory) -> list[TrialGroup]:
    """Group trials by aligned layer pairs. The result is empty if all trials have the same pairs."""
    found = groups(
        sweep, {trial.number: short(resolved_config(sweep, trial)["objective"]["layers"]) for trial in sweep.scored}
    )
    return found if len(found) > 1 else []


def by_variant(sweep: SweepHistory) -> list[TrialGroup]:
    """Group the trials of a study by variant."""
    if sweep.config.space.study is None:
        return []
    return groups(sweep, {trial.number: short(trial.record.point.get("variant", "?")) for trial in sweep.scored})


def importance(sweep: SweepHistory) -> Importance | None:
    """Return the share of the score's variance explained by each dimension (fANOVA), at the level with the most trials.

    Returns None if there are fewer than 4 trials or 2 dimensions, if all scores are equal, or for a population, where
    a score results from several points.
    """
    if sweep.config.algorithm == "pbt":
        return None
    level = sweep.widest_level
    trials = sweep.at(level)
    values: dict[str, list[Any]] = {}
    for name in dimensions(sweep):
        column = [trial.record.point[name] for trial in trials if name in trial.record.point]
        if len(column) == len(trials) and len({key(value) for value in column}) > 1:
            values[name] = column
    scores = [trial.rungs[level].score for trial in trials]
    if len(trials) < MIN_IMPORTANCE_TRIALS or len(values) < 2 or len(set(scores)) == 1:
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
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        study = optuna.create_study(direction="maximize")
        for at, score in enumerate(scores):
            point = {name: column[at] for name, column in values.items()}
            study.add_trial(optuna.trial.create_trial(params=point, distributions=domains, value=score))
        evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
        shares = optuna.importance.get_param_importances(study, evaluator=evaluator, params=list(domains))
    finally:
        optuna.logging.set_verbosity(verbosity)
    ordered = dict(sorted(shares.items(), key=lambda item: -item[1]))
    return Importance(level=level, trials=len(trials), shares=ordered)


def numeric(values: Sequence[Any]) -> bool:
    return all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)


def logarithmic(sweep: SweepHistory, name: str, values: Sequence[Any]) -> bool:
    """Whether a dimension is sampled on a logarithmic scale or its values span orders of magnitude."""
    dimension = sweep.config.space.dimensions.get(name)
    return min(values) > 0 and (bool(dimension and dimension.log) or max(values) / min(values) >= 30)
