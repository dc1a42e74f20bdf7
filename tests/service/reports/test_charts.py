"""Tests that charts are valid SVG with all marks inside the image, for any numbers and any text."""

from __future__ import annotations

import math
import re
from xml.etree import ElementTree

from hypothesis import given
from hypothesis import strategies as st

from service.reports.charts import (
    HEIGHT,
    LARGEST,
    WIDTH,
    ChartPoint,
    ChartSeries,
    HeatCell,
    heat_map,
    line_chart,
    scatter_plot,
    ticks,
)

NUMBERS = st.floats(-1e12, 1e12)
VALUES = st.one_of(st.none(), st.floats())
TEXT = st.text(st.characters(blacklist_categories=("Cs", "Cc")), max_size=200)  # what XML 1.0 can contain


def parsed(svg: str) -> ElementTree.Element:
    return ElementTree.fromstring(svg)


def positions(root: ElementTree.Element) -> list[tuple[float, float]]:
    lines = [line.get("points", "") for line in root.iter("polyline")]
    found = [tuple(map(float, pair.split(","))) for line in lines for pair in line.split()]
    found += [(float(dot.get("cx", "")), float(dot.get("cy", ""))) for dot in root.iter("circle")]
    return found  # type: ignore[return-value]  # pairs


@given(st.lists(st.tuples(NUMBERS, VALUES), max_size=20), TEXT)
def test_finite_points_of_a_line_are_drawn_inside_the_image(
    points: list[tuple[float, float | None]], name: str
) -> None:
    finite = [y for _, y in points if y is not None and abs(y) < LARGEST]
    svg = line_chart([ChartSeries(name, points)], name, name, name)
    if not finite:
        assert svg == ""
        return
    found = positions(parsed(svg))
    assert len(found) == len(finite)
    assert all(0 <= x <= WIDTH and 0 <= y <= HEIGHT for x, y in found)


def test_a_line_is_broken_where_values_are_missing() -> None:
    points = [(0, 1.0), (1, 2.0), (2, None), (3, math.nan), (4, 3.0), (5, 1.0), (6, math.inf), (7, 2.0)]
    root = parsed(line_chart([ChartSeries("loss", points)], "Loss", "step"))
    assert [len(line.get("points", "").split()) for line in root.iter("polyline")] == [2, 2]
    assert len(list(root.iter("circle"))) == 1  # a single value has no line


def test_higher_values_are_drawn_higher_and_later_steps_further_right() -> None:
    found = positions(parsed(line_chart([ChartSeries("loss", [(0, 1.0), (10, 3.0), (20, 2.0)])], "Loss", "step")))
    (x0, y0), (x1, y1), (x2, y2) = found
    assert x0 < x1 < x2
    assert y0 > y2 > y1


@given(st.lists(st.tuples(TEXT, NUMBERS, NUMBERS, st.booleans()), max_size=8))
def test_a_scatter_plot_has_one_named_dot_per_point(points: list[tuple[str, float, float, bool]]) -> None:
    svg = scatter_plot([ChartPoint(*point) for point in points], "Score", "speed", "score")
    if not points:
        assert svg == ""
        return
    root = parsed(svg)
    assert len(list(root.iter("circle"))) == len(points)
    marked = sum(point[3] for point in points)
    (front,) = root.iter("polyline")
    assert len(front.get("points", "").split()) == marked


@given(st.lists(st.tuples(st.floats(), st.booleans(), TEXT), max_size=6))
def test_a_heat_map_colours_only_comparable_cells(cells: list[tuple[float, bool, str]]) -> None:
    names = [str(index) for index in range(6)]
    drawn = [HeatCell(index, index, value, [text], same) for index, (value, same, text) in enumerate(cells)]
    root = parsed(heat_map(names, names, drawn, "Scores", "student", "teacher"))
    fills = [rect.get("fill") for rect in root.iter("rect")]
    assert len(fills) == len(cells)
    for (value, same, _), fill in zip(cells, fills, strict=True):
        assert re.fullmatch("#[0-9a-f]{6}", fill or "")
        assert (fill == "#f1f1ef") == (not same or not abs(value) < LARGEST)


@given(st.floats(-1e9, 1e9), st.floats(1e-6, 1e9))
def test_ticks_are_few_and_inside_their_range(low: float, span: float) -> None:
    found = ticks(low, low + span)
    assert len(found) <= 12
    margin = 1e-6 * max(abs(low), span)
    assert all(low - margin <= value <= low + span + margin for value in found)
    assert found == sorted(found)


def test_text_is_escaped() -> None:
    nasty = "</title><script>alert(1)</script>\"'"
    svg = scatter_plot([ChartPoint(nasty, 1.0, 2.0)], nasty, nasty, nasty)
    assert "<script" not in svg
    assert {element.tag for element in parsed(svg).iter()} == {"svg", "line", "text", "polyline", "circle", "title"}
