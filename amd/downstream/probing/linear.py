"""Linear probe: MAE's head (BatchNorm without affine parameters, then a linear layer) trained on frozen features.

Features are either cached and shuffled, or computed on the fly from augmented samples.
Source: facebookresearch/mae, `main_linprobe.py`.
Shapes: B batch, n training samples, m test samples, N tokens, D features, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from amd.config import LinearAugment, LinearConfig
from amd.downstream.arrays import Array, Features, TokenFeatures
from amd.training.checkpoints.state import stream_seed
from amd.training.trainer.optimizer import cosine_lr, set_lr

BATCH, MIN_BATCH, MIN_STEPS = 16_384, 32, 16
CHUNK = 8192

# Augmentations as DataConfig fields. Deviation from MAE: its crop draws one box; ours draws up to ten, then falls back
# to the largest that fits.
AUGMENTS: dict[LinearAugment, dict[str, Any]] = {
    "none": {},
    "image": {"crop": "random_resized", "crop_scale": (0.08, 1.0), "flip": True, "rand_augment": None, "repeats": 1},
    "video": {"crop": "multi_scale", "flip": False, "rand_augment": None, "repeats": 1, "sampling": "strided"},
    "data": {},
}


class LinearHead(nn.Module):
    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        # momentum=None averages over all steps, where MAE uses a moving average. Frozen features have a fixed
        # distribution, and in a short probe a moving average retains part of the initial 0 and 1.
        self.norm = nn.BatchNorm1d(width, affine=False, eps=1e-6, momentum=None)
        self.linear = nn.Linear(width, classes)
        nn.init.trunc_normal_(self.linear.weight, std=0.01)
        nn.init.zeros_(self.linear.bias)

    def forward(self, features: Tensor) -> Tensor:
        """Compute logits: (B, D) -> (B, C)."""
        logits: Tensor = self.linear(self.norm(features))
        return logits


def batch_size(config: LinearConfig, samples: int) -> int:
    """Return the number of samples per step: by default MAE's, or fewer if an epoch would have fewer than 16 steps."""
    return min(samples, config.batch_size or max(MIN_BATCH, min(BATCH, samples // MIN_STEPS)))


def shuffled(train: Features | TokenFeatures, batch: int, epochs: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches (B, D) or (B, N, D) and labels (B,) in a new order every epoch; incomplete batches are dropped."""
    values, labels = torch.from_numpy(train.values), torch.from_numpy(train.labels)
    for epoch in range(epochs):
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(stream_seed(seed, "order", epoch)))
        for start in range(0, len(order) - batch + 1, batch):
            chosen = order[start : start + batch]
            yield values[chosen], labels[chosen]


def train_head(
    batches: Iterable[tuple[Tensor, Tensor]],
    config: LinearConfig,
    *,
    width: int,
    classes: int,
    batch: int,
    steps_per_epoch: int,
    seed: int,
    device: torch.device | str = "cpu",
) -> LinearHead:
    """Train a head for config.epochs x steps_per_epoch batches; deterministic for a given seed. Labels start at 0."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream_seed(seed, "head"))
        head = LinearHead(width, classes).to(device)
    fit(
        head,
        OPTIMIZERS[config.method](head, config),
        batches,
        peak=config.base_lr * batch / 256,
        steps=config.epochs * steps_per_epoch,
        warmup=config.warmup_epochs * steps_per_epoch,
    )
    return head.eval()


def fit(
    head: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    peak: float,
    steps: int,
    warmup: int,
) -> None:
    """Minimise the cross-entropy of a head on batches; the learning rate follows a cosine from `peak` to 0."""
    device = next(head.parameters()).device
    for step, (features, labels) in enumerate(batches):
        set_lr(optimizer, cosine_lr(step, peak=peak, final=0.0, steps=steps, warmup=warmup))
        loss = functional.cross_entropy(head(features.to(device)), labels.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@torch.inference_mode()
def logits(head: LinearHead, test: Array) -> Array:
    """Compute the logits of a trained head: (m, D) -> (m, C)."""
    device = head.linear.weight.device
    parts = [head(chunk.to(device)).cpu() for chunk in torch.from_numpy(test).split(CHUNK)]
    values: Array = torch.cat(parts).numpy()
    return values


def _lars(head: LinearHead, config: LinearConfig) -> torch.optim.Optimizer:
    """Return LARS as in MAE: the trust ratio scales only the weight matrix, not the bias."""
    from timm.optim import Lars  # seconds to import

    weight, bias = head.linear.weight, head.linear.bias
    groups = [
        {"params": [weight], "always_adapt": True, "weight_decay": config.weight_decay},
        {"params": [bias], "always_adapt": False, "weight_decay": 0.0},
    ]
    optimizer: torch.optim.Optimizer = Lars(groups, momentum=config.momentum)
    return optimizer


def _sgd(head: LinearHead, config: LinearConfig) -> torch.optim.Optimizer:
    return torch.optim.SGD(
        head.parameters(), lr=config.base_lr, momentum=config.momentum, weight_decay=config.weight_decay
    )


OPTIMIZERS: dict[str, Callable[[LinearHead, LinearConfig], torch.optim.Optimizer]] = {"lars": _lars, "sgd": _sgd}
