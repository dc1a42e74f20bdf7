"""Progress output for a sweep: a live table on a terminal, plain lines in a log, nothing in quiet mode."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol, TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from amd.training.reporting.progress import LineWatcher, NullWatcher, ProgressBarWatcher, Watcher, duration
from tune_spaces.ledger import TrialRecord, first_line
from tune_spaces.report import Report
from tune_spaces.report import show as render_report
from tune_spaces.search.plan import SweepPlan

REFRESH_S = 0.5
MAX_TABLE_ROWS = 20  # running trials first, then the best


class SweepStatus(Protocol):
    """The sweep state that progress output needs."""

    @property
    def records(self) -> dict[int, TrialRecord]: ...
    def seconds(self) -> float: ...
    def unstarted(self) -> int: ...


class SearchProgress(Protocol):
    """Receives a sweep's events."""

    def on_plan(self, plan: SweepPlan, name: str) -> None: ...
    def log(self, text: str) -> None: ...
    def on_event(self, number: int, event: dict[str, Any]) -> None: ...
    def on_rung(self, record: TrialRecord) -> None: ...
    def on_trial_end(self, record: TrialRecord) -> None: ...
    def refresh(self, sweep: SweepStatus) -> None: ...
    def on_report(self, report: Report) -> None: ...
    def watcher(self) -> Any: ...
    def close(self) -> None: ...


class NullProgress:
    """Prints nothing."""

    def on_plan(self, plan: SweepPlan, name: str) -> None:
        pass

    def log(self, text: str) -> None:
        pass

    def on_event(self, number: int, event: dict[str, Any]) -> None:
        pass

    def on_rung(self, record: TrialRecord) -> None:
        pass

    def on_trial_end(self, record: TrialRecord) -> None:
        pass

    def refresh(self, sweep: SweepStatus) -> None:
        pass

    def on_report(self, report: Report) -> None:
        pass

    @contextmanager
    def watcher(self) -> Iterator[Watcher]:
        yield NullWatcher()

    def close(self) -> None:
        pass


class _PlanLogging(NullProgress):
    """Logs the plan; subclasses implement `log`."""

    def on_plan(self, plan: SweepPlan, name: str) -> None:
        self.log("\n".join([f"sweep      {name}", *plan.lines()]))


class LineProgress(_PlanLogging):
    """Prints one line per rung and per finished trial, for logs and pipes."""

    def __init__(self, out: TextIO) -> None:
        self._out = out

    def log(self, text: str) -> None:
        print(text, file=self._out, flush=True)

    def on_event(self, number: int, event: dict[str, Any]) -> None:
        if event["kind"] == "warning":
            self.log(f"trial {number}: WARNING {event['text']}")

    def on_rung(self, record: TrialRecord) -> None:
        last = record.rungs[-1]
        self.log(f"trial {record.number}: {last.score:.2f} after step {last.step}  {point(record)}")

    def on_trial_end(self, record: TrialRecord) -> None:
        if record.state != "succeeded":
            reason = f" ({record.reason}): {first_line(record.message)}" if record.reason else " early"
            self.log(f"trial {record.number}: {record.state}{reason}")

    def on_report(self, report: Report) -> None:
        Console(file=self._out).print(render_report(report))

    @contextmanager
    def watcher(self) -> Iterator[Watcher]:
        yield LineWatcher(self._out, seconds=10.0)


class TableProgress(_PlanLogging):
    """Shows trials in progress, the best so far, and the time left."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live: Live | None = None
        self._name = ""
        self._steps: dict[int, tuple[int, int, float]] = {}  # step, total steps, clips/s
        self._drawn = 0.0

    def on_plan(self, plan: SweepPlan, name: str) -> None:
        self._name = name
        super().on_plan(plan, name)

    def log(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False)

    def on_event(self, number: int, event: dict[str, Any]) -> None:
        if event["kind"] == "start":
            self._steps[number] = event["step"], event["steps"], 0.0
        elif event["kind"] == "step":
            _, total, _ = self._steps.get(number, (0, 0, 0.0))
            self._steps[number] = event["step"], total, event["speed"]
        elif event["kind"] == "warning":
            self._console.print(f"trial {number}: {event['text']}", style="yellow", highlight=False, markup=False)

    def on_trial_end(self, record: TrialRecord) -> None:
        if record.state == "failed":
            self.log(f"trial {record.number} failed ({record.reason}): {first_line(record.message)}")

    def refresh(self, sweep: SweepStatus) -> None:
        if time.monotonic() - self._drawn < REFRESH_S:
            return
        self._drawn = time.monotonic()
        if self._live is None:
            self._live = Live(console=self._console, auto_refresh=False, transient=True)
            self._live.start()
        self._live.update(self._draw(sweep), refresh=True)

    def on_report(self, report: Report) -> None:
        self.close()
        self._console.print(render_report(report))

    @contextmanager
    def watcher(self) -> Iterator[Watcher]:
        bar = ProgressBarWatcher(self._console)
        try:
            yield bar
        finally:
            bar.close()

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _draw(self, sweep: SweepStatus) -> Group:
        table = Table(title=self._name, title_justify="left")
        for column in ("trial", "point", "state", "step", "clips/s", "score", "rung"):
            table.add_column(column, justify="left" if column in ("point", "state") else "right")
        for record in _order(sweep.records)[:MAX_TABLE_ROWS]:
            step, total, speed = self._steps.get(record.number, (0, 0, 0.0))
            running = record.state == "running"
            table.add_row(
                str(record.number),
                Text(point(record), overflow="ellipsis", no_wrap=True),
                record.state,
                f"{step}/{total}" if running and total else "",
                f"{speed:.0f}" if running and speed else "",
                f"{record.score:.2f}" if record.score is not None else "",
                f"{record.rungs[-1].fraction:.0%}" if record.rungs else "",
                style="bold" if running else "dim" if record.state == "stopped" else None,
            )
        return Group(table, Text(status(sweep)))


def status(sweep: SweepStatus) -> str:
    """Return one line with the progress, the best score and the remaining time."""
    records = sweep.records.values()
    done = [record for record in records if record.state != "running"]
    left = sweep.unstarted() + len(records) - len(done)
    line = f"{len(done)} of {len(done) + left} trials finished"
    best = max((r for r in records if r.rungs and r.rungs[-1].fraction == 1), key=lambda r: r.score or 0, default=None)
    if best is not None:
        line += f"   best so far: {best.score:.2f}, trial {best.number}"
    line += f"   {duration(sweep.seconds())}"
    if done:
        line += f", about {duration(sweep.seconds() / len(done) * (left + sweep.unstarted()) / 2)} left"
    return line


def _order(records: dict[int, TrialRecord]) -> list[TrialRecord]:
    return sorted(
        records.values(),
        key=lambda r: (r.state != "running", -(r.rungs[-1].fraction if r.rungs else 0), -(r.score or 0)),
    )


def point(record: TrialRecord) -> str:
    """Format a point compactly, using only the last part of each name."""
    values = "  ".join(f"{name.rpartition('.')[2]}={_short(value)}" for name, value in record.point.items())
    parent = f"  (from trial {record.parent})" if record.parent is not None else ""
    return values + ("  (baseline)" if record.baseline else parent)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def open_progress(quiet: bool) -> SearchProgress:
    """Return progress output that shows a live table on a terminal and writes plain log lines otherwise.

    Both write to standard error, leaving standard output for results.
    """
    if quiet:
        return NullProgress()
    console = Console(stderr=True)
    return TableProgress(console) if console.is_terminal else LineProgress(sys.stderr)
