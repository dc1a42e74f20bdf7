"""Plot of scores over training: every trial at its rungs, with children branching off their parents."""

from __future__ import annotations

from statistics import stdev
from typing import Any

from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, NullLocator

from tune_spaces.report.formatting import share
from tune_spaces.report.plots.canvas import (
    BASELINE,
    BEST,
    INK,
    LINE,
    PALE,
    PLAIN,
    best_label,
    legend,
    metric_axis,
    new_figure,
    subtitle,
)
from tune_spaces.report.sweep import SweepHistory, TrialHistory

STYLES: dict[str, dict[str, Any]] = {
    "best": {"color": BEST, "lw": 2.8, "marker": "o", "ms": 7, "zorder": 6},
    "baseline": {"color": BASELINE, "lw": 2.2, "marker": "o", "ms": 6, "ls": (0, (4, 2)), "zorder": 5},
    "ended": {"color": PLAIN, "lw": 1.3, "marker": "o", "ms": 4.5, "zorder": 4},
    "running": {"color": "#009e73", "lw": 1.3, "marker": "^", "ms": 5.5, "zorder": 4},
    "stopped": {"color": PALE, "lw": 1.0, "marker": "o", "ms": 3.5, "zorder": 2},
    "failed": {"color": PALE, "lw": 1.0, "marker": "x", "ms": 6, "ls": (0, (1, 2)), "zorder": 2},
}
STATUS_LABELS = {
    "baseline": "baseline",
    "ended": "completed",
    "running": "running",
    "stopped": "stopped early",
    "failed": "failed",
}


def curves(sweep: SweepHistory) -> Any:
    """Plot each trial's score over training."""
    if max((len(trial.rungs) for trial in sweep.trials), default=0) < 2:
        return None
    figure, axes = new_figure("Scores during training: every trial at its rungs", 8.2, 5.0)
    fractions = sweep.config.fractions()
    special = {trial.number for trial in (sweep.best, sweep.baseline) if trial is not None}
    scored = [trial for trial in sweep.trials if trial.rungs]
    for trial in sorted(scored, key=lambda trial: (trial.number in special, trial.reach)):
        levels = sorted(trial.rungs)
        xs, ys = [fractions[level] for level in levels], [trial.rungs[level].score for level in levels]
        style = _style(sweep, trial)
        if fork := _fork(sweep, trial):  # connect to the parent's line
            axes.plot([fork[0], xs[0]], [fork[1], ys[0]], **{**style, "marker": "", "ls": (0, (1, 1.5))})
        if trial.number in special and all(len(sweep.seeds(trial.rungs[level])) > 1 for level in levels):
            sds = [stdev(sweep.seeds(trial.rungs[level])) for level in levels]
            low, high = [y - sd for y, sd in zip(ys, sds, strict=True)], [y + sd for y, sd in zip(ys, sds, strict=True)]
            axes.fill_between(xs, low, high, color=style["color"], alpha=0.13, lw=0, zorder=1)
        axes.plot(xs, ys, **style)
    if sweep.config.algorithm == "pbt":
        axes.set_xlim(0, 1.04)
    else:
        axes.set_xscale("log")
        axes.set_xlim(fractions[0] * 0.9, 1.12)
    axes.xaxis.set_major_locator(FixedLocator(list(fractions)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(fractions, [share(fraction) if fraction < 1 else "full" for fraction in fractions])
    axes.set_xlabel("fraction of training", color=INK)
    metric_axis(axes.yaxis, sweep)
    axes.grid(color=LINE, lw=0.7)
    band = " (band: ± sd over seeds)" if sweep.config.seeds > 1 else ""
    subtitle(axes, f"each dot is a rung, where a probe scored the trial{band}")
    keys = [Line2D([], [], label=best_label(sweep), **STYLES["best"])] if sweep.best else []
    for status, label in STATUS_LABELS.items():
        if any(_status(sweep, trial) == status for trial in scored):
            keys.append(Line2D([], [], label=label, **STYLES[status]))
    if any(trial.record.parent is not None for trial in scored):
        keys.append(Line2D([], [], color=PLAIN, lw=1.3, ls=(0, (1, 1.5)), label="child branches off its parent"))
    legend(figure, keys)
    return figure


def _fork(sweep: SweepHistory, trial: TrialHistory) -> tuple[float, float] | None:
    """Return the fraction of training and the score at which a child branched off its parent."""
    if trial.record.parent is None:
        return None
    at, level = sweep.ancestry(trial)[-2], trial.record.born - 1
    return (sweep.config.fractions()[level], at.rungs[level].score) if level in at.rungs else None


def _status(sweep: SweepHistory, trial: TrialHistory) -> str:
    if trial is sweep.best:
        return "best"
    if trial is sweep.baseline and not trial.failed:
        return "baseline"
    return {"succeeded": "ended"}.get(trial.record.state, trial.record.state)


def _style(sweep: SweepHistory, trial: TrialHistory) -> dict[str, Any]:
    return STYLES[_status(sweep, trial)]
