"""Fake published encoders: real cards, with placeholder bytes instead of weights."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import Engine
from sqlalchemy.orm import Session

from amd.artifacts.card import Card, Score
from amd.artifacts.discovery import CARD, WEIGHTS, encoder_folder
from amd.storage import join, write_bytes, write_json
from service.db.models import RegisteredEncoder

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)


def card(encoder_id: str, hours: int = 0, **facts: Any) -> Card:
    values: dict[str, Any] = {
        "id": encoder_id,
        "created": NOON + timedelta(hours=hours),
        "encoder": {"size": "demo-student"},
        "clip": {"frames": 1, "size": 32, "patch": 4, "tubelet": 1},
        "objective": "amd",
        "run": encoder_id,
        "steps": 3,
        "data": {"train": "demo:digits", "samples": 1397, "digest": "abc"},
        "versions": {"amd-service": "0.1.0"},
        "config": {"mask": {"teacher_ratio": 0.5}, "seed": 0},
    }
    return Card.model_validate({**values, **facts})


def publish(root: str, encoder_id: str, hours: int = 0, weights: bytes = b"weights", **facts: Any) -> Card:
    """Write a card and placeholder weights under the storage root."""
    published, url = card(encoder_id, hours, **facts), encoder_folder(root, encoder_id)
    write_bytes(join(url, WEIGHTS), weights)
    write_json(join(url, CARD), published.model_dump(mode="json"))
    return published


def index_encoder(engine: Engine, encoder_id: str, project: str = "default", hours: int = 0, **facts: Any) -> str:
    """Insert an encoder into the registry's index and return its ID."""
    indexed = card(encoder_id, hours, **facts)
    with Session(engine) as session, session.begin():
        session.add(
            RegisteredEncoder(
                id=encoder_id,
                project=project,
                job_id=indexed.run,
                created_at=indexed.created.timestamp(),
                card=indexed.model_dump(mode="json"),
                stamp="",
                seen_at=0.0,
            )
        )
    return encoder_id


def score(protocol: Any, value: float, metric: str = "eval/top1", data: str = "demo:digits") -> Score:
    return Score(protocol=protocol, data=data, samples=400, values={metric: value})
