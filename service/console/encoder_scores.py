"""Scores of encoders for lists and select fields. Knows nothing about HTTP."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from amd.artifacts.card import STRICTEST_FIRST, strictest_score
from service.console import wording
from service.registry.comparison import LOWER_IS_BETTER, Benchmark, best_positions, newest_values
from service.registry.schemas import EncoderView

MAX_LISTED = 200  # maximum number of encoders on a page or in a select field


class ScoreColumn(NamedTuple):
    """Scores of several encoders on one benchmark."""

    benchmark: Benchmark
    values: dict[str, float]
    """Score by encoder ID, without the encoders that have no such score."""
    best: set[str]
    """IDs of the encoders with the best score; empty if the scores are equal or cannot be ranked."""

    @property
    def name(self) -> str:
        """Name of the benchmark, as selected in the list of encoders."""
        return f"{self.label}, {self.benchmark.metric}, {self.benchmark.data}"

    @property
    def label(self) -> str:
        """Protocol and views."""
        return f"{self.benchmark.protocol} {self.benchmark.views}".replace("_", "-").strip()

    @property
    def lower_is_better(self) -> bool:
        return self.benchmark.metric in LOWER_IS_BETTER

    def rank(self, encoder: EncoderView) -> float:
        """Return the key that sorts encoders from best to worst; encoders without a score are last."""
        value = self.values.get(encoder.id)
        if value is None:
            return math.inf
        return value if self.lower_is_better else -value


class EncoderOption(NamedTuple):
    """An encoder in a select field."""

    id: str
    text: str


def score_columns(encoders: Sequence[EncoderView]) -> list[ScoreColumn]:
    """Return the scores by benchmark, for the first metric of each evaluation.

    The benchmark with the most scored encoders is first, then the one with the strictest protocol.
    """
    values: dict[Benchmark, dict[str, float]] = {}
    for encoder in encoders:
        main = {(score.protocol, next(iter(score.values))) for score in encoder.scores if score.values}
        for benchmark, value in newest_values(encoder.scores).items():
            if (benchmark.protocol, benchmark.metric) in main:
                values.setdefault(benchmark, {})[encoder.id] = value
    columns = []
    for benchmark, found in values.items():
        ids = list(found)
        best = {ids[position] for position in best_positions(benchmark.metric, list(found.values()))}
        columns.append(ScoreColumn(benchmark, found, best))
    return sorted(
        columns, key=lambda one: (-len(one.values), STRICTEST_FIRST.index(one.benchmark.protocol), one.benchmark)
    )


def encoder_options(encoders: Sequence[EncoderView]) -> list[EncoderOption]:
    """Return encoders as options: those with scores first, with their aliases and the score of the strictest protocol.

    Otherwise, the order is kept.
    """
    return [EncoderOption(one.id, _option_text(one)) for one in sorted(encoders, key=lambda one: not one.scores)]


def _option_text(encoder: EncoderView) -> str:
    parts = [encoder.id, *(alias.name for alias in encoder.aliases)]
    best = strictest_score(encoder.scores)
    if best is not None:
        metric, value = next(iter(best.values.items()))
        parts.append(f"{best.protocol.replace('_', '-')} {wording.score(metric, value)}")
    return ", ".join(parts)
