"""Attentive probe: a cross-attention block with one learned query, then a linear classifier, on a frozen ViT's tokens.

Unlike a linear probe on mean-pooled tokens, it can weight tokens by their content. Source: V-JEPA's attentive probe
(Bardes et al. 2024), including its AdamW settings. Deviations: the class token, if any, is included, and each video is
represented by a single clip.
Shapes: B batch, n training samples, N tokens, D width, C classes.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor, nn

from amd.config import AttentiveConfig, ConfigError, EncoderConfig
from amd.downstream.arrays import Array, Labels, TokenFeatures
from amd.downstream.probing.linear import MIN_BATCH, MIN_STEPS, fit
from amd.models.layers import LAYER_NORM_EPS, Mlp
from amd.training.checkpoints.state import stream_seed

BATCH = 256
MLP_RATIO = 4.0


class AttentiveHead(nn.Module):
    """A pre-norm cross-attention block with a single learned query, followed by a linear classifier."""

    def __init__(self, width: int, heads: int, classes: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.empty(1, 1, width))
        self.norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp_norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.mlp = Mlp(width, MLP_RATIO)
        self.linear = nn.Linear(width, classes)
        nn.init.trunc_normal_(self.query, std=0.02)
        nn.init.trunc_normal_(self.linear.weight, std=0.02)
        nn.init.zeros_(self.linear.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """Compute logits: (B, N, D) of any floating dtype -> (B, C) float32."""
        keys = self.norm(tokens.float())
        query = self.query.expand(len(tokens), -1, -1)  # (B, 1, D)
        pooled = query + self.attention(query, keys, keys, need_weights=False)[0]
        pooled = pooled + self.mlp(self.mlp_norm(pooled))
        logits: Tensor = self.linear(pooled[:, 0])
        return logits


def check_heads(config: AttentiveConfig, encoder: EncoderConfig) -> int:
    """Return the number of attention heads. Raises ConfigError if it does not divide the encoder's width."""
    heads = config.heads or encoder.heads
    if encoder.width % heads:
        raise ConfigError(
            [
                f"attentive.heads={heads} must divide the encoder's width {encoder.width}; leave it out to "
                f"use {encoder.heads}"
            ]
        )
    return heads


def attentive_batch_size(config: AttentiveConfig, samples: int) -> int:
    """Return the number of samples per step: by default 256, or fewer if an epoch would have fewer than 16 steps."""
    return min(samples, config.batch_size or max(MIN_BATCH, min(BATCH, samples // MIN_STEPS)))


def collect_tokens(batches: Iterable[tuple[Tensor, Tensor]], samples: int, config: AttentiveConfig) -> TokenFeatures:
    """Collect the tokens of up to `samples` samples. Raises ConfigError if they would exceed attentive.memory_mib."""
    values, labels, read = np.zeros((0, 0, 0), np.float16), [], 0
    for tokens, batch_labels in batches:
        if not values.size:
            _check_memory(samples * tokens[0].numel() * values.itemsize, samples, config)
            values = np.empty((samples, *tokens.shape[1:]), np.float16)  # allocated once: the largest array
        values[read : read + len(tokens)] = tokens.cpu().numpy()
        labels.append(batch_labels)
        read += len(tokens)
    return TokenFeatures(values[:read], torch.cat(labels).numpy())


def _check_memory(size: int, samples: int, config: AttentiveConfig) -> None:
    mib = -(-size // 2**20)
    if mib > config.memory_mib:
        raise ConfigError(
            [
                f"attentive.memory_mib={config.memory_mib}: the tokens of {samples} samples in data.train take "
                f"{mib} MiB; raise the limit, probe on fewer samples, or recompute the tokens in every epoch with "
                "attentive.augment=data"
            ]
        )


def train_attentive(
    batches: Iterable[tuple[Tensor, Tensor]],
    config: AttentiveConfig,
    *,
    width: int,
    heads: int,
    classes: int,
    steps_per_epoch: int,
    seed: int,
    device: torch.device | str = "cpu",
) -> AttentiveHead:
    """Train a head for config.epochs x steps_per_epoch batches; deterministic for a given seed. Labels start at 0."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream_seed(seed, "attentive"))
        head = AttentiveHead(width, heads, classes).to(device)
    fit(
        head,
        torch.optim.AdamW(head.parameters(), lr=config.lr, weight_decay=config.weight_decay),
        batches,
        peak=config.lr,
        steps=config.epochs * steps_per_epoch,
        warmup=config.warmup_epochs * steps_per_epoch,
    )
    return head.eval()


@torch.inference_mode()
def classify(head: AttentiveHead, batches: Iterable[tuple[Tensor, Tensor]]) -> tuple[Array, Labels]:
    """Return the logits (m, C) and labels (m,) for all batches of tokens."""
    found = [(head(tokens.to(head.query.device)).cpu(), labels) for tokens, labels in batches]
    logits: Array = torch.cat([part for part, _ in found]).numpy()
    return logits, torch.cat([labels for _, labels in found]).numpy()
