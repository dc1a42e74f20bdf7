"""The sections of a config, each with the rules that hold within it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

MaskStrategy = Literal["random", "tube"]
DecoderTokens = Literal["all", "running_cell"]
Distance = Literal["l2", "l1", "smooth_l1"]
TargetNorm = Literal["none", "layer_norm", "l2"]
Reduction = Literal["mean", "sum"]
PixelTarget = Literal["per_channel", "per_patch", "normalized", "unit"]
Positions = Literal["sincos_1d", "sincos_2d", "sincos_3d", "learned"]
Init = Literal["videomae", "xavier", "trunc_normal"]
Precision = Literal["auto", "fp32", "bf16"]
Device = Literal["auto", "cpu", "cuda"]
DataFormat = Literal["auto", "image_folder", "video_folder", "list", "frame_list", "shards"]
FrameSampling = Literal["strided", "window", "segments"]
Crop = Literal["multi_scale", "random_resized", "center"]
Interpolation = Literal["bilinear", "bicubic"]
VideoDecoder = Literal["pyav", "decord"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class TokenGrid(NamedTuple):
    """Tokens along time, height and width; token order is time-major, then row, then column."""

    frames: int
    height: int
    width: int

    @property
    def tokens(self) -> int:
        return self.frames * self.height * self.width

    @property
    def per_frame(self) -> int:
        return self.height * self.width


class Section(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False, validate_default=True
    )


def _square(value: object) -> object:
    return (value, value) if isinstance(value, int) and not isinstance(value, bool) else value


FrameSize = Annotated[tuple[int, int], BeforeValidator(_square)]


class ClipConfig(Section):
    """What a network is fed, and how it is cut into tokens. An image is a clip of one frame with tubelet 1."""

    frames: int = Field(16, ge=1, le=1024)
    size: FrameSize = (224, 224)
    """Height and width in pixels; a single number means a square."""
    patch: int = Field(16, ge=1)
    """Side of a token in pixels."""
    tubelet: int = Field(2, ge=1)
    """Frames per token."""
    sampling_rate_frames: int = Field(4, ge=1)
    """Every n-th frame of the source goes into the clip."""
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    @model_validator(mode="after")
    def _divisible(self) -> ClipConfig:
        for name, pixels in zip(("height", "width"), self.size, strict=True):
            if pixels <= 0 or pixels % self.patch:
                raise ValueError(
                    f"clip.size: {name} {pixels} must be a positive multiple of clip.patch={self.patch}: "
                    "tokens tile the frame"
                )
        if self.frames % self.tubelet:
            raise ValueError(
                f"clip.frames={self.frames} must be a multiple of clip.tubelet={self.tubelet}: tokens tile the clip"
            )
        if min(self.std) <= 0:
            raise ValueError(f"clip.std={self.std} must be positive: pixels are divided by it")
        return self

    @property
    def grid(self) -> TokenGrid:
        return TokenGrid(self.frames // self.tubelet, self.size[0] // self.patch, self.size[1] // self.patch)

    @property
    def token_values(self) -> int:
        """Pixel values in one token (P): tubelet x patch x patch x 3."""
        return self.tubelet * self.patch * self.patch * 3

    @property
    def is_image(self) -> bool:
        return self.frames == 1


class EncoderSize(NamedTuple):
    width: int
    depth: int
    heads: int


ENCODER_SIZES: dict[str, EncoderSize] = {
    "S": EncoderSize(384, 12, 6),
    "B": EncoderSize(768, 12, 12),
    "L": EncoderSize(1024, 24, 16),
    "H": EncoderSize(1280, 32, 16),
    "demo-student": EncoderSize(64, 4, 4),
    "demo-teacher": EncoderSize(128, 6, 4),
}


# What a width must be a multiple of.
POSITION_PARTS: dict[Positions, int] = {"sincos_1d": 1, "sincos_2d": 4, "sincos_3d": 16, "learned": 1}


class EncoderConfig(Section):
    """A plain pre-norm ViT. `size` is a shorthand that fills width, depth and heads."""

    size: str | None = None
    """One of S, B, L, H, demo-student, demo-teacher; or none, with width, depth and heads given."""
    width: int = Field(384, ge=4)
    depth: int = Field(12, ge=1)
    heads: int = Field(6, ge=1)
    mlp_ratio: float = Field(4.0, gt=0)
    class_token: bool = False
    positions: Positions = "sincos_1d"
    """Fixed tables (VideoMAE: sincos_1d, MAE: sincos_2d, MVD: sincos_3d), or a trained one (timm, Hugging Face ViT)."""
    position_base: float = Field(10_000.0, gt=1)
    init: Init = "videomae"
    """xavier: every linear map, the patch embedding included (MAE). videomae: the same, but the patch embedding and the
    decoder's input keep PyTorch's default. trunc_normal: standard deviation 0.02 everywhere."""
    drop_path: float = Field(0.0, ge=0, lt=1)
    """Rate at the last block, growing linearly from 0 at the first (METHOD 2.2)."""

    @model_validator(mode="before")
    @classmethod
    def _fill_size(cls, values: Any) -> Any:
        if not isinstance(values, Mapping) or values.get("size") is None:
            return values
        size = values["size"]
        if size not in ENCODER_SIZES:
            raise ValueError(
                f"encoder.size={size!r} is not one of {', '.join(ENCODER_SIZES)}; "
                "or leave it out and give width, depth and heads"
            )
        named = ENCODER_SIZES[size]._asdict()
        for field, number in named.items():
            if values.get(field, number) != number:
                raise ValueError(
                    f"encoder.{field}={values[field]} contradicts encoder.size={size} ({field} {number}): "
                    "set encoder.size=null to choose width, depth and heads"
                )
        return {**values, **named}

    @model_validator(mode="after")
    def _shapes(self) -> EncoderConfig:
        if self.width % self.heads:
            raise ValueError(f"encoder.width={self.width} must be a multiple of encoder.heads={self.heads}")
        parts = POSITION_PARTS[self.positions]
        if self.width % parts:
            raise ValueError(f"encoder.width={self.width} must be a multiple of {parts} for {self.positions} positions")
        return self


class DecoderConfig(Section):
    """Rebuilds pixels at student-masked tokens from the student's encoded tokens."""

    width: int = Field(192, ge=4)
    depth: int = Field(4, ge=1)
    heads: int = Field(3, ge=1)
    input_bias: bool = False
    """A bias on the map from encoder to decoder width: MAE has it, VideoMAE and AMD do not."""

    @model_validator(mode="after")
    def _shapes(self) -> DecoderConfig:
        if self.width % self.heads:
            raise ValueError(f"decoder.width={self.width} must be a multiple of decoder.heads={self.heads}")
        return self


