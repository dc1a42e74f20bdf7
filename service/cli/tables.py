"""Tables that fit a terminal of any width: text wraps or columns are dropped, but no text is cut off."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, NamedTuple, TypeVar

from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from service.cli.console import out

T = TypeVar("T")

GAP = 2  # spaces between columns
NARROW = 12


class Column(NamedTuple, Generic[T]):
    """A column of a table whose rows are values of type T."""

    title: str
    cell: Callable[[T], str | Text]
    """Content for a row. A str is printed verbatim, without markup."""
    wraps: bool = True
    """Whether the content may wrap onto the next line. IDs do not wrap, so that they can be copied."""
    narrow: int = NARROW
    """Minimum width of a wrapping column; if it would need to be narrower, a column is dropped instead."""
    drop: int | None = None
    """Drop priority: columns with the lowest value are dropped first, but empty columns are dropped before all others.
    None: the column is never dropped."""


class _FilledColumn(NamedTuple):
    title: str
    cells: list[Text]
    widest: int
    narrowest: int
    drop: int | None

    @property
    def is_empty(self) -> bool:
        return not any(self.cells)


def fitted_table(columns: Sequence[Column[T]], rows: Sequence[T], width: int) -> Table:
    """Return a table of at most `width` characters."""
    filled = [_fill(column, rows) for column in columns]
    while _total([column.narrowest for column in filled]) > width:
        droppable = [column for column in filled if column.drop is not None]
        if not droppable:
            break
        filled.remove(min(droppable, key=lambda column: (not column.is_empty, column.drop or 0)))
    table = Table(box=None, pad_edge=False)
    for column, column_width in zip(filled, _widths(filled, width), strict=True):
        table.add_column(column.title, width=column_width, overflow="fold")
    for row in zip(*(column.cells for column in filled), strict=True):
        table.add_row(*row)
    return table


def facts_table(facts: Sequence[tuple[str, str | Text]]) -> Table:
    """Return a table of names and values without a header. Facts with an empty value are omitted."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts:
        if value:
            table.add_row(name, _as_text(value))
    return table


def _fill(column: Column[T], rows: Sequence[T]) -> _FilledColumn:
    cells = [_as_text(column.cell(row)) for row in rows]
    widest = max(Measurement.get(out, out.options, text).maximum for text in (Text(column.title), *cells))
    narrowest = min(widest, column.narrow) if column.wraps else widest
    return _FilledColumn(column.title, cells, widest, narrowest, column.drop)


def _widths(columns: Sequence[_FilledColumn], width: int) -> list[int]:
    """Narrow the widest columns until all fit; columns are narrowed below their minimum width only as a last resort."""
    widths = [column.widest for column in columns]
    while _total(widths) > width and max(widths) > 1:
        index = max(range(len(widths)), key=lambda i: (widths[i] > columns[i].narrowest, widths[i]))
        widths[index] -= 1
    return widths


def _total(widths: Sequence[int]) -> int:
    return sum(widths) + GAP * (len(widths) - 1)


def _as_text(value: str | Text) -> Text:
    return value if isinstance(value, Text) else Text(value)
