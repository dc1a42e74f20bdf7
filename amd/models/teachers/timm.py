"""Load plain timm ViTs (`timm:NAME`) as image teachers, after checking that the architecture matches our encoder.

Learned position embeddings are loaded by `amd.exchange.load`, and layer scale is folded into the weights by `layouts`.
Differences that would silently change features (norm epsilon, activation, pixel normalisation, register tokens) raise
ConfigError.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from amd.config import ClipConfig, ConfigError
from amd.models.layers import LAYER_NORM_EPS

TIMM = "timm:"


def load_timm(weights: str, clip: ClipConfig, *, pretrained: bool = True, field: str = "teacher.weights") -> Any:
    """Return the pre-trained model `timm:NAME`, with its position embeddings resampled by timm to the clip's size.

    `field`: config field to mention in error messages.
    Raises ConfigError if the model is unknown, its weights cannot be downloaded, or it is not a plain ViT for the clip.
    """
    import timm

    name = weights.removeprefix(TIMM)
    try:
        known = timm.is_model(name.split(".")[0])
    except Exception:  # names with odd characters
        known = False
    if not known:
        raise ConfigError([f"{field}={weights}: timm has no such model; see timm.list_models('vit_*')"])
    try:
        model = timm.create_model(name, pretrained=False, img_size=clip.size, num_classes=0)
    except Exception as error:  # model builders raise their own exceptions
        reason = str(error).split("\n")[0][:200]
        raise ConfigError(
            [f"{field}={weights}: cannot be built for {list(clip.size)} pixels ({reason}); choose a plain ViT"]
        ) from None
    check_plain(model, clip, weights, field)  # before anything is downloaded
    try:
        if pretrained:
            model = timm.create_model(name, pretrained=True, img_size=clip.size, num_classes=0)
    except Exception as error:  # hub and network raise their own exceptions
        reason = str(error).split("\n")[0][:200]
        raise ConfigError(
            [
                f"{field}={weights}: its weights could not be downloaded ({type(error).__name__}: {reason}); "
                "without access to the hub, set the path to a downloaded file instead"
            ]
        ) from None
    return model


def timm_clip(weights: str) -> ClipConfig:
    """Return the input config that `timm:NAME` was trained with. Raises ConfigError if it is not a known plain ViT."""
    import timm

    name = weights.removeprefix(TIMM)
    try:
        model = timm.create_model(name, pretrained=False, num_classes=0)
        (height, width), (patch, _) = model.patch_embed.img_size, model.patch_embed.patch_size
    except Exception:  # names with odd characters, builders with their own exceptions, other models
        raise ConfigError([f"weights={weights}: timm has no such plain ViT; see timm.list_models('vit_*')"]) from None
    settings = model.pretrained_cfg
    normalisation = {field: tuple(settings[field]) for field in ("mean", "std") if settings.get(field)}
    return ClipConfig(frames=1, tubelet=1, size=(height, width), patch=patch, **normalisation)


def check_plain(model: Any, clip: ClipConfig, weights: str, field: str = "teacher.weights") -> None:
    """Raise ConfigError unless a timm model and our encoder compute the same features from the same weights."""
    problems = []
    if type(model).__name__ != "VisionTransformer":
        raise ConfigError([f"{field}={weights}: is a {type(model).__name__}, not a plain VisionTransformer"])
    norms = [module for module in model.modules() if isinstance(module, nn.LayerNorm)]
    if any(norm.eps != LAYER_NORM_EPS for norm in norms):
        problems.append(f"its norms do not have epsilon {LAYER_NORM_EPS}")
    activations = {repr(block.mlp.act) for block in model.blocks}
    if activations != {repr(nn.GELU())}:
        problems.append(f"its activation is {', '.join(sorted(activations))}, not GELU")
    if getattr(model, "num_reg_tokens", 0):
        problems.append("it has register tokens")
    if not isinstance(model.norm_pre, nn.Identity):
        problems.append("it normalises tokens before the first block")
    if tuple(model.patch_embed.patch_size) != (clip.patch, clip.patch):
        problems.append(f"its patch size is {model.patch_embed.patch_size[0]}, but clip.patch={clip.patch}")
    settings = model.pretrained_cfg
    for statistic in ("mean", "std"):
        theirs = tuple(settings.get(statistic) or ())
        if theirs and any(abs(a - b) > 1e-6 for a, b in zip(theirs, getattr(clip, statistic), strict=True)):
            problems.append(f"it was trained with a different pixel normalisation: set clip.{statistic}={list(theirs)}")
    if problems:
        raise ConfigError([f"{field}={weights}: {problem}" for problem in problems])
