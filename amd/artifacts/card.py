"""The card of a published encoder: its input, provenance and scores. Torch-free.

Accesses no files: `weights` writes the card as JSON, `model_card` renders it as Markdown.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from amd.config import ClipConfig, DecoderConfig, EncoderConfig, Interpolation, MaskStrategy, PixelTarget

Pooling = Literal["mean", "mean_then_norm"]


class HeadCard(BaseModel):
    """Description of the classifier published with an encoder."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    classes: int
    """Number of classes."""
    multi_label: bool = False
    """Whether a sample may have several labels; if so, probabilities are computed with one sigmoid per class."""
    labels: tuple[str, ...] | None = None
    """Names of the classes, if the data set provides them."""
    sha256: str | None = None
    """SHA-256 of head.safetensors, verified on loading."""


class DecoderCard(BaseModel):
    """Description of the decoder published with an encoder."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    network: DecoderConfig
    """Architecture of the decoder."""
    mask_strategy: MaskStrategy
    """Masking strategy used in training."""
    mask_ratio: float = Field(ge=0, lt=1)
    """Fraction of tokens hidden from the encoder in training."""
    pixels: PixelTarget
    """Pixel targets used in training. Displaying per-token normalised targets requires each token's mean and
    variance."""
    sha256: str | None = None
    """SHA-256 of decoder.safetensors, verified on loading."""


STRICTEST_FIRST = ("test", "detection", "linear", "attentive", "knn", "few_shot")
"""Evaluation protocols, the strictest first."""


class Score(BaseModel):
    """One evaluation of an encoder: protocol, data, views and metrics."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    protocol: Literal["test", "linear", "knn", "few_shot", "attentive", "detection"]
    """Evaluation protocol. test: fine-tuned classifier. linear, knn, few_shot, attentive: probes on frozen features.
    detection: frame-mAP."""
    data: str
    """Location of the scored samples."""
    digest: str | None = None
    """Digest of the scored samples' manifest."""
    samples: int
    """Number of scored samples."""
    views: str | None = None
    """Views per sample: temporal segments x spatial crops, such as 5x3."""
    values: dict[str, float]
    """Metric values by name, such as eval/top1 in percent."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """Other evaluation settings, such as neighbours, labels per class and a probe's training data."""
    run: str | None = None
    """Run that produced the score."""
    created: datetime = Field(default_factory=lambda: datetime.now(UTC))


class Card(BaseModel):
    """Input, provenance and scores of a published encoder."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    id: str
    """ID of the encoder."""
    created: datetime = Field(default_factory=lambda: datetime.now(UTC))
    encoder: EncoderConfig
    clip: ClipConfig
    interpolation: Interpolation = "bilinear"
    pooling: Pooling = "mean"
    """Pooling of tokens into one embedding. mean: mean of all tokens after the last norm, without the class token.
    mean_then_norm: last norm applied to the mean of all tokens, as in fine-tuned encoders (fc_norm)."""
    final_norm: bool = True
    """Whether the last norm was trained; false for encoders trained without reconstruction."""
    head: HeadCard | None = None
    """Classifier of a fine-tuned encoder, stored in head.safetensors."""
    decoder: DecoderCard | None = None
    """Decoder of an encoder trained with reconstruction, stored in decoder.safetensors."""
    run: str | None = None
    job: str | None = None
    """Job that imported the encoder; null if the encoder was trained (see `run`) or imported without a job."""
    objective: Literal["amd", "mae", "finetune", "detection"] | None = None
    steps: int | None = None
    teacher: dict[str, Any] | None = None
    """Teacher that the encoder was distilled from: source (weights or preset), encoder config and weight digest."""
    start: dict[str, Any] | None = None
    """Origin of the initial weights; null if they were random."""
    weights_license: str | None = None
    """Licence inherited from the teacher's weights or the initial weights; null if none is stated."""
    data: dict[str, Any] = Field(default_factory=dict)
    """Training data: location (train), number of samples, and digest of the manifest."""
    config: dict[str, Any] = Field(default_factory=dict)
    """Complete config of the run."""
    versions: dict[str, str] = Field(default_factory=dict)
    scores: tuple[Score, ...] = ()
    sha256: str | None = None
    """SHA-256 of encoder.safetensors, verified on loading."""

    @property
    def is_non_commercial(self) -> bool:
        """Whether the weights' licence forbids commercial use."""
        return is_non_commercial(self.weights_license)

    @property
    def output(self) -> str:
        """Kind of output for a clip: embedding or logits."""
        return "embedding" if self.head is None else "logits"

    @property
    def best_score(self) -> tuple[str, float] | None:
        """First metric of the best evaluation under the strictest protocol available."""
        best = strictest_score(self.scores)
        return next(iter(best.values.items())) if best is not None else None


def strictest_score(scores: Iterable[Score]) -> Score | None:
    """Return the best evaluation under the strictest protocol available, by its first metric."""
    ordered = sorted(scores, key=lambda score: STRICTEST_FIRST.index(score.protocol))
    strictest = [score for score in ordered if score.protocol == ordered[0].protocol]
    return max(strictest, key=lambda score: next(iter(score.values.values())), default=None)


def is_non_commercial(license: str | None) -> bool:
    """Return whether a licence forbids commercial use, judging by its name (such as CC-BY-NC-4.0)."""
    parts = (license or "").lower().replace("_", "-").replace(" ", "-").split("-")
    return "nc" in parts or "noncommercial" in parts or "non-commercial" in (license or "").lower()
