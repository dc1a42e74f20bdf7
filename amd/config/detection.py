"""An action detection run: a pre-trained encoder and a head that says what each person of a key frame does (AVA)."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, model_validator

from amd.config.finetune import FinetuneOptimConfig
from amd.config.run import RunConfig
from amd.config.sections import DataConfig, EncoderConfig, Section, _square

Fraction = Annotated[float, Field(ge=0, lt=1)]
Half = Annotated[float, Field(ge=0, lt=0.5)]


class DetectionHeadConfig(Section):
    """RoIAlign on the encoder's last map, the maximum over each box, one sigmoid an action."""

    resolution: int = Field(7, ge=1)
    """Cells along each side of a box."""
    dropout: float = Field(0.0, ge=0, lt=1)
    init_scale: float = Field(0.001, gt=0)
    """The head starts at trunc-normal 0.02 times this."""


class DetectionDataConfig(DataConfig):
    """`train` is a csv in AVA's layout: video, timestamp, x1, y1, x2, y2, action, person; boxes as fractions.

    `root` holds what its videos are: VIDEO.mp4 (or another ending), or folders VIDEO of numbered frames; default: the
    csv's own folder. `sampling`, `crop` and `center_fraction` are not read: boxes say where to look.
    """

    frame_name: str = "{folder}_{:06}.jpg"
    """File name of frame n (from 1) in a video's folder, whose name is {folder}."""
    val: str | None = None
    """A csv like `train`, scored on the way and at the end; none: the last checkpoint is published unscored."""
    boxes: str | None = None
    """A person detector's boxes for `val`: the same layout, the last column a score, the action empty. none: the
    annotated boxes are scored, which flatters."""
    excluded: str | None = None
    """A csv `video,timestamp` of key frames that `val` leaves out."""
    label_map: str
    """Names and numbers (from 1) of the actions that may be annotated: AVA's .pbtxt."""
    evaluated: str | None = None
    """A .pbtxt of the actions that are scored (AVA: 60 of 80); none: those of `label_map`."""
    fps: float | None = Field(None, gt=0)
    """Frames per second; none: what each video says, 30 in frame folders."""
    first_frame_s: float | None = None
    """Timestamp of the first frame, in seconds; none: 0 in videos, 900 in frame folders, as AVA's are extracted."""
    short_side: int = Field(256, ge=1)
    """Frames are scaled to it; training then crops clip.size at random."""
    jitter_out: tuple[Fraction, Fraction] = (0.2, 0.1)
    """How far each side of a training box may move outwards, as fractions of the box's width and height."""
    jitter_in: tuple[Half, Half] = (0.1, 0.05)
    """And inwards."""


class DetectionEvaluationConfig(Section):
    every_epochs: int = Field(1, ge=1)
    """How often `data.val` is scored."""
    batch_size: int = Field(8, ge=1)
    """Key frames at once, over all workers."""
    size: Annotated[tuple[int, int] | None, BeforeValidator(_square)] = None
    """Height and width that hold a whole frame, the rest filled with the mean colour; none: clip.size."""
    min_score: float = Field(0.8, ge=0, le=1)
    """Boxes of `data.boxes` below it are left out."""
    extend: tuple[Fraction, Fraction] = (0.1, 0.05)
    """By how much boxes grow before the network looks at them, as fractions of width and height."""


class DetectionConfig(RunConfig):
    """One action detection run, complete."""

    encoder: EncoderConfig = EncoderConfig()
    weights: str | None = None
    """Where the encoder starts: a published encoder's id or folder, a file or URI of any layout; none: from scratch."""
    weights_license: str | None = None
    """Of the weights, where no card tells it; carried to the published encoder."""
    head: DetectionHeadConfig = DetectionHeadConfig()
    data: DetectionDataConfig
    optim: FinetuneOptimConfig = FinetuneOptimConfig()
    evaluation: DetectionEvaluationConfig = DetectionEvaluationConfig()

    @model_validator(mode="before")
    @classmethod
    def _defaults(cls, values: Any) -> Any:
        """Detection keeps the checkpoint that validates best, unless told otherwise."""
        if not isinstance(values, dict) or not isinstance(values.get("checkpoint"), dict | None):
            return values
        best = {"keep_best": 1, "best_metric": "eval/map"}
        return {**values, "checkpoint": {**best, **(values.get("checkpoint") or {})}}

    def _problems(self) -> list[str]:
        problems = []
        data, size = self.data, self.evaluation.size
        if data.short_side < max(self.clip.size):
            problems.append(
                f"data.short_side={data.short_side} must not be below clip.size={list(self.clip.size)}: training crops "
                "that much out of the scaled frames"
            )
        if size is not None and any(side <= 0 or side % self.clip.patch for side in size):
            problems.append(
                f"evaluation.size={list(size)} must be positive multiples of clip.patch={self.clip.patch}: tokens tile "
                "the frame"
            )
        if data.rand_augment is not None:
            problems.append("data.rand_augment: boxes would not follow what it does to a picture; set it to null")
        if data.repeats > 1:
            problems.append(f"data.repeats={data.repeats}: detection cuts one clip a key frame; set it to 1")
        if self.optim.ema_decay is not None:
            problems.append("optim.ema_decay: detection keeps no moving average; set it to null")
        return [*problems, *super()._problems()]
