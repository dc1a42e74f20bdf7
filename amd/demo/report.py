"""Render the demo's results as a rich table, as Markdown and as JSON."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import mean, stdev
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict

from amd.storage import join

if TYPE_CHECKING:
    from rich.table import Table


class DemoRow(BaseModel):
    """One row of the table: an arm and its scores for each seed."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    key: str
    title: str
    knn: tuple[float, ...] = ()
    """Top-1 accuracy of the nearest-neighbour probe, in percent."""
    linear: tuple[float, ...] = ()
    """Top-1 accuracy of the linear probe, in percent."""
    finetuned: tuple[float, ...] = ()
    """Top-1 accuracy after fine-tuning the whole encoder on a few labels, in percent."""
    steps: tuple[int, ...] = ()
    seconds: tuple[float, ...] = ()
    """Training time in seconds, excluding start-up; a student's time excludes teacher training."""
    encoders: tuple[str, ...] = ()
    pictures: tuple[str, ...] = ()


class DemoSection(BaseModel):
    """The rows for one modality."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    key: str
    title: str
    chance: float
    """Top-1 accuracy of random guessing, in percent."""
    samples: int
    """Number of held-out samples used for scoring."""
    rows: tuple[DemoRow, ...]

    def row(self, key: str) -> DemoRow:
        return next(row for row in self.rows if row.key == key)


class DemoReport(BaseModel):
    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    storage: str
    seeds: tuple[int, ...]
    sections: tuple[DemoSection, ...]
    embedded: dict[str, str | int | list[float]]
    """Embedding of one file, computed by the published student: path, encoder, width and first values."""
    served: dict[str, str] | None = None
    """Endpoint that serves the student; keys: url, key_file, deployment, encoder."""
    seconds: float


def pictures_url(root: str) -> str:
    """Return the folder under a storage root in which the demo saves its pictures."""
    return join(root, "demo")


def mean_and_sd(values: Sequence[float], digits: int = 1) -> str:
    """Format a single value as is, and several values as mean ± sample standard deviation."""
    if not values:
        return "–"
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{mean(values):.{digits}f} ± {stdev(values):.{digits}f}"


COLUMNS: dict[str, Callable[[DemoRow], str]] = {
    "": lambda row: row.title,
    "kNN %": lambda row: mean_and_sd(row.knn),
    "linear %": lambda row: mean_and_sd(row.linear),
    "fine-tuned %": lambda row: mean_and_sd(row.finetuned),
    # equal lengths are shown without a deviation
    "steps": lambda row: mean_and_sd(row.steps[:1] if len(set(row.steps)) == 1 else row.steps, 0),
    "seconds": lambda row: mean_and_sd(row.seconds, 0),
}


def headings(report: DemoReport) -> list[str]:
    """Return the column names; `fine-tuned %` is omitted if no row has that score."""
    finetuned = any(row.finetuned for section in report.sections for row in section.rows)
    return [name for name in COLUMNS if finetuned or name != "fine-tuned %"]


def cells(row: DemoRow, names: Sequence[str]) -> list[str]:
    return [COLUMNS[name](row) for name in names]


def heading(section: DemoSection, seeds: int) -> str:
    spread = f", mean ± sd of {seeds} seeds" if seeds > 1 else ""
    return f"{section.title}; {section.samples} held out{spread}"


def guessing(section: DemoSection) -> DemoRow:
    return DemoRow(key="chance", title="guessing", knn=(section.chance,), linear=(section.chance,))


def table(report: DemoReport) -> Table:
    """Render all sections as one rich table."""
    from rich.table import Table

    shown = Table(title="Top-1 of frozen features on held-out digits", title_justify="left")
    names = headings(report)
    for name in names:
        shown.add_column(name, justify="right" if name else "left", no_wrap=bool(name))  # never truncate numbers
    for number, section in enumerate(report.sections):
        if number:
            shown.add_section()
        shown.add_row(f"[bold]{heading(section, len(report.seeds))}[/bold]")
        for row in (guessing(section), *section.rows):
            shown.add_row(*cells(row, names), style="bold green" if row.key == "amd" else None)
    return shown


def markdown(report: DemoReport) -> str:
    """Render the same table as Markdown, for a README."""
    lines, names = [], headings(report)
    for section in report.sections:
        lines += ["| " + " | ".join((heading(section, len(report.seeds)), *names[1:])) + " |"]
        lines += ["|---|" + "---:|" * (len(names) - 1)]
        for row in (guessing(section), *section.rows):
            first, *rest = cells(row, names)
            strong = "**" if row.key == "amd" else ""
            lines.append("| " + " | ".join([f"{strong}{first}{strong}", *rest]) + " |")
        lines.append("")
    return "\n".join(lines)
