"""Plot of scores over both mask ratios."""

from __future__ import annotations

from typing import Any

import matplotlib
from matplotlib.patches import Patch, Rectangle

from tune_spaces.report.plots.canvas import (
    BASELINE,
    BEST,
    FAINT,
    INK,
    LINE,
    PALE,
    PAPER,
    SCORES,
    legend,
    new_figure,
    subtitle,
)
from tune_spaces.report.ratio_map import RatioMap, ratio_map
from tune_spaces.report.sweep import SweepHistory
from tune_spaces.report.verdict import METRIC_NAMES


def ratios(sweep: SweepHistory) -> Any:
    """Plot scores over teacher and student ratio, one panel per plotted level."""
    if sweep.config.space.study is not None:
        return None
    maps = [(level, found) for level in sweep.plotted_levels if (found := ratio_map(sweep, level)) is not None]
    if not maps:
        return None
    columns, lines = len(maps[0][1].students), len(maps[0][1].teachers)
    wide, high = max(4.6, 0.92 * columns + 1.5), max(3.2, 0.74 * lines + 2.2)
    figure, panels = new_figure("Score by mask ratio", wide * len(maps), high, len(maps))
    # one colour range for all panels, so that small differences between the last trials do not appear large
    span = max(max(scores) - min(scores) for level, found in maps if (scores := _reached(found, level)))
    for number, (axes, (level, found)) in enumerate(zip(panels if len(maps) > 1 else [panels], maps, strict=True)):
        _map(figure, axes, sweep, found, level, span, number == 0)
    keys = [
        Patch(facecolor="none", edgecolor=BEST, lw=2.6, label="best"),
        Patch(facecolor="none", edgecolor=BASELINE, lw=2.6, label="baseline: the base config"),
    ]
    if any(cell.symmetric for _, found in maps for cell in found.cells):
        keys.append(
            Patch(facecolor="none", edgecolor=INK, lw=1.2, ls=(0, (3, 2)), label="symmetric: both see the same tokens")
        )
    if any(cell.level < level for level, found in maps for cell in found.cells):
        keys.append(Patch(facecolor="#f1f3f5", edgecolor=PALE, hatch="///", label="reached only the rung shown"))
    legend(figure, keys)
    return figure


def _map(figure: Any, axes: Any, sweep: SweepHistory, found: RatioMap, level: int, span: float, first: bool) -> None:
    high = max(_reached(found, level), default=1.0)
    norm = matplotlib.colors.Normalize(high - 1.02 * span - 1e-6, high + 1e-6)
    filled = {(cell.student, cell.teacher) for cell in found.cells}
    for column, line in found.possible - filled:
        axes.add_patch(Rectangle((column - 0.5, line - 0.5), 1, 1, fc="none", ec=LINE, lw=0.8))
    for cell in found.cells:
        corner, reached = (cell.student - 0.5, cell.teacher - 0.5), cell.level == level
        colour: Any = SCORES(norm(cell.score)) if reached else "#f1f3f5"
        axes.add_patch(
            Rectangle(corner, 1, 1, fc=colour, ec=PAPER if reached else PALE, lw=1, hatch=None if reached else "///")
        )
        ink = INK if not reached or _light(colour) else PAPER
        text = [f"{cell.score:.1f}"]
        text += [f"± {cell.sd:.1f}"] if cell.sd is not None else []
        text += [f"rung {cell.level + 1}"] if not reached else []
        text += [f"{len(cell.trials)} trials"] if reached and len(cell.trials) > 1 else []
        if cell.symmetric:
            _frame(axes, cell.student, cell.teacher, ink if reached else FAINT, 1.3, 0.44, (0, (3, 2)))
        box = None if reached else {"facecolor": "#f1f3f5", "edgecolor": "none", "pad": 1.2}
        axes.text(
            cell.student, cell.teacher, "\n".join(text), ha="center", va="center", fontsize=8.5, linespacing=1.15,
            color=ink if reached else FAINT, bbox=box, zorder=3,
        )  # fmt: skip
    marked = [(sweep.baseline, BASELINE, 0.46), (sweep.best, BEST, 0.40)]
    same = sweep.baseline is sweep.best
    for trial, colour, half in marked:
        for cell in found.cells:
            if trial is not None and trial.number in cell.trials:
                _frame(axes, cell.student, cell.teacher, colour, 2.6, half if same or half == 0.46 else 0.46)
    axes.set_xlim(-0.55, len(found.students) - 0.45)
    axes.set_ylim(-0.55, len(found.teachers) - 0.45)
    axes.set_xticks(range(len(found.students)), found.students, fontsize=9)
    teachers = [f"{label}\nfull view" if label in ("0", "0.0") else label for label in found.teachers]
    axes.set_yticks(range(len(found.teachers)), teachers, fontsize=9)
    axes.set_xlabel("student ratio (hidden from the student)", color=INK)
    axes.set_ylabel("teacher ratio (hidden from the teacher)" if first else "", color=INK)
    axes.tick_params(length=0)
    axes.grid(False)
    for side in axes.spines.values():
        side.set_visible(False)
    if level == sweep.top_level and len(sweep.compared) == len(sweep.scored):
        where = (
            f"all {len(sweep.scored)} trials {sweep.describe_level(level)}"
            if len(sweep.scored) > 1
            else sweep.describe_level(level)
        )
    elif level == sweep.widest_level and level != sweep.top_level:
        where = f"rung {level + 1}, {sweep.describe_level(level)}: {len(sweep.at(level))} trials compared"
    else:
        where = f"rung {level + 1}, {sweep.describe_level(level)}: {len(sweep.at(level))} of {len(sweep.scored)} trials"
    subtitle(axes, where)
    if span and len(_reached(found, level)) > 1:
        bar = figure.colorbar(matplotlib.cm.ScalarMappable(norm, SCORES), ax=axes, shrink=0.8, pad=0.02, aspect=24)
        bar.outline.set_visible(False)
        bar.ax.tick_params(labelsize=8, length=0, colors=FAINT)
        bar.set_label(f"{METRIC_NAMES[sweep.config.metric]}, %", fontsize=8.5, color=FAINT)


def _reached(found: RatioMap, level: int) -> list[float]:
    return [cell.score for cell in found.cells if cell.level == level]


def _frame(axes: Any, column: int, line: int, colour: str, width: float, half: float, style: Any = "-") -> None:
    axes.add_patch(
        Rectangle(
            (column - half, line - half), 2 * half, 2 * half, fc="none", ec=colour, lw=width, ls=style, zorder=4,
            joinstyle="miter",
        )
    )  # fmt: skip


def _light(colour: tuple[float, float, float, float]) -> bool:
    red, green, blue, _ = colour
    return 0.299 * red + 0.587 * green + 0.114 * blue > 0.52
