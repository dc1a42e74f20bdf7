"""Tests for tables at several widths: they fit, wrap names, omit columns in order, and truncate nothing."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from service.cli.tables import Column, facts_table, fitted_table

Row = tuple[str, str, str, str]
ID = "train-20260101-120000-1a2b3c4d"
COLUMNS: tuple[Column[Row], ...] = (
    Column("id", lambda row: row[0], wraps=False),
    Column("name", lambda row: row[1]),
    Column("progress", lambda row: row[2], drop=2),
    Column("created", lambda row: row[3], wraps=False, drop=1),
)


def lines(rows: list[Row], width: int, columns: tuple[Column[Row], ...] = COLUMNS) -> list[str]:
    console = Console(width=width, color_system=None)
    with console.capture() as captured:
        console.print(fitted_table(columns, rows, width))
    return [line.rstrip() for line in captured.get().splitlines()]


def test_a_table_is_one_line_per_row_if_it_fits() -> None:
    found = lines([(ID, "a name", "3/10", "5 min ago")], 80)
    assert found == [
        "id                              name    progress  created",
        f"{ID}  a name  3/10      5 min ago",
    ]


def test_names_wrap_before_a_column_is_omitted() -> None:
    found = lines([(ID, "a long name of several parts", "1200/40000, 12 min left", "5 min ago")], 80)
    assert found[0].split() == ["id", "name", "progress", "created"]
    assert len(found) > 2, "the name continues on other lines"


def test_columns_are_omitted_in_the_defined_order_and_the_id_is_never_truncated() -> None:
    row = (ID, "a long name of several parts", "1200/40000, 12 min left", "5 min ago")
    headers = {width: lines([row], width)[0].split() for width in (80, 65, 45)}
    assert headers == {
        80: ["id", "name", "progress", "created"],
        65: ["id", "name", "progress"],
        45: ["id", "name"],
    }
    assert all(any(line.startswith(ID) for line in lines([row], width)) for width in headers)


def test_an_empty_column_is_omitted_first() -> None:
    found = lines([(ID, "a long name of several parts", "", "5 min ago")], 60)
    assert found[0].split() == ["id", "name", "created"]


def test_markup_in_a_cell_is_printed_verbatim() -> None:
    assert "[red]mine[/red]" in lines([(ID, "[red]mine[/red]", "", "")], 80)[1]


TEXT = st.text(st.characters(codec="ascii", categories=("L", "N", "P")) | st.just(" "), max_size=60)


@given(rows=st.lists(st.tuples(TEXT, TEXT, TEXT, TEXT), min_size=1, max_size=4), width=st.integers(20, 100))
def test_no_line_exceeds_the_width_and_no_character_is_lost(rows: list[Row], width: int) -> None:
    kept = tuple(column._replace(drop=None) for column in COLUMNS)
    found = lines(rows, width, kept)
    assert all(len(line) <= width for line in found)
    expected = sorted("".join(["idnameprogresscreated", *(cell for row in rows for cell in row)]).replace(" ", ""))
    assert sorted("".join(found).replace(" ", "")) == expected


@pytest.mark.parametrize("width", [40, 80])
def test_a_long_path_wraps_onto_the_next_line(width: int) -> None:
    console = Console(width=width, color_system=None)
    path = "/storage/" + "x" * 100
    with console.capture() as captured:
        console.print(facts_table([("run", path), ("encoder", "")]))
    assert captured.get().replace("run", "").replace("\n", "").replace(" ", "") == path
