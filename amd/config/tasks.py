"""What trains nothing and yet may run as a job: weights in, weights out, data made fast to read."""

from __future__ import annotations

import re
from pathlib import PurePosixPath
from typing import Any, Literal

from pydantic import Field, field_validator

from amd.config.sections import ENCODER_SIZES, DataConfig, FrameSize, Interpolation, Positions, Section

ENCODER_ID = r"[A-Za-z0-9][A-Za-z0-9_.-]*"
ExportFormat = Literal["timm", "huggingface", "official", "onnx", "torch-export"]


class TaskConfig(Section):
    storage: str | None = None
    """Root of encoder ids, any fsspec URL; none: AMD_STORAGE, else the user's data folder."""

    @property
    def cpus(self) -> float:
        """That it keeps busy."""
        return 1.0


def encoder_id(weights: str) -> str:
    """The name that weights are published under where nobody gives one: that of their file."""
    name = PurePosixPath(weights.removeprefix("timm:").rstrip("/")).name
    stem = re.sub(r"\.(pth|pt|bin|safetensors|tar)$", "", name)
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", stem).strip("-._")[:200] or "imported"


def _of_weights(values: dict[str, Any]) -> str:
    return encoder_id(values.get("weights", ""))


class ForeignWeights(Section):
    """Weights from outside, and what the user says of them; none: read off them, or guessed."""

    weights: str = Field(min_length=1)
    """A file, folder or URL of any known layout, or timm:NAME."""
    id: str = Field(default_factory=_of_weights, max_length=200)
    """The encoder's; by default the name of the file."""
    size: str | None = None
    """One of S, B, L, H, demo-student, demo-teacher; none: read off the shapes."""
    heads: int | None = Field(None, ge=1)
    """No tensor tells; guessed as width / 64."""
    frames: int | None = Field(None, ge=1, le=1024)
    image_size: FrameSize | None = None
    """Height and width in pixels; a single number means a square."""
    patch: int | None = Field(None, ge=1)
    """Side of a token in pixels."""
    tubelet: int | None = Field(None, ge=1)
    """Frames per token."""
    sampling_rate_frames: int | None = Field(None, ge=1)
    """Every n-th frame of the source goes into a clip."""
    positions: Positions | None = None
    mean: tuple[float, float, float] | None = None
    """Of pixels in [0, 1]."""
    std: tuple[float, float, float] | None = None
    interpolation: Interpolation | None = None
    license: str | None = Field(None, max_length=100)
    """What the weights hand down, such as CC-BY-NC-4.0."""

    @field_validator("id")
    @classmethod
    def _name(cls, value: str) -> str:
        if not re.fullmatch(ENCODER_ID, value):
            raise ValueError(
                f"id={value}: letters, digits, dots, dashes and underscores, beginning with a letter or digit"
            )
        return value

    @field_validator("size")
    @classmethod
    def _known(cls, value: str | None) -> str | None:
        if value is not None and value not in ENCODER_SIZES:
            raise ValueError(f"size={value} is not one of {', '.join(ENCODER_SIZES)}; leave it out to have it read off")
        return value


class ImportConfig(ForeignWeights, TaskConfig):
    """Foreign weights to publish as an encoder."""


class ExportConfig(TaskConfig):
    """A published encoder to write in another format."""

    encoder: str = Field(min_length=1)
    """A published encoder: id, folder or URL."""
    format: ExportFormat = "huggingface"
    output: str | None = None
    """A folder or URL that what is written goes into. A job's is its own, `<storage>/jobs/<job>/output`."""


class PrepareConfig(TaskConfig):
    """A raw collection to turn into what trains fast: scaled down, small GOP, tar shards with an index."""

    data: DataConfig
    output: str | None = None
    """A folder or URL for the shards. A job's is its own, `<storage>/jobs/<job>/output`."""
    short_side: int = Field(320, ge=16)
    """Shorter side in pixels; smaller ones stay."""
    gop: int = Field(12, ge=1)
    """Frames between key frames of a video."""
    crf: int = Field(23, ge=0, le=51)
    """H.264's constant rate factor: higher is smaller and worse."""
    frame_rate: float | None = Field(None, gt=0)
    """Frames a second; none: the source's."""
    quality: int = Field(90, ge=1, le=100)
    """Of JPEG."""
    shard_mib: int = Field(128, ge=1)
    workers: int = Field(2, ge=1)
    """Processes that decode and encode."""
    limit: int | None = Field(None, ge=1)
    """The first samples only."""
    sample_timeout_s: float = Field(600.0, gt=0)

    @property
    def cpus(self) -> float:
        return float(self.workers)