class GeneratorConfig(Section):
    """Predicts the teacher's features at teacher-only tokens, one per layer pair."""

    depth: int = Field(2, ge=1)
    width: int | None = Field(None, ge=4)
    """None: the teacher's width, as in AMD. Another width has a linear map before and after the blocks."""
    heads: int | None = Field(None, ge=1)
    """None: width // 64, as in AMD."""


class StudentConfig(Section):
    encoder: EncoderConfig = EncoderConfig(size="S")
    decoder: DecoderConfig = DecoderConfig()
    generator: GeneratorConfig = GeneratorConfig()


class TeacherConfig(Section):
    """The frozen larger encoder: from `weights`, or trained first from `preset`."""

    encoder: EncoderConfig = EncoderConfig(size="L")
    weights: str | None = None
    """A file or URI (official, safetensors), `timm:NAME`, or a published encoder's folder or id."""
    preset: str | None = None
    """A preset with objective.kind=mae: trained first, once, and cached by the digest of its config."""
    overrides: dict[str, Any] = Field(default_factory=dict)
    """Overrides of that preset, dotted keys."""
    weights_license: str | None = None
    """Carried to the student's card; VideoMAE's released weights are CC-BY-NC-4.0."""

    @model_validator(mode="after")
    def _one_source(self) -> TeacherConfig:
        if (self.weights is None) == (self.preset is None):
            both = "both are given" if self.weights else "neither is given"
            raise ValueError(
                f"teacher.weights and teacher.preset: {both}; give exactly one, weights to load (a file, a URI, "
                "timm:NAME or an encoder id) or a preset to train first"
            )
        if self.overrides and self.preset is None:
            raise ValueError("teacher.overrides changes teacher.preset, which is not given")
        return self


