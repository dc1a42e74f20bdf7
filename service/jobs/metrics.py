"""Run metrics as downsampled series, in which each bucket of steps keeps its lowest and highest value.

The metrics of recently requested runs are kept in memory. A chunk never changes, so it is read once.
"""

from __future__ import annotations

import json
import math
import threading
from array import array
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Collection, Sequence

from amd.storage import join, read_bytes
from amd.training.reporting.metrics_reader import Line, chunk_names
from amd.training.run_folder import FACTS
from service.jobs.schemas import MetricsView, SeriesView
from service.web.bounded_calls import report_progress

MAX_CACHED_POINTS = 4_000_000  # 16 bytes each
WAIT_S = 0.2


class MetricsCache:
    """Metrics of the most recently requested runs. Thread-safe."""

    def __init__(self, max_points: int = MAX_CACHED_POINTS) -> None:
        self._max_points = max_points
        self._runs: OrderedDict[str, RunMetrics] = OrderedDict()
        self._lock = threading.Lock()

    def view(self, run_folder: str, names: Collection[str], max_points: int, since_step: int = 0) -> MetricsView:
        """Return a series for each metric in `names`, or for all metrics if `names` is empty, starting at `since_step`.

        Reads the chunks written since the last call.
        """
        with self._lock:
            run = self._runs.setdefault(run_folder, RunMetrics(run_folder))
            self._runs.move_to_end(run_folder)
        view = run.view(names, max_points, since_step)
        with self._lock:
            while len(self._runs) > 1 and sum(each.points for each in self._runs.values()) > self._max_points:
                self._runs.popitem(last=False)
        return view


class RunMetrics:
    """Metrics of one run, in memory."""

    def __init__(self, run_folder: str) -> None:
        self._folder = run_folder
        self._lock = threading.Lock()
        self._facts = b""
        self._clear()

    def _clear(self) -> None:
        self._chunks: set[str] = set()
        self._series: dict[str, _Series] = {}
        self._last_step: int | None = None
        self.points = 0

    def view(self, names: Collection[str], max_points: int, since_step: int) -> MetricsView:
        """Read new chunks and return the series."""
        self._acquire()
        try:
            self._update()
            chosen = sorted(self._series.keys() & set(names) if names else self._series)
            series = [self._series[name].view(name, max_points, since_step) for name in chosen]
            return MetricsView(series=series, names=sorted(self._series), last_step=self._last_step)
        finally:
            self._lock.release()

    def _acquire(self) -> None:
        """Wait for other requests for this run, extending the call's timeout while they make progress."""
        chunks = -1
        while not self._lock.acquire(timeout=WAIT_S):
            if len(self._chunks) != chunks:
                chunks = len(self._chunks)
                report_progress()

    def _update(self) -> None:
        facts = _read_or_empty(join(self._folder, FACTS))
        if facts != self._facts:  # a different run with the same name
            self._facts = facts
            self._clear()
        for name in chunk_names(self._folder):
            if name not in self._chunks:
                report_progress()
                for text in read_bytes(join(self._folder, "metrics", name)).decode().splitlines():
                    self._add(json.loads(text))
                self._chunks.add(name)
        self.points = sum(len(series.steps) for series in self._series.values())

    def _add(self, line: Line) -> None:
        step = int(line["step"])
        self._last_step = step if self._last_step is None else max(step, self._last_step)
        for name, value in line.items():
            if "/" in name:
                self._series.setdefault(name, _Series()).add(step, float(value))


class _Series:
    """A metric's values, ordered by step."""

    def __init__(self) -> None:
        self.steps = array("q")
        self.values = array("d")

    def add(self, step: int, value: float) -> None:
        """Add a value, replacing any earlier value for this step: a resumed run repeats steps."""
        value = math.inf if math.isnan(value) else value  # neither is shown, and NaN cannot be ordered
        if not self.steps or step > self.steps[-1]:
            self.steps.append(step)
            self.values.append(value)
            return
        at = bisect_left(self.steps, step)
        if self.steps[at] == step:
            self.values[at] = value
        else:
            self.steps.insert(at, step)
            self.values.insert(at, value)

    def view(self, name: str, max_points: int, since_step: int) -> SeriesView:
        start = bisect_left(self.steps, since_step)
        steps, values = self.steps[start:], self.values[start:]
        kept = downsample(values, max_points)
        return SeriesView(
            name=name,
            steps=[steps[index] for index in kept],
            values=[values[index] if math.isfinite(values[index]) else None for index in kept],
            points=len(steps),
        )


def _read_or_empty(url: str) -> bytes:
    try:
        return read_bytes(url)
    except FileNotFoundError:
        return b""


def downsample(values: Sequence[float], limit: int) -> Sequence[int]:
    """Return the indices of the values to keep, at most `limit`. No value may be NaN.

    Keeps the first and last value, and the lowest and highest value of each equal-sized bucket in between, so that
    spikes stay visible at every zoom level.
    """
    if len(values) <= limit:
        return range(len(values))
    last = len(values) - 1
    if limit < 4:
        return [0, last][:limit]
    buckets = (limit - 2) // 2
    kept = [0]
    for number in range(buckets):
        start = 1 + number * (last - 1) // buckets
        bucket = values[start : 1 + (number + 1) * (last - 1) // buckets]
        kept += [start + index for index in sorted({bucket.index(min(bucket)), bucket.index(max(bucket))})]
    return [*kept, last]
