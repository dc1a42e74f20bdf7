"""A run's metrics as series, with fewer points where fewer are asked for: each bucket keeps its lowest and highest."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

from amd.training.reporting.metrics import Line
from service.jobs.schemas import MetricsView, SeriesView

Points = Sequence[tuple[int, float]]  # (step, value)


def series(lines: Sequence[Line], names: Collection[str], max_points: int) -> MetricsView:
    """`names`: none means all."""
    known = sorted({name for line in lines for name in line if "/" in name})
    found = []
    for name in known:
        if names and name not in names:
            continue
        points = [(int(line["step"]), float(line[name])) for line in lines if name in line]
        kept = thinned(points, max_points)
        values = [value if math.isfinite(value) else None for _, value in kept]
        found.append(SeriesView(name=name, steps=[step for step, _ in kept], values=values, points=len(points)))
    return MetricsView(series=found, names=known, last_step=int(lines[-1]["step"]) if lines else None)


def thinned(points: Points, most: int) -> Points:
    """At most so many points, in order: the first, the last, and of equal buckets between them the lowest and highest.

    A spike is never lost, whatever the zoom.
    """
    if len(points) <= most:
        return points
    if most < 4:
        return [points[0], points[-1]][:most]
    inner = points[1:-1]
    buckets = (most - 2) // 2
    kept = [points[0]]
    for number in range(buckets):
        bucket = inner[number * len(inner) // buckets : (number + 1) * len(inner) // buckets]
        ordered = sorted(range(len(bucket)), key=lambda place: _order(bucket[place][1]))
        kept += [bucket[place] for place in sorted({ordered[0], ordered[-1]})]
    return [*kept, points[-1]]


def _order(value: float) -> float:
    """A value that is no number stands out: it counts as the highest."""
    return math.inf if math.isnan(value) else value
