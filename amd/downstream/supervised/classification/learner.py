"""Learner for fine-tuning runs: a classifier with batch augmentation, layer decay and a moving average of the weights.

Mixing uses the global generators of `random` and numpy, as timm does, seeded from (seed, step, rank) at every step. A
run resumed with the same number of workers is therefore bit-identical; with a different number, it mixes different
pairs.
Shapes: B clips in a micro-batch, T frames, H height, W width, C classes.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from amd.artifacts.weights import whole_clips
from amd.config import AugmentConfig, FinetuneConfig
from amd.data.loading.loader import Batch
from amd.downstream.supervised.learner import SupervisedLearner
from amd.losses import unit_pixels
from amd.models.classifier import Classifier
from amd.training.checkpoints.state import stream_seed
from amd.training.process_group import ProcessGroup

EMA = "ema"
Targets = Callable[[Batch], Tensor]  # (B,) class indices, or (B, C) zeros and ones


def new_classifier(config: FinetuneConfig) -> Classifier:
    assert config.head.classes is not None, "counted before the run starts"
    return Classifier(
        config.encoder,
        config.clip.grid,
        config.clip.token_values,
        config.head.classes,
        dropout=config.head.dropout,
        init_scale=config.head.init_scale,
    )


class Finetuner(SupervisedLearner[Classifier]):
    """Classifier and its optimizer on one rank."""

    def __init__(
        self, config: FinetuneConfig, group: ProcessGroup, start: Callable[[Classifier], Any], targets: Targets
    ) -> None:
        super().__init__(config, group, lambda: new_classifier(config), start)
        self.config, self._targets = config, targets
        self.average: AveragedModel | None = None
        if config.optim.ema_decay is not None:
            self.average = AveragedModel(self.network, multi_avg_fn=get_ema_multi_avg_fn(config.optim.ema_decay))
        self._augment_batch = BatchAugmentation(
            config.augment, config.head.classes or 0, config.head.multi_label, self.device
        )

    def begin(self, step: int) -> None:
        super().begin(step)
        seed = stream_seed(self.config.seed, "mix", step, self.group.rank) % 2**32
        random.seed(seed)
        np.random.seed(seed)

    def loss(self, clips: Tensor, batch: Batch, row: int) -> Sequence[Tensor]:
        targets = self._targets(batch).to(self.device, non_blocking=True)
        pixels, soft = self._augment_batch(self._normalized(clips), targets)
        logits = self.model(*whole_clips(self.network.encoder, self.config.clip, pixels)).float()
        if self.config.head.multi_label:
            return (functional.binary_cross_entropy_with_logits(logits, soft),)
        return (functional.cross_entropy(logits, soft),)

    def end(self) -> None:
        if self.average is not None:
            self.average.update_parameters(self.network)

    @property
    def tested(self) -> Classifier:
        """Model to evaluate and publish, with the moving average of the weights if there is one."""
        if self.average is None:
            return self.network
        assert isinstance(self.average.module, Classifier)
        return self.average.module

    def extra_state(self) -> dict[str, dict[str, Tensor]]:
        return {} if self.average is None else {EMA: dict(self.average.state_dict())}

    def load_extra_state(self, tensors: dict[str, dict[str, Tensor]]) -> None:
        if self.average is not None:
            self.average.load_state_dict(tensors[EMA])

    def _normalized(self, clips: Tensor) -> Tensor:
        """Normalise clips (B, 3, T, H, W) from uint8 to float input for the model."""
        clip = self.config.clip
        shape = (1, 3, 1, 1, 1)
        mean, std = (torch.tensor(values, device=clips.device).reshape(shape) for values in (clip.mean, clip.std))
        return (unit_pixels(clips, clip) - mean) / std


class BatchAugmentation:
    """Random erasing, mixup or cutmix, and label smoothing for a normalised batch; imports timm only if needed."""

    def __init__(self, augment: AugmentConfig, classes: int, multi_label: bool, device: torch.device) -> None:
        self._augment, self._classes, self._multi_label = augment, classes, multi_label
        self._erase: Any = None
        self._mix: Any = None
        if augment.erase_prob:
            from timm.data.random_erasing import RandomErasing

            self._erase = RandomErasing(augment.erase_prob, mode="pixel", device=device)
        if augment.mixes:
            from timm.data.mixup import Mixup

            self._mix = Mixup(
                augment.mixup,
                augment.cutmix,
                prob=augment.mix_prob,
                switch_prob=augment.switch_prob,
                label_smoothing=augment.label_smoothing,
                num_classes=classes,
            )

    def __call__(self, clips: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Augment clips (B, 3, T, H, W); turn class indices (B,) or multi-hot vectors (B, C) into soft targets."""
        flat = clips.flatten(1, 2)  # (B, 3 T, H, W): one box for all frames of a clip
        if self._erase is not None:
            flat = self._erase(flat.contiguous())
        if self._mix is not None and len(flat) % 2 == 0:  # elastic runs may have odd batches
            flat, soft = self._mix(flat.contiguous(), targets)
        else:
            soft = self._smooth(targets)
        return flat.unflatten(1, clips.shape[1:3]), soft

    def _smooth(self, targets: Tensor) -> Tensor:
        if self._multi_label:
            return targets.float()
        smoothing = self._augment.label_smoothing
        exact = functional.one_hot(targets, self._classes).float()
        return exact * (1 - smoothing) + smoothing / self._classes


def restore_classifier(config: FinetuneConfig, tensors: dict[str, dict[str, Tensor]]) -> Classifier:
    """Rebuild a checkpoint's classifier for evaluation, with the moving average of the weights if there is one."""
    classifier = new_classifier(config)
    if EMA in tensors:
        prefix = "module."
        state = {key.removeprefix(prefix): value for key, value in tensors[EMA].items() if key.startswith(prefix)}
    else:
        state = tensors["model"]
    classifier.load_state_dict(state)
    return classifier
