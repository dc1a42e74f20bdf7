"""What a person sees of a sweep: a live table of trials on a terminal, plain lines in a log, nothing when quiet."""

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

from amd.training.reporting.progress import Bar, Lines, Silence, Watcher, duration
from tune_spaces.ledger import TrialRecord, first_line
from tune_spaces.report import Report
from tune_spaces.report import show as shown_report
from tune_spaces.search.plan import Plan

REFRESH_S = 0.5
SHOWN = 20  # trials in the live table: those that run, then the best


class Sweeping(Protocol):
    """What is asked of a sweep."""

    @property
    def records(self) -> dict[int, TrialRecord]: ...
    def seconds(self) -> float: ...
    def unbegun(self) -> int: ...


class Show(Protocol):
    def plan(self, plan: Plan, name: str) -> None: ...
    def say(self, text: str) -> None: ...
    def see(self, number: int, event: dict[str, Any]) -> None: ...
    def rung(self, record: TrialRecord) -> None: ...
    def ended(self, record: TrialRecord) -> None: ...
    def beat(self, sweep: Sweeping) -> None: ...
    def report(self, report: Report) -> None: ...
    def watching(self) -> Any: ...
    def close(self) -> None: ...


class Quiet:
    """Says nothing."""

    def plan(self, plan: Plan, name: str) -> None:
        pass

    def say(self, text: str) -> None:
        pass

    def see(self, number: int, event: dict[str, Any]) -> None:
        pass

    def rung(self, record: TrialRecord) -> None:
        pass

    def ended(self, record: TrialRecord) -> None:
        pass

    def beat(self, sweep: Sweeping) -> None:
        pass

    def report(self, report: Report) -> None:
        pass

    @contextmanager
    def watching(self) -> Iterator[Watcher]:
        yield Silence()

    def close(self) -> None:
        pass


class Telling(Quiet):
    """Says the plan; subclasses say how."""

    def plan(self, plan: Plan, name: str) -> None:
        self.say("\n".join([f"sweep      {name}", *plan.lines()]))


class PlainLines(Telling):
    """One line for each rung and each end: for logs and pipes."""

    def __init__(self, out: TextIO) -> None:
        self._out = out

    def say(self, text: str) -> None:
        print(text, file=self._out, flush=True)

    def see(self, number: int, event: dict[str, Any]) -> None:
        if event["kind"] == "warning":
            self.say(f"trial {number}: WARNING {event['text']}")

    def rung(self, record: TrialRecord) -> None:
        last = record.rungs[-1]
        self.say(f"trial {record.number}: {last.score:.2f} after step {last.step}  {point(record)}")

    def ended(self, record: TrialRecord) -> None:
        if record.state != "succeeded":
            why = f" ({record.reason}): {first_line(record.message)}" if record.reason else " early"
            self.say(f"trial {record.number}: {record.state}{why}")

    def report(self, report: Report) -> None:
        Console(file=self._out).print(shown_report(report))

    @contextmanager
    def watching(self) -> Iterator[Watcher]:
        yield Lines(self._out, seconds=10.0)


class LiveTable(Telling):
    """Trials as they go, the best so far, and the time left."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live: Live | None = None
        self._name = ""
        self._steps: dict[int, tuple[int, int, float]] = {}  # step, of, clips/s
        self._drawn = 0.0

    def plan(self, plan: Plan, name: str) -> None:
        self._name = name
        super().plan(plan, name)

    def say(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False)

    def see(self, number: int, event: dict[str, Any]) -> None:
        if event["kind"] == "start":
            self._steps[number] = event["step"], event["steps"], 0.0
        elif event["kind"] == "step":
            _, of, _ = self._steps.get(number, (0, 0, 0.0))
            self._steps[number] = event["step"], of, event["speed"]
        elif event["kind"] == "warning":
            self._console.print(f"trial {number}: {event['text']}", style="yellow", highlight=False, markup=False)

    def ended(self, record: TrialRecord) -> None:
        if record.state == "failed":
            self.say(f"trial {record.number} failed ({record.reason}): {first_line(record.message)}")

    def beat(self, sweep: Sweeping) -> None:
        if time.monotonic() - self._drawn < REFRESH_S:
            return
        self._drawn = time.monotonic()
        if self._live is None:
            self._live = Live(console=self._console, auto_refresh=False, transient=True)
            self._live.start()
        self._live.update(self._draw(sweep), refresh=True)

    def report(self, report: Report) -> None:
        self.close()
        self._console.print(shown_report(report))

    @contextmanager
    def watching(self) -> Iterator[Watcher]:
        bar = Bar(self._console)
        try:
            yield bar
        finally:
            bar.close()

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _draw(self, sweep: Sweeping) -> Group:
        table = Table(title=self._name, title_justify="left")
        for column in ("trial", "point", "state", "step", "clips/s", "score", "rung"):
            table.add_column(column, justify="left" if column in ("point", "state") else "right")
        for record in _order(sweep.records)[:SHOWN]:
            step, of, speed = self._steps.get(record.number, (0, 0, 0.0))
            running = record.state == "running"
            table.add_row(
                str(record.number),
                Text(point(record), overflow="ellipsis", no_wrap=True),
                record.state,
                f"{step}/{of}" if running and of else "",
                f"{speed:.0f}" if running and speed else "",
                f"{record.score:.2f}" if record.score is not None else "",
                f"{record.rungs[-1].fraction:.0%}" if record.rungs else "",
                style="bold" if running else "dim" if record.state == "stopped" else None,
            )
        return Group(table, Text(status(sweep)))


def status(sweep: Sweeping) -> str:
    """How far, how good, how long yet."""
    records = sweep.records.values()
    done = [record for record in records if record.state != "running"]
    left = sweep.unbegun() + len(records) - len(done)
    line = f"{len(done)} of {len(done) + left} trials ended"
    best = max((r for r in records if r.rungs and r.rungs[-1].fraction == 1), key=lambda r: r.score or 0, default=None)
    if best is not None:
        line += f"   best so far: {best.score:.2f}, trial {best.number}"
    line += f"   {duration(sweep.seconds())}"
    if done:
        line += f", about {duration(sweep.seconds() / len(done) * (left + sweep.unbegun()) / 2)} left"
    return line


def _order(records: dict[int, TrialRecord]) -> list[TrialRecord]:
    return sorted(
        records.values(),
        key=lambda r: (r.state != "running", -(r.rungs[-1].fraction if r.rungs else 0), -(r.score or 0)),
    )


def point(record: TrialRecord) -> str:
    """A point in short: last words of names and their values."""
    words = "  ".join(f"{name.rpartition('.')[2]}={_short(value)}" for name, value in record.point.items())
    parent = f"  (from trial {record.parent})" if record.parent is not None else ""
    return words + ("  (baseline)" if record.baseline else parent)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def show(quiet: bool) -> Show:
    """A table on a terminal, lines elsewhere; both on standard error, so that standard output stays for results."""
    if quiet:
        return Quiet()
    console = Console(stderr=True)
    return LiveTable(console) if console.is_terminal else PlainLines(sys.stderr)