class MaskConfig(Section):
    strategy: MaskStrategy = "tube"
    student_ratio: float = Field(0.9, ge=0, lt=1)
    """Fraction of tokens hidden from the student."""
    teacher_ratio: float = Field(0.75, ge=0, lt=1)
    """Fraction of tokens hidden from the teacher; at most student_ratio. 0: the teacher sees the full clip."""
    decoder: DecoderTokens = "all"
    """Which student-masked tokens the decoder rebuilds: all, or the running cell of VideoMAE V2."""
    decoder_ratio: float = Field(0.5, gt=0, lt=1)
    """Fraction of tokens left out of reconstruction by the running cell: 0.25, 0.5 or 0.75."""

    @model_validator(mode="after")
    def _asymmetric(self) -> MaskConfig:
        if self.teacher_ratio > self.student_ratio:
            raise ValueError(
                f"mask.teacher_ratio={self.teacher_ratio} must not be above mask.student_ratio={self.student_ratio}: "
                "the teacher sees at least what the student sees"
            )
        if self.decoder == "running_cell" and self.decoder_ratio not in (0.25, 0.5, 0.75):
            raise ValueError(f"mask.decoder_ratio={self.decoder_ratio} must be 0.25, 0.5 or 0.75: a cell is 2x2 tokens")
        return self

    def hidden_cells(self, ratio: float, cells: int) -> int:
        """How many of `cells` a ratio hides; truncated, as in the official mask generator."""
        return int(ratio * cells)


class LayerPair(Section):
    """A student block aligned with a teacher block; blocks count from 1."""

    student: int = Field(ge=1)
    teacher: int = Field(ge=1)


class LossWeights(Section):
    reconstruction: float = Field(1.0, ge=0)
    direct: float = Field(1.0, ge=0)
    generation: float = Field(1.0, ge=0)


class ObjectiveConfig(Section):
    kind: Literal["amd", "mae"] = "amd"
    """amd: with a teacher. mae: reconstruction alone (MAE, VideoMAE), which makes teachers and baselines."""
    weights: LossWeights = LossWeights()
    layers: tuple[LayerPair, ...] = (LayerPair(student=6, teacher=12), LayerPair(student=12, teacher=24))
    """Aligned layer pairs; the paper takes the middle and the last block."""
    distance: Distance = "l2"
    """How features are compared; l2 is the mean squared error."""
    smooth_l1_beta: float = Field(1.0, gt=0)
    target_norm: TargetNorm = "none"
    """What is done to features before they are compared: nothing (AMD), a LayerNorm without parameters on the
    teacher's, or each token of both sides to unit length (DMAE)."""
    reduction: Reduction = "mean"
    """Over layer pairs: mean as in the official code, sum as in the paper."""
    pixels: PixelTarget = "per_channel"
    """Pixel targets: normalised per token and colour (VideoMAE), per token over all values (MAE); or the pixels as the
    networks see them (normalized), or in [0, 1] (unit)."""


_FRAME_NAME = re.compile(r"([^{}\\]|\{0?(:0?\d{1,2}d?)?\}|\{folder\})+")


