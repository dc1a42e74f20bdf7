"""AdamW with the official parameter groups, and the learning rate for each step."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from amd.config import OptimConfig

UNDECAYED_LEAVES = ("mask_token", "class_token", "cls_token", "pos_embed", "positions")


def is_decayed(name: str, parameter: Tensor) -> bool:
    """Return whether weight decay applies to a parameter; it skips vectors, biases, tokens and position embeddings.

    Source: the official `get_parameter_groups`. Deviation: its skip list matches only the full name `mask_token`; here
    only the last part of the name is compared, which also covers MAE's class token and the generators' mask tokens
    (which the official code never trains).
    """
    leaf = name.rpartition(".")[2]
    return not (parameter.ndim == 1 or name.endswith(".bias") or leaf in UNDECAYED_LEAVES)


def layer_scale(name: str, depth: int, decay: float) -> float:
    """Return the learning-rate scale of a classifier parameter: `decay ** n`, where n is the number of layers above it.

    The embedding and the class token are layer 0; the last norm and the head have scale 1. Source: the official
    `LayerDecayValueAssigner` (BEiT's rule).
    """
    block = re.match(r"encoder\.blocks\.(\d+)\.", name)
    if block:
        layer = int(block[1]) + 1
    else:
        layer = 0 if re.match(r"encoder\.(patch_embed|class_token|positions)\b", name) else depth + 1
    return float(decay ** (depth + 1 - layer))


def parameter_groups(
    model: nn.Module, weight_decay: float, scale: Callable[[str], float] = lambda name: 1.0
) -> list[dict[str, object]]:
    """Group trainable parameters and their `names` by learning-rate scale and weight decay; undecayed groups first."""
    groups: dict[tuple[bool, float], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        decayed, factor = is_decayed(name, parameter), scale(name)
        empty = {"params": [], "names": [], "weight_decay": weight_decay if decayed else 0.0, "lr_scale": factor}
        group = groups.setdefault((decayed, factor), empty)
        group["params"].append(parameter)
        group["names"].append(name)
    return [groups[key] for key in sorted(groups)]


def build_optimizer(
    model: nn.Module, optim: OptimConfig, scale: Callable[[str], float] = lambda name: 1.0
) -> torch.optim.AdamW:
    """Build a fused AdamW (one kernel per group, on CPU and GPU); `set_lr` sets the learning rate for each step."""
    return torch.optim.AdamW(
        parameter_groups(model, optim.weight_decay, scale),
        lr=optim.lr,
        betas=optim.betas,
        eps=optim.eps,
        weight_decay=optim.weight_decay,
        fused=True,
    )


def cosine_lr(step: int, *, peak: float, final: float, steps: int, warmup: int, start: float = 0.0) -> float:
    """Return the learning rate at a step: linear warm-up from `start` to `peak`, then a half cosine to `final`.

    Exactly as in the official `cosine_scheduler`: the first step uses `start`; the last warm-up step and the step after
    it use `peak`. Deviations: a warm-up specified only in steps works (the official function fails its own assertion),
    and steps beyond the end keep the final rate (the official index would be out of range).
    """
    if step < warmup:
        return start + (peak - start) * step / (warmup - 1) if warmup > 1 else start
    progress = min(step - warmup, steps - warmup) / max(1, steps - warmup)
    return final + 0.5 * (peak - final) * (1 + math.cos(math.pi * progress))


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every group to `lr` times its layer-decay scale."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


def clip_gradients(parameters: Iterable[Tensor], limit: float | None) -> Tensor:
    """Scale gradients to a global norm of at most `limit`; return the norm before clipping, a scalar on the device.

    After DDP's all-reduce every rank has the same gradients, so the norm is equal on all ranks.
    """
    with_gradients = [parameter for parameter in parameters if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in with_gradients if parameter.grad is not None])
    if limit is not None:
        torch.nn.utils.clip_grads_with_norm_(with_gradients, limit, norm)
    return norm
