"""VideoMAE, ViTMAE and ViT from transformers: keys of published files and of transformers 5, and folder metadata.

Attention keys differ: published files use `attention.attention.q_bias`, transformers 5 uses
`attention.attention.query.bias`. A table with only one of them would silently leave biases at zero.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import torch
from torch import Tensor

from amd.artifacts.card import Card
from amd.artifacts.model_card import UNKNOWN_LICENSE
from amd.config import ConfigError, Interpolation, TokenGrid
from amd.exchange.layouts import Layout, Rules, State
from amd.models.layers import LAYER_NORM_EPS
from amd.storage import exists, join, read_bytes, read_json

_STEM = r"(?:videomae\.|vit\.)?"


def _layer(source: str, target: str) -> Rules:
    """Return the rules for one transformer layer, in both notations; `source` captures the layer number."""
    start, end = rf"{source}\.", rf"{target}.\1."
    return (
        (start + r"attention\.attention\.([qv])_bias", end + r"attn.\2_bias"),
        (start + r"attention\.(?:attention\.query|q_proj)\.bias", end + r"attn.q_bias"),
        (start + r"attention\.(?:attention\.value|v_proj)\.bias", end + r"attn.v_bias"),
        (start + r"attention\.(?:attention\.query|q_proj)\.weight", end + r"attn.q.weight"),
        (start + r"attention\.(?:attention\.key|k_proj)\.weight", end + r"attn.k.weight"),
        (start + r"attention\.(?:attention\.key|k_proj)\.bias", None),  # cancels in the softmax
        (start + r"attention\.(?:attention\.value|v_proj)\.weight", end + r"attn.v.weight"),
        (start + r"attention\.(?:output\.dense|o_proj)\.(weight|bias)", end + r"attn.proj.\2"),
        (start + r"(?:intermediate\.dense|mlp\.fc1)\.(weight|bias)", end + r"mlp.fc1.\2"),
        (start + r"(?:output\.dense|mlp\.fc2)\.(weight|bias)", end + r"mlp.fc2.\2"),
        (start + r"layernorm_before\.(weight|bias)", end + r"norm1.\2"),
        (start + r"layernorm_after\.(weight|bias)", end + r"norm2.\2"),
    )


HUGGING_FACE = (
    Layout(
        "Hugging Face VideoMAE, ViTMAE or ViT",
        _STEM + r"embeddings\.patch_embeddings\.projection\.weight",
        (
            (_STEM + r"embeddings\.patch_embeddings\.projection\.(weight|bias)", r"encoder.patch_embed.\1"),
            (_STEM + r"embeddings\.cls_token", r"encoder.class_token"),
            (_STEM + r"embeddings\.position_embeddings", r"encoder.positions"),
            *_layer(_STEM + r"(?:encoder\.layer|layers)\.(\d+)", r"encoder.blocks"),
            (_STEM + r"layernorm\.(weight|bias)", r"encoder.norm.\1"),
            (r"fc_norm\.(weight|bias)", r"classifier.norm.\1"),
            (r"classifier\.(weight|bias)", r"classifier.head.\1"),
            (_STEM + r"pooler\.dense\.(?:weight|bias)", None),  # applies to the class token, after the last norm
            (r"vit\.embeddings\.mask_token", None),
            (r"encoder_to_decoder\.weight", r"decoder.input.weight"),
            (r"decoder\.decoder_embed\.(weight|bias)", r"decoder.input.\1"),
            (r"(?:decoder\.)?mask_token", r"decoder.mask_token"),
            (r"decoder\.decoder_pos_embed|position_embeddings", r"decoder.positions"),
            # the second form is written by version 5
            *_layer(r"decoder\.decoder_(?:layers|encoder\.layer)\.(\d+)", r"decoder.blocks"),
            (r"decoder\.(?:decoder_)?norm\.(weight|bias)", r"decoder.norm.\1"),
            (r"decoder\.(?:head|decoder_pred)\.(weight|bias)", r"decoder.head.\1"),
        ),
    ),
)


class FolderFacts(NamedTuple):
    """Metadata of a Hugging Face folder; absent values are None."""

    heads: int | None = None
    grid: TokenGrid | None = None  # of the position table
    frames: int | None = None
    size: tuple[int, int] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    interpolation: Interpolation | None = None
    labels: tuple[str, ...] | None = None
    license: str | None = None
    unbiased: bool = False  # attention has no biases, so absent biases are not an error
    problems: tuple[str, ...] = ()  # computations that differ from ours


def folder_facts(url: str, *, field: str = "weights") -> FolderFacts:
    """Read config.json, preprocessor_config.json and the card of a folder. Raises ConfigError if one is invalid."""
    config = _json(join(url, "config.json"), field)
    preprocessor = _json(join(url, "preprocessor_config.json"), field)
    if "architecture" in config:  # a timm folder
        arguments = config.get("model_args") or {}
        trained = config.get("pretrained_cfg") or {}
        own = [name for name in ("act_layer", "norm_layer") if name in arguments]
        return FolderFacts(
            heads=arguments.get("num_heads"),
            mean=_numbers(trained.get("mean")),
            std=_numbers(trained.get("std")),
            license=_card_license(url),
            problems=tuple(f"its {name} is {arguments[name]}; only GELU and LayerNorm are supported" for name in own),
        )
    if config.get("model_type") not in FAMILIES:
        if not config:
            return FolderFacts(license=_card_license(url))
        kinds = ", ".join(FAMILIES)
        raise ConfigError([f"{field}={url}: model_type={config.get('model_type')} is not one of {kinds}"])
    size, patch = (_pair(config.get(name, default)) for name, default in (("image_size", 224), ("patch_size", 16)))
    video = config["model_type"] == "videomae"
    frames, tubelet = (config.get("num_frames", 16), config.get("tubelet_size", 2)) if video else (1, 1)
    names = config.get("id2label") or {}
    labels = tuple(str(names[key]) for key in sorted(names, key=int))
    problems = []
    if config.get("hidden_act", "gelu") != "gelu":
        problems.append(f"its activation is {config['hidden_act']}, not GELU")
    # transformers writes 1e-12 where the original networks used 1e-6; the effect on features is negligible.
    if config.get("layer_norm_eps", 1e-12) > LAYER_NORM_EPS:
        problems.append(f"its norms use epsilon {config['layer_norm_eps']}, not {LAYER_NORM_EPS}")
    return FolderFacts(
        heads=config.get("num_attention_heads", 12),
        grid=TokenGrid(frames // tubelet, size[0] // patch[0], size[1] // patch[1]),
        frames=frames,
        size=size,
        mean=_numbers(preprocessor.get("image_mean")),
        std=_numbers(preprocessor.get("image_std")),
        interpolation=_RESAMPLING.get(preprocessor.get("resample", -1)),
        labels=labels if any(label != f"LABEL_{i}" for i, label in enumerate(labels)) else None,
        license=_card_license(url),
        unbiased=config.get("qv_bias", config.get("qkv_bias", True)) is False,
        problems=tuple(problems),
    )


FAMILIES = ("videomae", "vit_mae", "vit")
_RESAMPLING: dict[int, Interpolation] = {2: "bilinear", 3: "bicubic"}  # constants of PIL.Image.Resampling


def sidecar_facts(url: str, *, field: str = "weights") -> FolderFacts:
    """Read the JSON file that `export` writes next to a file; return empty metadata if there is none."""
    sidecar = _json(f"{url}.json", field)
    try:
        inputs, labels = sidecar["input"], sidecar["output"]["labels"]
        shape = inputs["shape"]
        return FolderFacts(
            heads=sidecar["heads"],
            frames=shape[2] if len(shape) == 5 else 1,
            size=(shape[-2], shape[-1]),
            mean=_numbers(inputs["mean"]),
            std=_numbers(inputs["std"]),
            interpolation=inputs["interpolation"],
            labels=tuple(labels) if labels else None,
            license=sidecar["weights_license"],
        )
    except (KeyError, TypeError, IndexError):  # an unrelated file with that name
        return FolderFacts()


def _json(url: str, field: str) -> dict[str, Any]:
    if not exists(url):
        return {}
    try:
        return dict(read_json(url))
    except (ValueError, TypeError):
        raise ConfigError([f"{field}={url}: not a JSON object; download it again"]) from None


def _pair(value: int | list[int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def _numbers(values: list[float] | None) -> tuple[float, ...] | None:
    return tuple(values) if values else None


def _card_license(url: str) -> str | None:
    """Return the value of `license:` in the front matter of a model card."""
    card = join(url, "README.md")
    text = read_bytes(card).decode(errors="replace") if exists(card) else ""
    front = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    found = re.search(r"^license:[ \t]*(\S+)[ \t]*$", front[1], re.MULTILINE) if front else None
    return found[1].strip('"') if found and found[1] != UNKNOWN_LICENSE else None


def videomae_folder(state: State, card: Card) -> tuple[State, dict[str, Any]]:
    """Convert an encoder (and the `classifier.*` keys of a head) to VideoMAE's published keys and config.json."""
    out: State = {}
    prefix = "videomae." if card.head else ""
    for key, tensor in state.items():
        if key.startswith("classifier."):
            out[key] = tensor
        elif key == "patch_embed.weight":
            clip = card.clip
            cut = tensor.unflatten(1, (clip.tubelet, clip.patch, clip.patch, 3)).movedim(-1, 1)
            out[f"{prefix}embeddings.patch_embeddings.projection.weight"] = cut
        elif key.startswith("norm.") and card.head:
            out[f"fc_{key}"] = tensor
        else:
            out |= {prefix + name: part for name, part in _published_keys(key, tensor, separate_bias=True).items()}
    config = {
        "architectures": ["VideoMAEForVideoClassification" if card.head else "VideoMAEModel"],
        "model_type": "videomae",
        "num_frames": card.clip.frames,
        "tubelet_size": card.clip.tubelet,
        "qkv_bias": True,
        "use_mean_pooling": card.head is not None,
    }
    if card.head:
        names = card.head.labels or tuple(f"LABEL_{i}" for i in range(card.head.classes))
        config |= {
            "id2label": {str(i): name for i, name in enumerate(names)},
            "label2id": {name: i for i, name in enumerate(names)},
            "problem_type": "multi_label_classification" if card.head.multi_label else "single_label_classification",
        }
    return out, config | _sizes(card)


