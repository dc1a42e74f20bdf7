"""A probe: what a frozen encoder is worth on labelled data."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from amd.config.sections import DataConfig, Device, ScalingConfig, Section

ProbeKind = Literal["knn", "linear", "few_shot"]
ProbePooling = Literal["card", "mean", "mean_then_norm", "class_token"]
LinearMethod = Literal["lars", "sgd", "logistic"]
LinearAugment = Literal["none", "image", "video", "data"]


class ProbeDataConfig(DataConfig):
    """`train` is the labelled set that probes learn from; `test` is scored."""

    test: str
    """Read like `train`."""


class KnnConfig(Section):
    neighbours: int = Field(20, ge=1)
    temperature: float = Field(0.07, gt=0)
    """A neighbour of cosine similarity s votes with weight exp(s / temperature)."""


class LinearConfig(Section):
    """A linear classifier on frozen features."""

    method: LinearMethod = "sgd"
    """sgd: MAE's head (BatchNorm without weights, then a linear map) by SGD with momentum. lars: the same by LARS, as
    MAE has it; made for batches of thousands, it learns too little from small sets. logistic: scikit-learn's logistic
    regression on standardised features, seconds for small sets."""
    augment: LinearAugment = "none"
    """What the head learns on. none: features of the middle of each sample, computed once. Otherwise features are
    computed anew every epoch from augmented samples: image is MAE's protocol (random resized crop, flip), video is ours
    (random start, multi-scale crop), data is what data.crop, data.flip and the like tell."""
    epochs: int = Field(90, ge=1)
    warmup_epochs: int = Field(10, ge=0)
    batch_size: int | None = Field(None, ge=2)
    """Samples a step; none: MAE's 16384, or less where an epoch would have fewer than 16 steps."""
    base_lr: float = Field(0.1, gt=0)
    """For 256 samples a step; the learning rate grows with the batch."""
    weight_decay: float = Field(0.0, ge=0)
    momentum: float = Field(0.9, ge=0, lt=1)
    strength: float = Field(0.1, gt=0)
    """scikit-learn's C, for method=logistic."""

    @model_validator(mode="after")
    def _rules(self) -> LinearConfig:
        if self.method == "logistic" and self.augment != "none":
            raise ValueError(
                f"linear.augment={self.augment}: linear.method=logistic learns on features computed once; take "
                "linear.augment=none, or linear.method=lars"
            )
        if self.warmup_epochs > self.epochs:
            raise ValueError(f"linear.warmup_epochs={self.warmup_epochs} must not be above epochs={self.epochs}")
        return self


class FewShotConfig(Section):
    """Logistic regression on few labels a class, drawn several times."""

    labels: tuple[int, ...] = Field((1, 5, 10), min_length=1)
    """Labels a class."""
    draws: int = Field(5, ge=1)
    strength: float = Field(1.0, gt=0)
    """scikit-learn's C."""

    @model_validator(mode="after")
    def _positive(self) -> FewShotConfig:
        if min(self.labels) < 1 or len(set(self.labels)) < len(self.labels):
            raise ValueError(f"few_shot.labels={list(self.labels)} must be different numbers above 0")
        return self


class ProbeConfig(Section):
    """One probe of a published encoder, complete."""

    encoder: str
    """A published encoder: id, folder or URL."""
    data: ProbeDataConfig
    kinds: tuple[ProbeKind, ...] = Field(("knn", "linear"), min_length=1)
    pooling: ProbePooling = "card"
    """How tokens become one feature; card: as the encoder's card says."""
    classes: int | None = Field(None, ge=2)
    """Classes; none: one more than the highest label of the learning set."""
    knn: KnnConfig = KnnConfig()
    linear: LinearConfig = LinearConfig()
    few_shot: FewShotConfig = FewShotConfig()
    scaling: ScalingConfig = ScalingConfig()
    """workers: Ray actors that compute features; micro_batch: clips at once, none: 128."""
    cache: bool = True
    """Keep features below the storage root and read them from there; samples are known by their names, so turn it off
    where files have changed under the same names."""
    storage: str | None = None
    """Root of encoders and features, any fsspec URL; none: AMD_STORAGE, else the user's data folder."""
    seed: int = Field(0, ge=0, lt=2**31)


class RunProbeConfig(Section):
    """How a run's encoder is probed while it is trained, by a process of its own: nearest neighbours and linear."""

    data: ProbeDataConfig
    every_epochs: int = Field(10, ge=1)
    device: Device = "cpu"
    """By default the GPUs are left to the training."""
    classes: int | None = Field(None, ge=2)
    pooling: ProbePooling = "card"
    knn: KnnConfig = KnnConfig()
    linear: LinearConfig = LinearConfig(method="logistic")
    seed: int = Field(0, ge=0, lt=2**31)
