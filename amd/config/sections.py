"""Config sections for the method: clip, student, teacher, mask and objective.

Each section validates its own fields; cross-section rules are checked by the run configs. Torch-free.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from amd.config.locations import KeyedByConfig, WeightsLocation, check_fixed_fields

MaskStrategy = Literal["random", "tube"]
DecoderTokens = Literal["all", "running_cell"]
Distance = Literal["l2", "l1", "smooth_l1"]
TargetNorm = Literal["none", "layer_norm", "l2"]
Reduction = Literal["mean", "sum"]
PixelTarget = Literal["per_channel", "per_patch", "normalized", "unit"]
Positions = Literal["sincos_1d", "sincos_2d", "sincos_3d", "learned"]
ONLY_AMD: dict[str, Any] = {"x-only-with": {"objective.kind": "amd"}}
"""JSON schema keyword of fields that a run uses only with this value of another field."""
Init = Literal["videomae", "xavier", "trunc_normal"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class TokenGrid(NamedTuple):
    """Number of tokens along time, height and width; tokens are ordered by frame, then row, then column."""

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
    """Base class of all config sections: frozen, no unknown keys, and docstrings as field descriptions."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False, validate_default=True
    )


def as_pair(value: object) -> object:
    """Expand a single integer to a pair; other values are returned unchanged and validated afterwards."""
    return (value, value) if isinstance(value, int) and not isinstance(value, bool) else value


FrameSize = Annotated[tuple[int, int], BeforeValidator(as_pair)]


class ClipConfig(Section):
    """Model input and how it is split into tokens. An image is a one-frame clip with a tubelet size of 1."""

    frames: int = Field(16, ge=1, le=1024)
    """Frames per clip; 1 for images."""
    size: FrameSize = (224, 224)
    """Height and width of a frame in pixels; a single number means a square."""
    patch: int = Field(16, ge=1)
    """Height and width of a token in pixels."""
    tubelet: int = Field(2, ge=1)
    """Frames per token."""
    sampling_rate_frames: int = Field(4, ge=1)
    """Distance between consecutive frames of a clip, in frames of the source video."""
    mean: tuple[float, float, float] = IMAGENET_MEAN
    """Per-channel (RGB) mean of pixel values in [0, 1], subtracted from the pixels."""
    std: tuple[float, float, float] = IMAGENET_STD
    """Per-channel (RGB) standard deviation of pixel values in [0, 1]; pixels are divided by it."""

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
        """Pixel values per token (P): tubelet x patch x patch x 3."""
        return self.tubelet * self.patch * self.patch * 3

    @property
    def is_image(self) -> bool:
        return self.frames == 1


class EncoderSize(NamedTuple):
    """Dimensions set by `encoder.size`."""

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

# The width is split evenly among the sines and cosines of every axis, so it must be a multiple of this.
POSITION_PARTS: dict[Positions, int] = {"sincos_1d": 1, "sincos_2d": 4, "sincos_3d": 16, "learned": 1}

MAX_POSITION_GRID = 256  # maximum rows or columns of an interpolated table, to bound its memory


