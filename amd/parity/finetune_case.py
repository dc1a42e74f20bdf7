"""Replay of the official fine-tuned classifier with our encoder and a head: features, losses, gradients.

Layer scale is folded into the preceding linear layer, and gradients flow through the folding, so every official
parameter has a gradient.
Shapes: B batch, N tokens, K classes, D width.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional

from amd.config import EncoderConfig, TokenGrid, validate
from amd.exchange.source import to_student
from amd.models.encoder import Encoder
from amd.models.layers import LAYER_NORM_EPS
from amd.parity.amd_case import DTYPE, TOLERANCE
from amd.parity.files import GoldenTensors
from amd.parity.report import ParityReport
from amd.tokens import patchify

FILE = "finetune.safetensors"
HEADS = 3  # in every variant; cannot be inferred from tensors
LABELS = (3, 5)
SMOOTHING = 0.1
SOFT = (0.88, 0.02)  # soft targets of the labelled class and of each other class


def check(folder: Path, report: ParityReport) -> None:
    stored = GoldenTensors(folder, FILE.removesuffix(".safetensors"), report)
    video = GoldenTensors(folder, "amd_inputs", report).take("video")
    variants = sorted({name.split(".state.")[0] for name in stored.names() if ".state." in name})
    if video is not None:
        for variant in variants:
            state = dict(stored.all(f"{variant}.state."))
            for precision in DTYPE:
                _check_variant(f"{variant}.{precision}.", state, video, precision, stored, report)
    stored.close()


def _check_variant(
    prefix: str, state: dict[str, Tensor], video: Tensor, precision: str, stored: GoldenTensors, report: ParityReport
) -> None:
    leaves = {name: tensor.to(DTYPE[precision], copy=True).requires_grad_() for name, tensor in state.items()}
    features = _features(leaves, video.to(DTYPE[precision]))
    logits = functional.linear(features, leaves["head.weight"], leaves["head.bias"])  # (B, K)
    labels = torch.tensor(LABELS)
    soft = torch.full_like(logits, SOFT[1]).scatter(1, labels[:, None], SOFT[0])
    got = {
        "features": features,
        "logits": logits,
        "loss_soft": functional.cross_entropy(logits, soft),
        "loss_ce": functional.cross_entropy(logits, labels),
        "loss_ls": functional.cross_entropy(logits, labels, label_smoothing=SMOOTHING),
    }
    for name, tensor in got.items():
        golden = stored.take(prefix + name)
        if golden is not None:
            report.close(stored.name, prefix + name, tensor, golden, TOLERANCE[precision])
    got["loss_soft"].backward()
    for name, golden in list(stored.all(f"{prefix}grad.")):
        gradient = leaves[name].grad if name in leaves else None
        if gradient is None:
            report.fail(
                stored.name, f"{prefix}grad.{name}", "cannot be checked: none of our parameters gets this gradient"
            )
        else:
            report.close_l2(stored.name, f"{prefix}grad.{name}", gradient, golden, TOLERANCE[precision])


def _features(leaves: dict[str, Tensor], video: Tensor) -> Tensor:
    """Return features (B, D): normalised pooled tokens if the file has fc_norm, else the first token after the norm."""
    width, _, tubelet, patch, _ = leaves["patch_embed.proj.weight"].shape
    depth = 1 + max(int(name.split(".")[1]) for name in leaves if name.startswith("blocks."))
    grid = TokenGrid(video.shape[2] // tubelet, video.shape[3] // patch, video.shape[4] // patch)
    pixels = patchify(video, tubelet, patch)
    config = validate(EncoderConfig, {"width": width, "depth": depth, "heads": HEADS})
    encoder = Encoder(config, grid, pixels.shape[-1]).to(video.dtype)
    state = to_student(leaves).state.items()
    ours = {name.removeprefix("encoder."): tensor for name, tensor in state if name.startswith("encoder.")}
    for name, parameter in encoder.named_parameters():
        if name.endswith(("q_bias", "v_bias")) and name not in ours:
            ours[name] = torch.zeros_like(parameter)  # a variant without attention biases
    everything = torch.arange(grid.tokens).expand(len(video), -1)
    pooled = "fc_norm.weight" in leaves
    ours |= {name: leaf for name, leaf in encoder.named_parameters() if name.startswith("norm.") and pooled}
    ours |= dict(encoder.named_buffers())
    output = functional_call(
        encoder, ours, (pixels, everything), {"intermediates": (depth,), "final": not pooled}, strict=True
    )
    if not pooled:
        first: Tensor = output.final[:, 0]
        return first
    mean = output.intermediates[0].mean(dim=1)
    return functional.layer_norm(mean, (width,), leaves["fc_norm.weight"], leaves["fc_norm.bias"], LAYER_NORM_EPS)
