"""Request and response schemas for encoders and aliases. Fields are named as in the encoder card."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, StringConstraints, field_validator

from amd.artifacts.card import Score
from amd.config import ThirdPartyWeights
from service.web.schemas import ApiModel, LabelKey, LabelValue, Project

MAX_COMPARED = 6  # encoders that can be compared at once, so that they fit side by side on a page
RESERVED_ALIAS = "aliases"  # a path under /v1/encoders, so it cannot be an encoder ID or alias

ALIAS_PATTERN = r"^[a-z0-9][a-z0-9_-]{0,62}$"
ENCODER_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,199}$"
EncoderReference = Annotated[str, StringConstraints(pattern=ENCODER_PATTERN)]
"""Encoder ID or alias."""

FigureName = Literal["parameters", "width", "depth", "flops_per_clip"]
Objective = Literal["amd", "mae", "finetune", "detection", "imported"]


class InputView(ApiModel):
    """Input format of an encoder."""

    kind: Literal["image", "video"]
    frames: int
    size: tuple[int, int]
    """Height and width in pixels."""
    sampling_rate_frames: int | None
    """Distance between sampled video frames; null for images."""
    patch: int
    tubelet: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str


class LineageView(ApiModel):
    """Origin of an encoder."""

    job: str | None
    """Job that published the encoder; null if it was not published by a job of this service."""
    run: str | None
    steps: int | None
    teacher: dict[str, Any] | None
    start: dict[str, Any] | None
    """Description of the weights that training started from."""
    data: dict[str, Any]
    """Training data: its location (`train`), number of samples (`samples`) and manifest digest (`digest`)."""
    versions: dict[str, str]
    """Versions of the code that produced the encoder."""


class AliasName(ApiModel):
    """An alias and its project."""

    project: str
    name: str


class EncoderView(ApiModel):
    """A published encoder, as described by its card."""

    id: str
    name: str | None
    """Name of the job with the encoder's ID; null if there is none, as for teachers, trials and imported weights."""
    project: str | None
    """Project that owns the encoder: the project of the job that published it, or `default` if no job did."""
    created_at: datetime
    objective: Objective
    size: str | None
    """Named size: S, B, L, H, …; null for a custom size."""
    width: int
    """Embedding width."""
    depth: int
    heads: int
    parameters: int
    flops_per_clip: float
    input: InputView
    classes: int | None
    """Number of classes; null if the encoder has no classifier."""
    best_score: dict[str, float] | None
    """First metric of the strictest evaluation protocol, with its value; null if the encoder has no scores."""
    scores: list[Score]
    weights_license: str | None
    """Licence inherited from the weights that training started from; null if none is stated."""
    non_commercial: bool
    aliases: list[AliasName]
    """Aliases in the caller's projects that point to the encoder."""
    lineage: LineageView


class EncoderDetail(EncoderView):
    """An encoder with its training configuration."""

    config: dict[str, Any]
    """Resolved configuration of the run that trained the encoder."""
    labels: list[str] | None
    """Class names."""
    multi_label: bool
    rebuilds: bool
    """Whether the encoder was published with its decoder and supports reconstructions."""
    pooling: str
    sha256: str | None
    """SHA-256 of encoder.safetensors."""


class EncoderPage(ApiModel):
    """A page of encoders."""

    items: list[EncoderView]
    next_cursor: str | None
    """Cursor for the next page; null on the last page."""


class ImportRequest(ThirdPartyWeights):
    """External weights to publish as an encoder.

    Fields that cannot be inferred from the weights are required. The job's log lists any that are missing.
    """

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"weights": "timm:vit_small_patch16_224.dino", "id": "dino-s", "license": "Apache-2.0"},
                {"weights": "s3://bucket/videomae_vit_b.pth", "id": "videomae-b", "license": "CC-BY-NC-4.0"},
            ]
        }
    )

    project: Project | None = None
    """Project of the encoder. Default: the API key's project, or `default` if the key covers all projects."""
    labels: dict[LabelKey, LabelValue] = Field(default_factory=dict, max_length=32)
    """Labels of the import job."""

    @field_validator("id")
    @classmethod
    def _not_reserved(cls, value: str) -> str:
        if value == RESERVED_ALIAS:
            raise ValueError(f"id={value} is a reserved path; choose another ID")
        return value


class AliasRequest(ApiModel):
    """Target of an alias."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"encoder": "train-20260101-120000-1a2b3c4d"},
                {"encoder": "candidate", "expected": "train-20250101-120000-1a2b3c4d"},
            ]
        }
    )

    encoder: EncoderReference
    """Encoder ID, or another alias, which is resolved once, when the request is processed."""
    expected: Annotated[str, StringConstraints(max_length=200)] | None = None
    """Encoder that the alias must currently point to. If null, the alias must not exist; if omitted, there is no
    condition."""
    project: Project | None = None
    """Project of the alias. Default: the API key's project, or `default` if the key covers all projects."""


class AliasView(ApiModel):
    """An alias and the encoder that it points to."""

    project: str
    name: str
    encoder: str
    changed_at: datetime
    changed_by: str
    moves: int


class MoveView(ApiModel):
    """One change to an alias."""

    number: int
    at: datetime
    actor: str
    """ID of the API key, or the OIDC subject, that made the change."""
    before: str | None
    """Encoder before the change; null if the alias did not exist."""
    after: str | None
    """Encoder after the change; null if the alias was deleted."""


class AliasDetail(AliasView):
    """An alias with its history."""

    history: list[MoveView]
    """Changes, oldest first."""


class AliasList(ApiModel):
    """Aliases, sorted by name."""

    items: list[AliasView]


class FieldDifference(ApiModel):
    """A card field that differs between two encoders."""

    field: str
    """Dotted path in the card, such as `config.mask.teacher_ratio`."""
    a: Any
    b: Any


class ScorePair(ApiModel):
    """Both encoders' scores for one metric, protocol and data set; null for an encoder without that score."""

    protocol: str
    data: str
    metric: str
    a: float | None
    b: float | None


class Figure(ApiModel):
    """One measure of size or compute, for both encoders."""

    name: FigureName
    a: float
    b: float


class CompareView(ApiModel):
    """Two encoders side by side."""

    a: EncoderView
    b: EncoderView
    figures: list[Figure]
    scores: list[ScorePair]
    differences: list[FieldDifference]
    """Differences in training configuration, architecture and input."""


class FieldValues(ApiModel):
    """A card field that differs between the compared encoders."""

    field: str
    """Dotted path in the card, such as `config.mask.teacher_ratio`."""
    values: list[Any]
    """Value for each encoder; null where the field is absent."""


class ScoreValues(ApiModel):
    """Scores of the compared encoders for one metric, protocol, data set and number of views."""

    protocol: str
    data: str
    views: str | None
    """Views per sample: temporal segments x spatial crops, such as 5x3; null if the protocol has no views."""
    metric: str
    values: list[float | None]
    """Score of each encoder; null for an encoder without that score."""
    best: list[int]
    """Positions of the encoders with the best score, starting at 0; empty if the scores are equal or cannot be
    ranked."""


class FigureValues(ApiModel):
    """One measure of size or compute, for each compared encoder."""

    name: FigureName
    values: list[float]


class EncoderComparison(ApiModel):
    """Several encoders side by side. Values are in the order of `encoders`."""

    encoders: list[EncoderView]
    figures: list[FigureValues]
    scores: list[ScoreValues]
    differences: list[FieldValues]
    """Differences in training configuration, architecture and input."""
