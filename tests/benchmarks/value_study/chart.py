"""Draw the results of the value study: accuracy against the CPU time of training, a mark per arm.

    python -m tests.benchmarks.value_study.chart OUT/confirm docs/images/value-study.svg [--probe linear]

A mark shows the mean over the seeds, and its line ± one standard deviation. The time of the teacher is not included.
"""

from __future__ import annotations

import argparse
import json
import math
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 720, 380, 56, 110, 24, 48
INK, GRID = "#3c4043", "#e3e5e8"
COLOURS = ("#1f6feb", "#d97706", "#0f9d58", "#8b5cf6", "#dc2626", "#0891b2", "#6b7280")


class Mark(NamedTuple):
    arm: str
    seconds: float
    percent: float
    spread: float


def read_marks(folder: Path, probe: str) -> list[Mark]:
    """Return a mark per arm, without the teacher and random weights, ordered by time."""
    runs: dict[str, list[tuple[float, float]]] = {}
    for path in folder.glob("*.json"):
        result = json.loads(path.read_text())
        if result["arm"] not in ("teacher", "random"):
            runs.setdefault(result["arm"], []).append((result["seconds"], result["scores"][probe]))
    marks = []
    for arm, values in runs.items():
        seconds, percents = zip(*values, strict=True)
        marks.append(Mark(arm, mean(seconds), mean(percents), stdev(percents) if len(percents) > 1 else 0.0))
    return sorted(marks, key=lambda mark: mark.seconds)


def draw(marks: Sequence[Mark], probe: str) -> ET.Element:
    """Return an SVG image with a logarithmic time axis."""
    svg = ET.Element("svg", xmlns="http://www.w3.org/2000/svg", viewBox=f"0 0 {WIDTH} {HEIGHT}", width=str(WIDTH))
    svg.set("font-family", "system-ui, sans-serif")
    svg.set("font-size", "12")
    ET.SubElement(svg, "rect", width="100%", height="100%", fill="white")
    low = math.floor(min(mark.percent - mark.spread for mark in marks))
    high = math.ceil(max(mark.percent + mark.spread for mark in marks))
    first = math.log(min(mark.seconds for mark in marks) / 1.3)
    last = math.log(max(mark.seconds for mark in marks) * 1.3)

    def x(seconds: float) -> float:
        return LEFT + (math.log(seconds) - first) / (last - first) * (WIDTH - LEFT - RIGHT)

    def y(percent: float) -> float:
        return HEIGHT - BOTTOM - (percent - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    for percent in range(low, high + 1):
        _line(svg, LEFT, y(percent), WIDTH - RIGHT, y(percent), GRID)
        _text(svg, LEFT - 8, y(percent) + 4, str(percent), "end")
    for seconds in (10, 20, 50, 100, 200, 500, 1000):
        if first <= math.log(seconds) <= last:
            _line(svg, x(seconds), TOP, x(seconds), HEIGHT - BOTTOM, GRID)
            _text(svg, x(seconds), HEIGHT - BOTTOM + 18, str(seconds), "middle")
    _text(svg, (LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, "CPU seconds of the student's training, log scale", "middle")
    _text(svg, LEFT, TOP - 6, f"{probe}, top-1 in %", "start")
    for mark, colour in zip(marks, COLOURS, strict=False):
        at, height = x(mark.seconds), y(mark.percent)
        _line(svg, at, y(mark.percent - mark.spread), at, y(mark.percent + mark.spread), colour, 2)
        ET.SubElement(svg, "circle", cx=f"{at:.1f}", cy=f"{height:.1f}", r="5", fill=colour)
        _text(svg, at + 10, height + 4, mark.arm, "start")
    return svg


def _line(svg: ET.Element, x1: float, y1: float, x2: float, y2: float, colour: str, width: int = 1) -> None:
    ends = {"x1": x1, "y1": y1, "x2": x2, "y2": y2}
    ET.SubElement(
        svg, "line", {name: f"{at:.1f}" for name, at in ends.items()}, stroke=colour, **{"stroke-width": str(width)}
    )


def _text(svg: ET.Element, x: float, y: float, text: str, anchor: str) -> None:
    ET.SubElement(svg, "text", x=f"{x:.1f}", y=f"{y:.1f}", fill=INK, **{"text-anchor": anchor}).text = text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--probe", default="linear")
    args = parser.parse_args()
    marks = read_marks(args.results, args.probe)
    args.output.write_text(ET.tostring(draw(marks, args.probe), encoding="unicode") + "\n")


if __name__ == "__main__":
    main()
