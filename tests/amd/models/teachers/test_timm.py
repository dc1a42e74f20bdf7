from __future__ import annotations

from typing import Any

import pytest
import timm
import torch

from amd.config import ConfigError, TrainConfig
from amd.exchange.load import load_teacher
from amd.models.encoder import Encoder
from amd.tokens import patchify, take_tokens
from tests.support.runs.configs import tiny_image_config
from tests.support.runs.peers import load_encoder_file

SIZES = {"embed_dim": 24, "depth": 2, "num_heads": 3, "patch_size": 4, "num_classes": 0}


def teacher_config(**overrides: Any) -> TrainConfig:
    encoder = {"width": 24, "depth": 2, "heads": 3, "class_token": True}
    layers = [{"student": 2, "teacher": 1}, {"student": 4, "teacher": 2}]
    values = {"teacher__encoder": encoder, "objective__layers": layers, "teacher__weights": "timm:vit_tiny_patch16_224"}
    return tiny_image_config(**(values | overrides))


def timm_model(**overrides: Any) -> Any:
    """Return a timm ViT with random values in all parameters."""
    torch.manual_seed(0)
    model = timm.models.VisionTransformer(**(SIZES | {"img_size": 16} | overrides)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.pretrained_cfg = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
    return model


def timm_intermediates(model: Any, images: torch.Tensor) -> list[torch.Tensor]:
    return model.forward_intermediates(images, indices=[0, 1], intermediates_only=True, output_fmt="NLC")


@pytest.mark.parametrize(
    "options",
    [{}, {"init_values": 0.5}, {"no_embed_class": True}, {"global_pool": "avg", "fc_norm": True}],
    ids=["plain", "layer-scale", "no-class-position", "pooled"],
)
def test_features_of_a_timm_teacher_match_timm(monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]) -> None:
    model, config = timm_model(**options), teacher_config()
    monkeypatch.setattr(timm, "create_model", lambda *_, **__: model)
    teacher = load_teacher(config)
    images = torch.randn(2, 3, 16, 16)
    pixels = patchify(images[:, :, None], 1, 4)
    index = torch.stack([torch.randperm(16) for _ in range(2)])
    with torch.no_grad():
        expected = timm_intermediates(model, images)
    got = teacher(take_tokens(pixels, index), index)
    assert len(got) == 2
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, take_tokens(theirs, index), rtol=1e-4, atol=1e-4)


def test_a_saved_timm_file_loads_as_a_teacher(tmp_path: Any) -> None:
    model, config = timm_model(num_classes=7), teacher_config()
    torch.save(model.state_dict(), tmp_path / "vit.pth")
    assert config.teacher is not None
    encoder = Encoder(config.teacher.encoder, config.clip.grid, config.clip.token_values)
    load_encoder_file(encoder, str(tmp_path / "vit.pth"), intermediates_only=True)
    images = torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        got = encoder(patchify(images[:, :, None], 1, 4), torch.arange(16)[None], intermediates=(1, 2))
        for ours, theirs in zip(got.intermediates, timm_intermediates(model, images), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(got.final, model.forward_features(images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"reg_tokens": 2}, "register tokens"),
        ({"pre_norm": True}, "before the first block"),
        ({"act_layer": torch.nn.SiLU}, "its activation is SiLU"),
        ({"norm_layer": torch.nn.LayerNorm}, "do not have epsilon"),
        ({"patch_size": 8}, r"its patch size is 8, but clip\.patch=4"),
        ({"qk_norm": True}, r"unexpected \d+: encoder\.blocks\.0\.attn\.k_norm|blocks\.0\.attn\.k_norm"),
        ({"embed_dim": 48}, r"check teacher\.encoder\.width"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_architectures_that_would_silently_change_features_are_rejected(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], reason: str
) -> None:
    model = timm_model(**options)
    monkeypatch.setattr(timm, "create_model", lambda *_, **__: model)
    with pytest.raises(ConfigError, match=reason):
        load_teacher(teacher_config())


def test_the_error_for_a_different_pixel_normalisation_explains_how_to_fix_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model = timm_model()
    model.pretrained_cfg = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
    monkeypatch.setattr(timm, "create_model", lambda *_, **__: model)
    with pytest.raises(ConfigError, match=r"set clip\.mean=\[0\.5, 0\.5, 0\.5\]") as caught:
        load_teacher(teacher_config())
    assert "set clip.std" in str(caught.value)


def test_unknown_models_and_unreachable_weights_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="timm has no such model"):
        load_teacher(teacher_config(teacher__weights="timm:vit_enormous"))

    def unreachable(*_: Any, pretrained: bool, **__: Any) -> Any:
        if pretrained:
            raise ConnectionError("no route to the hub")
        return timm_model()

    monkeypatch.setattr(timm, "create_model", unreachable)
    with pytest.raises(ConfigError, match=r"no route to the hub.*set the path to a downloaded file"):
        load_teacher(teacher_config())
    monkeypatch.undo()
    with pytest.raises(ConfigError, match=r"choose a plain ViT"):
        load_teacher(teacher_config(teacher__weights="timm:resnet18"))
    with pytest.raises(ConfigError, match=r"timm teachers take images"):
        load_teacher(teacher_config(clip__frames=2))