def vit_folder(state: State, table: Tensor, card: Card) -> tuple[State, dict[str, Any]]:
    """Convert an image encoder with a class token and position embeddings (N, D) to ViTModel without a pooler."""
    out: State = {"embeddings.position_embeddings": torch.cat([table.new_zeros(1, table.shape[1]), table])[None]}
    for key, tensor in state.items():
        if key == "patch_embed.weight":
            cut = tensor.unflatten(1, (card.clip.patch, card.clip.patch, 3)).movedim(-1, 1)
            out["embeddings.patch_embeddings.projection.weight"] = cut
        else:
            out |= _published_keys(key, tensor, separate_bias=False)
    return out, {"architectures": ["ViTModel"], "model_type": "vit", "qkv_bias": True} | _sizes(card)


def preprocessor(card: Card) -> dict[str, Any]:
    """Return preprocessor_config.json: resize the shorter side, crop the centre, normalise."""
    height, width = card.clip.size
    return {
        # DINOv2's processor for images: ViT's own cannot crop before version 5.
        "image_processor_type": "BitImageProcessor" if card.clip.is_image else "VideoMAEImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": min(height, width)},
        "resample": next(number for number, name in _RESAMPLING.items() if name == card.interpolation),
        "do_center_crop": True,
        "crop_size": {"height": height, "width": width},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(card.clip.mean),
        "image_std": list(card.clip.std),
    }


