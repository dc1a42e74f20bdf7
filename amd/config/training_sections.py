"""Config sections of a training run: data, optimizer, schedule, checkpoints, scaling and tracking.

Shared by pre-training, fine-tuning, detection, probing and embedding. Torch-free.
"""

from __future__ import annotations

import math
import re
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from amd.config.locations import CacheLocation, DataLocation, TrackingLocation
from amd.config.sections import Section, as_pair

Precision = Literal["auto", "fp32", "bf16"]
Device = Literal["auto", "cpu", "cuda"]
DataFormat = Literal["auto", "image_folder", "video_folder", "list", "frame_list", "shards"]
FrameSampling = Literal["strided", "window", "segments"]
Crop = Literal["multi_scale", "random_resized", "center"]
Interpolation = Literal["bilinear", "bicubic"]
VideoDecoder = Literal["pyav", "decord"]
DamagePolicy = Literal["tolerant", "strict"]

_FRAME_NAME = re.compile(r"([^{}\\]|\{0?(:0?\d{1,2}d?)?\}|\{folder\})+")


class DataConfig(Section):
    """Data set, clip sampling and file reading."""

    train: DataLocation
    """Path or fsspec URL of the data: a folder, a list file or a shard pattern (`…/{000..099}.tar`); or `demo:digits` /
    `demo:moving-digits`, which are generated on first use."""
    format: DataFormat = "auto"
    """Layout of the data; auto detects it from the path and its contents."""
    root: DataLocation = ""
    """Base folder for relative paths in list files. Default: the folder that contains the list file."""
    frame_name: str = "img_{:05}.jpg"
    """Format string for frame file names in frame folders; frame numbers start at 1."""
    sampling: FrameSampling = "strided"
    """Frame sampling in training. strided: every clip.sampling_rate_frames-th frame from a random start (K400). window:
    frames spread evenly over a random window of clip.frames x clip.sampling_rate_frames frames (SSv2; K400
    fine-tuning). segments: one random frame from each of clip.frames equal segments of the video (TSN; SSv2
    fine-tuning)."""
    crop: Crop = "multi_scale"
    """Spatial crop in training. multi_scale: random scale, aspect ratio and position from fixed sets (VideoMAE).
    random_resized: random area (see crop_scale) and aspect ratio (MAE). center: the largest central crop."""
    crop_scale: tuple[float, float] = (0.2, 1.0)
    """Smallest and largest area of a random_resized crop, as fractions of the frame."""
    flip: bool = False
    """Whether to flip clips horizontally with probability 0.5; disable if labels depend on left and right (SSv2)."""
    rand_augment: str | None = None
    """RandAugment policy in timm's notation, such as rand-m7-n4-mstd0.5-inc1. Images are augmented after the crop, as
    in timm and MAE; videos before the crop, identically in all frames of a clip, as in VideoMAE. Default: no
    RandAugment."""
    center_fraction: float = Field(1.0, gt=0, le=1)
    """Side of the center crop in evaluation, as a fraction of the largest possible crop; 0.875 corresponds to
    resizing to 256 and cropping to 224."""
    interpolation: Interpolation = "bilinear"
    """Interpolation used to resize frames."""
    repeats: int = Field(1, ge=1, le=64)
    """Number of clips cut from each decoded sample (repeated augmentation)."""
    loader_workers: int = Field(4, ge=0, le=256)
    """Data loader processes per training worker; 0 reads data in the training process itself."""
    prefetch_batches: int = Field(2, ge=1)
    """Batches that each data loader process prepares in advance."""
    max_bad_fraction: float = Field(0.01, ge=0, le=1)
    """Maximum fraction of unreadable samples in the data set; the run stops if it is exceeded."""
    read_timeout_s: float = Field(30.0, gt=0)
    """Seconds allowed to read and decode one sample; a sample that takes longer counts as bad."""
    read_memory_mib: int = Field(4096, ge=1024)
    """Address space limit of a decoding process on Linux, in MiB; a sample that needs more counts as bad."""
    decoder: VideoDecoder = "pyav"
    """Video decoder. pyav: decodes every file exactly, detects damage, and is faster. decord: used only for files that
    decord is known to decode correctly; all other files use pyav. decord has wheels for Linux on x86-64 only."""
    damage: DamagePolicy = "tolerant"
    """Treatment of damaged videos. tolerant: decodable frames are used, and the video is listed in
    damaged_samples.jsonl. strict: the video counts as bad. A wrong frame count in a header or an index does not count
    as damage."""
    min_decoded_share: float = Field(0.5, gt=0, le=1)
    """Minimum share of a damaged video's frames that must decode with damage=tolerant; otherwise the video counts as
    bad. For a truncated video, the share is relative to the frames that the file contains."""
    retries: int = Field(3, ge=0, le=20)
    """Maximum number of retries after a failed read from remote storage."""
    read_ahead_mib: int = Field(64, ge=0, le=65_536)
    """Amount of remote data that each data loader process fetches in advance, in MiB, so that decoding does not wait
    for storage. 0: each file is fetched when it is needed."""
    cache_dir: CacheLocation | None = None
    """Local cache folder for remote files; the least recently used files are evicted. Default: no cache."""
    cache_limit_mib: int = Field(10_240, ge=1)
    """Size limit of the cache folder, in MiB."""

    @model_validator(mode="after")
    def _frame_names(self) -> DataConfig:
        """Confine frame names to their folder: the config may come from an untrusted REST client."""
        name = self.frame_name
        if not _FRAME_NAME.fullmatch(name) or name.startswith("/") or ".." in name.split("/"):
            raise ValueError(
                f"data.frame_name={name!r} must be a relative file name inside the frame folder: {{}} or {{:05}} is "
                "replaced by the frame number, {folder} by the folder's name"
            )
        return self

    @model_validator(mode="after")
    def _scales(self) -> DataConfig:
        low, high = self.crop_scale
        if not 0 < low <= high <= 1:
            raise ValueError(f"data.crop_scale={self.crop_scale} must be two fractions with 0 < low <= high <= 1")
        return self


