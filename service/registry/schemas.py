"""What goes over the wire about encoders and aliases. Words as on the cards."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, StringConstraints, field_validator

from amd.artifacts.card import Score
from amd.config import ForeignWeights
from service.jobs.schemas import LabelKey, LabelValue, Project, Wire

RESERVED = "aliases"  # a path of its own beside the encoders' names

ALIAS = r"^[a-z0-9][a-z0-9_-]{0,62}$"
ENCODER = r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,199}$"
Named = Annotated[str, StringConstraints(pattern=ENCODER)]
"""An encoder's id or an alias."""

Objective = Literal["amd", "mae", "finetune", "detection", "imported"]


class InputView(Wire):
    """What an encoder takes."""

    kind: Literal["image", "video"]
    frames: int
    size: tuple[int, int]
    """Height and width in pixels."""
    sampling_rate_frames: int | None
    """Every n-th frame of a video goes into the clip; null for images."""
    patch: int
    tubelet: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str


class LineageView(Wire):
    """Where an encoder came from."""

    job: str | None
    """Of this service, that published it."""
    run: str | None
    steps: int | None
    teacher: dict[str, Any] | None
    start: dict[str, Any] | None
    """Facts of the weights that it began with."""
    data: dict[str, Any]
    """train: where; samples: how many; digest: of the manifest."""
    versions: dict[str, str]
    """Of the code that made it."""


class AliasName(Wire):
    project: str
    name: str


class EncoderView(Wire):
    """A published encoder: its card's facts."""

    id: str
    project: str | None
    """null: it belongs to none, and all may use it."""
    created_at: datetime
    objective: Objective
    size: str | None
    """S, B, L, H, …; null: none of the named ones."""
    width: int
    """Of its vectors."""
    depth: int
    heads: int
    parameters: int
    flops_per_clip: float
    input: InputView
    classes: int | None
    """Of its classifier; null: it has none."""
    best_score: dict[str, float] | None
    """The headline: the strictest protocol's first metric."""
    scores: list[Score]
    weights_license: str | None
    """Handed down by the weights it learnt from; null: nothing restricts them, or nobody said."""
    non_commercial: bool
    aliases: list[AliasName]
    """That point to it, of the caller's projects."""
    lineage: LineageView


class EncoderDetail(EncoderView):
    config: dict[str, Any]
    """Of the run that trained it, resolved."""
    labels: list[str] | None
    """Names of the classes."""
    multi_label: bool
    rebuilds: bool
    """Whether it was published with its decoder, and can be asked for reconstructions."""
    pooling: str
    sha256: str | None
    """Of encoder.safetensors."""


class EncoderPage(Wire):
    items: list[EncoderView]
    next_cursor: str | None
    """For the next page; null on the last."""


class ImportRequest(ForeignWeights):
    """Weights from outside to publish as an encoder. What cannot be guessed must be said; the job's log tells which."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"weights": "timm:vit_small_patch16_224.dino", "id": "dino-s", "license": "Apache-2.0"},
                {"weights": "s3://bucket/videomae_vit_b.pth", "id": "videomae-b", "license": "CC-BY-NC-4.0"},
            ]
        }
    )

    project: Project | None = None
    """Whose encoder it will be. None: the key's own; for a key of all projects: `default`."""
    labels: dict[LabelKey, LabelValue] = Field(default_factory=dict, max_length=32)
    """Of the job."""

    @field_validator("id")
    @classmethod
    def _free(cls, value: str) -> str:
        if value == RESERVED:
            raise ValueError(f"id={value} is a path of this interface; choose another")
        return value


class AliasRequest(Wire):
    """Where an alias shall point."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"encoder": "train-20260101-120000-1a2b3c4d"},
                {"encoder": "candidate", "expected": "train-20250101-120000-1a2b3c4d"},
            ]
        }
    )

    encoder: Named
    """An id, or another alias, whose encoder is taken."""
    expected: Annotated[str, StringConstraints(max_length=200)] | None = None
    """Move it only if it points to this encoder now; null: only if it does not exist yet; left out: in any case."""
    project: Project | None = None
    """None: the key's own; for a key of all projects: `default`."""


class AliasView(Wire):
    """A name of a project for one of its encoders."""

    project: str
    name: str
    encoder: str
    changed_at: datetime
    changed_by: str
    moves: int


class MoveView(Wire):
    number: int
    at: datetime
    actor: str
    """A key's id, or an OIDC subject."""
    before: str | None
    """The encoder it pointed to; null: none."""
    after: str | None
    """null: the alias was taken away."""


class AliasDetail(AliasView):
    history: list[MoveView]
    """Oldest first."""


class AliasList(Wire):
    items: list[AliasView]


class FieldDifference(Wire):
    field: str
    """Dotted, of the card's `config`, `encoder`, `clip` and so on."""
    a: Any
    b: Any


class ScorePair(Wire):
    """One metric by one protocol on one data set; null where an encoder was not measured so."""

    protocol: str
    data: str
    metric: str
    a: float | None
    b: float | None


class Figure(Wire):
    name: Literal["parameters", "width", "depth", "flops_per_clip"]
    a: float
    b: float


class CompareView(Wire):
    """Two encoders side by side."""

    a: EncoderView
    b: EncoderView
    figures: list[Figure]
    scores: list[ScorePair]
    differences: list[FieldDifference]
    """In how they were made and are fed."""
