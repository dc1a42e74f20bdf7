"""Draw line charts, scatter plots and heat maps as SVG, to be embedded in an HTML page.

All text is escaped. Series colours are the CSS classes c1 to c8, which the page's style sheet defines.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from markupsafe import Markup

from service.web.formats import number, shortened

WIDTH, HEIGHT = 520, 250
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 12, 38  # margins
COLOURS = 8  # number of colour classes for series
SCALE = ((233, 238, 247), (156, 195, 227), (63, 143, 181), (20, 80, 111))  # RGB of low to high scores
LARGEST = 1e300  # values beyond it are not drawn, since their differences could overflow
LIGHT = 0.5  # luminance above which text on a cell is dark


class ChartSeries(NamedTuple):
    """One line of a chart."""

    name: str
    points: Sequence[tuple[float, float | None]]
    """(x, y) pairs; the line is interrupted where a value is missing or not finite."""
    colour: int = 0
    """Index of the colour, starting at 0."""
    is_faint: bool = False


class ChartPoint(NamedTuple):
    """One point of a scatter plot."""

    name: str
    x: float
    y: float
    is_marked: bool = False
    """Whether the line through the marked points passes through this one."""


class HeatCell(NamedTuple):
    """One cell of a heat map."""

    x: int
    """Column index, starting at 0."""
    y: int
    """Row index, starting at 0 at the bottom."""
    value: float
    lines: Sequence[str]
    """Lines of text in the cell."""
    is_comparable: bool = True
    """Whether the value belongs on the colour scale."""


class _Axis(NamedTuple):
    """Linear mapping from values to positions."""

    low: float
    high: float
    start: float
    stop: float

    def at(self, value: float) -> float:
        return round(self.start + (value - self.low) / (self.high - self.low) * (self.stop - self.start), 1)


def colour_class(index: int) -> str:
    return f"c{index % COLOURS + 1}"


def line_chart(series: Sequence[ChartSeries], label: str, x_label: str, y_label: str = "") -> Markup:
    """Draw lines over a common x axis. Returns an empty string if no point is finite."""
    points = [point for one in series for segment in _segments(one.points) for point in segment]
    if not points:
        return Markup("")
    x_axis, y_axis = _axes(points)
    parts = [_grid(x_axis, y_axis, x_label, y_label)]
    for one in series:
        for segment in _segments(one.points):
            path = " ".join(f"{x_axis.at(x)},{y_axis.at(y)}" for x, y in segment)
            name = f"{colour_class(one.colour)}{' faint' if one.is_faint else ''}"
            if len(segment) > 1:
                parts.append(Markup('<polyline class="line {}" points="{}"/>').format(name, path))
            else:
                parts.append(_dot(x_axis.at(segment[0][0]), y_axis.at(segment[0][1]), name, one.name))
    return _svg(parts, label, HEIGHT)


def scatter_plot(points: Sequence[ChartPoint], label: str, x_label: str, y_label: str) -> Markup:
    """Draw points, and a line through the marked ones. Returns an empty string if no point is finite."""
    points = [point for point in points if _is_drawable(point.x) and _is_drawable(point.y)]
    if not points:
        return Markup("")
    x_axis, y_axis = _axes([(point.x, point.y) for point in points])
    parts = [_grid(x_axis, y_axis, x_label, y_label)]
    marked = sorted((point.x, point.y) for point in points if point.is_marked)
    path = " ".join(f"{x_axis.at(x)},{y_axis.at(y)}" for x, y in marked)
    parts.append(Markup('<polyline class="line c2" points="{}"/>').format(path))
    for point in points:
        name = colour_class(1 if point.is_marked else 0)
        parts.append(_dot(x_axis.at(point.x), y_axis.at(point.y), name, point.name))
    return _svg(parts, label, HEIGHT)


def heat_map(
    columns: Sequence[str], rows: Sequence[str], cells: Sequence[HeatCell], label: str, x_label: str, y_label: str
) -> Markup:
    """Draw cells coloured by value. `rows` are ordered from bottom to top."""
    height = TOP + BOTTOM + 44 * max(len(rows), 1)
    step_x, step_y = (WIDTH - LEFT - RIGHT) / max(len(columns), 1), 44
    compared = [cell.value for cell in cells if cell.is_comparable and _is_drawable(cell.value)]
    low, high = min(compared, default=0.0), max(compared, default=1.0)
    parts = []
    for cell in cells:
        left, top = LEFT + cell.x * step_x, height - BOTTOM - (cell.y + 1) * step_y
        is_coloured = cell.is_comparable and _is_drawable(cell.value)
        fill, text = _cell_colours((cell.value - low) / ((high - low) or 1.0) if is_coloured else None)
        shape = '<rect class="cell" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}" fill="{}"/>'
        parts.append(Markup(shape).format(left, top, step_x - 2, step_y - 2, fill))
        middle = top + step_y / 2 + 3 - 5.5 * (len(cell.lines) - 1)
        for index, line in enumerate(cell.lines):
            parts.append(_text(left + step_x / 2, middle + 11 * index, line, f"middle {text}"))
    for index, name in enumerate(columns):
        parts.append(_text(LEFT + (index + 0.5) * step_x, height - BOTTOM + 14, name, "middle"))
    for index, name in enumerate(rows):
        parts.append(_text(LEFT - 6, height - BOTTOM - (index + 0.5) * step_y + 4, name, "end"))
    parts += _axis_labels(x_label, y_label, height)
    return _svg(parts, label, height)


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Return about `count` round numbers between `low` and `high`."""
    span = (high - low) / count
    unit = 10.0 ** math.floor(math.log10(span))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= span * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def _axes(points: Sequence[tuple[float, float]]) -> tuple[_Axis, _Axis]:
    xs, ys = [x for x, _ in points], [y for _, y in points]
    return _Axis(*_limits(xs, 0.0), LEFT, WIDTH - RIGHT), _Axis(*_limits(ys, 0.06), HEIGHT - BOTTOM, TOP)


