"""Sweep plots: matplotlib figures, each with a file name. Empty plots are omitted."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import matplotlib

from tune_spaces.report.plots.canvas import PAPER
from tune_spaces.report.plots.choices import importances, parallel
from tune_spaces.report.plots.cost import cost
from tune_spaces.report.plots.curves import curves
from tune_spaces.report.plots.ranking import layers, variants
from tune_spaces.report.plots.ratios import ratios
from tune_spaces.report.sweep import SweepHistory

DPI = 150


class Picture(NamedTuple):
    """A plot in the report."""

    name: str  # file name without extension
    caption: str
    figure: Any


def pictures(sweep: SweepHistory) -> list[Picture]:
    """Return the non-empty plots, in the order in which they appear in the report."""
    drawn = ((name, draw(sweep)) for name, draw in DRAWN.items())
    return [Picture(name, CAPTIONS[name], figure) for name, figure in drawn if figure is not None]


def rendered(figure: Any) -> dict[str, bytes]:
    """Return a figure's file contents by extension; identical figures produce identical bytes."""
    files = {}
    for ending, options in (("png", {"dpi": DPI}), ("svg", {"metadata": {"Date": None}})):
        data = io.BytesIO()
        with matplotlib.rc_context({"svg.hashsalt": "amd"}):
            figure.savefig(data, format=ending, facecolor=PAPER, **options)
        files[ending] = data.getvalue()
    return files


DRAWN: Mapping[str, Callable[[SweepHistory], Any]] = {
    "variants": variants,
    "mask_ratios": ratios,
    "cost": cost,
    "layers": layers,
    "parallel": parallel,
    "importance": importances,
    "curves": curves,
}
CAPTIONS = {
    "variants": "Mean, standard deviation and individual seeds for each variant.",
    "mask_ratios": "Rows: teacher ratio; columns: student ratio. The teacher never sees less than the student, so one "
    "corner stays empty. Hatched cells reached only an earlier rung and are not comparable with the coloured ones. "
    "Outlined cells are valid but were not tried.",
    "cost": "Only trials at the same rung are shown. Speeds were measured during training on this "
    "sweep's machines; GFLOPs are computed.",
    "layers": "Pairs are student→teacher, with blocks numbered from 1. Trials with the same layer pairs share a row. "
    "Compare only within a panel: each panel is one rung.",
    "parallel": "Each line is a trial, coloured by its score at the rung with the most trials; the best trial is "
    "selected at the highest rung.",
    "importance": "fANOVA on a random forest fitted to these trials. It is unreliable for fewer than about 50 trials "
    "and says nothing about values that were not tried.",
    "curves": "Only scores at the same fraction are comparable.",
}