class DataConfig(Section):
    train: str
    """An fsspec URL or path: folder, list file, shard pattern (`…/{000..099}.tar`), or `demo:digits` /
    `demo:moving-digits`, which are written on first use."""
    format: DataFormat = "auto"
    root: str = ""
    """Put before relative paths in list files; default: the list file's own folder."""
    frame_name: str = "img_{:05}.jpg"
    """File name of frame n (from 1) in frame folders."""
    sampling: FrameSampling = "strided"
    """strided: every clip.sampling_rate_frames-th frame from a random start (K400). window: frames spread evenly over a
    random window of frames x rate (SSv2; K400 fine-tuning). segments: a random frame out of each of clip.frames equal
    parts of the sample (TSN; SSv2 fine-tuning)."""
    crop: Crop = "multi_scale"
    crop_scale: tuple[float, float] = (0.2, 1.0)
    """Area of a random_resized crop, as a fraction of the frame."""
    flip: bool = False
    """Mirror left and right with probability one half; never where left and right carry the label (SSv2)."""
    rand_augment: str | None = None
    """timm's RandAugment, such as rand-m7-n4-mstd0.5-inc1, the same operations in all frames of a clip; none: off."""
    center_fraction: float = Field(1.0, gt=0, le=1)
    """Side of the center crop of an evaluation, as a fraction of the largest one; 0.875 is resize 256, crop 224."""
    interpolation: Interpolation = "bilinear"
    repeats: int = Field(1, ge=1, le=64)
    """Repeated augmentation: clips cut from one decoded sample."""
    loader_workers: int = Field(4, ge=0, le=256)
    """Reading processes per training worker; 0 reads in the training process itself."""
    prefetch_batches: int = Field(2, ge=1)
    """Per reading process."""
    max_bad_fraction: float = Field(0.01, ge=0, le=1)
    """Unreadable samples beyond this fraction of the data set stop the run."""
    read_timeout_s: float = Field(30.0, gt=0)
    """A sample that takes longer to read and decode is bad."""
    read_memory_mib: int = Field(4096, ge=1024)
    """Address space a decoding process may take; a sample that needs more is bad."""
    decoder: VideoDecoder = "pyav"
    """pyav: exact for every file, sees damage, and is the faster. decord: where it is known to read rightly, pyav
    elsewhere."""
    retries: int = Field(3, ge=0, le=20)
    """Further attempts at a remote read that fails."""
    cache_dir: str | None = None
    """A local folder that keeps remote files, least recently used first out."""
    cache_limit_mib: int = Field(10_240, ge=1)

    @model_validator(mode="after")
    def _frame_names(self) -> DataConfig:
        """A name below its folder, with numbers alone put in: it may come from a stranger."""
        name = self.frame_name
        if not _FRAME_NAME.fullmatch(name) or name.startswith("/") or ".." in name.split("/"):
            raise ValueError(
                f"data.frame_name={name!r} must be a file's name below its folder, its number as {{}} or {{:05}}, its "
                "folder's name as {folder}"
            )
        return self

    @model_validator(mode="after")
    def _scales(self) -> DataConfig:
        low, high = self.crop_scale
        if not 0 < low <= high <= 1:
            raise ValueError(f"data.crop_scale={self.crop_scale} must be two fractions with 0 < low <= high <= 1")
        return self


class OptimConfig(Section):
    """AdamW with the official parameter groups: no decay on biases, norms, tokens and positions."""

    batch_size: int = Field(256, ge=1)
    """Samples per optimiser step over all workers; with data.repeats each gives several clips."""
    base_lr: float = Field(1.5e-4, gt=0)
    """Peak learning rate per 256 samples: lr = base_lr x batch_size / 256 (repeats are not counted, as in AMD)."""
    min_lr: float = Field(1e-5, ge=0)
    """Final learning rate per 256 samples."""
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.05, ge=0)
    clip_norm: float | None = Field(None, gt=0)
    """Global gradient norm; none leaves gradients as they are."""

    @property
    def lr(self) -> float:
        return self.base_lr * self.batch_size / 256

    @property
    def final_lr(self) -> float:
        return self.min_lr * self.batch_size / 256