class EncoderConfig(Section):
    """A plain pre-norm ViT. `size` sets width, depth and heads together."""

    size: str | None = None
    """Name of a standard encoder: S, B, L, H, demo-student or demo-teacher. Default: none; width, depth and heads are
    set individually."""
    width: int = Field(384, ge=4)
    """Embedding dimension of the encoder."""
    depth: int = Field(12, ge=1)
    """Number of transformer blocks in the encoder."""
    heads: int = Field(6, ge=1)
    """Attention heads per encoder block; must divide the encoder's width."""
    mlp_ratio: float = Field(4.0, gt=0)
    """Hidden dimension of each MLP, as a multiple of the width."""
    class_token: bool = False
    """Whether the encoder has a class token (MAE has one, VideoMAE does not)."""
    positions: Positions = "sincos_1d"
    """Position embedding: a fixed table, sincos_1d (VideoMAE), sincos_2d (MAE) or sincos_3d (MVD); or learned (timm,
    Hugging Face ViT)."""
    position_base: float = Field(10_000.0, gt=1)
    """Base of the wavelengths in sine-cosine position embeddings."""
    position_grid: Annotated[tuple[int, int] | None, BeforeValidator(as_pair)] = None
    """Rows and columns of the sincos_2d table that is interpolated to the clip's token grid, as in MAE. Set
    automatically when training starts from weights for another input size. Default: the table is computed for the
    clip's token grid."""
    init: Init = "videomae"
    """Weight initialisation. xavier: Xavier-uniform for every linear layer, including the patch embedding (MAE).
    videomae: the same, except that the patch embedding and the decoder's input layer keep PyTorch's default.
    trunc_normal: truncated normal with standard deviation 0.02."""
    drop_path: float = Field(0.0, ge=0, lt=1)
    """Stochastic depth rate of the last block; rates grow linearly from 0 at the first block."""

    @model_validator(mode="before")
    @classmethod
    def _fill_size(cls, values: Any) -> Any:
        if not isinstance(values, Mapping) or values.get("size") is None:
            return values
        size = values["size"]
        if size not in ENCODER_SIZES:
            raise ValueError(
                f"encoder.size={size!r} is not one of {', '.join(ENCODER_SIZES)}; "
                "choose one of these, or omit encoder.size and set width, depth and heads"
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
            raise ValueError(
                f"encoder.width={self.width} must be a multiple of {parts} for encoder.positions={self.positions}"
            )
        grid = self.position_grid
        if grid is not None and (self.positions != "sincos_2d" or not 1 <= min(grid) <= max(grid) <= MAX_POSITION_GRID):
            raise ValueError(
                f"encoder.position_grid={list(grid)} must be two numbers from 1 to {MAX_POSITION_GRID}, and requires "
                f"encoder.positions=sincos_2d, not {self.positions}: other fixed tables are computed for every size"
            )
        return self


class DecoderConfig(Section):
    """The decoder, which predicts pixels at student-masked tokens from the encoded student-visible tokens."""

    width: int = Field(192, ge=4)
    """Embedding dimension of the decoder."""
    depth: int = Field(4, ge=1)
    """Number of transformer blocks in the decoder."""
    heads: int = Field(3, ge=1)
    """Attention heads per decoder block; must divide the decoder's width."""
    input_bias: bool = False
    """Whether the linear layer from encoder to decoder width has a bias: true in MAE, false in VideoMAE and AMD."""

    @model_validator(mode="after")
    def _shapes(self) -> DecoderConfig:
        if self.width % self.heads:
            raise ValueError(f"decoder.width={self.width} must be a multiple of decoder.heads={self.heads}")
        return self


class GeneratorConfig(Section):
    """The generators, one per layer pair, which predict the teacher's features at teacher-only tokens."""

    depth: int = Field(2, ge=1)
    """Number of transformer blocks in each generator."""
    width: int | None = Field(None, ge=4)
    """Embedding dimension of the generators. Default: the teacher's width, as in AMD. Any other width adds linear
    layers before and after the blocks."""
    heads: int | None = Field(None, ge=1)
    """Attention heads per generator block. Default: width // 64, as in AMD."""


class StudentConfig(Section):
    """The trained modules: a small encoder, a decoder and generators."""

    encoder: EncoderConfig = EncoderConfig(size="S")
    """Student encoder, which is published at the end of the run."""
    decoder: DecoderConfig = DecoderConfig()
    """Decoder for pixel reconstruction."""
    generator: GeneratorConfig = Field(GeneratorConfig(), json_schema_extra=ONLY_AMD)
    """Generators for generation alignment."""


def _recipe() -> type[BaseModel]:
    """Return the config class for teacher presets, imported lazily because its module imports this one."""
    from amd.config.train import TrainConfig

    return TrainConfig


class TeacherConfig(Section):
    """The larger, frozen encoder: loaded from `weights`, or trained from `preset` before the student."""

    encoder: EncoderConfig = EncoderConfig(size="L")
    """Teacher encoder; must match the teacher's weights."""
    weights: WeightsLocation | None = None
    """Source of the teacher's weights: a file or URI (official checkpoint or safetensors), `timm:NAME`, or the ID or
    folder of a published encoder."""
    preset: str | None = None
    """Preset with objective.kind=mae that trains the teacher before the student, on the student's data; the trained
    teacher is cached and reused by later runs with the same teacher config and data."""
    overrides: Annotated[dict[str, Any], KeyedByConfig(_recipe)] = Field(default_factory=dict)
    """Overrides for the teacher's preset, keyed by dotted field names; data.train selects other data than the
    student's."""
    weights_license: str | None = None
    """Licence of the teacher's weights, copied to the student's card; CC-BY-NC-4.0 for VideoMAE weights."""

    @field_validator("overrides")
    @classmethod
    def _fixed(cls, overrides: dict[str, Any]) -> dict[str, Any]:
        check_fixed_fields(
            _recipe(),
            "overrides",
            overrides,
            "a teacher uses its student's storage, tracking and cache, and its name is generated; remove the override",
        )
        return overrides

    @model_validator(mode="after")
    def _one_source(self) -> TeacherConfig:
        if (self.weights is None) == (self.preset is None):
            both = "both are set" if self.weights else "neither is set"
            raise ValueError(
                f"teacher.weights and teacher.preset: {both}; set exactly one: weights to load (a file, a URI, "
                "timm:NAME or an encoder ID) or a preset to train first"
            )
        if self.overrides and self.preset is None:
            raise ValueError(
                "teacher.overrides applies to teacher.preset, which is not set; set the preset, or remove the overrides"
            )
        return self


class MaskConfig(Section):
    """Asymmetric masking: which tokens the student, the teacher and the decoder process."""

    strategy: MaskStrategy = "tube"
    """Masking strategy. random: each token is hidden independently (MAE). tube: the same positions are hidden in every
    frame (VideoMAE)."""
    student_ratio: float = Field(0.9, ge=0, lt=1)
    """Fraction of tokens hidden from the student."""
    teacher_ratio: float = Field(0.75, ge=0, lt=1)
    """Fraction of tokens hidden from the teacher, at most student_ratio; 0 shows the teacher the full clip."""
    decoder: DecoderTokens = "all"
    """Student-masked tokens that the decoder reconstructs: all of them, or VideoMAE V2's running_cell subset."""
    decoder_ratio: float = Field(0.5, gt=0, lt=1)
    """Fraction of student-masked tokens that running_cell excludes from reconstruction: 0.25, 0.5 or 0.75."""

    @model_validator(mode="after")
    def _asymmetric(self) -> MaskConfig:
        if self.teacher_ratio > self.student_ratio:
            raise ValueError(
                f"mask.teacher_ratio={self.teacher_ratio} must not be above mask.student_ratio={self.student_ratio}: "
                "the teacher must see every token that the student sees"
            )
        if self.decoder == "running_cell" and self.decoder_ratio not in (0.25, 0.5, 0.75):
            raise ValueError(f"mask.decoder_ratio={self.decoder_ratio} must be 0.25, 0.5 or 0.75: a cell is 2x2 tokens")
        return self

    def hidden_cells(self, ratio: float, cells: int) -> int:
        """Return how many of `cells` cells are hidden at the given ratio, rounded down as in the official code."""
        return int(ratio * cells)


class LayerPair(Section):
    """A student block aligned with a teacher block; blocks are numbered from 1."""

    student: int = Field(ge=1)
    """Student block, numbered from 1."""
    teacher: int = Field(ge=1)
    """Teacher block, numbered from 1."""


class LossWeights(Section):
    """Weights of the loss terms in the total loss; 0 disables a term."""

    reconstruction: float = Field(1.0, ge=0)
    """Weight of the pixel reconstruction loss; if 0, no decoder is built."""
    direct: float = Field(1.0, ge=0, json_schema_extra=ONLY_AMD)
    """Weight of direct alignment, on student-visible tokens."""
    generation: float = Field(1.0, ge=0, json_schema_extra=ONLY_AMD)
    """Weight of generation alignment, on teacher-only tokens; if 0, no generators are built."""


class ObjectiveConfig(Section):
    """Training objective: the loss terms and how predictions are compared with targets."""

    kind: Literal["amd", "mae"] = "amd"
    """Training objective. amd: distillation from a teacher, with reconstruction. mae: reconstruction only (MAE,
    VideoMAE), for teachers and baselines."""
    weights: LossWeights = LossWeights()
    """Weights of the loss terms."""
    layers: tuple[LayerPair, ...] = Field(
        (LayerPair(student=6, teacher=12), LayerPair(student=12, teacher=24)), json_schema_extra=ONLY_AMD
    )
    """Layer pairs to align, numbered from 1; the paper uses the middle and the last block."""
    distance: Distance = Field("l2", json_schema_extra=ONLY_AMD)
    """Distance between student and teacher features; l2 is the mean squared error."""
    smooth_l1_beta: float = Field(1.0, gt=0, json_schema_extra=ONLY_AMD)
    """Threshold between the quadratic and linear parts of smooth_l1."""
    target_norm: TargetNorm = Field("none", json_schema_extra=ONLY_AMD)
    """Normalisation of features before comparison. none: raw features (AMD). layer_norm: LayerNorm without parameters
    on the teacher's features. l2: student and teacher features of every token are scaled to unit length (DMAE)."""
    reduction: Reduction = Field("mean", json_schema_extra=ONLY_AMD)
    """Reduction over layer pairs: mean, as in the official code, or sum, as in the paper."""
    pixels: PixelTarget = "per_channel"
    """Pixel targets for reconstruction. per_channel: normalised per token and colour channel (VideoMAE). per_patch:
    normalised over all values of a token (MAE). normalized: normalised by clip.mean and clip.std. unit: pixels in
    [0, 1]."""