class OptimConfig(Section):
    """AdamW with the official parameter groups: no weight decay on biases, norms, tokens and position embeddings."""

    batch_size: int = Field(256, ge=1)
    """Samples per optimizer step, across all workers; each sample yields data.repeats clips."""
    base_lr: float = Field(1.5e-4, gt=0)
    """Peak learning rate, per 256 samples: lr = base_lr x batch_size / 256. Repeats are not counted, as in AMD."""
    min_lr: float = Field(1e-5, ge=0)
    """Learning rate at the end of the schedule, per 256 samples."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decay rates for the first and second moments."""
    eps: float = Field(1e-8, gt=0)
    """AdamW's epsilon, added to the denominator."""
    weight_decay: float = Field(0.05, ge=0)
    """AdamW's decoupled weight decay."""
    clip_norm: float | None = Field(None, gt=0)
    """Maximum global norm of the gradients. Default: no clipping."""

    @property
    def lr(self) -> float:
        """Peak learning rate of the optimizer."""
        return self.base_lr * self.batch_size / 256

    @property
    def final_lr(self) -> float:
        """Learning rate of the optimizer at the end of the schedule."""
        return self.min_lr * self.batch_size / 256


class ScheduleConfig(Section):
    """Learning rate schedule: linear warm-up from 0, then cosine decay, updated every step."""

    epochs: int | None = Field(None, ge=1)
    """Length of the run in epochs; set either epochs or steps."""
    steps: int | None = Field(None, ge=1)
    """Length of the run in optimizer steps; set either epochs or steps."""
    warmup_epochs: int | None = Field(None, ge=0)
    """Length of the warm-up in epochs. Default: no warm-up, unless warmup_steps is set."""
    warmup_steps: int | None = Field(None, ge=0)
    """Length of the warm-up in optimizer steps. Default: no warm-up, unless warmup_epochs is set."""

    @model_validator(mode="after")
    def _one_length(self) -> ScheduleConfig:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("schedule.epochs and schedule.steps: set exactly one of them as the length of the run")
        if self.warmup_epochs is not None and self.warmup_steps is not None:
            raise ValueError("schedule.warmup_epochs and schedule.warmup_steps: set at most one")
        if self.epochs is not None and (self.warmup_epochs or 0) >= self.epochs + 1:
            raise ValueError(f"schedule.warmup_epochs={self.warmup_epochs} must not be above epochs={self.epochs}")
        if self.steps is not None and (self.warmup_steps or 0) > self.steps:
            raise ValueError(
                f"schedule.warmup_steps={self.warmup_steps} must not be above steps={self.steps}; lower warmup_steps, "
                "or raise steps"
            )
        return self

    def total_steps(self, steps_per_epoch: int) -> int:
        return self.steps if self.steps is not None else (self.epochs or 0) * steps_per_epoch

    def total_warmup_steps(self, steps_per_epoch: int) -> int:
        if self.warmup_steps is not None:
            return self.warmup_steps
        return (self.warmup_epochs or 0) * steps_per_epoch


class CheckpointConfig(Section):
    """Schedule and retention of checkpoints."""

    every_steps: int | None = Field(None, ge=1)
    """Optimizer steps between checkpoints. Default: no checkpoints at step intervals."""
    every_minutes: float | None = Field(15.0, gt=0)
    """Minutes between checkpoints, in addition to every_steps; whichever comes first triggers a checkpoint."""
    keep_last: int = Field(2, ge=1)
    """Number of most recent checkpoints to keep."""
    keep_best: int = Field(0, ge=0)
    """Number of checkpoints with the best values of best_metric to keep, in addition to keep_last."""
    best_metric: str = "loss/total"
    """Metric that ranks checkpoints, as named in the run's metrics. Lower is better for losses, higher for all other
    metrics."""
    pin_steps: tuple[int, ...] = ()
    """Steps at which a checkpoint is always written and never removed."""
    deadline_s: float = Field(60.0, gt=0)
    """Seconds allowed for the final checkpoint when a run is stopped (SIGTERM, cancellation, preemption)."""

    @property
    def higher_is_better(self) -> bool:
        return "loss" not in self.best_metric


