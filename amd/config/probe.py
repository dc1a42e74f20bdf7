"""Configs for probes, which evaluate a frozen encoder on labelled data."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from amd.config.locations import DataLocation, EncoderLocation, StorageLocation
from amd.config.sections import Section
from amd.config.training_sections import DataConfig, Device, ScalingConfig

ProbeKind = Literal["knn", "linear", "few_shot", "attentive"]
ProbePooling = Literal["card", "mean", "mean_then_norm", "class_token"]
LinearMethod = Literal["lars", "sgd", "logistic"]
LinearAugment = Literal["none", "image", "video", "data"]


class ProbeDataConfig(DataConfig):
    """Labelled data: probes are fitted on `train` and scored on `test`."""

    test: DataLocation
    """Test data, in the same format as `train`."""


class KnnConfig(Section):
    """A weighted nearest-neighbour classifier on frozen features."""

    neighbours: int = Field(20, ge=1)
    """Number of nearest neighbours that vote."""
    temperature: float = Field(0.07, gt=0)
    """Temperature of the votes: a neighbour with cosine similarity s has weight exp(s / temperature)."""


class LinearConfig(Section):
    """A linear classifier on frozen features."""

    method: LinearMethod = "sgd"
    """Training method. sgd: MAE's head (BatchNorm without affine parameters, then a linear layer) trained by SGD with
    momentum. lars: the same head trained by LARS, as in MAE; intended for batches of thousands of samples, so it
    underfits small data sets. logistic: scikit-learn's logistic regression on standardised features; takes seconds for
    small data sets."""
    augment: LinearAugment = "none"
    """Augmentation of the training samples. none: features of the central view, computed once. All other choices
    recompute the features in every epoch. image: MAE's protocol (random resized crop, flip). video: random start and
    multi-scale crop. data: the augmentation configured by data.crop, data.flip and related fields."""
    epochs: int = Field(90, ge=1)
    """Number of training epochs with method=sgd or lars."""
    warmup_epochs: int = Field(10, ge=0)
    """Epochs of linear warm-up with method=sgd or lars."""
    batch_size: int | None = Field(None, ge=2)
    """Samples per step with method=sgd or lars. Default: 16384 as in MAE, or fewer so that an epoch has at least 16
    steps."""
    base_lr: float = Field(0.1, gt=0)
    """Peak learning rate, per 256 samples: lr = base_lr x batch_size / 256."""
    weight_decay: float = Field(0.0, ge=0)
    """Weight decay with method=sgd or lars."""
    momentum: float = Field(0.9, ge=0, lt=1)
    """Momentum with method=sgd or lars."""
    strength: float = Field(0.1, gt=0)
    """Inverse regularisation strength (C) of scikit-learn's logistic regression; used only with method=logistic."""

    @model_validator(mode="after")
    def _rules(self) -> LinearConfig:
        if self.method == "logistic" and self.augment != "none":
            raise ValueError(
                f"linear.augment={self.augment}: linear.method=logistic trains on features computed once; use "
                "linear.augment=none, or linear.method=lars"
            )
        if self.warmup_epochs > self.epochs:
            raise ValueError(f"linear.warmup_epochs={self.warmup_epochs} must not be above epochs={self.epochs}")
        return self


class FewShotConfig(Section):
    """Logistic regression on a few labelled samples per class, averaged over several draws."""

    labels: tuple[int, ...] = Field((1, 5, 10), min_length=1)
    """Numbers of labelled samples per class; a separate probe is fitted and scored for each number."""
    draws: int = Field(5, ge=1)
    """Number of random draws of labelled samples; scores are averaged over the draws."""
    strength: float = Field(1.0, gt=0)
    """Inverse regularisation strength (C) of scikit-learn's logistic regression."""

    @model_validator(mode="after")
    def _positive(self) -> FewShotConfig:
        if min(self.labels) < 1 or len(set(self.labels)) < len(self.labels):
            raise ValueError(f"few_shot.labels={list(self.labels)} must be distinct numbers above 0")
        return self


