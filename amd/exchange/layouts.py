"""Foreign keys to the keys of `Student`, by tables of patterns, and the exact rewritings of tensors on the way.

Everything passes through the student's keys: an encoder is the part below `encoder.`. A key that no rule knows is told
as unexpected by whoever loads. Two rewritings change no result: a bias on attention keys is dropped (softmax cancels
it), and layer scale is folded into the map before it.
Knows how tables are applied; the tables stand in `official` and `huggingface`.
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
Rules = tuple[tuple[str, str | None], ...]  # (pattern of a whole key, our key); None: known, and takes no part here


class Layout(NamedTuple):
    name: str
    mark: str  # a key that tells the layout, as a pattern
    rules: Rules


class Translated(NamedTuple):
    layout: str
    state: State  # our student keys; `*.positions` are tables; under `classifier.` what follows an encoder's blocks
    dropped: list[str]  # known keys of the file that take no part
    unknown: list[str]  # keys that no rule knows
    kernel: tuple[int, ...] = ()  # of the file's patch embedding: ([tubelet,] patch, patch); empty where it is flat


def translate(state: Mapping[str, Tensor], layouts: Sequence[Layout]) -> Translated:
    """Foreign weights under the keys of `Student`; parts the file does not have are absent.

    Raises ConfigError when the keys are of none of the layouts.
    """
    stripped = {key.removeprefix("backbone."): tensor for key, tensor in state.items()}
    for layout in layouts:
        if any(re.fullmatch(layout.mark, key) for key in stripped):
            return _translate(stripped, layout)
    names = ", ".join(layout.name for layout in layouts)
    raise ConfigError([f"keys of no known layout, such as {', '.join(sorted(state)[:4])}; known are: {names}"])


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
    """Separate q, k, v maps (Hugging Face) to one."""
    out = dict(state)
    for key in state:
        if key.endswith("attn.q.weight"):
            stem = key.removesuffix("q.weight")
            if all(f"{stem}{part}.weight" in out for part in "qkv"):
                out[f"{stem}qkv.weight"] = torch.cat([out.pop(f"{stem}{part}.weight") for part in "qkv"])
                out.pop(f"{stem}k.bias", None)
    return out


def _split_bias(state: State) -> State:
    """A fused bias (3D) to q and v; the third of the keys changes nothing."""
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
    """x + gamma * (W y + b) = x + (gamma W) y + gamma b."""
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
