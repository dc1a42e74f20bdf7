"""Lay out benchmark results as rows of text. Does not import torch, and does not depend on how the rows are printed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from amd.config import flatten

REPEATS = 4  # as in AMD's recipes; the official loader then reaches 29 clips/s per core on 340x256 H.264


class TextTable(NamedTuple):
    """A table of formatted cells; the first cell of a row is its label."""

    title: str
    header: list[str]  # empty: the table has no header
    rows: list[list[str]]

    def __str__(self) -> str:
        lines = [self.header, *self.rows] if self.header else self.rows
        first, *others = [max(map(len, column)) for column in zip(*lines, strict=True)]
        form = "  ".join([f"{{:<{first}}}", *(f"{{:>{width}}}" for width in others)])
        return "\n".join([self.title, *(form.format(*line) for line in lines)])


def step_table(figures: Mapping[str, Any]) -> TextTable:
    """Lay out the result of `bench_step`, omitting metrics that were not measured."""
    rows = [
        [key, f"{value:.4g}" if isinstance(value, float) else str(value)]
        for key, value in flatten(figures).items()
        if value is not None
    ]
    return TextTable("One training step", [], rows)


def data_table(result: Mapping[str, Any]) -> TextTable:
    """Lay out the result of `bench_data` with one column per data set."""
    height, width = result["size"]
    sets = result["sets"]
    rows = [
        [title, *("-" if one[key] is None else form.format(one[key]) for one in sets)]
        for title, (key, form) in ROWS.items()
    ]
    title = f"Reading clips of {result['frames']} x {height} x {width} on one core"
    return TextTable(title, ["", *(one["name"] for one in sets)], rows)


ROWS = {
    "read a sample's bytes": ("read_ms", "{:.2f} ms"),
    "decode its frames": ("decode_ms", "{:.2f} ms"),
    "bare decord": ("decord_ms", "{:.2f} ms"),
    "speed-up over bare decord": ("speed_against_decord", "{:.2f} x"),
    "augment a clip": ("augment_ms", "{:.2f} ms"),
    "augment / decode": ("augment_share", "{:.3f}"),
    "augment a clip as in the official code": ("official_augment_ms", "{:.2f} ms"),
    "collate a clip": ("collate_ms", "{:.2f} ms"),
    "clips per sample": ("repeats", "{}"),
    "clips/s per core": ("clips_per_s", "{:.1f}"),
    f"clips/s per core with {REPEATS} repeats": (f"clips_per_s_repeats_{REPEATS}", "{:.1f}"),
    "speed-up over decord and official augmentation": (f"speed_against_official_repeats_{REPEATS}", "{:.2f} x"),
    "unreadable samples": ("bad", "{}"),
    "data.loader_workers for the target": ("loader_workers", "{}"),
}
