"""Content of a run's report: curves, config, published encoder with its lineage, and origin of the data."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from typing import Any, NamedTuple

from amd.config import flatten
from amd.storage import exists, join, read_json
from amd.training.run_folder import FACTS, run_folder
from service.jobs.metrics import RunMetrics
from service.jobs.schemas import MetricsView, SeriesView
from service.registry.lineage import LineageNode
from service.registry.schemas import EncoderDetail
from service.reports.charts import ChartSeries, colour_class, line_chart
from service.reports.sections import LegendEntry, ReportChart
from service.web.formats import number, shortened
from tune_spaces.report.verdict import METRIC_NAMES

PREFIXES = ("loss", "eval", "optim", "speed")
"""Groups of metrics that a report shows, in this order. All losses share a chart."""
TITLES = {
    "loss": "Loss",
    "optim/lr": "Learning rate",
    "optim/grad_norm": "Gradient norm",
    "speed/samples_per_s": "Throughput, samples per second",
    "speed/mfu": "Model FLOPs utilisation",
    **{name: f"{title[0].upper()}{title[1:]}, %" for name, title in METRIC_NAMES.items()},
}
MAX_POINTS = 240  # per series
MAX_CHARTS, MAX_LINES = 12, 8
MAX_VERSIONS = 20


class RunContent(NamedTuple):
    """Content that only a run's report has."""

    charts: list[ReportChart]
    charts_omitted: int
    encoder: EncoderDetail | None
    lineage: list[LineageNode]
    origin: list[tuple[str, str]]
    """(name, value) pairs for what determines the result besides the config: data, seed and versions."""


def read_origin(root: str, job_id: str, config: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Read what a run recorded when it started. For a run that has not started, return what its config specifies."""
    path = join(run_folder(root, job_id), FACTS)
    facts = read_json(path) if exists(path) else {}
    data, versions, flat = facts.get("data") or {}, facts.get("versions") or {}, flatten(config)
    known = {
        "Training data": flat.get("data.train"),
        "Samples": data.get("samples"),
        "Digest of the data": data.get("digest"),
        "Seed": flat.get("seed"),
        **dict(islice(versions.items(), MAX_VERSIONS)),
    }
    return [(name, number(value)) for name, value in known.items() if value is not None]


def read_curves(root: str, job_id: str) -> MetricsView:
    """Read the metrics of a run, downsampled for a report."""
    return RunMetrics(run_folder(root, job_id)).view((), MAX_POINTS, since_step=0)


def run_charts(metrics: MetricsView) -> tuple[list[ReportChart], int]:
    """Draw up to MAX_CHARTS charts of a run's metrics, and count the omitted charts."""
    groups: dict[str, list[SeriesView]] = {}
    for one in metrics.series:
        prefix = one.name.partition("/")[0]
        if prefix in PREFIXES:
            groups.setdefault(prefix if prefix == "loss" else one.name, []).append(one)
    names = sorted(groups, key=lambda name: (PREFIXES.index(name.partition("/")[0]), name))
    charts = [_chart(name, groups[name][:MAX_LINES]) for name in names[:MAX_CHARTS]]
    return charts, len(names) - len(charts)


def _chart(group: str, found: list[SeriesView]) -> ReportChart:
    lines = [
        ChartSeries(one.name, list(zip(one.steps, one.values, strict=True)), index) for index, one in enumerate(found)
    ]
    legend = [
        LegendEntry(colour_class(index), shortened(one.name, 80), number(_last(one.values)))
        for index, one in enumerate(found)
    ]
    title = TITLES.get(group, shortened(group, 80))
    return ReportChart(title, line_chart(lines, f"{title} over steps", "step"), legend)


def _last(values: list[float | None]) -> float | None:
    return next((value for value in reversed(values) if value is not None), None)
