"""The card of a published encoder: how to feed it, where it came from, what it scored. Torch-free.

Knows nothing of files; `artifacts` writes it as JSON, `model_card` as a page for people.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from amd.config import ClipConfig, DecoderConfig, EncoderConfig, Interpolation, MaskStrategy, PixelTarget

Pooling = Literal["mean", "mean_then_norm"]


class Head(BaseModel):
    """The classifier that was trained on top of an encoder."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    classes: int
    multi_label: bool = False
    """Whether a sample may have several labels: then each class has a probability of its own (sigmoid)."""
    labels: tuple[str, ...] | None = None
    """Names of the classes, where the data set knows them."""
    sha256: str | None = None
    """Of head.safetensors; checked when loaded."""


class Rebuilder(BaseModel):
    """The decoder that was trained together with an encoder: how it is built, what was hidden, what it answers."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    network: DecoderConfig
    mask_strategy: MaskStrategy
    mask_ratio: float = Field(ge=0, lt=1)
    """Fraction of tokens that was hidden from the encoder."""
    pixels: PixelTarget
    """What it answers: pixels, or pixels normalised per token, which need that token's mean and spread to be seen."""
    sha256: str | None = None
    """Of decoder.safetensors; checked when loaded."""


class Score(BaseModel):
    """One measurement of what an encoder is worth: by which protocol, on what, with which views."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    protocol: Literal["test", "linear", "knn", "few_shot", "detection"]
    """test: the fine-tuned classifier. linear, knn, few_shot: probes on frozen features. detection: frame-mAP."""
    data: str
    """Where the scored samples are."""
    digest: str | None = None
    """Of their manifest."""
    samples: int
    views: str | None = None
    """Temporal segments x spatial crops, such as 5x3."""
    values: dict[str, float]
    """Metrics as DESIGN names them: eval/top1 in percent, eval/knn_top1, ..."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """What else decides the figure: neighbours, labels a class, the data a probe learnt on."""
    run: str | None = None
    created: datetime = Field(default_factory=lambda: datetime.now(UTC))


class Card(BaseModel):
    """How to feed an encoder, where it came from, and what it scored."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    id: str
    created: datetime = Field(default_factory=lambda: datetime.now(UTC))
    encoder: EncoderConfig
    clip: ClipConfig
    interpolation: Interpolation = "bilinear"
    pooling: Pooling = "mean"
    """mean: over all tokens after the last norm, the class token left out. mean_then_norm: the last norm of the tokens'
    mean, as a fine-tuned encoder has it (fc_norm)."""
    final_norm: bool = True
    """Whether the last norm was trained; without reconstruction it is not."""
    head: Head | None = None
    """Where it was fine-tuned: its weights lie in head.safetensors."""
    decoder: Rebuilder | None = None
    """Where it was trained to rebuild pixels: its decoder's weights lie in decoder.safetensors."""
    run: str | None = None
    objective: Literal["amd", "mae", "finetune", "detection"] | None = None
    steps: int | None = None
    teacher: dict[str, Any] | None = None
    """Its source (weights or preset), encoder config and weights' digest."""
    start: dict[str, Any] | None = None
    """Facts of the weights it began with, where it did not begin at random."""
    weights_license: str | None = None
    """Licence that the teacher's weights, or those it began with, hand down; none where nothing restricts them."""
    data: dict[str, Any] = Field(default_factory=dict)
    """train: where; samples: how many; digest: of the manifest."""
    config: dict[str, Any] = Field(default_factory=dict)
    """The run's whole config."""
    versions: dict[str, str] = Field(default_factory=dict)
    scores: tuple[Score, ...] = ()
    sha256: str | None = None
    """Of encoder.safetensors; checked when loaded."""

    @property
    def is_non_commercial(self) -> bool:
        return is_non_commercial(self.weights_license)

    @property
    def output(self) -> str:
        """What it gives for a clip."""
        return "embedding" if self.head is None else "logits"

    @property
    def best_score(self) -> tuple[str, float] | None:
        """The headline: the first metric of the best measurement, the strictest protocol that there is."""
        for protocol in ("test", "detection", "linear", "knn", "few_shot"):
            values = [next(iter(score.values.items())) for score in self.scores if score.protocol == protocol]
            if values:
                return max(values, key=lambda pair: pair[1])
        return None


def is_non_commercial(license: str | None) -> bool:
    """Whether a licence forbids commercial use, by its name (CC-BY-NC-4.0 and its kin)."""
    words = (license or "").lower().replace("_", "-").replace(" ", "-").split("-")
    return "nc" in words or "noncommercial" in words or "non-commercial" in (license or "").lower()
