"""What the demo found, as one table for people, as markdown, and as JSON. Knows nothing of how it was found."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import mean, stdev
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    from rich.table import Table


class Row(BaseModel):
    """One line of the table: what was probed, and its figures, one for each seed."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    key: str
    title: str
    knn: tuple[float, ...] = ()
    """Top-1 in percent of the nearest-neighbour probe."""
    linear: tuple[float, ...] = ()
    """Top-1 in percent of the linear probe."""
    finetuned: tuple[float, ...] = ()
    """Top-1 in percent after fine-tuning the whole encoder on few labels."""
    steps: tuple[int, ...] = ()
    seconds: tuple[float, ...] = ()
    """Training alone, without start-up; a student's does not contain its teacher's."""
    encoders: tuple[str, ...] = ()
    pictures: tuple[str, ...] = ()


class Section(BaseModel):
    """One modality."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    key: str
    title: str
    chance: float
    """Percent that guessing reaches."""
    samples: int
    """Held-out samples scored."""
    rows: tuple[Row, ...]

    def row(self, key: str) -> Row:
        return next(row for row in self.rows if row.key == key)


class DemoReport(BaseModel):
    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    storage: str
    seeds: tuple[int, ...]
    sections: tuple[Section, ...]
    embedded: dict[str, str | int | list[float]]
    """One file embedded with the published student: path, encoder, width, first values."""
    served: dict[str, str] | None = None
    """Where the student answers requests: url, key_file, deployment, encoder."""
    seconds: float


def figure(values: Sequence[float], digits: int = 1) -> str:
    """One value as it is; several as mean ± sample standard deviation."""
    if not values:
        return "–"
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{mean(values):.{digits}f} ± {stdev(values):.{digits}f}"


COLUMNS: dict[str, Callable[[Row], str]] = {
    "": lambda row: row.title,
    "kNN %": lambda row: figure(row.knn),
    "linear %": lambda row: figure(row.linear),
    "fine-tuned %": lambda row: figure(row.finetuned),
    # of equal lengths nothing is to be averaged
    "steps": lambda row: figure(row.steps[:1] if len(set(row.steps)) == 1 else row.steps, 0),
    "seconds": lambda row: figure(row.seconds, 0),
}


def headings(report: DemoReport) -> list[str]:
    """The columns that have something to show."""
    tuned = any(row.finetuned for section in report.sections for row in section.rows)
    return [name for name in COLUMNS if tuned or name != "fine-tuned %"]


def cells(row: Row, names: Sequence[str]) -> list[str]:
    return [COLUMNS[name](row) for name in names]


def heading(section: Section, seeds: int) -> str:
    spread = f", mean ± sd of {seeds} seeds" if seeds > 1 else ""
    return f"{section.title}; {section.samples} held out{spread}"


def guessing(section: Section) -> Row:
    return Row(key="chance", title="guessing", knn=(section.chance,), linear=(section.chance,))


def table(report: DemoReport) -> Table:
    """All sections in one rich table."""
    from rich.table import Table

    shown = Table(title="What the frozen features are worth: top-1 on digits no network saw", title_justify="left")
    names = headings(report)
    for name in names:
        shown.add_column(name, justify="right" if name else "left", no_wrap=bool(name))  # figures are never cut
    for number, section in enumerate(report.sections):
        if number:
            shown.add_section()
        shown.add_row(f"[bold]{heading(section, len(report.seeds))}[/bold]")
        for row in (guessing(section), *section.rows):
            shown.add_row(*cells(row, names), style="bold green" if row.key == "amd" else None)
    return shown


def markdown(report: DemoReport) -> str:
    """The same as a table for a README."""
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
