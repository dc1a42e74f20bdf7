"""Plots of all dimensions: parallel coordinates with one line per trial, and importance."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import matplotlib
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from tune_spaces.report.figures import importance, logarithmic, numeric
from tune_spaces.report.formatting import short
from tune_spaces.report.plots.canvas import (
    BASELINE,
    BEST,
    INK,
    LINE,
    PALE,
    PAPER,
    SCORES,
    best_label,
    legend,
    new_figure,
    subtitle,
    truncate,
)
from tune_spaces.report.sweep import SweepHistory, TrialHistory, dimensions
from tune_spaces.report.verdict import METRIC_NAMES


def parallel(sweep: SweepHistory) -> Any:
    """Plot a line through the values of each trial, coloured by its score at the level with the most trials."""
    names = {} if sweep.config.space.study is not None else dimensions(sweep)
    trials = sweep.scored
    columns = {name: [trial.record.point[name] for trial in trials if name in trial.record.point] for name in names}
    columns = {name: column for name, column in columns.items() if len({repr(value) for value in column}) > 1}
    level = sweep.widest_level
    if len(columns) < 2 or len(sweep.at(level)) < 2:
        return None
    figure, axes = new_figure("Values and scores of all trials", max(8.2, 2.1 * (len(columns) + 1) + 1), 5.0)
    scales = [_scale(sweep, name, column) for name, column in columns.items()]
    scores = [trial.rungs[level].score for trial in sweep.at(level)]
    low, high = min(scores), max(scores)
    norm = matplotlib.colors.Normalize(low, high if high > low else low + 1)
    last = len(scales)
    special = [trial for trial in (sweep.baseline, sweep.best) if trial is not None]
    for trial in sorted(trials, key=lambda trial: (trial in special, _score(trial, level))):
        compared = level in trial.rungs
        places = [
            (at, scale.place(trial.record.point[name]))
            for at, (name, scale) in enumerate(zip(columns, scales, strict=True))
            if name in trial.record.point
        ]
        colour: Any = PALE
        if compared:
            places.append((last, float(norm(trial.rungs[level].score))))
            colour = SCORES(norm(trial.rungs[level].score))
        style: dict[str, Any] = {"color": colour, "lw": 1.6 if compared else 0.9, "alpha": 0.9}
        if trial is sweep.best:
            style = {"color": BEST, "lw": 3.2}
        elif trial is sweep.baseline:
            style = {"color": BASELINE, "lw": 2.4, "ls": (0, (4, 2))}
        axes.plot(*_eased(places), zorder=2 + compared + (trial in special), solid_capstyle="round", **style)
    for at, scale in enumerate(scales):
        for place, text in scale.ticks:
            _tick(axes, at, place, text, 5 if at else -5)
    _draw_score_axis(axes, last, low, high, norm)
    titles = [truncate(names[name], 24).replace("_", " ") for name in columns]
    _label_axes(axes, [*titles, f"score, %, of {len(scores)} trials\n{sweep.describe_level(level)}"])
    legend(figure, _legend_entries(sweep, all_scored=len(scores) == len(trials)))
    return figure


def _draw_score_axis(axes: Any, last: int, low: float, high: float, norm: Any) -> None:
    """Draw the last axis: a colour bar for the scores, with its ticks."""
    if high <= low:
        _tick(axes, last, float(norm(low)), f"{low:.1f}", 10)
        return
    axes.imshow(
        [[step / 99] for step in range(100)], aspect="auto", origin="lower", cmap=SCORES, zorder=4,
        extent=(last - 0.012 * (last + 1), last + 0.012 * (last + 1), 0, 1),
    )  # fmt: skip
    for value in MaxNLocator(5).tick_values(low, high):
        if low <= value <= high:
            _tick(axes, last, float(norm(value)), f"{value:g}", 10)


def _label_axes(axes: Any, titles: Sequence[str]) -> None:
    """Draw one vertical line per title, and hide the plot's frame."""
    for at in range(len(titles)):
        axes.axvline(at, color=INK, lw=1, zorder=1)
    axes.set_xticks(range(len(titles)), titles, fontsize=10)
    axes.xaxis.tick_top()
    axes.tick_params(length=0, pad=8)
    axes.set_yticks([])
    axes.set_xlim(-0.05, len(titles) - 0.7)
    axes.set_ylim(-0.04, 1.04)
    for side in axes.spines.values():
        side.set_visible(False)


