"""Checkpoint layouts of the official AMD, VideoMAE, MAE, MVD and timm code, with tables that map their keys to ours
and back.

Converts key names and axis orders; opens no files.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from amd.config import ClipConfig
from amd.exchange.layouts import Layout, State

_BLOCK = (
    r"(norm[12]\.(?:weight|bias)|attn\.(?:qkv\.weight|qkv\.bias|q_bias|v_bias|proj\.weight|proj\.bias)"
    r"|mlp\.fc[12]\.(?:weight|bias)|gamma_[12]|ls[12]\.gamma)"
)

PRETRAIN = Layout(
    "VideoMAE or AMD pre-training",
    r"encoder\.patch_embed\.proj\.weight",
    (
        (r"encoder\.patch_embed\.proj\.(weight|bias)", r"encoder.patch_embed.\1"),
        (rf"encoder\.blocks\.(\d+)\.{_BLOCK}", r"encoder.blocks.\1.\2"),
        (r"encoder\.norm\.(weight|bias)", r"encoder.norm.\1"),
        (r"encoder\.projection_heads\.(\d+)\.weight", r"projections.\1.weight"),
        (rf"generators\.(\d+)\.blocks\.(\d+)\.{_BLOCK}", r"generators.\1.blocks.\2.\3"),
        (r"generators\.\d+\.norm\.(weight|bias)", None),  # built but never used by the official code
        # Only in our exports: the official code keeps these in a plain list, so its checkpoints lack them.
        (r"generator_mask_tokens\.(\d+)", r"generators.\1.mask_token"),
        (r"encoder_to_decoder\.(weight|bias)", r"decoder.input.\1"),
        (r"mask_token", r"decoder.mask_token"),
        (rf"decoder\.blocks\.(\d+)\.{_BLOCK}", r"decoder.blocks.\1.\2"),
        (r"decoder\.(norm|head)\.(weight|bias)", r"decoder.\1.\2"),
    ),
)
PLAIN = Layout(
    "MAE, timm or fine-tuned",
    r"patch_embed\.proj\.weight",
    (
        (r"patch_embed\.proj\.(weight|bias)", r"encoder.patch_embed.\1"),
        (r"cls_token", r"encoder.class_token"),
        (r"pos_embed", r"encoder.positions"),
        (rf"blocks\.(\d+)\.{_BLOCK}", r"encoder.blocks.\1.\2"),
        (r"norm\.(weight|bias)", r"encoder.norm.\1"),
        (r"fc_norm\.(weight|bias)", r"classifier.norm.\1"),
        (r"head\.(weight|bias)", r"classifier.head.\1"),
        (r"decoder_embed\.(weight|bias)", r"decoder.input.\1"),
        (r"mask_token", r"decoder.mask_token"),
        (r"decoder_pos_embed", r"decoder.positions"),
        (rf"decoder_blocks\.(\d+)\.{_BLOCK}", r"decoder.blocks.\1.\2"),
        (r"decoder_norm\.(weight|bias)", r"decoder.norm.\1"),
        (r"decoder_pred\.(weight|bias)", r"decoder.head.\1"),
        (r"(mask_token|down|decoder|pos_embed)_(img|vid)(\..+)?", None),  # MVD: decoders for its two teachers
    ),
)
OUR_STUDENT = Layout("our student", r"encoder\.patch_embed\.weight", ((r"(.+)", r"\1"),))
OUR_ENCODER = Layout("our encoder", r"patch_embed\.weight", ((r"(.+)", r"encoder.\1"),))
OFFICIAL = (PRETRAIN, PLAIN, OUR_STUDENT, OUR_ENCODER)


def to_official(state: Mapping[str, Tensor], clip: ClipConfig) -> State:
    """Convert our student to AMD's layout (or, without projections and generators, to VideoMAE's).

    Each generator's norm, which the official code builds but never uses, is filled with ones and zeros. Generator
    mask tokens are stored as `generator_mask_tokens.I`, which the official loader ignores.
    """
    out: State = {}
    for key, tensor in state.items():
        if key == "encoder.patch_embed.weight":
            cut = tensor.unflatten(1, (clip.tubelet, clip.patch, clip.patch, 3))
            out["encoder.patch_embed.proj.weight"] = cut.movedim(-1, 1).contiguous()
        elif found := re.fullmatch(r"generators\.(\d+)\.mask_token", key):
            out[f"generator_mask_tokens.{found[1]}"] = tensor
            width = tensor.shape[-1]
            out[f"generators.{found[1]}.norm.weight"] = torch.ones(width, dtype=tensor.dtype)
            out[f"generators.{found[1]}.norm.bias"] = torch.zeros(width, dtype=tensor.dtype)
        else:
            out[_rename(key, _TO_AMD)] = tensor
    return out


def to_mae(state: Mapping[str, Tensor], clip: ClipConfig) -> State:
    """Convert our student (class token, 2-D position embeddings) to MAE's layout, without its two fixed tables."""
    out: State = {}
    for key, tensor in state.items():
        if key == "encoder.patch_embed.weight":
            cut = tensor.unflatten(1, (clip.patch, clip.patch, 3))
            out["patch_embed.proj.weight"] = cut.movedim(-1, 1).contiguous()
        elif key.endswith("q_bias"):
            stem = key.removesuffix("q_bias")
            fused = [tensor, torch.zeros_like(tensor), state[f"{stem}v_bias"]]
            out[_rename(f"{stem}qkv.bias", _TO_MAE)] = torch.cat(fused)
        elif not key.endswith("v_bias"):
            out[_rename(key, _TO_MAE)] = tensor
    return out


