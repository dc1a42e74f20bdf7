"""Config for an action detection run: a pre-trained encoder and a head that classifies people's actions (AVA)."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, model_validator

from amd.config.finetune import FinetuneOptimConfig, TestedCheckpoint
from amd.config.locations import DataLocation, WeightsLocation
from amd.config.run import RunConfig
from amd.config.sections import EncoderConfig, Section, as_pair
from amd.config.training_sections import DataConfig

Fraction = Annotated[float, Field(ge=0, lt=1)]
Half = Annotated[float, Field(ge=0, lt=0.5)]


class DetectionHeadConfig(Section):
    """Detection head: RoIAlign on the last feature map, max pooling over each box, and a sigmoid per action."""

    resolution: int = Field(7, ge=1)
    """Output resolution of RoIAlign: number of cells along each side of a box."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout rate applied before the head."""
    init_scale: float = Field(0.001, gt=0)
    """Scale factor for the head's initial weights, which are truncated normal with standard deviation 0.02."""


class DetectionDataConfig(DataConfig):
    """Annotated boxes: `train` is a CSV in AVA's layout, with the columns video, timestamp, x1, y1, x2, y2, action and
    person.

    Box coordinates are fractions of the frame. `root` (default: the folder that contains the CSV) contains the videos,
    each as VIDEO.mp4 (or with another extension) or as a folder VIDEO of numbered frames. `sampling`, `crop` and
    `center_fraction` are ignored, because the boxes determine when and where clips are taken.
    """

    frame_name: str = "{folder}_{:06}.jpg"
    """Format string for frame file names, with the folder's name ({folder}) and the frame number, which
    starts at 1."""
    val: DataLocation | None = None
    """Validation annotations, a CSV in the same layout as `train`, scored during and after training. Default: no
    validation; the last checkpoint is published without a score."""
    boxes: DataLocation | None = None
    """Boxes from a person detector for `val`: a CSV in the same layout, with an empty action and a score in the last
    column. Default: the annotated boxes, which overestimates the score."""
    excluded: DataLocation | None = None
    """Key frames to exclude from `val`: a CSV of video and timestamp. Default: none."""
    label_map: DataLocation
    """Label map with the names and IDs of all annotated actions: a .pbtxt file as in AVA, with IDs starting at 1."""
    evaluated: DataLocation | None = None
    """Label map of the actions to score (AVA: 60 of 80), a .pbtxt file. Default: all actions in `label_map`."""
    fps: float | None = Field(None, gt=0)
    """Frame rate of the videos, in frames per second. Default: the rate stored in each video; 30 for frame folders."""
    first_frame_s: float | None = None
    """Timestamp of the first frame, in seconds. Default: 0 for videos; 900 for frame folders, as in AVA."""
    short_side: int = Field(256, ge=1)
    """Length of the short side to which frames are resized, in pixels; training takes random crops of clip.size."""
    jitter_out: tuple[Fraction, Fraction] = (0.2, 0.1)
    """Maximum outward shift of each side of a training box, as fractions of the box's width and height."""
    jitter_in: tuple[Half, Half] = (0.1, 0.05)
    """Maximum inward shift of each side of a training box, as fractions of the box's width and height."""


class DetectionEvaluationConfig(Section):
    """Evaluation by frame-mAP on `data.val`."""

    every_epochs: int = Field(1, ge=1)
    """Epochs between evaluations on `data.val`."""
    batch_size: int = Field(8, ge=1)
    """Key frames per forward pass of each worker."""
    checkpoint: TestedCheckpoint = "best"
    """Checkpoint to test and publish: the best on data.val by checkpoint.best_metric, or the last, as in the official
    code. Choosing the best overestimates the score, because data.val is also the test set."""
    size: Annotated[tuple[int, int] | None, BeforeValidator(as_pair)] = None
    """Height and width, in pixels, to which whole frames are padded with the mean colour. Default: clip.size."""
    min_score: float = Field(0.8, ge=0, le=1)
    """Minimum detector score; boxes in `data.boxes` with a lower score are ignored."""
    extend: tuple[Fraction, Fraction] = (0.1, 0.05)
    """Enlargement of each box before RoIAlign, as fractions of its width and height."""


class DetectionConfig(RunConfig):
    """Complete config for an action detection run."""

    encoder: EncoderConfig = EncoderConfig()
    """Encoder to fine-tune; must match the initial weights."""
    weights: WeightsLocation | None = None
    """Initial weights of the encoder: the ID or folder of a published encoder, or a file or URI of any known layout.
    Default: random initialisation."""
    weights_license: str | None = None
    """Licence of initial weights that have no card; copied to the published encoder's card."""
    head: DetectionHeadConfig = DetectionHeadConfig()
    """Detection head."""
    data: DetectionDataConfig
    """Training and validation annotations."""
    optim: FinetuneOptimConfig = FinetuneOptimConfig()
    """Optimizer settings."""
    evaluation: DetectionEvaluationConfig = DetectionEvaluationConfig()
    """Evaluation during and after training."""

    @model_validator(mode="before")
    @classmethod
    def _defaults(cls, values: Any) -> Any:
        """Keep the checkpoint with the best validation score, unless the config sets its own policy."""
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
                "are cut from the resized frames"
            )
        if size is not None and any(side <= 0 or side % self.clip.patch for side in size):
            problems.append(
                f"evaluation.size={list(size)} must be positive multiples of clip.patch={self.clip.patch}: tokens tile "
                "the frame"
            )
        if data.rand_augment is not None:
            problems.append(
                f"data.rand_augment={data.rand_augment}: geometric operations would not move the boxes; set it to null"
            )
        if data.repeats > 1:
            problems.append(f"data.repeats={data.repeats}: detection uses one clip per key frame; set it to 1")
        if self.optim.ema_decay is not None:
            problems.append(
                f"optim.ema_decay={self.optim.ema_decay}: detection does not average the weights; set it to null"
            )
        return [*problems, *super()._problems()]