def _limits(values: Sequence[float], margin: float) -> tuple[float, float]:
    """Return the limits of an axis: the range of the values, widened by the fraction `margin`, and never empty."""
    low, high = min(values), max(values)
    if high - low <= 1e-12 * max(abs(low), abs(high), 1e-12):
        pad = abs(low) * 0.1 or 1.0
        return low - pad, high + pad
    pad = (high - low) * margin
    return low - pad, high + pad


def _is_drawable(value: float) -> bool:
    return -LARGEST < value < LARGEST  # false for NaN


def _segments(points: Sequence[tuple[float, float | None]]) -> list[list[tuple[float, float]]]:
    """Split a line into segments where values are missing or not finite."""
    segments: list[list[tuple[float, float]]] = [[]]
    for x, y in points:
        if y is not None and _is_drawable(x) and _is_drawable(y):
            segments[-1].append((x, y))
        elif segments[-1]:
            segments.append([])
    return [segment for segment in segments if segment]


def _grid(x_axis: _Axis, y_axis: _Axis, x_label: str, y_label: str) -> Markup:
    parts = []
    for value in ticks(y_axis.low, y_axis.high):
        shape = '<line class="grid" x1="{}" x2="{}" y1="{}" y2="{}"/>'
        parts.append(Markup(shape).format(LEFT, WIDTH - RIGHT, y_axis.at(value), y_axis.at(value)))
        parts.append(_text(LEFT - 6, y_axis.at(value) + 4, _tick_text(value), "end"))
    below = ((x_axis.at(value), _tick_text(value)) for value in ticks(x_axis.low, x_axis.high, 6))
    parts += [_text(x, HEIGHT - BOTTOM + 14, text, "middle") for x, text in below]
    parts += _axis_labels(x_label, y_label, HEIGHT)
    return Markup("").join(parts)


def _tick_text(value: float) -> str:
    return f"{value:.0e}" if value and (abs(value) >= 1e6 or abs(value) < 1e-4) else number(value)


def _axis_labels(x_label: str, y_label: str, height: float) -> list[Markup]:
    found = [_text((LEFT + WIDTH - RIGHT) / 2, height - 6, x_label, "middle label")]
    if y_label:
        shape = '<text class="middle label" transform="translate(12 {:.1f}) rotate(-90)">{}</text>'
        found.append(Markup(shape).format((TOP + height - BOTTOM) / 2, y_label))
    return found


def _text(x: float, y: float, text: str, name: str) -> Markup:
    return Markup('<text class="{}" x="{:.1f}" y="{:.1f}">{}</text>').format(name, x, y, shortened(text, 60))


def _dot(x: float, y: float, name: str, title: str) -> Markup:
    shape = '<circle class="dot {}" cx="{}" cy="{}" r="4"><title>{}</title></circle>'
    return Markup(shape).format(name, x, y, shortened(title))


def _cell_colours(share: float | None) -> tuple[str, str]:
    """Return a cell's fill and text class. `share`: position on the colour scale, 0 to 1; None: not comparable."""
    if share is None:
        return "#f1f1ef", "dark"
    position = min(max(share, 0.0), 1.0) * (len(SCALE) - 1)
    index = min(int(position), len(SCALE) - 2)
    rest = position - index
    low, high = SCALE[index], SCALE[index + 1]
    red, green, blue = (round(a + (b - a) * rest) for a, b in zip(low, high, strict=True))
    is_light = (0.299 * red + 0.587 * green + 0.114 * blue) / 255 > LIGHT
    return f"#{red:02x}{green:02x}{blue:02x}", "dark" if is_light else "bright"


def _svg(parts: Sequence[Markup], label: str, height: float) -> Markup:
    shape = '<svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>'
    return Markup(shape).format(WIDTH, height, shortened(label, 300), Markup("").join(parts))
