"""Convert database rows for encoders and aliases to response schemas."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from amd.artifacts.card import Card
from amd.flops import encoder_flops
from service.db.models import Alias, AliasMove, RegisteredEncoder
from service.jobs.estimate import encoder_parameters
from service.registry.schemas import (
    AliasDetail,
    AliasName,
    AliasView,
    EncoderDetail,
    EncoderView,
    InputView,
    LineageView,
    MoveView,
)
from service.registry.store import IMPORTED, EncoderNames
from service.web.schemas import utc_datetime


def encoder_views(rows: Sequence[RegisteredEncoder], names: EncoderNames) -> list[EncoderView]:
    return [EncoderView(**_facts(row, _card(row), names)) for row in rows]


def encoder_detail(row: RegisteredEncoder, names: EncoderNames) -> EncoderDetail:
    card = _card(row)
    return EncoderDetail(
        **_facts(row, card, names),
        config=card.config,
        labels=list(card.head.labels) if card.head is not None and card.head.labels is not None else None,
        multi_label=card.head is not None and card.head.multi_label,
        rebuilds=card.decoder is not None,
        pooling=card.pooling,
        sha256=card.sha256,
    )


def alias_view(alias: Alias) -> AliasView:
    return AliasView(**_alias_facts(alias))


def alias_detail(alias: Alias, moves: Sequence[AliasMove]) -> AliasDetail:
    targets = [None, *(move.encoder_id for move in moves)]
    history = [
        MoveView(number=move.number, at=utc_datetime(move.at), actor=move.actor, before=before, after=after)
        for move, (before, after) in zip(moves, pairwise(targets), strict=True)
    ]
    return AliasDetail(**_alias_facts(alias), history=history)


def _card(row: RegisteredEncoder) -> Card:
    return Card.model_validate(row.card)


def _facts(row: RegisteredEncoder, card: Card, names: EncoderNames) -> dict[str, Any]:
    encoder, clip, best = card.encoder, card.clip, card.best_score
    return {
        "id": row.id,
        "name": names.of_jobs.get(row.id),
        "project": row.project,
        "created_at": utc_datetime(row.created_at),
        "objective": card.objective or IMPORTED,
        "size": encoder.size,
        "width": encoder.width,
        "depth": encoder.depth,
        "heads": encoder.heads,
        "parameters": encoder_parameters(encoder, clip.token_values),
        "flops_per_clip": sum(encoder_flops(encoder, clip.grid.tokens, clip.token_values)),
        "input": InputView(
            kind="image" if clip.is_image else "video",
            sampling_rate_frames=None if clip.is_image else clip.sampling_rate_frames,
            interpolation=card.interpolation,
            **clip.model_dump(include={"frames", "size", "patch", "tubelet", "mean", "std"}),
        ),
        "classes": card.head.classes if card.head is not None else None,
        "best_score": {best[0]: best[1]} if best is not None else None,
        "scores": list(card.scores),
        "weights_license": card.weights_license,
        "non_commercial": card.is_non_commercial,
        "aliases": [
            AliasName(project=alias.project, name=alias.name) for alias in names.aliases if alias.encoder_id == row.id
        ],
        "lineage": LineageView(
            job=row.job_id,
            **{name: getattr(card, name) for name in ("run", "steps", "teacher", "start", "data", "versions")},
        ),
    }


def _alias_facts(alias: Alias) -> dict[str, Any]:
    return {
        "project": alias.project,
        "name": alias.name,
        "encoder": alias.encoder_id,
        "changed_at": utc_datetime(alias.changed_at),
        "changed_by": alias.changed_by,
        "moves": alias.moves,
    }
