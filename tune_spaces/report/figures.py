"""The numbers of a sweep's report: what may be compared with what, differences, the cheapest, what mattered.

Values in, values out. Only scores of the same rung are ever compared. Knows nothing of pictures or pages.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from fractions import Fraction
from statistics import mean, stdev
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict

from amd.config import ConfigError, overridden, validate
from amd.storage import exists, join, read_json
from tune_spaces.config import SearchConfig
from tune_spaces.ledger import Ledger, Rung, TrialRecord, TrialState

CONFIDENCE = 0.95
FEW = 4  # comparable trials below which nothing is said of importance
MOST_VALUES, MOST_BINS = 9, 6  # of an axis of the heat map; more values are put into bins


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

    def seeds(self, rung: Rung) -> tuple[float, ...]:
        """The metric by seed."""
        return rung.figures.get(self.config.metric) or (rung.score,)

    def place(self, level: int) -> str:
        """A level in words: after 1/3 of training."""
        fraction = self.config.fractions()[level]
        return "after the whole training" if fraction == 1 else f"after {share(fraction)} of training"


class Difference(NamedTuple):
    """Ours less theirs."""

    value: float
    interval: tuple[float, float] | None  # none: it cannot be known


class Cell(NamedTuple):
    """One cell of the map of mask ratios."""

    student: int  # column
    teacher: int  # row, from below
    level: int  # the furthest that its trials reached, up to the level asked for
    score: float
    sd: float | None  # over seeds, pooled over its trials
    trials: tuple[int, ...]
    symmetric: bool  # teacher and student see the same tokens


class RatioMap(NamedTuple):
    students: list[str]  # labels of the columns, ascending
    teachers: list[str]
    cells: list[Cell]
    possible: set[tuple[int, int]]  # (column, row) where the teacher does not see less than the student


class Importance(NamedTuple):
    level: int
    trials: int
    shares: dict[str, float]  # of the score's variance, the highest first


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


def resolved(sweep: Sweep, trial: Trial) -> dict[str, Any]:
    """A trial's training config as plain values."""
    return overridden(sweep.config.train.model_dump(mode="json"), trial.record.overrides)


def ratio_map(sweep: Sweep, level: int) -> RatioMap | None:
    """Scores by mask ratios, each cell at the furthest rung up to `level` that any of its trials reached.

    Its score is the mean of those trials. None where the ratios do not vary.
    """
    placed = [(trial, resolved(sweep, trial)["mask"]) for trial in sweep.alive if min(trial.rungs) <= level]
    ratios = [(trial, float(mask["student_ratio"]), float(mask["teacher_ratio"])) for trial, mask in placed]
    everywhere = [resolved(sweep, trial)["mask"] for trial in sweep.alive]  # the same axes at every level
    students, columns = bins([float(mask["student_ratio"]) for mask in everywhere])
    teachers, lines = bins([float(mask["teacher_ratio"]) for mask in everywhere])
    groups: dict[tuple[int, int], list[Trial]] = {}
    for trial, student, teacher in ratios:
        groups.setdefault((columns[student], lines[teacher]), []).append(trial)
    if len({(mask["student_ratio"], mask["teacher_ratio"]) for mask in everywhere}) < 2:
        return None
    cells = []
    for (column, line), trials in sorted(groups.items()):
        reached = max(max(at for at in trial.rungs if at <= level) for trial in trials)
        there = [trial for trial in trials if reached in trial.rungs]
        spreads = [stdev(by_seed) for trial in there if len(by_seed := sweep.seeds(trial.rungs[reached])) > 1]
        sd = mean(spread**2 for spread in spreads) ** 0.5 if spreads else None
        score = mean(trial.rungs[reached].score for trial in there)
        pairs = {(student, teacher) for trial, student, teacher in ratios if trial in there}
        same = all(student == teacher for student, teacher in pairs)
        cells.append(Cell(column, line, reached, score, sd, tuple(trial.number for trial in there), same))
    lowest = {line: min(value for value, at in lines.items() if at == line) for line in lines.values()}
    highest = {column: max(value for value, at in columns.items() if at == column) for column in columns.values()}
    possible = {(column, line) for column in highest for line in lowest if lowest[line] <= highest[column]}
    return RatioMap(students, teachers, cells, possible)


def bins(values: Sequence[float]) -> tuple[list[str], dict[float, int]]:
    """Labels of a few bins, ascending, and where each value belongs; few values stay as they are, and 0 always does."""
    distinct = sorted(set(values))
    if len(distinct) <= MOST_VALUES:
        return [f"{value:.3g}" for value in distinct], {value: at for at, value in enumerate(distinct)}
    width = next((width for width in (0.05, 0.1) if len({_bin(v, width) for v in distinct}) <= MOST_BINS), 0.2)
    used = sorted({_bin(value, width) for value in distinct})
    labels = ["0" if number < 0 else f"{number * width:.2g}–{(number + 1) * width:.2g}" for number in used]
    return labels, {value: used.index(_bin(value, width)) for value in distinct}


def _bin(value: float, width: float) -> int:
    return int(value / width + 1e-9) if value else -1


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


def dimensions(sweep: Sweep) -> dict[str, str]:
    """Names of the space that vary among the trials, with a short name of each."""
    told = list(dict.fromkeys(name for trial in sweep.trials for name in trial.record.point))
    points = [trial.record.point for trial in sweep.trials]
    varying = [name for name in told if len({_key(point.get(name)) for point in points}) > 1] or told
    last = [name.rpartition(".")[2] for name in varying]
    return {name: short if last.count(short) == 1 else name for name, short in zip(varying, last, strict=True)}


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
        if len(column) == len(trials) and len({_key(value) for value in column}) > 1:
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
            values[name] = [_key(value) for value in column]
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


def title(point: Mapping[str, Any], names: Mapping[str, str]) -> str:
    """A point in words; of a study, its variant."""
    if set(point) == {"variant"}:
        return short(point["variant"])
    return ", ".join(f"{names[name]} {short(point[name])}" for name in names if name in point) or "as given"


def short(value: Any) -> str:
    """A value in a few letters: 0.0015, 2→3 4→6 for layer pairs."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, Mapping):
        if set(value) == {"student", "teacher"}:
            return f"{value['student']}→{value['teacher']}"
        return " ".join(f"{name} {short(part)}" for name, part in value.items())
    if isinstance(value, list | tuple):
        return " ".join(short(part) for part in value) or "none"
    return str(value)


def share(fraction: float) -> str:
    """1/9 for 0.111…, else percent."""
    exact = Fraction(fraction).limit_denominator(1000)
    return str(exact) if abs(float(exact) - fraction) < 1e-9 else f"{100 * fraction:.2g} %"


def signed(value: float) -> str:
    """+1.2; 0.0 without a sign."""
    text = f"{value:+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text


def spread(values: Sequence[float], digits: int = 1) -> str:
    """One value as it is; several as mean ± sample standard deviation."""
    if not values:
        return "–"
    sd = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{sd}"


def _key(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)
