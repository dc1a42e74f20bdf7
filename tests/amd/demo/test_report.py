from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from amd.demo.report import DemoReport, DemoRow, DemoSection, cells, markdown, mean_and_sd, table


def report(seeds: int = 1) -> DemoReport:
    rows = (
        DemoRow(key="pixels", title="raw pixels", knn=(96.8,), linear=(95.6,)),
        DemoRow(
            key="amd",
            title="student by AMD",
            knn=(81.0, 82.0, 83.0)[:seeds],
            linear=(86.0, 86.0, 89.0)[:seeds],
            steps=(500, 500, 500)[:seeds],
            seconds=(33.4, 30.0, 31.0)[:seeds],
            encoders=("/s/encoders/a",),
        ),
    )
    section = DemoSection(key="image", title="Images", chance=10, samples=400, rows=rows)
    embedded = {"file": "x.png", "width": 64, "values": [0.1]}
    return DemoReport(storage="/s", seeds=tuple(range(seeds)), sections=(section,), embedded=embedded, seconds=60)


@pytest.mark.parametrize(
    ("values", "shown"), [((), "–"), ((81.04,), "81.0"), ((81.0, 82.0, 83.0), "82.0 ± 1.0"), ((5.0, 5.0), "5.0 ± 0.0")]
)
def test_several_seeds_are_shown_as_mean_and_sample_standard_deviation(values: tuple[float, ...], shown: str) -> None:
    assert mean_and_sd(values) == shown


def test_the_table_shows_every_row_with_its_metrics_steps_and_seconds() -> None:
    console = Console(file=io.StringIO(), width=120)
    console.print(table(report(seeds=3)))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "Images; 400 held out, mean ± sd of 3 seeds" in text
    assert "10.0" in next(line for line in text.splitlines() if "guessing" in line)
    line = next(line for line in text.splitlines() if "student by AMD" in line)
    for expected in ("82.0 ± 1.0", "87.0 ± 1.7", "500", "31 ± 2"):
        assert expected in line
    assert "96.8" in next(line for line in text.splitlines() if "raw pixels" in line)


def test_steps_that_differ_between_seeds_are_shown_as_mean_and_standard_deviation() -> None:
    row = DemoRow(key="mae-time", title="as long as AMD takes", steps=(900, 700, 1200))
    assert cells(row, ["steps"]) == ["933 ± 252"]
    assert cells(row.model_copy(update={"steps": (500, 500, 500)}), ["steps"]) == ["500"]


def test_narrow_terminals_wrap_titles_but_not_numbers() -> None:
    console = Console(file=io.StringIO(), width=60)
    console.print(table(report(seeds=3)))
    for expected in ("82.0 ± 1.0", "87.0 ± 1.7", "500", "31 ± 2"):
        assert expected in console.file.getvalue()  # type: ignore[attr-defined]


def test_markdown_rows_have_equal_cell_counts() -> None:
    lines = [line for line in markdown(report()).splitlines() if line]
    assert len(lines) == 5
    assert {line.count("|") for line in lines} == {6}
    assert "| **student by AMD** | 81.0 | 86.0 | 500 | 33 |" in lines


def test_a_report_round_trips_through_json() -> None:
    first = report(seeds=3)
    assert DemoReport.model_validate(json.loads(first.model_dump_json())) == first
    assert first.sections[0].row("amd").steps == (500, 500, 500)
