"""Options, results and limits of an inference request. Does not import torch.

Shapes: T frames, H height, W width, N tokens per clip, D encoder width.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field


class Item(NamedTuple):
    """One image or video: its bytes or its location."""

    content: bytes | None = None
    uri: str | None = None
    """Path or fsspec URL; the caller must already have checked that reading it is allowed."""


class InferenceOptions(BaseModel):
    """Task and output options, which apply to every item in a request."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    task: Literal["embedding", "classification", "reconstruction"] = "embedding"
    normalize: bool = False
    """Whether to scale embeddings to unit length."""
    tokens: Literal["none", "patch"] = "none"
    """Tokens to return with the embedding. patch: every token, after the last norm."""
    layers: tuple[int, ...] = ()
    """Blocks whose output tokens are returned before any norm. Blocks are numbered from 1."""
    top_k: int = Field(5, ge=1)
    """Number of classes that a classification returns, most likely first."""
    views: str | None = None
    """Number of segments x crops, such as 5x3. Results are averaged over these views. Default: one center clip."""
    mask_ratio: float | None = None
    """Fraction of tokens that a reconstruction hides. Default: the ratio that the encoder was trained with."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Seed for a reconstruction's mask; the same seed and ratio hide the same tokens in every item."""


class InferenceResult(NamedTuple):
    """Results of one request, all computed by the same encoder."""

    encoder: str
    """ID of the encoder."""
    items: list[dict[str, Any]]
    """One dict per item; its keys depend on the task.

    embedding: {"embedding": (D,) float32}; if requested, also "tokens": (N, D) and "layers": {"6": (N, D)}.
    classification: {"labels", "scores", "classes"}: names, probabilities and indices of the most likely classes.
    reconstruction: {"mask_ratio", "seed", "visible", "loss", "original", "masked", "rebuilt"}: `visible` contains
    the indices of visible tokens, `loss` is the mean squared error on hidden tokens, as in training; clips are
    (3, T, H, W) uint8, `rebuilt` float32 in [0, 1].
    """
    queue_s: float = 0.0
    """Longest time that any of the clips waited for its batch."""
    batch_fill: float = 0.0
    """Mean number of tokens in the clips' batches, as a fraction of the limit."""


class FrozenSettings(BaseModel):
    """Base class for immutable settings that reject unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


class RequestLimits(FrozenSettings):
    """Upper bounds on the cost of one request."""

    items: int = Field(256, ge=1)
    """Maximum number of items per request."""
    rebuilt_items: int = Field(16, ge=1)
    """Maximum number of items per reconstruction request; each result holds three clips."""
    output_mib: int = Field(64, ge=1)
    """Maximum size in MiB of the tokens and layers that a request returns, as float32."""
    json_output_mib: int = Field(4, ge=1)
    """Maximum size in MiB of tokens and layers that are returned as JSON, which takes ten times the memory."""
    views: int = Field(64, ge=1)
    """Maximum number of views (segments times crops) per item."""
    bytes_mib: int = Field(64, ge=1)
    """Maximum file size in MiB."""
    pixels: int = Field(40_000_000, ge=1)
    """Maximum number of pixels in an image or video frame."""
    frames: int = Field(36_000, ge=1)
    """Maximum number of frames in a video."""
    duration_s: float = Field(1200.0, gt=0)
    """Maximum duration of a video in seconds."""
    decoded_mib: int = Field(512, ge=1)
    """Maximum size in MiB of all decoded frames of a file, as RGB."""
    memory_mib: int = Field(2048, ge=1024)
    """Maximum address space in MiB of a decoding process."""
    decode_timeout_s: float = Field(1.5, gt=0)
    """Maximum time in seconds to read and decode a file."""
    fetch_timeout_s: float = Field(20.0, gt=0)
    """Maximum time in seconds to fetch a file from a remote store."""


class EngineSettings(FrozenSettings):
    """Device, batching, queue and decoding settings of an engine."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["float32", "bfloat16"] = "float32"
    threads: int | None = Field(None, ge=1)
    """Number of CPU threads for the model. Default: PyTorch's default."""
    max_batch_tokens: int | None = Field(None, ge=1)
    """Maximum number of tokens per forward pass; a clip with more tokens runs as a separate batch.

    Default: 2048 on a CPU, where larger batches are not faster, and 32768 on a GPU.
    """
    max_wait_ms: float = Field(5.0, ge=0)
    """Maximum time in milliseconds that an idle model waits for items that are being decoded."""
    max_queued_tokens: int = Field(262_144, ge=1)
    """Maximum number of admitted tokens waiting for a forward pass; further requests are rejected."""
    max_queued_mib: int = Field(1024, ge=1)
    """Maximum size in MiB of admitted files waiting to be decoded."""
    max_output_mib: int = Field(512, ge=1)
    """Maximum size in MiB of the tokens and layers that admitted requests return; further requests are rejected."""
    decoders: int = Field(2, ge=1, le=64)
    """Number of decoding processes."""
    limits: RequestLimits = RequestLimits()
