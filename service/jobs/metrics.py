"""Run metrics as downsampled series, in which each bucket of steps keeps its lowest and highest value."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

from amd.training.reporting.metrics_reader import Line, read_metrics
from amd.training.run_folder import run_folder
from service.jobs.schemas import MetricsView, SeriesView
from service.web.bounded_calls import report_progress

Points = Sequence[tuple[int, float]]  # (step, value)


def read_series(
    root: str, job_id: str, names: Collection[str] = (), max_points: int = 500, since_step: int = 0
) -> MetricsView:
    """Read a job's metrics from the storage root; the arguments are those of `series`."""
    lines = read_metrics(run_folder(root, job_id), before_chunk=report_progress)
    return series(lines, names, max_points, since_step)


def series(lines: Sequence[Line], names: Collection[str], max_points: int, since_step: int = 0) -> MetricsView:
    """Return a series for each metric in `names`, or for all metrics if `names` is empty, starting at `since_step`."""
    known = sorted({name for line in lines for name in line if "/" in name})
    last_step = int(lines[-1]["step"]) if lines else None
    lines = [line for line in lines if line["step"] >= since_step] if since_step else lines
    found = []
    for name in known:
        if names and name not in names:
            continue
        points = [(int(line["step"]), float(line[name])) for line in lines if name in line]
        kept = downsample(points, max_points)
        values = [value if math.isfinite(value) else None for _, value in kept]
        found.append(SeriesView(name=name, steps=[step for step, _ in kept], values=values, points=len(points)))
    return MetricsView(series=found, names=known, last_step=last_step)


def downsample(points: Points, limit: int) -> Points:
    """Downsample a series to at most `limit` points.

    Keeps the first and last point, and the lowest and highest point of each equal-sized bucket in between, so that
    spikes stay visible at every zoom level.
    """
    if len(points) <= limit:
        return points
    if limit < 4:
        return [points[0], points[-1]][:limit]
    inner = points[1:-1]
    buckets = (limit - 2) // 2
    kept = [points[0]]
    for number in range(buckets):
        bucket = inner[number * len(inner) // buckets : (number + 1) * len(inner) // buckets]
        ordered = sorted(range(len(bucket)), key=lambda index: _order(bucket[index][1]))
        kept += [bucket[index] for index in sorted({ordered[0], ordered[-1]})]
    return [*kept, points[-1]]


def _order(value: float) -> float:
    """Return the sort key of a value. NaN sorts highest, so that it stays visible."""
    return math.inf if math.isnan(value) else value
