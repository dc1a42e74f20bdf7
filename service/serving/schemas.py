"""What goes over the wire about deployments, and what a deployment is made of."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from service.jobs.schemas import Project, Wire
from service.serving.requests import MOST_ITEMS, Input

State = Literal["deploying", "healthy", "unhealthy", "failed"]


class Replicas(Wire):
    min: int = Field(1, ge=0, le=1000)
    """0: none while nothing is asked; the first request then waits for one to start."""
    max: int = Field(1, ge=1, le=1000)


class ServingSettings(Wire):
    """How a deployment runs."""

    replicas: Replicas = Replicas()
    """More than min run while requests queue."""
    cpus: float = Field(0.0, ge=0, le=256)
    """That a replica takes away from jobs; 0: it lives on what they leave."""
    gpus: float = Field(0.0, ge=0, le=16)
    """Of a replica; fractions share one GPU."""
    threads: int | None = Field(None, ge=1, le=256)
    """Of a replica's model on a CPU; none: its CPUs, at least one."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    max_batch_tokens: int | None = Field(None, ge=1)
    """Tokens in one forward pass, of all requests together; none: the engine's own."""
    max_wait_ms: float | None = Field(None, ge=0, le=1000)
    """How long an idle model waits for more to come; none: the engine's own."""
    max_queued_tokens: int | None = Field(None, ge=1)
    """Past it requests are answered 429; none: the engine's own."""
    decoders: int | None = Field(None, ge=1, le=64)
    """Processes of a replica that decode files; none: the engine's own."""

    def engine(self) -> dict[str, Any]:
        names = ("max_batch_tokens", "max_wait_ms", "max_queued_tokens", "decoders")
        own = {name: value for name in names if (value := getattr(self, name)) is not None}
        device = "cuda" if self.gpus else "cpu"
        return {**own, "device": device, "dtype": self.dtype, "threads": self.threads or max(1, int(self.cpus))}


class DeploymentRequest(ServingSettings):
    """Encoders that shall answer requests."""

    encoder: Annotated[str, Field(min_length=1, max_length=200)]
    """An id, or an alias, which is followed where it moves."""
    candidate: Annotated[str, Field(min_length=1, max_length=200)] | None = None
    """Another that answers a share of the requests; null takes it away again."""
    share: float = Field(0.1, ge=0, le=1)
    """Of the requests, for the candidate."""
    project: Project | None = None
    """None: the key's own; for a key of all projects: `default`."""


class DeploymentView(Wire):
    name: str
    project: str
    encoder: str
    candidate: str | None
    share: float
    settings: ServingSettings
    serving: dict[str, str]
    """Ids that its replicas were last told, by `main` and `candidate`."""
    state: State
    message: str
    created_by: str
    created_at: datetime
    changed_at: datetime


class DeploymentList(Wire):
    items: list[DeploymentView]


class DriftView(Wire):
    """How far the candidate's answers lie from the encoder's, on the same items, as one replica has seen them."""

    items: int
    cosine_mean: float | None
    """None where the widths differ, or nothing was compared yet."""
    cosine_min: float | None
    neighbours: int
    neighbours_kept: float | None
    """Share of each item's nearest neighbours that is the same for both, 0 to 1."""


class EmbeddingView(Wire):
    """What an encoder found in one file."""

    encoder: str
    """The id of the one that answered."""
    index: int
    embedding: list[float] | str
    """(D,); base64 where that was asked for."""
    tokens: list[list[float]] | str | None = None
    layers: dict[str, Any] | None = None


class ClassificationView(Wire):
    encoder: str
    index: int
    labels: list[str]
    scores: list[float]
    """Probabilities of those labels."""
    classes: list[int]
    """Their numbers."""


class NeighboursRequest(Wire):
    """What the neighbours are of: one of record, location, vector and input."""

    record: int | None = Field(None, ge=0, le=2**53)
    """Its number in the data set."""
    location: Annotated[str, Field(min_length=1, max_length=4096)] | None = None
    """Its file, as the answers spell it."""
    vector: list[Annotated[float, Field(allow_inf_nan=False)]] | None = Field(None, min_length=1, max_length=65536)
    input: Input | None = None
    """A file: {"base64": …}, {"uri": …}, or a `data:` URL. A deployment of the same encoder embeds it."""
    k: int = Field(10, ge=1, le=100)
    """How many neighbours."""

    @model_validator(mode="after")
    def _one(self) -> NeighboursRequest:
        given = [name for name in ("record", "location", "vector", "input") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give one of record, location, vector and input; this has {', '.join(given) or 'none'}")
        return self


class NeighbourView(Wire):
    record: int
    location: str
    label: int | None
    score: float
    """Cosine, -1 to 1."""


class ReconstructionView(Wire):
    """What an encoder saw of one file, and what its decoder made of the rest.

    Pictures are PNGs as `data:` URLs; the frames of a film stand side by side, the first at the left.
    """

    encoder: str
    index: int
    mask_ratio: float
    seed: int
    visible: list[int]
    """Tokens that the encoder saw, counted from 0: row by row, then frame by frame."""
    loss: float
    """Mean squared error on the others, as training measures it."""
    original: str
    """The clip as it was cut for the encoder."""
    masked: str
    """Hidden tokens painted over."""
    rebuilt: str
    """The decoder's answer in place of hidden tokens."""


class OpenAIEmbeddings(Wire):
    """OpenAI's request, its input being files."""

    model: Annotated[str, Field(min_length=1, max_length=200)]
    """An encoder's id, its alias, or a deployment."""
    input: Input | Annotated[list[Input], Field(min_length=1, max_length=MOST_ITEMS)]
    """`data:` URLs in base64, or URIs below the allowed prefixes."""
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Annotated[int, Field(ge=1)] | None = None
    """Must be the encoder's own."""
    user: str | None = None
