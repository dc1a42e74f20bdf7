"""Scores on a grid of student and teacher mask ratios, binned when there are many values."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean, stdev
from typing import NamedTuple

from tune_spaces.report.sweep import SweepHistory, TrialHistory

MAX_AXIS_VALUES, MAX_AXIS_BINS = 9, 6  # per axis; more values are grouped into bins


class RatioCell(NamedTuple):
    """One cell of a mask-ratio map."""

    student: int  # column
    teacher: int  # row, from the bottom
    level: int  # highest level that its trials reached, up to the requested level
    score: float
    sd: float | None  # over seeds, pooled over its trials
    trials: tuple[int, ...]
    symmetric: bool  # teacher and student see the same tokens


class RatioMap(NamedTuple):
    students: list[str]  # column labels, ascending
    teachers: list[str]
    cells: list[RatioCell]
    possible: set[tuple[int, int]]  # (column, row) where the teacher sees at least what the student sees


def ratio_map(sweep: SweepHistory, level: int) -> RatioMap | None:
    """Return the scores by mask ratio; each cell uses the highest level, up to `level`, that any of its trials reached.

    A cell's score is the mean over the trials that reached that level. Returns None if the ratios do not vary.
    """
    pairs = [_mask_ratios(sweep, trial) for trial in sweep.scored]
    if len(set(pairs)) < 2:
        return None
    students, columns = bins([student for student, _ in pairs])  # same axes at every level
    teachers, lines = bins([teacher for _, teacher in pairs])
    ratios = {trial.number: pair for trial, pair in zip(sweep.scored, pairs, strict=True)}
    groups: dict[tuple[int, int], list[TrialHistory]] = {}
    for trial in sweep.scored:
        if min(trial.rungs) <= level:
            student, teacher = ratios[trial.number]
            groups.setdefault((columns[student], lines[teacher]), []).append(trial)
    cells = []
    for (column, line), trials in sorted(groups.items()):
        reached = max(max(at for at in trial.rungs if at <= level) for trial in trials)
        there = [trial for trial in trials if reached in trial.rungs]
        spreads = [stdev(by_seed) for trial in there if len(by_seed := sweep.seeds(trial.rungs[reached])) > 1]
        sd = mean(spread**2 for spread in spreads) ** 0.5 if spreads else None
        score = mean(trial.rungs[reached].score for trial in there)
        same = all(student == teacher for student, teacher in (ratios[trial.number] for trial in there))
        cells.append(RatioCell(column, line, reached, score, sd, tuple(trial.number for trial in there), same))
    lowest = {line: min(value for value, at in lines.items() if at == line) for line in lines.values()}
    highest = {column: max(value for value, at in columns.items() if at == column) for column in columns.values()}
    possible = {(column, line) for column in highest for line in lowest if lowest[line] <= highest[column]}
    return RatioMap(students, teachers, cells, possible)


def _mask_ratios(sweep: SweepHistory, trial: TrialHistory) -> tuple[float, float]:
    mask, overrides = sweep.config.train.mask, trial.record.overrides
    student = overrides.get("mask.student_ratio", mask.student_ratio)
    return float(student), float(overrides.get("mask.teacher_ratio", mask.teacher_ratio))


def bins(values: Sequence[float]) -> tuple[list[str], dict[float, int]]:
    """Return the bin labels, ascending, and the bin of each value.

    If there are only a few values, each has its own bin; 0 always has its own bin.
    """
    distinct = sorted(set(values))
    if len(distinct) <= MAX_AXIS_VALUES:
        return [f"{value:.3g}" for value in distinct], {value: at for at, value in enumerate(distinct)}
    width = next((width for width in (0.05, 0.1) if len({_bin(v, width) for v in distinct}) <= MAX_AXIS_BINS), 0.2)
    used = sorted({_bin(value, width) for value in distinct})
    labels = ["0" if number < 0 else f"{number * width:.2g}–{(number + 1) * width:.2g}" for number in used]
    return labels, {value: used.index(_bin(value, width)) for value in distinct}


def _bin(value: float, width: float) -> int:
    return int(value / width + 1e-9) if value else -1
