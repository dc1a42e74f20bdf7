"""Elements shared by all plots: colours, figure layout, titles, legends and markers.

Uses colour-blind-safe palettes: Okabe-Ito and cividis. Draws without pyplot, so there is no global state.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D

from tune_spaces.report.sweep import SweepHistory
from tune_spaces.report.verdict import METRIC_NAMES

PAPER, INK, FAINT, LINE = "#ffffff", "#212529", "#6c757d", "#dee2e6"
PALE = "#b8bec4"  # trials that ended earlier
BEST, BASELINE, PLAIN = "#d55e00", "#0072b2", "#495057"
SCORES = matplotlib.colormaps["cividis"]


def new_figure(title: str, width: float, height: float, panels: int = 1) -> tuple[Any, Any]:
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1, wspace=0.04)
    figure = Figure(figsize=(width, height), layout=layout, facecolor=PAPER)
    FigureCanvasAgg(figure)
    figure.suptitle(title, x=0.015, ha="left", fontsize=13.5, fontweight="bold", color=INK)
    axes = figure.subplots(1, panels)
    for one in axes if panels > 1 else [axes]:
        one.set_axisbelow(True)
        one.tick_params(colors=INK, labelsize=9.5)
        for side in ("top", "right"):
            one.spines[side].set_visible(False)
        for side in ("left", "bottom"):
            one.spines[side].set_color(PALE)
    return figure, axes


def subtitle(axes: Any, text: str) -> None:
    axes.set_title(text, loc="left", fontsize=10, color=FAINT, pad=8)


def metric_axis(axis: Any, sweep: SweepHistory) -> None:
    axis.set_label_text(f"{METRIC_NAMES[sweep.config.metric]}, %", color=INK)


def legend(figure: Any, keys: Sequence[Any]) -> None:
    wide = figure.get_size_inches()[0]
    letters = sum(len(key.get_label()) + 7 for key in keys)
    lines = max(1, round(letters / (12.5 * wide) + 0.49))
    figure.legend(
        handles=keys, loc="outside lower left", ncols=-(-len(keys) // lines), frameon=False, fontsize=9, labelcolor=INK,
        columnspacing=1.6,
    )  # fmt: skip


def best_label(sweep: SweepHistory) -> str:
    return "best: the baseline" if sweep.best is sweep.baseline else "best"


def dot(colour: str, label: str, marker: str = "o", *, hollow: bool = False, line: Any = None) -> Any:
    face = PAPER if hollow else colour
    return Line2D([], [], color=colour, marker=marker, mfc=face, ms=7, lw=1 if line else 0, ls=line or "-", label=label)


def truncate(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"
