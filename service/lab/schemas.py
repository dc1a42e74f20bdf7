"""Request and response schemas of the mask lab."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from amd.config import DecoderTokens, MaskStrategy
from amd.lab import Layer
from service.serving.requests import DEADLINE_S, Input
from service.web.schemas import ApiModel

MAX_NUMBER = 2**53  # exact in JSON


class LabOptions(ApiModel):
    """Mask settings, and the preset, encoder or job that provides omitted settings."""

    preset: Annotated[str, Field(min_length=1, max_length=100)] | None = None
    """Training preset whose config applies. Default: `demo-image-amd`, unless `encoder` or `job` is set."""
    encoder: Annotated[str, Field(min_length=1, max_length=200)] | None = None
    """ID or alias of an encoder that was published with its decoder. Its training config applies, and the response
    includes reconstructed pixels."""
    job: Annotated[str, Field(min_length=1, max_length=100)] | None = None
    """Training job: its config applies unless `encoder` or `preset` is set, and `record` selects a sample from its
    data."""
    record: int | None = Field(None, ge=0, le=MAX_NUMBER)
    """Number of a record in the job's data, used as the input."""
    checkpoint: int | None = Field(None, ge=0, le=MAX_NUMBER)
    """Step of the job's checkpoint whose student reconstructs pixels. The job may still be running."""
    alignment: bool = False
    """Whether to load the job's teacher and show how well the checkpoint's student is aligned with it."""
    student_ratio: float | None = Field(None, ge=0, lt=1)
    """Fraction of tokens hidden from the student."""
    teacher_ratio: float | None = Field(None, ge=0, lt=1)
    """Fraction of tokens hidden from the teacher, at most the student's."""
    strategy: MaskStrategy | None = None
    """Masking strategy."""
    decoder: DecoderTokens | None = None
    """Student-masked tokens that the decoder reconstructs."""
    decoder_ratio: float | None = Field(None, gt=0, lt=1)
    """Fraction of student-masked tokens that running_cell excludes: 0.25, 0.5 or 0.75."""
    seed: int | None = Field(None, ge=0, lt=2**31)
    """Random seed of the run."""
    step: int = Field(0, ge=0, le=MAX_NUMBER)
    """Training step, counted from 0."""
    batch_size: int | None = Field(None, ge=1, le=2**24)
    """Samples per step (`optim.batch_size`)."""
    position: int = Field(0, ge=0, le=MAX_NUMBER)
    """Position of the clip in the step's batch, counted from 0."""
    deadline_s: float = Field(DEADLINE_S, gt=0, le=600)
    """Time limit in seconds, after which the request fails. The first request also waits for a replica to start."""


class LabRequest(LabOptions):
    """JSON body of a request to the mask lab."""

    input: Input | None = None
    """Image or video. If null, masks are drawn on the job's `record` if set, otherwise on a single-coloured clip."""


class LabMask(ApiModel):
    """Mask settings that were applied."""

    strategy: str
    student_ratio: float
    teacher_ratio: float
    decoder: str
    decoder_ratio: float
    seed: int
    step: int
    batch_size: int
    position: int
    clips_per_step: int
    """Number of clips in a step's batch: samples times repeats."""


class LabClip(ApiModel):
    """Shape of the clip and its tokens."""

    frames: int
    height: int
    width: int
    tubelet: int
    patch: int
    grid: tuple[int, int, int]
    """Tokens along time, height and width."""


class LabTokenSets(ApiModel):
    """Token indices by role, counted from 0, row by row, then frame by frame."""

    student_visible: list[int]
    """Tokens that both networks see."""
    teacher_only: list[int]
    """Tokens that only the teacher sees."""
    student_masked: list[int]
    """Tokens hidden from the student, including the teacher-only ones."""
    reconstructed: list[int]
    """Student-masked tokens that the decoder reconstructs."""


class LabFlops(ApiModel):
    """FLOPs of a training step, per clip."""

    teacher: float
    student: float
    projections: float
    generators: float
    decoder: float
    total: float


class LabCost(ApiModel):
    """Compute cost of a training step at these mask settings, compared with the baseline."""

    flops: LabFlops
    baseline: LabFlops
    """FLOPs at the mask settings of the preset, job or encoder."""
    baseline_student_ratio: float
    baseline_teacher_ratio: float
    relative: float
    """Total FLOPs as a multiple of the baseline's."""


class LabAlignment(ApiModel):
    """Unweighted alignment losses between the checkpoint's student and its teacher, averaged or summed over layer pairs
    as in training."""

    direct: float
    """Mean over student-visible tokens: the clip's direct alignment loss in training."""
    generation: float | None
    """Mean over teacher-only tokens: the clip's generation loss in training; null without generation alignment."""
    direct_tokens: list[float]
    """Loss of each token, in the order of `token_sets.student_visible`."""
    generation_tokens: list[float]
    """Loss of each token, in the order of `token_sets.teacher_only`; empty without generation alignment."""


class LabView(ApiModel):
    """Masks of one clip, drawn as layers."""

    preset: str | None
    job: str | None
    encoder: str | None
    """ID of the encoder that reconstructed the pixels."""
    checkpoint: int | None
    """Step of the job's checkpoint that reconstructed the pixels."""
    mask: LabMask
    clip: LabClip
    token_sets: LabTokenSets
    cost: LabCost
    columns: int
    """Frames per row of a sprite sheet."""
    layers: dict[Layer, str]
    """Sprite sheets of all frames, as PNG `data:` URLs. `teacher` and `roles` need a config with a teacher. `roles`
    colours tokens for direct alignment green, tokens for generation alignment blue and tokens that are only
    reconstructed grey; `error` shows the error of each reconstructed token, and `alignment` the alignment loss of each
    token that the teacher sees, relative to the largest one."""
    loss: float | None
    """Mean squared error over reconstructed tokens, as in training; null unless there are both an input and a model."""
    errors: list[float] | None
    """Mean squared error of each reconstructed token, in the order of `token_sets.reconstructed`."""
    alignment: LabAlignment | None = None
    """Alignment with the teacher; null unless requested with an input."""
