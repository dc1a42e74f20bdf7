"""A fine-tuning run: a pre-trained encoder and a classifier on labelled data (METHOD 4)."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from amd.config.run import RunConfig
from amd.config.sections import DataConfig, EncoderConfig, OptimConfig, Section

ViewSampling = Literal["dense", "segments"]

HEADLINE = {False: "eval/top1", True: "eval/map"}  # by head.multi_label
FIGURES = {False: ("eval/top1", "eval/top5", "eval/loss"), True: ("eval/map",)}


class HeadConfig(Section):
    """What turns the pooled, normalised tokens into one number a class."""

    classes: int | None = Field(None, ge=2)
    """Classes; none: one more than the highest label of the training data."""
    multi_label: bool = False
    """A sample may have several labels (`path 3,17` in a list): sigmoid and binary cross entropy, scored by mAP."""
    dropout: float = Field(0.0, ge=0, lt=1)
    init_scale: float = Field(0.001, gt=0)
    """The head starts at trunc-normal 0.02 times this."""


class AugmentConfig(Section):
    """What is done to a batch on its way to the network; frames are augmented by `data`."""

    mixup: float = Field(0.8, ge=0)
    """alpha of mixup's Beta distribution; 0: no mixup."""
    cutmix: float = Field(1.0, ge=0)
    mix_prob: float = Field(1.0, ge=0, le=1)
    switch_prob: float = Field(0.5, ge=0, le=1)
    """How often cutmix is taken where both are on."""
    label_smoothing: float = Field(0.1, ge=0, lt=1)
    """Not with head.multi_label, where every class has a target of its own."""
    erase_prob: float = Field(0.25, ge=0, le=1)
    """Random erasing: one box of noise through all frames of a clip."""

    @property
    def mixes(self) -> bool:
        return self.mix_prob > 0 and (self.mixup > 0 or self.cutmix > 0)


class ViewsConfig(Section):
    """A test looks at every sample several times and averages the probabilities."""

    segments: int = Field(1, ge=1, le=64)
    """Clips along time."""
    crops: int = Field(1, ge=1, le=9)
    """Crops along the longer side."""
    sampling: ViewSampling = "dense"
    """dense: every clip.sampling_rate_frames-th frame, segments spread evenly (K400). segments: one frame out of each
    of clip.frames equal parts of the video (TSN; SSv2)."""

    def __str__(self) -> str:
        return f"{self.segments}x{self.crops}"


class LabelledDataConfig(DataConfig):
    """`train` as in pre-training; `val` chooses the best checkpoint, `test` is scored once, at the end."""

    val: str | None = None
    """Read like `train`; none: the last checkpoint is the one tested and published."""
    test: str | None = None
    """Read like `train`; none: `val` is tested."""


class FinetuneOptimConfig(OptimConfig):
    betas: tuple[float, float] = (0.9, 0.999)
    base_lr: float = Field(5e-4, gt=0)
    min_lr: float = Field(1e-6, ge=0)
    layer_decay: float = Field(0.75, gt=0, le=1)
    """The learning rate of each block is that of the block after it times this; head and last norm have 1."""
    ema_decay: float | None = Field(None, gt=0, lt=1)
    """Test and publish a moving average of the weights instead of the weights; none: off."""


class EvaluationConfig(Section):
    every_epochs: int = Field(1, ge=1)
    """How often the validation data is scored: one view, the middle."""
    batch_size: int = Field(32, ge=1)
    """Samples at once, over all workers."""
    views: ViewsConfig = ViewsConfig()
    """Of the test."""


class FinetuneConfig(RunConfig):
    """One fine-tuning run, complete."""

    encoder: EncoderConfig = EncoderConfig()
    weights: str | None = None
    """Where the encoder starts: a published encoder's id or folder, a file or URI of any layout, `timm:NAME`; none:
    from scratch."""
    weights_license: str | None = None
    """Of the weights, where no card tells it; carried to the published encoder."""
    head: HeadConfig = HeadConfig()
    augment: AugmentConfig = AugmentConfig()
    data: LabelledDataConfig
    optim: FinetuneOptimConfig = FinetuneOptimConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    @model_validator(mode="before")
    @classmethod
    def _defaults(cls, values: Any) -> Any:
        """Fine-tuning keeps the checkpoint that validates best, unless told otherwise."""
        if not isinstance(values, dict) or not isinstance(values.get("checkpoint"), dict | None):
            return values
        head = values.get("head") or {}
        several = bool(head.get("multi_label") if isinstance(head, dict) else head.multi_label)
        chosen = {"keep_best": 1, **(values.get("checkpoint") or {})}
        if chosen.get("best_metric") in (None, HEADLINE[not several]):
            chosen["best_metric"] = HEADLINE[several]
        return {**values, "checkpoint": chosen}

    def _problems(self) -> list[str]:
        problems = []
        metric, figures = self.checkpoint.best_metric, FIGURES[self.head.multi_label]
        if metric.startswith("eval/") and metric not in figures:
            problems.append(
                f"checkpoint.best_metric={metric} is not measured with head.multi_label="
                f"{str(self.head.multi_label).lower()}; take {' or '.join(figures)}"
            )
        if self.head.multi_label and self.augment.mixes:
            problems.append(
                "augment.mixup, augment.cutmix: mixing is for one label a sample; set both to 0 with "
                "head.multi_label=true"
            )
        problems += self._mixing_problems() if self.augment.mixes else []
        return [*problems, *super()._problems()]

    def _mixing_problems(self) -> list[str]:
        """timm mixes a batch with its own mirror image, so it needs an even count."""
        least, most = self.scaling.workers
        share = self.optim.batch_size // most
        for samples in sorted({share, min(self.scaling.micro_batch or share, share)}, reverse=True):
            clips = samples * self.data.repeats
            if least == most and clips % 2:
                each = "each worker" if samples == share else "each micro-batch"
                return [
                    f"augment.mixup and augment.cutmix mix pairs: {each} has {clips} clips a step, and must have an "
                    "even number; change optim.batch_size, scaling.workers or scaling.micro_batch, or set "
                    "augment.mix_prob=0"
                ]
        return []
