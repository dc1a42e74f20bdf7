"""Configs for tasks other than training: import, export and data preparation."""

from __future__ import annotations

import re
from pathlib import PurePosixPath
from typing import Any, Literal

from pydantic import Field, field_validator

from amd.config.locations import EncoderLocation, OutputLocation, StorageLocation, WeightsLocation
from amd.config.sections import ENCODER_SIZES, FrameSize, Positions, Section
from amd.config.training_sections import DataConfig, Interpolation

ENCODER_ID = r"[A-Za-z0-9][A-Za-z0-9_.-]*"
ExportFormat = Literal["timm", "huggingface", "official", "onnx", "torch-export"]


class TaskConfig(Section):
    """Base class of all task configs."""

    storage: StorageLocation | None = None
    """Storage root for published encoders: a path or fsspec URL. Default: AMD_STORAGE, else the user's data folder."""

    @property
    def cpus(self) -> float:
        """Number of CPUs that the task reserves."""
        return 1.0


def encoder_id(weights: str) -> str:
    """Return the default ID for imported weights, derived from their file name."""
    name = PurePosixPath(weights.removeprefix("timm:").rstrip("/")).name
    stem = re.sub(r"\.(pth|pt|bin|safetensors|tar)$", "", name)
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", stem).strip("-._")[:200] or "imported"


def _default_id(values: dict[str, Any]) -> str:
    return encoder_id(values.get("weights", ""))


class ThirdPartyWeights(Section):
    """Third-party weights, with metadata that is missing from their files. Unset fields are inferred or guessed."""

    weights: WeightsLocation = Field(min_length=1)
    """Weights to import: a file, folder or URL of any known layout, or timm:NAME."""
    id: str = Field(default_factory=_default_id, max_length=200)
    """ID of the published encoder. Default: derived from the file name of the weights."""
    size: str | None = None
    """Name of a standard encoder: S, B, L, H, demo-student or demo-teacher. Default: inferred from the weights."""
    heads: int | None = Field(None, ge=1)
    """Attention heads per block, which cannot be inferred from tensor shapes. Default: width / 64."""
    frames: int | None = Field(None, ge=1, le=1024)
    """Frames per clip; 1 for images. Default: inferred from the weights or their metadata, else 16 (reported as a
    guess)."""
    image_size: FrameSize | None = None
    """Height and width of a frame in pixels; a single number means a square. Default: inferred from the weights or
    their metadata, else 224 (reported as a guess)."""
    patch: int | None = Field(None, ge=1)
    """Height and width of a token in pixels. Default: inferred from the patch embedding."""
    tubelet: int | None = Field(None, ge=1)
    """Frames per token. Default: inferred from the patch embedding."""
    sampling_rate_frames: int | None = Field(None, ge=1)
    """Distance between consecutive frames of a clip, in frames of the source video."""
    positions: Positions | None = None
    """Position embedding that the weights were trained with."""
    mean: tuple[float, float, float] | None = None
    """Per-channel (RGB) mean of pixel values in [0, 1], subtracted from the pixels."""
    std: tuple[float, float, float] | None = None
    """Per-channel (RGB) standard deviation of pixel values in [0, 1]; pixels are divided by it."""
    interpolation: Interpolation | None = None
    """Interpolation used to resize frames."""
    license: str | None = Field(None, max_length=100)
    """Licence of the weights, such as CC-BY-NC-4.0."""

    @field_validator("id")
    @classmethod
    def _name(cls, value: str) -> str:
        if not re.fullmatch(ENCODER_ID, value):
            raise ValueError(
                f"id={value} must consist of letters, digits, dots, dashes and underscores "
                "and start with a letter or digit"
            )
        return value

    @field_validator("size")
    @classmethod
    def _known(cls, value: str | None) -> str | None:
        if value is not None and value not in ENCODER_SIZES:
            raise ValueError(
                f"size={value} is not one of {', '.join(ENCODER_SIZES)}; omit `size` to infer it from the weights"
            )
        return value


class ImportConfig(ThirdPartyWeights, TaskConfig):
    """Config for importing third-party weights as a published encoder."""


class ExportConfig(TaskConfig):
    """Config for exporting a published encoder to another format."""

    encoder: EncoderLocation = Field(min_length=1)
    """Published encoder: its ID, folder or URL."""
    format: ExportFormat = "huggingface"
    """Export format."""
    output: OutputLocation | None = None
    """Folder or URL for the exported files; required outside jobs, which write to `<storage>/jobs/<job>/output`."""


class PrepareConfig(TaskConfig):
    """Config for converting a data set for fast reading: smaller frames, short GOPs, tar shards with an index."""

    data: DataConfig
    """Data set to prepare."""
    output: OutputLocation | None = None
    """Folder or URL for the shards; required outside jobs, which write to `<storage>/jobs/<job>/output`."""
    short_side: int = Field(320, ge=16)
    """Short side of the prepared frames, in pixels; smaller frames keep their size."""
    gop: int = Field(12, ge=1)
    """Distance between key frames of a video, in frames."""
    crf: int = Field(23, ge=0, le=51)
    """Constant rate factor of H.264; higher values mean smaller files and lower quality."""
    frame_rate: float | None = Field(None, gt=0)
    """Frame rate of the prepared videos, in frames per second. Default: the frame rate of the source."""
    quality: int = Field(90, ge=1, le=100)
    """JPEG quality of images."""
    segment_s: float | None = Field(None, gt=0)
    """Approximate duration of the samples that each video is cut into, in seconds. Default: one sample per video."""
    shard_mib: int = Field(128, ge=1)
    """Approximate size of each shard, in MiB."""
    workers: int = Field(2, ge=1)
    """Number of processes that decode and encode samples."""
    limit: int | None = Field(None, ge=1)
    """Maximum number of samples to prepare, starting with the first sample in the data set. Default: all samples."""
    sample_timeout_s: float = Field(600.0, gt=0)
    """Seconds allowed to decode and encode one sample."""

    @property
    def cpus(self) -> float:
        return float(self.workers)
