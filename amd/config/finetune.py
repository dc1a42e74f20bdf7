"""Config for a fine-tuning run: a pre-trained encoder and a classifier on labelled data."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from amd.config.locations import DataLocation, WeightsLocation
from amd.config.run import RunConfig
from amd.config.sections import EncoderConfig, Section
from amd.config.training_sections import DataConfig, OptimConfig

ViewSampling = Literal["dense", "segments"]
TestedCheckpoint = Literal["best", "last"]

# Both keyed by head.multi_label.
MAIN_METRIC = {False: "eval/top1", True: "eval/map"}
EVALUATION_METRICS = {False: ("eval/top1", "eval/top5", "eval/loss"), True: ("eval/map",)}


class HeadConfig(Section):
    """The linear classifier on the pooled, normalised tokens."""

    classes: int | None = Field(None, ge=2)
    """Number of classes. Default: one more than the highest label in the training data."""
    multi_label: bool = False
    """Whether a sample may have several labels (`path 3,17` in a list file). If so, sigmoid, binary cross-entropy and
    mAP replace softmax, cross-entropy and accuracy."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout rate applied before the head."""
    init_scale: float = Field(0.001, gt=0)
    """Scale factor for the head's initial weights, which are truncated normal with standard deviation 0.02."""


class AugmentConfig(Section):
    """Batch augmentation: mixup, CutMix, label smoothing and random erasing. See `data` for frame augmentation."""

    mixup: float = Field(0.8, ge=0)
    """Alpha of mixup's Beta distribution; 0 disables mixup."""
    cutmix: float = Field(1.0, ge=0)
    """Alpha of CutMix's Beta distribution; 0 disables CutMix."""
    mix_prob: float = Field(1.0, ge=0, le=1)
    """Probability that mixup or CutMix is applied to a batch."""
    switch_prob: float = Field(0.5, ge=0, le=1)
    """Probability of CutMix instead of mixup, when both are enabled."""
    label_smoothing: float = Field(0.1, ge=0, lt=1)
    """Label smoothing; ignored with head.multi_label, where every class has a separate binary target."""
    erase_prob: float = Field(0.25, ge=0, le=1)
    """Probability of random erasing, which fills the same box with noise in all frames of a clip."""

    @property
    def mixes(self) -> bool:
        """Whether mixup or CutMix is ever applied."""
        return self.mix_prob > 0 and (self.mixup > 0 or self.cutmix > 0)


class ViewsConfig(Section):
    """Multi-view testing: class probabilities are averaged over several clips and crops of each sample."""

    segments: int = Field(1, ge=1, le=64)
    """Number of clips per sample, spread over its duration."""
    crops: int = Field(1, ge=1, le=9)
    """Number of spatial crops per clip, spread along the longer side of the frame."""
    sampling: ViewSampling = "dense"
    """Frame sampling for testing. dense: every clip.sampling_rate_frames-th frame, with clips spread evenly (K400).
    segments: one frame from each of clip.frames equal segments of the video (TSN; SSv2)."""

    def __str__(self) -> str:
        return f"{self.segments}x{self.crops}"


class LabelledDataConfig(DataConfig):
    """Labelled data: `train` as in pre-training, `val` to choose the best checkpoint, `test` for the final score."""

    val: DataLocation | None = None
    """Validation data, in the same format as `train`. Default: none; the last checkpoint is tested and published."""
    test: DataLocation | None = None
    """Test data, in the same format as `train`, scored once at the end. Default: `val`."""


class FinetuneOptimConfig(OptimConfig):
    """AdamW with layer-wise learning rate decay and an optional moving average of the weights."""

    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's decay rates for the first and second moments."""
    base_lr: float = Field(5e-4, gt=0)
    """Peak learning rate, per 256 samples: lr = base_lr x batch_size / 256. Repeats are not counted, as in AMD."""
    min_lr: float = Field(1e-6, ge=0)
    """Learning rate at the end of the schedule, per 256 samples. For an absolute rate such as MAE's 1e-6, set 1e-6 x
    256 / batch_size, and adjust it whenever batch_size changes."""
    layer_decay: float = Field(0.75, gt=0, le=1)
    """Layer-wise learning rate decay: ratio of each block's learning rate to the next block's; the head and the last
    norm are not scaled."""
    ema_decay: float | None = Field(None, gt=0, lt=1)
    """Decay of an exponential moving average of the weights; the averaged weights are tested and published.
    Default: no averaging."""


