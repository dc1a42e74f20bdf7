"""What an engine is asked, what it answers, why it refuses, and what it may cost. Torch-free.

Shapes: T frames, H height, W width, N tokens of a clip, D width of the encoder.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field


class Item(NamedTuple):
    """One image or video: its bytes, or where it lies."""

    content: bytes | None = None
    uri: str | None = None
    """A path or an fsspec URL; whoever asks has made sure that it may be read."""


class Want(BaseModel):
    """What is asked of each item."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    task: Literal["embedding", "classification", "reconstruction"] = "embedding"
    normalize: bool = False
    """The embedding at length 1."""
    tokens: Literal["none", "patch"] = "none"
    """patch: beside the embedding every token after the last norm."""
    layers: tuple[int, ...] = ()
    """Blocks, counted from 1, whose tokens are wanted as they leave it, before any norm."""
    top_k: int = Field(5, ge=1)
    """Classes of a classification, likeliest first."""
    views: str | None = None
    """Segments x crops, such as 5x3, averaged: probabilities of a classification, else embeddings. None: the middle."""
    mask_ratio: float | None = None
    """Of a reconstruction: fraction of tokens that is hidden; none: as in training."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Of a reconstruction: which tokens; the same for the same ratio, whatever the item."""


class Answer(NamedTuple):
    """Of one request; all items by the same encoder."""

    encoder: str
    """Its id."""
    items: list[dict[str, Any]]
    """Each {"embedding": (D,) float32}, with "tokens": (N, D) and "layers": {"6": (N, D)} where asked; or {"labels",
    "scores", "classes"}: names, probabilities and numbers of the likeliest classes; or {"mask_ratio", "seed",
    "visible", "loss", "original", "masked", "rebuilt"}: of a reconstruction the indices of tokens that were seen, the
    mean squared error on the others as the objective compares them, and clips (3, T, H, W), the last as float32 in
    [0, 1], the others uint8."""


class Refusal(Exception):
    """A request that gets no answer; one sentence for whoever asked."""


class ItemRefused(Refusal):
    """An item that cannot be read, or costs more than it may."""

    def __init__(self, index: int, reason: str) -> None:
        super().__init__(index, reason)  # plain arguments: it may cross processes
        self.index, self.reason = index, reason

    def __str__(self) -> str:
        return f"item {self.index} {self.reason}"


class NotPossible(Refusal):
    """What this encoder cannot do, or no request may ask."""


class NotLoaded(Refusal):
    def __init__(self, slot: str) -> None:
        super().__init__(slot)
        self.slot = slot

    def __str__(self) -> str:
        return f"no encoder is loaded as {self.slot!r}"


class QueueFull(Refusal):
    def __init__(self, retry_after_s: float) -> None:
        super().__init__(retry_after_s)
        self.retry_after_s = retry_after_s
        """When the queue that is there now should be done."""

    def __str__(self) -> str:
        return f"more is queued than may be; ask again in {self.retry_after_s:.1f} s"


class DeadlineExceeded(Refusal):
    def __init__(self, deadline_s: float) -> None:
        super().__init__(deadline_s)
        self.deadline_s = deadline_s

    def __str__(self) -> str:
        return f"was not answered within its deadline of {self.deadline_s:g} s"


class Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


class Limits(Settings):
    """What a request may cost at most."""

    items: int = Field(256, ge=1)
    rebuilt_items: int = Field(16, ge=1)
    """Of a request for reconstructions, whose answer holds three clips for each."""
    views: int = Field(64, ge=1)
    """Segments times crops."""
    bytes_mib: int = Field(64, ge=1)
    """Of a file."""
    pixels: int = Field(40_000_000, ge=1)
    """Of an image, or of a video's frame."""
    frames: int = Field(36_000, ge=1)
    """Of a video."""
    duration_s: float = Field(1200.0, gt=0)
    """Of a video."""
    decoded_mib: int = Field(512, ge=1)
    """Of all frames that are looked at, as RGB."""
    memory_mib: int = Field(2048, ge=1024)
    """Address space of a decoding process."""
    decode_timeout_s: float = Field(1.5, gt=0)
    fetch_timeout_s: float = Field(20.0, gt=0)
    """To fetch a file from a remote store."""


class EngineSettings(Settings):
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["float32", "bfloat16"] = "float32"
    threads: int | None = Field(None, ge=1)
    """Of the model on a CPU; none: as many as PyTorch takes."""
    max_batch_tokens: int | None = Field(None, ge=1)
    """In one forward pass; a clip of more is one by itself. None: 2048 on a CPU, where more is not faster, 32768 on a
    GPU."""
    max_wait_ms: float = Field(5.0, ge=0)
    """How long an idle model waits for items that are being decoded."""
    max_queued_tokens: int = Field(262_144, ge=1)
    """Of admitted items that the model has not begun; past it requests are refused."""
    max_queued_mib: int = Field(1024, ge=1)
    """Of admitted bytes that are not decoded."""
    decoders: int = Field(2, ge=1, le=64)
    """Decoding processes."""
    limits: Limits = Limits()