def _legend_entries(sweep: SweepHistory, *, all_scored: bool) -> list[Line2D]:
    best = f"{best_label(sweep)} {sweep.describe_level(sweep.top_level)}"
    entries = [Line2D([], [], color=BEST, lw=3.2, label=best)]
    if sweep.baseline in sweep.scored and sweep.baseline is not sweep.best:
        entries.append(Line2D([], [], color=BASELINE, lw=2.4, ls=(0, (4, 2)), label="baseline"))
    metric = f"{METRIC_NAMES[sweep.config.metric]}, as on the right"
    entries.append(Line2D([], [], color=SCORES(0.6), lw=2.2, label=metric))
    if not all_scored:
        entries.append(Line2D([], [], color=PALE, lw=1, label="not scored at that rung"))
    return entries


def _score(trial: TrialHistory, level: int) -> float:
    return trial.rungs[level].score if level in trial.rungs else float("-inf")


class _Scale(NamedTuple):
    place: Callable[[Any], float]  # maps a value to its height, 0 to 1
    ticks: list[tuple[float, str]]


def _scale(sweep: SweepHistory, name: str, column: Sequence[Any]) -> _Scale:
    """Space a few values evenly; place many numbers on a linear or logarithmic axis."""
    if numeric(column) and len(set(column)) > 8:
        low, high = min(column), max(column)
        if logarithmic(sweep, name, column):

            def place(value: Any) -> float:
                return math.log(value / low) / math.log(high / low)

            marks = [low * (high / low) ** (step / 4) for step in range(5)]
            return _Scale(place, [(step / 4, f"{mark:.2g}") for step, mark in enumerate(marks)])
        marks = [mark for mark in MaxNLocator(5).tick_values(low, high) if low <= mark <= high]
        return _Scale(
            lambda value: float((value - low) / (high - low)), [((m - low) / (high - low), f"{m:g}") for m in marks]
        )
    distinct = sorted(set(column)) if numeric(column) else sorted({short(value) for value in column})
    heights = {short(value): at / (len(distinct) - 1) for at, value in enumerate(distinct)}
    every = -(-len(heights) // 12)
    ticks = [(height, truncate(text, 22)) for at, (text, height) in enumerate(heights.items()) if at % every == 0]
    return _Scale(lambda value: heights[short(value)], ticks)


def _eased(places: Sequence[tuple[int, float]]) -> tuple[list[float], list[float]]:
    """Return a curve that is flat at each given position, so that lines crossing there stay distinguishable."""
    xs, ys = [float(places[0][0])], [places[0][1]]
    for (x0, y0), (x1, y1) in itertools.pairwise(places):
        for step in range(1, 25):
            u = step / 24
            xs.append(x0 + u * (x1 - x0))
            ys.append(y0 + (3 * u * u - 2 * u**3) * (y1 - y0))
    return xs, ys


def _tick(axes: Any, x: float, y: float, text: str, away: int = 4) -> None:
    axes.annotate(
        text, (x, y), (away, 0), textcoords="offset points", va="center", fontsize=8.5, color=INK, zorder=9,
        ha="left" if away > 0 else "right",
        bbox={"facecolor": PAPER, "edgecolor": "none", "alpha": 0.75, "pad": 0.6}, annotation_clip=False,
    )  # fmt: skip


def importances(sweep: SweepHistory) -> Any:
    """Plot the share of the score's variance that each dimension explains."""
    found = importance(sweep) if sweep.config.space.study is None else None
    if found is None:
        return None
    names = dimensions(sweep)
    figure, axes = new_figure("What the score depends on", 7.0, 1.7 + 0.42 * len(found.shares))
    for at, part in enumerate(found.shares.values()):
        axes.barh(at, 100 * part, height=0.62, color=BASELINE)
        axes.annotate(
            f"{100 * part:.0f} %", (100 * part, at), (5, 0), textcoords="offset points", va="center", fontsize=9.5
        )
    axes.set_yticks(range(len(found.shares)), [truncate(names[name], 30).replace("_", " ") for name in found.shares])
    axes.set_ylim(len(found.shares) - 0.4, -0.6)
    axes.set_xlim(0, 112 * max(found.shares.values()))
    axes.set_xlabel("share of the score's variance between trials (fANOVA)", color=INK)
    axes.grid(axis="x", color=LINE, lw=0.7)
    few = "; few trials: a rough guide" if found.trials < 50 else ""
    subtitle(axes, f"{found.trials} trials {sweep.describe_level(found.level)}{few}")
    return figure