class EvaluationConfig(Section):
    """Validation during training and the final test."""

    every_epochs: int = Field(1, ge=1)
    """Epochs between validations, which use only the central view."""
    batch_size: int = Field(32, ge=1)
    """Clips per forward pass of each worker, or the number of views per sample if that is higher."""
    checkpoint: TestedCheckpoint = "best"
    """Checkpoint to test and publish: the best on data.val by checkpoint.best_metric, or the last, as in the official
    code. Choosing the best overestimates the score if data.val is also the test set."""
    views: ViewsConfig = ViewsConfig()
    """Views per sample in the final test."""


class FinetuneConfig(RunConfig):
    """Complete config for a fine-tuning run."""

    encoder: EncoderConfig = EncoderConfig()
    """Encoder to fine-tune; must match the initial weights."""
    weights: WeightsLocation | None = None
    """Initial weights of the encoder: the ID or folder of a published encoder, a file or URI of any known layout, or
    `timm:NAME`. Default: random initialisation."""
    weights_license: str | None = None
    """Licence of initial weights that have no card; copied to the published encoder's card."""
    head: HeadConfig = HeadConfig()
    """Classifier head."""
    augment: AugmentConfig = AugmentConfig()
    """Batch augmentation."""
    data: LabelledDataConfig
    """Training, validation and test data."""
    optim: FinetuneOptimConfig = FinetuneOptimConfig()
    """Optimizer settings."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """Validation during training and the final test."""

    @model_validator(mode="before")
    @classmethod
    def _defaults(cls, values: Any) -> Any:
        """Keep the checkpoint with the best validation score, unless the config sets its own policy."""
        if not isinstance(values, dict) or not isinstance(values.get("checkpoint"), dict | None):
            return values
        head = values.get("head") or {}
        multi_label = bool(head.get("multi_label") if isinstance(head, dict) else head.multi_label)
        checkpoint = {"keep_best": 1, **(values.get("checkpoint") or {})}
        if checkpoint.get("best_metric") in (None, MAIN_METRIC[not multi_label]):
            checkpoint["best_metric"] = MAIN_METRIC[multi_label]
        return {**values, "checkpoint": checkpoint}

    def _problems(self) -> list[str]:
        problems = []
        metric, measured = self.checkpoint.best_metric, EVALUATION_METRICS[self.head.multi_label]
        if metric.startswith("eval/") and metric not in measured:
            problems.append(
                f"checkpoint.best_metric={metric} is not measured with head.multi_label="
                f"{str(self.head.multi_label).lower()}; use {' or '.join(measured)}"
            )
        if self.head.multi_label and self.augment.mixes:
            problems.append(
                "augment.mixup, augment.cutmix: mixing requires one label per sample; set both to 0 with "
                "head.multi_label=true"
            )
        problems += self._mixing_problems() if self.augment.mixes else []
        return [*problems, *super()._problems()]

    def _mixing_problems(self) -> list[str]:
        """Check that every batch has an even number of clips, because timm mixes each batch with itself in reverse
        order."""
        min_workers, max_workers = self.scaling.workers
        share = self.optim.batch_size // max_workers
        for samples in sorted({share, min(self.micro_batch, share)}, reverse=True):
            clips = samples * self.data.repeats
            if min_workers == max_workers and clips % 2:
                each = "each worker" if samples == share else "each micro-batch"
                return [
                    f"augment.mixup and augment.cutmix mix pairs: {each} has {clips} clips, which must be an "
                    "even number; change optim.batch_size, scaling.workers or scaling.micro_batch, or set "
                    "augment.mix_prob=0"
                ]
        return []