class ScheduleConfig(Section):
    """Linear warm-up from 0, then half a cosine, per step. Length in epochs or in steps."""

    epochs: int | None = Field(None, ge=1)
    steps: int | None = Field(None, ge=1)
    warmup_epochs: int | None = Field(None, ge=0)
    warmup_steps: int | None = Field(None, ge=0)

    @model_validator(mode="after")
    def _one_length(self) -> ScheduleConfig:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("schedule.epochs and schedule.steps: give exactly one, the length of the run")
        if self.warmup_epochs is not None and self.warmup_steps is not None:
            raise ValueError("schedule.warmup_epochs and schedule.warmup_steps: give at most one")
        if self.epochs is not None and (self.warmup_epochs or 0) >= self.epochs + 1:
            raise ValueError(f"schedule.warmup_epochs={self.warmup_epochs} must not be above epochs={self.epochs}")
        if self.steps is not None and (self.warmup_steps or 0) > self.steps:
            raise ValueError(
                f"schedule.warmup_steps={self.warmup_steps} must not be above steps={self.steps}: give both"
            )
        return self

    def total_steps(self, steps_per_epoch: int) -> int:
        return self.steps if self.steps is not None else (self.epochs or 0) * steps_per_epoch

    def total_warmup_steps(self, steps_per_epoch: int) -> int:
        if self.warmup_steps is not None:
            return self.warmup_steps
        return (self.warmup_epochs or 0) * steps_per_epoch


class CheckpointConfig(Section):
    every_steps: int | None = Field(None, ge=1)
    every_minutes: float | None = Field(15.0, gt=0)
    """Also after so many minutes; whichever comes first."""
    keep_last: int = Field(2, ge=1)
    keep_best: int = Field(0, ge=0)
    """Keep so many with the best `best_metric` besides."""
    best_metric: str = "loss/total"
    """Of a line of the run's metrics. Losses are best when low, all else when high."""
    pin_steps: tuple[int, ...] = ()
    """Steps whose checkpoints are made and never removed."""
    deadline_s: float = Field(60.0, gt=0)
    """A stop (SIGTERM, cancel, preemption) ends with a final checkpoint within this time."""

    @property
    def higher_is_better(self) -> bool:
        return "loss" not in self.best_metric


class Retries(Section):
    """How often a run is restarted from its newest checkpoint, by what went wrong."""

    infrastructure: int = Field(3, ge=0)
    preemption: int = Field(10, ge=0)
    user: int = Field(0, ge=0)
    """Errors of config, data or code: they come back, so not at all by default."""


def _worker_range(value: object) -> object:
    return (value, value) if isinstance(value, int) and not isinstance(value, bool) else value


class ScalingConfig(Section):
    workers: Annotated[tuple[int, int], BeforeValidator(_worker_range)] = (1, 1)
    """Training workers (DDP ranks): a number, or [least, most] for an elastic run, which keeps batch and learning
    rate by recomputing accumulation."""
    device: Device = "auto"
    cpus_per_worker: float = Field(1.0, gt=0)
    threads_per_worker: int | None = Field(None, ge=1)
    """Threads of torch on CPU; none: the machine's cores shared by its workers."""
    micro_batch: int | None = Field(None, ge=1)
    """Most samples a worker takes through the networks at once; gradients are accumulated up to optim.batch_size."""
    precision: Precision = "auto"
    """auto: bf16 autocast on GPU, fp32 on CPU."""
    compile: bool = False
    """torch.compile the blocks."""
    retries: Retries = Retries()
    start_timeout_s: float = Field(300.0, gt=0)
    """How long to wait for the cluster to give the workers' resources before the run fails as infeasible."""

    @model_validator(mode="after")
    def _ordered(self) -> ScalingConfig:
        least, most = self.workers
        if not 1 <= least <= most:
            raise ValueError(f"scaling.workers={list(self.workers)} must be a positive number, or [least, most]")
        return self

    def worker_resources(self, gpu: bool) -> dict[str, float]:
        """What a worker asks of its node, in Ray's names."""
        return {"CPU": self.cpus_per_worker, **({"GPU": 1.0} if gpu else {})}

    @property
    def least_cpus(self) -> int:
        """Whole CPUs that the fewest workers need together."""
        return max(1, math.ceil(self.workers[0] * self.cpus_per_worker))


class TrackingConfig(Section):
    log_every_steps: int = Field(10, ge=1)
    tensorboard: bool = True
    mlflow: str | None = None
    """An MLflow tracking URI; needs the extra `mlflow`."""
    mlflow_experiment: str = "amd"
    guard_every_steps: int = Field(200, ge=0)
    """How often the collapse guard measures the student's features; 0: never."""
    guard_min_rank: float = Field(0.02, ge=0, le=1)
    """Warn when the effective rank of the student's features falls below this fraction of its width."""
