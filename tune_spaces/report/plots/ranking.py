"""Ranking plots for variants and aligned layers, one row each, with the best at the top."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import stdev
from typing import Any

from tune_spaces.report.figures import TrialGroup, by_layers, by_variant
from tune_spaces.report.plots.canvas import (
    BASELINE,
    BEST,
    FAINT,
    LINE,
    PAPER,
    PLAIN,
    best_label,
    dot,
    legend,
    metric_axis,
    new_figure,
    subtitle,
    truncate,
)
from tune_spaces.report.sweep import SweepHistory


def variants(sweep: SweepHistory) -> Any:
    """Plot a study's variants, with the best at the top."""
    found = by_variant(sweep)
    return _ranking(sweep, found, f"Study “{sweep.config.space.study}”: score by variant") if found else None


def layers(sweep: SweepHistory) -> Any:
    """Plot trials by aligned layer pairs, with the best at the top."""
    found = by_layers(sweep) if sweep.config.space.study is None else []
    return _ranking(sweep, found, "Score by aligned layers (student→teacher)") if found else None


def _ranking(sweep: SweepHistory, found: Sequence[TrialGroup], title: str) -> Any:
    """Draw one row per group, with mean, standard deviation and a dot per seed, and one panel per plotted level."""
    levels = sweep.plotted_levels
    figure, axes = new_figure(title, 3.0 + 5.0 * len(levels), 2.2 + 0.42 * len(found), len(levels))
    panels = axes if len(levels) > 1 else [axes]
    for number, (panel, level) in enumerate(zip(panels, levels, strict=True)):
        _ranks(panel, sweep, found, level)
        labels = [truncate(group.label, 34) + _trials(len(group.trials)) for group in found]
        panel.set_yticks(range(len(found)), labels if number == 0 else [""] * len(found), fontsize=10)
        panel.set_ylim(len(found) - 0.5, -0.5)
        metric_axis(panel.xaxis, sweep)
        panel.grid(axis="x", color=LINE, lw=0.7)
        subtitle(panel, f"{len(sweep.at(level))} trials {sweep.describe_level(level)}")
    keys = [dot(BEST, best_label(sweep), "D"), dot(PLAIN, "mean ± sd", "D"), dot(PLAIN, "one seed", "o", hollow=True)]
    if sweep.baseline in sweep.scored and sweep.baseline is not sweep.best:
        keys.insert(1, dot(BASELINE, "baseline", "D", line=(0, (4, 3))))
    legend(figure, keys)
    return figure


def _ranks(axes: Any, sweep: SweepHistory, found: Sequence[TrialGroup], level: int) -> None:
    best, base = sweep.best, sweep.baseline
    for at, group in enumerate(found):
        there = group.at(level)
        if not there:
            axes.annotate(
                f"reached rung {group.reach + 1}", (0.02, at), xycoords=("axes fraction", "data"), va="center",
                fontsize=9, color=FAINT,
            )  # fmt: skip
            continue
        colour = BEST if best in there else BASELINE if base in there else PLAIN
        values = [value for trial in there for value in sweep.seeds(trial.rungs[level])]
        middle = group.score(level)
        if len(values) > 1:
            sd = stdev(values)
            axes.plot([middle - sd, middle + sd], [at, at], color=colour, lw=2.2, solid_capstyle="butt", zorder=1)
            axes.plot(values, [at] * len(values), "o", ms=4.5, mfc=PAPER, mec=colour, zorder=3)
        axes.plot([middle], [at], "D", ms=7.5, color=colour, zorder=2)
    if base in sweep.at(level) and base is not None:
        axes.axvline(base.rungs[level].score, color=BASELINE, lw=1, ls=(0, (4, 3)), zorder=0)
    axes.margins(x=0.08)


def _trials(number: int) -> str:
    return f" ({number} trials)" if number > 1 else ""
