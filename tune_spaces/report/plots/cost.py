"""Plot of quality against cost: score against measured speed and teacher GFLOPs, with the Pareto front."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from statistics import stdev
from typing import Any

from matplotlib.lines import Line2D

from tune_spaces.report.figures import pareto_front
from tune_spaces.report.plots.canvas import (
    BASELINE,
    BEST,
    INK,
    LINE,
    PALE,
    PAPER,
    PLAIN,
    best_label,
    dot,
    legend,
    new_figure,
    subtitle,
)
from tune_spaces.report.sweep import SweepHistory, TrialHistory
from tune_spaces.report.verdict import METRIC_NAMES


def cost(sweep: SweepHistory) -> Any:
    """Plot score against measured speed and teacher GFLOPs, joining the trials on the Pareto front."""
    trials, level = sweep.compared, sweep.top_level
    timed = [trial for trial in trials if trial.rungs[level].clips_per_s]
    counted = [trial for trial in trials if "teacher_gflops" in trial.record.costs]
    panels: list[tuple[list[TrialHistory], Callable[[TrialHistory], float], str, int]] = []
    if len(timed) > 1:
        panels.append(
            (timed, lambda trial: trial.rungs[level].clips_per_s, "clips per second, measured during training", 1)
        )
    if len({trial.record.costs["teacher_gflops"] for trial in counted}) > 1:
        panels.append((counted, lambda trial: trial.record.costs["teacher_gflops"], "teacher GFLOPs per clip", -1))
    if not panels:
        return None
    figure, found = new_figure("Quality against teacher cost", 6.2 * len(panels), 4.9, len(panels))
    for number, (axes, (shown, x, label, sign)) in enumerate(
        zip(found if len(panels) > 1 else [found], panels, strict=True)
    ):
        _cost_panel(axes, sweep, shown, x, label, sign)
        axes.set_ylabel("" if number else f"{METRIC_NAMES[sweep.config.metric]}, %")
    keys = [dot(BEST, best_label(sweep)), dot(PLAIN, "other trials, by number")]
    if sweep.baseline in trials and sweep.baseline is not sweep.best:
        keys.insert(1, dot(BASELINE, "baseline"))
    keys.append(Line2D([], [], color=INK, lw=1.2, label="Pareto front: no trial is better and cheaper"))
    if any(len(sweep.seeds(trial.rungs[level])) > 1 for trial in trials):
        keys.append(Line2D([], [], color=PALE, lw=1.2, label="± sd over seeds"))
    legend(figure, keys)
    for axes, (shown, x, _, sign) in zip(found if len(panels) > 1 else [found], panels, strict=True):
        points = [(sign * x(trial), trial.rungs[level].score) for trial in shown]
        first = {shown[at].number for at in pareto_front(points)}
        line = [(sign * a, b) for a, b in sorted(points[at] for at in pareto_front(points))]
        labelled = sorted(shown, key=lambda trial: (trial is not sweep.best, trial is not sweep.baseline,
                                                  trial.number not in first))  # fmt: skip
        _name_points(
            figure, axes, [(x(trial), trial.rungs[level].score, str(trial.number)) for trial in labelled], line
        )
    return figure


def _cost_panel(
    axes: Any, sweep: SweepHistory, shown: list[TrialHistory], x: Callable[[TrialHistory], float], label: str, sign: int
) -> None:
    level = sweep.top_level
    points = [(sign * x(trial), trial.rungs[level].score) for trial in shown]
    best = sorted(points[at] for at in pareto_front(points))
    axes.plot([sign * a for a, _ in best], [b for _, b in best], color=INK, lw=1.2, zorder=2)
    for trial, (a, b) in zip(shown, points, strict=True):
        colour = BEST if trial is sweep.best else BASELINE if trial is sweep.baseline else PLAIN
        values = sweep.seeds(trial.rungs[level])
        if len(values) > 1:
            sd = stdev(values)
            axes.plot([sign * a] * 2, [b - sd, b + sd], color=PALE, lw=1.2, zorder=1)
        size = 9 if colour != PLAIN else 6.5
        axes.plot([sign * a], [b], "o", ms=size, color=colour, mec=PAPER, mew=0.8, zorder=4 if colour != PLAIN else 3)
    axes.set_xlabel(label + (" (faster to the right)" if sign > 0 else " (cheaper to the left)"), color=INK)
    axes.grid(color=LINE, lw=0.7)
    axes.margins(0.08, 0.1)
    left = len(sweep.scored) - len(shown)
    more = f"; {left} that ended earlier not shown" if left else ""
    subtitle(axes, f"{len(shown)} trials {sweep.describe_level(level)}{more}")


def _name_points(
    figure: Any, axes: Any, named: Sequence[tuple[float, float, str]], line: Sequence[tuple[float, float]]
) -> None:
    """Label points where a label fits without covering the line or other labels; earlier points take precedence."""
    figure.draw_without_rendering()
    frame, taken = axes.get_window_extent(), list[Any]()
    dots = [axes.transData.transform((x, y)) for x, y, _ in named]
    for start, end in itertools.pairwise([axes.transData.transform(point) for point in line]):
        steps = max(2, int(math.dist(start, end) / 3))
        dots += [start + (end - start) * step / steps for step in range(steps)]
    places = [
        (7, 5, "left"),
        (-7, 5, "right"),
        (7, -13, "left"),
        (-7, -13, "right"),
        (0, 9, "center"),
        (0, -18, "center"),
    ]
    for x, y, text in named:
        for dx, dy, side in places:
            note = axes.annotate(
                text, (x, y), (dx, dy), textcoords="offset points", ha=side, fontsize=8.5, color=INK, zorder=5
            )
            box = note.get_window_extent().padded(1)
            inside = frame.x0 < box.x0 and box.x1 < frame.x1 and frame.y0 < box.y0 and box.y1 < frame.y1
            if inside and not any(box.overlaps(other) for other in taken) and not any(box.contains(*at) for at in dots):
                taken.append(box)
                break
            note.remove()