class Retries(Section):
    """Maximum number of restarts from the newest checkpoint, by cause of failure. A newer checkpoint resets the
    count."""

    infrastructure: int = Field(3, ge=0)
    """Maximum number of restarts after infrastructure failures, such as a lost node or a crashed worker."""
    preemption: int = Field(10, ge=0)
    """Maximum number of restarts after a node is preempted."""
    user: int = Field(0, ge=0)
    """Maximum number of restarts after errors in config, data or code; 0 by default, because these errors recur."""


class ScalingConfig(Section):
    """Workers, devices and precision."""

    workers: Annotated[tuple[int, int], BeforeValidator(as_pair)] = (1, 1)
    """Training workers (DDP ranks): a number, or [min, max] for an elastic run, which adapts gradient accumulation to
    keep the batch size and learning rate constant."""
    device: Device = "auto"
    """Device for the workers; auto uses a GPU if one is available."""
    cpus_per_worker: float = Field(1.0, gt=0)
    """CPUs that Ray reserves per worker."""
    threads_per_worker: int | None = Field(None, ge=1)
    """PyTorch threads per worker on CPU. Default: the machine's cores divided among its workers."""
    micro_batch: int | None = Field(None, ge=1)
    """Maximum samples per forward pass of a worker; gradients accumulate up to optim.batch_size. Default: a worker's
    share of the batch at the maximum number of workers, so an elastic run needs no more memory per worker when it
    shrinks. Halved for the next attempt when a GPU runs out of memory."""
    precision: Precision = "auto"
    """Numeric precision. bf16: bfloat16 autocast. auto: bf16 on GPU, fp32 on CPU."""
    compile: bool = False
    """Whether to compile the transformer blocks with torch.compile."""
    retries: Retries = Retries()
    """Restarts after a failure."""
    resize_interval_s: float = Field(60.0, ge=0)
    """Seconds between checks of how many workers an elastic run can use. Before a resize, the
    run writes a checkpoint and stops."""
    start_timeout_s: float = Field(300.0, gt=0)
    """Seconds to wait for the cluster to provide the workers' resources before the run fails as infeasible."""
    stall_timeout_s: float | None = Field(1800.0, gt=0)
    """Seconds without a completed step or evaluation batch after which a worker counts as stalled: its stack traces are
    logged, and the run restarts from the newest checkpoint. null: no limit."""

    @model_validator(mode="after")
    def _ordered(self) -> ScalingConfig:
        low, high = self.workers
        if not 1 <= low <= high:
            raise ValueError(
                f"scaling.workers={list(self.workers)} must be a positive number, or [min, max] with 1 <= min <= max"
            )
        return self

    def worker_resources(self, gpu: bool) -> dict[str, float]:
        """Return the resources that one worker requests, keyed by Ray's resource names."""
        return {"CPU": self.cpus_per_worker, **({"GPU": 1.0} if gpu else {})}

    @property
    def min_cpus(self) -> int:
        """CPUs that the minimum number of workers needs in total, rounded up to whole CPUs."""
        return max(1, math.ceil(self.workers[0] * self.cpus_per_worker))


class TrackingConfig(Section):
    """Metric logging and the collapse guard."""

    log_every_steps: int = Field(10, ge=1)
    """Optimizer steps between logged metrics."""
    tensorboard: bool = True
    """Whether to write TensorBoard event files."""
    mlflow: TrackingLocation | None = None
    """MLflow tracking URI; requires the `mlflow` extra. Default: no MLflow."""
    mlflow_experiment: str = "amd"
    """Name of the MLflow experiment."""
    guard_every_steps: int = Field(200, ge=0)
    """Optimizer steps between measurements by the collapse guard (the effective rank of the student's features);
    0 disables it."""
    guard_min_rank: float = Field(0.02, ge=0, le=1)
    """Minimum effective rank of the student's features, as a fraction of their width; the guard warns below this
    value."""


class MediaConfig(Section):
    """Pictures of fixed training samples during pre-training: the input, the student's view, and the reconstruction."""

    samples: int = Field(8, ge=0, le=8)
    """Number of samples in the pictures, which are written after probes and after the steps of checkpoint.pin_steps;
    0 disables pictures."""
    every_steps: int | None = Field(None, ge=1)
    """Optimizer steps between pictures, in addition to probes and pinned steps. Default: no additional pictures."""
