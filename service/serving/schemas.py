"""Request and response schemas for deployments and inference."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator, model_validator

from service.serving.requests import MAX_ITEMS, Input
from service.web.parameters import MAX_NUMBER
from service.web.schemas import ApiModel, Project, not_a_boolean

MIN_SHARE = 0.01  # of a CPU or GPU; Ray rounds to 0.0001, and a model does not run on less than a hundredth
State = Literal["deploying", "healthy", "unhealthy", "failed"]


class Replicas(ApiModel):
    """Autoscaling bounds."""

    min: int = Field(1, ge=0, le=1000)
    """Minimum number of replicas. If 0, the deployment scales to zero when idle, and the next request waits until a
    replica has started."""
    max: int = Field(1, ge=1, le=1000)
    """Maximum number of replicas."""


class ServingSettings(ApiModel):
    """Resources and engine settings of a deployment."""

    replicas: Replicas = Replicas()
    """Minimum and maximum number of replicas. Replicas are added while requests queue."""
    cpus: float = Field(0.0, ge=0, le=256)
    """Number of CPUs reserved per replica and therefore unavailable to jobs. If 0, the replica uses CPUs that jobs
    leave idle."""
    gpus: float = Field(0.0, ge=0, le=16)
    """Number of GPUs reserved per replica. With a fraction, several replicas can share one GPU."""
    threads: int | None = Field(None, ge=1, le=256)
    """Number of CPU threads for the model in each replica. Default: the number of reserved CPUs, but at least 1."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the forward pass."""
    max_batch_tokens: int | None = Field(None, ge=1, le=10**9)
    """Maximum number of tokens per forward pass. Default: set by the engine."""
    max_wait_ms: float | None = Field(None, ge=0, le=1000)
    """Maximum time in milliseconds that an idle model waits for further clips. Default: set by the engine."""
    max_queued_tokens: int | None = Field(None, ge=1, le=10**9)
    """Maximum number of queued tokens; requests beyond it fail with status 429. Default: set by the engine."""
    decoders: int | None = Field(None, ge=1, le=64)
    """Number of decoding processes per replica. Default: set by the engine."""

    def engine(self) -> dict[str, Any]:
        """Return the engine's settings by field name."""
        names = ("max_batch_tokens", "max_wait_ms", "max_queued_tokens", "decoders")
        own = {name: value for name in names if (value := getattr(self, name)) is not None}
        device = "cuda" if self.gpus else "cpu"
        return {**own, "device": device, "dtype": self.dtype, "threads": self.threads or max(1, int(self.cpus))}


class DeploymentRequest(ServingSettings):
    """An encoder to serve, with its resources and engine settings."""

    encoder: Annotated[str, Field(min_length=1, max_length=200)]
    """Encoder ID or alias. If the alias moves, the deployment follows it."""
    candidate: Annotated[str, Field(min_length=1, max_length=200)] | None = None
    """Second encoder, which serves a share of the requests. Default: none."""
    share: float = Field(0.1, ge=0, le=1)
    """Fraction of requests sent to the candidate."""
    project: Project | None = None
    """Project of the deployment. Default: the API key's project, or `default` if the key covers all projects."""

    # Rules for requests alone: a deployment that was stored before a rule existed stays readable.

    @field_validator("replicas")
    @classmethod
    def _ordered(cls, value: Replicas) -> Replicas:
        if value.min > value.max:
            raise ValueError(
                f"replicas.min={value.min} must not be above replicas.max={value.max}; raise max or lower min"
            )
        return value

    @field_validator("cpus", "gpus")
    @classmethod
    def _allocatable(cls, value: float, info: ValidationInfo) -> float:
        if 0 < value < MIN_SHARE:
            raise ValueError(
                f"{info.field_name}={value:g} must be 0 or at least {MIN_SHARE:g}, the smallest share; raise it"
            )
        if info.field_name == "gpus" and value > 1 and value != int(value):
            raise ValueError(
                f"gpus={value:g} must be a whole number if above 1: a replica can share one GPU, but not several; "
                "round it"
            )
        return value

    @field_validator("max_queued_tokens")
    @classmethod
    def _holds_a_batch(cls, value: int | None, info: ValidationInfo) -> int | None:
        batch = info.data.get("max_batch_tokens")
        if value is not None and batch is not None and value < batch:
            raise ValueError(
                f"max_queued_tokens={value} must not be below max_batch_tokens={batch}: no batch would ever be full; "
                "raise it or lower max_batch_tokens"
            )
        return value


