"""Compare encoders: size and compute, scores, and the fields of their cards that differ."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from amd.artifacts.card import Card, Score
from amd.config import flatten
from service.db.models import RegisteredEncoder
from service.registry.schemas import (
    CompareView,
    EncoderComparison,
    FieldDifference,
    FieldValues,
    Figure,
    FigureName,
    FigureValues,
    ScorePair,
    ScoreValues,
)
from service.registry.store import EncoderNames
from service.registry.views import encoder_views

# Fields that always differ, or are compared elsewhere.
NOT_COMPARED = {"id", "created", "scores", "sha256", "versions", "run", "job"}
FIGURES: tuple[FigureName, ...] = ("parameters", "width", "depth", "flops_per_clip")
LOWER_IS_BETTER = {"eval/loss"}
NOT_RANKED = {"eval/unreadable"}  # a number of samples, not a score


class Benchmark(NamedTuple):
    """What a score measures. Only scores of the same benchmark are comparable."""

    protocol: str
    data: str
    views: str
    """Views per sample; empty if the score has no setting of views."""
    metric: str


def compare(rows: Sequence[RegisteredEncoder], names: EncoderNames) -> EncoderComparison:
    """Return the encoders side by side, in the given order."""
    encoders = encoder_views(rows, names)
    return EncoderComparison(
        encoders=encoders,
        figures=[FigureValues(name=name, values=[getattr(one, name) for one in encoders]) for name in FIGURES],
        scores=list(_scores([Card.model_validate(row.card).scores for row in rows])),
        differences=list(_differences([row.card for row in rows])),
    )


def compare_pair(first: RegisteredEncoder, second: RegisteredEncoder, names: EncoderNames) -> CompareView:
    """Return two encoders side by side."""
    found = compare([first, second], names)
    one, other = found.encoders
    return CompareView(
        a=one,
        b=other,
        figures=[Figure(name=row.name, a=row.values[0], b=row.values[1]) for row in found.figures],
        scores=[
            ScorePair(protocol=row.protocol, data=row.data, metric=row.metric, a=row.values[0], b=row.values[1])
            for row in found.scores
        ],
        differences=[FieldDifference(field=row.field, a=row.values[0], b=row.values[1]) for row in found.differences],
    )


def _scores(scores: Sequence[Iterable[Score]]) -> Iterator[ScoreValues]:
    found = [newest_values(each) for each in scores]
    for key in sorted({key for metrics in found for key in metrics}):
        values = [metrics.get(key) for metrics in found]
        yield ScoreValues(
            protocol=key.protocol,
            data=key.data,
            views=key.views or None,
            metric=key.metric,
            values=values,
            best=best_positions(key.metric, values),
        )


def newest_values(scores: Iterable[Score]) -> dict[Benchmark, float]:
    """Return the newest value for each benchmark."""
    return {
        Benchmark(score.protocol, score.data, score.views or "", metric): value
        for score in sorted(scores, key=lambda score: score.created)
        for metric, value in score.values.items()
    }


def best_positions(metric: str, values: Sequence[float | None]) -> list[int]:
    """Return the positions of the best values; empty if the values are equal or cannot be ranked."""
    known = {value for value in values if value is not None}
    if metric in NOT_RANKED or len(known) < 2:
        return []
    best = min(known) if metric in LOWER_IS_BETTER else max(known)
    return [position for position, value in enumerate(values) if value == best]


def _differences(cards: Sequence[dict[str, Any]]) -> Iterator[FieldValues]:
    """Return the fields that differ. A field that the training config repeats is listed as `config.FIELD` only."""
    flat = [flatten({key: card[key] for key in card.keys() - NOT_COMPARED}) for card in cards]
    rows: dict[str, list[Any]] = {}
    for field in sorted({field for fields in flat for field in fields}):
        values = [fields.get(field) for fields in flat]
        is_hash = field.endswith(".sha256")  # of a head or decoder; always differs
        if not is_hash and any(value != values[0] for value in values):
            rows[field] = values
    for field, values in rows.items():
        if rows.get(f"config.{field}") != values:
            yield FieldValues(field=field, values=values)