_TO_AMD = (
    (r"encoder\.patch_embed\.bias", r"encoder.patch_embed.proj.bias"),
    (r"projections\.(\d+)\.weight", r"encoder.projection_heads.\1.weight"),
    (r"decoder\.input\.(.+)", r"encoder_to_decoder.\1"),
    (r"decoder\.mask_token", r"mask_token"),
)
_TO_MAE = (
    (r"encoder\.patch_embed\.bias", r"patch_embed.proj.bias"),
    (r"encoder\.class_token", r"cls_token"),
    (r"encoder\.(.+)", r"\1"),
    (r"decoder\.input\.(.+)", r"decoder_embed.\1"),
    (r"decoder\.mask_token", r"mask_token"),
    (r"decoder\.head\.(.+)", r"decoder_pred.\1"),
    (r"decoder\.(.+)", r"decoder_\1"),
)


def _rename(key: str, rules: tuple[tuple[str, str], ...]) -> str:
    for pattern, name in rules:
        if found := re.fullmatch(pattern, key):
            return found.expand(name)
    return key


def mae_encoder(state: Mapping[str, Tensor], table: Tensor, clip: ClipConfig, *, pooled: bool) -> State:
    """Convert an image encoder to the layout of MAE and timm, with its position table (N, D).

    `pooled`: whether the last norm applies to pooled tokens. The position embedding of the class token is zero.
    """
    out = to_mae({f"encoder.{key}": tensor for key, tensor in state.items()}, clip)
    rows = [table.new_zeros(1, table.shape[1]), table] if "class_token" in state else [table]
    out["pos_embed"] = torch.cat(rows)[None]
    return _rename_norm(out) if pooled else out


def videomae_encoder(state: Mapping[str, Tensor], clip: ClipConfig, *, pooled: bool) -> State:
    """Convert an encoder to the layout of VideoMAE and AMD: pre-trained or, if `pooled`, fine-tuned."""
    out = to_official({f"encoder.{key}": tensor for key, tensor in state.items()}, clip)
    return _rename_norm(_strip_prefix(out)) if pooled else out


def mvd_encoder(state: Mapping[str, Tensor], table: Tensor, clip: ClipConfig, *, pooled: bool) -> State:
    """Convert an encoder to MVD's layout: like VideoMAE's after fine-tuning, but with a position table (N, D).

    As in MVD, a class token has no position embedding.
    """
    out = _strip_prefix(videomae_encoder(state, clip, pooled=False))
    if "class_token" in out:
        out["cls_token"] = out.pop("class_token")
    out["pos_embed"] = table[None]
    return _rename_norm(out) if pooled else out


def _strip_prefix(state: State) -> State:
    return {key.removeprefix("encoder."): tensor for key, tensor in state.items()}


def _rename_norm(state: State) -> State:
    return {re.sub(r"^norm\.", "fc_norm.", key): tensor for key, tensor in state.items()}
