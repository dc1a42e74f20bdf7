"""A sweep as pictures: figures of matplotlib, each with the name of its file. One with nothing to show is left out.

Knows nothing of storage.
"""

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
from tune_spaces.report.sweep import Sweep

DPI = 150


class Picture(NamedTuple):
    name: str  # of its files, without an ending
    caption: str
    figure: Any


def pictures(sweep: Sweep) -> list[Picture]:
    """All that have something to show, in the order of a page."""
    drawn = ((name, draw(sweep)) for name, draw in DRAWN.items())
    return [Picture(name, CAPTIONS[name], figure) for name, figure in drawn if figure is not None]


def rendered(figure: Any) -> dict[str, bytes]:
    """A figure as files, by ending; equal figures give equal bytes."""
    files = {}
    for ending, options in (("png", {"dpi": DPI}), ("svg", {"metadata": {"Date": None}})):
        data = io.BytesIO()
        with matplotlib.rc_context({"svg.hashsalt": "amd"}):
            figure.savefig(data, format=ending, facecolor=PAPER, **options)
        files[ending] = data.getvalue()
    return files


DRAWN: Mapping[str, Callable[[Sweep], Any]] = {
    "variants": variants,
    "mask_ratios": ratios,
    "cost": cost,
    "layers": layers,
    "parallel": parallel,
    "importance": importances,
    "curves": curves,
}
CAPTIONS = {
    "variants": "Each variant's mean, its standard deviation, and every seed.",
    "mask_ratios": "Rows: what is hidden from the teacher; columns: what is hidden from the student. The teacher never "
    "sees less than the student, so one corner stays empty. Hatched: came only to an earlier rung, so it cannot "
    "be compared with the coloured ones. Outlined: possible, but not tried.",
    "cost": "Trials at the same rung only. Speeds are those of training on the machines of this sweep; GFLOP are "
    "counted.",
    "layers": "Blocks count from 1, student→teacher. Trials that share their layer pairs stand in one line. Compare "
    "within a panel only: each is one rung.",
    "parallel": "One line is one trial, coloured at the rung where most trials can be compared; the best is that of "
    "the furthest rung.",
    "importance": "fANOVA on a forest fitted to these trials. It is unreliable for few trials (fewer than about 50), "
    "and says nothing of values that were not tried.",
    "curves": "Scores of the same fraction may be compared, those of different fractions not.",
}