class DeploymentView(ApiModel):
    """A deployment and its state."""

    name: str
    project: str
    encoder: str
    candidate: str | None
    share: float
    settings: ServingSettings
    serving: dict[str, str]
    """IDs of the encoders last sent to the replicas, by slot: `main` and `candidate`."""
    state: State
    message: str
    running: int = 0
    """Number of running replicas, which reserve their CPUs and GPUs."""
    created_by: str
    created_at: datetime
    changed_at: datetime
    etag: str | None = None
    """ETag of the settings, for `If-Match`; null if the service predates this field."""


class DeploymentList(ApiModel):
    """Deployments, sorted by name."""

    items: list[DeploymentView]


class RevisionView(ApiModel):
    """Settings of a deployment as one change requested them."""

    number: int
    """Number of the revision, starting at 1 for each deployment."""
    created_at: datetime
    actor: str
    """ID of the API key or OIDC subject that made the change."""
    encoder: str
    candidate: str | None
    share: float
    settings: ServingSettings
    resolved: dict[str, str]
    """Encoder IDs that the names resolved to when the change was made, keyed by slot: `main` and `candidate`."""
    restored: int | None
    """Number of the revision that a rollback restored; null for other changes."""
    changed: list[str] | None
    """Names of the fields that differ from the revision before, such as `replicas.max`; null if that revision does not
    exist."""


class RevisionList(ApiModel):
    """Revisions of a deployment, newest first."""

    items: list[RevisionView]


class RollbackRequest(ApiModel):
    """A revision whose settings to restore."""

    revision: Annotated[int, Field(ge=1, le=MAX_NUMBER), BeforeValidator(not_a_boolean)]
    """Number of the revision to restore."""


class DriftView(ApiModel):
    """Comparison of the candidate's and the encoder's embeddings of the same items, measured on a single replica."""

    items: int
    """Number of items compared."""
    cosine_mean: float | None
    """Mean cosine similarity; null if the widths differ or no item has been compared yet."""
    cosine_min: float | None
    """Lowest cosine similarity."""
    neighbours: int
    """Number of nearest neighbours compared per item."""
    neighbours_kept: float | None
    """Mean share of each item's nearest neighbours that the encoders have in common, 0 to 1."""


class EmbeddingView(ApiModel):
    """Embedding of one file."""

    encoder: str
    """ID of the encoder that computed the embedding."""
    index: int
    embedding: list[float] | str
    """Vector of D values, or base64 if requested."""
    tokens: list[list[float]] | str | None = None
    layers: dict[str, Any] | None = None


class ClassificationView(ApiModel):
    """Most likely classes for one file."""

    encoder: str
    index: int
    labels: list[str]
    scores: list[float]
    """Probabilities, in the order of `labels`."""
    classes: list[int]
    """Indices of the classes, in the order of `labels`."""


class NeighboursRequest(ApiModel):
    """A neighbour search. The query is exactly one of record, location, vector and input."""

    record: int | None = Field(None, ge=0, le=2**53)
    """Index of the record in the data set."""
    location: Annotated[str, Field(min_length=1, max_length=4096)] | None = None
    """Location of the file, as returned in search results."""
    vector: list[Annotated[float, Field(allow_inf_nan=False)]] | None = Field(None, min_length=1, max_length=65536)
    """Embedding to search for."""
    input: Input | None = None
    """File, as {"base64": …}, {"uri": …} or a `data:` URL. A deployment of the same encoder embeds it."""
    k: int = Field(10, ge=1, le=100)
    """Number of neighbours."""

    @model_validator(mode="after")
    def _exactly_one_query(self) -> NeighboursRequest:
        given = [name for name in ("record", "location", "vector", "input") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"set exactly one of record, location, vector and input; got {', '.join(given) or 'none'}")
        return self


class NeighbourView(ApiModel):
    """A neighbour and its similarity."""

    record: int
    location: str
    label: int | None
    score: float
    """Cosine similarity, -1 to 1."""


class ReconstructionView(ApiModel):
    """Reconstruction of one file.

    Images are PNGs as `data:` URLs; the frames of a video are tiled from left to right.
    """

    encoder: str
    index: int
    mask_ratio: float
    seed: int
    visible: list[int]
    """Indices of visible tokens, starting at 0, counted row by row within each frame."""
    loss: float
    """Mean squared error on hidden tokens, as in training."""
    original: str
    """Clip as the encoder receives it."""
    masked: str
    """Clip with hidden tokens painted over."""
    rebuilt: str
    """Clip with the decoder's predictions in place of hidden tokens."""


class OpenAIEmbeddings(ApiModel):
    """OpenAI-compatible embeddings request whose inputs are files."""

    model: Annotated[str, Field(min_length=1, max_length=200)]
    """Encoder ID, alias or deployment name."""
    input: Input | Annotated[list[Input], Field(min_length=1, max_length=MAX_ITEMS)]
    """Files as base64 `data:` URLs, or URIs under the allowed prefixes."""
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    """Width of the embeddings; must equal the encoder's."""
    user: str | None = None