_NAMES = {
    "class_token": "embeddings.cls_token",
    "patch_embed.bias": "embeddings.patch_embeddings.projection.bias",
    "norm.weight": "layernorm.weight",
    "norm.bias": "layernorm.bias",
}
_PARTS = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}


def _published_keys(key: str, tensor: Tensor, *, separate_bias: bool) -> State:
    """Convert one of our tensors to the keys of published checkpoints, which every transformers version can load.

    Fused qkv weights are split.
    """
    if key in _NAMES:
        return {_NAMES[key]: tensor}
    _, block, part = key.split(".", 2)  # blocks.N.…
    layer = f"encoder.layer.{block}"
    attention = f"{layer}.attention.attention"
    if part == "attn.qkv.weight":
        names = [f"{attention}.{name}.weight" for name in ("query", "key", "value")]
        return dict(zip(names, tensor.chunk(3), strict=True))
    if part in ("attn.q_bias", "attn.v_bias"):
        letter = part[5]
        if separate_bias:  # VideoMAE
            return {f"{attention}.{letter}_bias": tensor}
        bias = {f"{attention}.{'query' if letter == 'q' else 'value'}.bias": tensor}
        return bias | ({f"{attention}.key.bias": torch.zeros_like(tensor)} if letter == "q" else {})
    stem, _, leaf = part.rpartition(".")
    return {f"{layer}.{_PARTS[stem]}.{leaf}": tensor}


def _sizes(card: Card) -> dict[str, Any]:
    encoder, (height, width) = card.encoder, card.clip.size
    return {
        "hidden_size": encoder.width,
        "num_hidden_layers": encoder.depth,
        "num_attention_heads": encoder.heads,
        "intermediate_size": int(encoder.width * encoder.mlp_ratio),
        "hidden_act": "gelu",
        "layer_norm_eps": LAYER_NORM_EPS,
        "image_size": height if height == width else [height, width],
        "patch_size": card.clip.patch,
        "num_channels": 3,
    }
