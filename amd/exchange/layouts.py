"""Map third-party state-dict keys to the keys of `Student` using pattern tables.

Tensors are rewritten losslessly where layouts differ. All weights use the student's keys; an encoder's keys start with
`encoder.`. The loader reports keys that match no rule as unexpected. Two rewrites do not change the output: the bias of
attention keys is dropped (it cancels in the softmax), and layer scale is folded into the preceding linear layer. The
tables themselves are in `official` and `huggingface`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from amd.config import ConfigError

PATCHES = "encoder.patch_embed.weight"

State = dict[str, Tensor]
Rules = tuple[tuple[str, str | None], ...]  # (pattern of a whole key, our key); None if the key is known but unused


class Layout(NamedTuple):
    name: str
    mark: str  # pattern of a key that identifies the layout
    rules: Rules


class Translated(NamedTuple):
    layout: str
    state: State  # keys of `Student`; `*.positions` are tables; `classifier.*` follows the encoder's blocks
    dropped: list[str]  # known keys that are not used
    unknown: list[str]  # keys that match no rule
    kernel: tuple[int, ...] = ()  # of the patch embedding in the file: ([tubelet,] patch, patch); empty if it is flat


def translate(state: Mapping[str, Tensor], layouts: Sequence[Layout]) -> Translated:
    """Translate third-party weights to the keys of `Student`; parts missing from the file are omitted from the result.

    Raises ConfigError if the keys match no layout.
    """
    stripped = {key.removeprefix("backbone."): tensor for key, tensor in state.items()}
    for layout in layouts:
        if any(re.fullmatch(layout.mark, key) for key in stripped):
            return _translate(stripped, layout)
    names = ", ".join(layout.name for layout in layouts)
    raise ConfigError(
        [f"keys match no known layout (first keys: {', '.join(sorted(state)[:4])}); known layouts: {names}"]
    )


def _translate(state: Mapping[str, Tensor], layout: Layout) -> Translated:
    ours: State = {}
    dropped: list[str] = []
    unknown: list[str] = []
    for key, tensor in state.items():
        for pattern, name in layout.rules:
            if found := re.fullmatch(pattern, key):
                if name is None:
                    dropped.append(key)
                else:
                    ours[found.expand(name)] = tensor
                break
        else:
            unknown.append(key)
    for rewrite in (_stack_attention, _split_bias, _fold_layer_scale):
        ours = rewrite(ours)
    patches = ours.get(PATCHES)
    if patches is None or patches.ndim <= 2:
        return Translated(layout.name, ours, dropped, unknown)
    # A convolution (D, C, [t,] p, p) with stride = kernel is a linear map of flat pixels (D, t p p C).
    ours[PATCHES] = patches.movedim(1, -1).flatten(1)
    return Translated(layout.name, ours, dropped, unknown, tuple(patches.shape[2:]))


def _stack_attention(state: State) -> State:
    """Stack separate q, k, v projections (Hugging Face) into one."""
    out = dict(state)
    for key in state:
        if key.endswith("attn.q.weight"):
            stem = key.removesuffix("q.weight")
            if all(f"{stem}{part}.weight" in out for part in "qkv"):
                out[f"{stem}qkv.weight"] = torch.cat([out.pop(f"{stem}{part}.weight") for part in "qkv"])
                out.pop(f"{stem}k.bias", None)
    return out


def _split_bias(state: State) -> State:
    """Split a fused bias (3D) into q and v; the bias of k cancels in the softmax."""
    out: State = {}
    for key, tensor in state.items():
        if key.endswith("attn.qkv.bias"):
            query, _, value = tensor.chunk(3)
            stem = key.removesuffix("qkv.bias")
            out[f"{stem}q_bias"], out[f"{stem}v_bias"] = query, value
        else:
            out[key] = tensor
    return out


_SCALES = {"gamma_1": "attn.proj", "gamma_2": "mlp.fc2", "ls1.gamma": "attn.proj", "ls2.gamma": "mlp.fc2"}


def _fold_layer_scale(state: State) -> State:
    """Fold layer scale into the preceding layer: x + gamma * (W y + b) = x + (gamma W) y + gamma b."""
    out = dict(state)
    for key in state:
        for suffix, linear in _SCALES.items():
            if key.endswith(f".{suffix}"):
                stem = f"{key.removesuffix(suffix)}{linear}"
                if f"{stem}.weight" in out and f"{stem}.bias" in out:
                    gamma = out.pop(key)
                    out[f"{stem}.weight"] = gamma[:, None] * out[f"{stem}.weight"]
                    out[f"{stem}.bias"] = gamma * out[f"{stem}.bias"]
    return out