class AttentiveConfig(Section):
    """A cross-attention block with one learned query and a linear classifier, on all tokens of a frozen encoder."""

    augment: LinearAugment = "none"
    """Augmentation of the training samples. none: tokens of the central view, computed once and kept in memory. All
    other choices recompute the tokens in every epoch, as in linear.augment."""
    epochs: int = Field(20, ge=1)
    """Number of training epochs."""
    warmup_epochs: int = Field(0, ge=0)
    """Epochs of linear warm-up."""
    batch_size: int | None = Field(None, ge=1)
    """Samples per step. Default: 256, or fewer so that an epoch has at least 16 steps."""
    lr: float = Field(1e-3, gt=0)
    """Peak learning rate of AdamW, not scaled by the batch size; decays to 0 on a cosine schedule."""
    weight_decay: float = Field(0.01, ge=0)
    """Weight decay of AdamW."""
    heads: int | None = Field(None, ge=1)
    """Attention heads; must divide the encoder's width. Default: the same number as in the encoder."""
    memory_mib: int = Field(4096, ge=1)
    """Memory limit for the tokens cached by augment=none, in MiB."""

    @model_validator(mode="after")
    def _warmup(self) -> AttentiveConfig:
        if self.warmup_epochs > self.epochs:
            raise ValueError(f"attentive.warmup_epochs={self.warmup_epochs} must not be above epochs={self.epochs}")
        return self


class ProbeConfig(Section):
    """Complete config for probing a published encoder."""

    encoder: EncoderLocation
    """Published encoder: its ID, folder or URL."""
    data: ProbeDataConfig
    """Labelled data."""
    kinds: tuple[ProbeKind, ...] = Field(("knn", "linear"), min_length=1)
    """Probes to run."""
    pooling: ProbePooling = "card"
    """Pooling of tokens into one feature vector; `card` uses the pooling in the encoder's card."""
    classes: int | None = Field(None, ge=2)
    """Number of classes. Default: one more than the highest label in data.train."""
    knn: KnnConfig = KnnConfig()
    """Nearest-neighbour probe."""
    linear: LinearConfig = LinearConfig()
    """Linear probe."""
    few_shot: FewShotConfig = FewShotConfig()
    """Few-shot probe."""
    attentive: AttentiveConfig = AttentiveConfig()
    """Attentive probe."""
    scaling: ScalingConfig = ScalingConfig()
    """Workers (Ray actors) that compute features; micro_batch is the number of clips per forward pass
    (default 128). The attentive probe and probes on augmented samples run in a single process."""
    cache: bool = True
    """Whether to cache features under the storage root. Samples are identified by name, so turn the cache off if files
    have changed without being renamed."""
    storage: StorageLocation | None = None
    """Storage root for encoders and features: path or fsspec URL. Default: AMD_STORAGE, else the user's data folder."""
    seed: int = Field(0, ge=0, lt=2**31)
    """Random seed."""


class RunProbeConfig(Section):
    """Nearest-neighbour and linear probes of a run's encoder during training, in a separate process."""

    data: ProbeDataConfig
    """Labelled data."""
    every_epochs: int = Field(10, ge=1)
    """Epochs between probes."""
    device: Device = "cpu"
    """Device that runs the probes; cpu leaves the GPUs free for training."""
    classes: int | None = Field(None, ge=2)
    """Number of classes. Default: one more than the highest label in data.train."""
    pooling: ProbePooling = "card"
    """Pooling of tokens into one feature vector; `card` uses the pooling in the encoder's card."""
    knn: KnnConfig = KnnConfig()
    """Nearest-neighbour probe."""
    linear: LinearConfig = LinearConfig(method="logistic")
    """Linear probe."""
    seed: int = Field(0, ge=0, lt=2**31)
    """Random seed."""
