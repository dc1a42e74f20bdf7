"""Tests for initialising encoders from transformers, timm and AMD weights (initialization.py, positions.py)."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn
from transformers import (
    VideoMAEConfig,
    VideoMAEForPreTraining,
    VideoMAEForVideoClassification,
    VideoMAEModel,
    ViTConfig,
    ViTForImageClassification,
    ViTMAEConfig,
    ViTMAEForPreTraining,
    ViTModel,
)

from amd.artifacts.weights import Card, encode, save_encoder
from amd.config import ClipConfig, ConfigError, EncoderConfig, TokenGrid, validate
from amd.exchange.initialization import StartingPoint, load_starting_point
from amd.exchange.positions import resample
from amd.models.classifier import Classifier
from amd.models.encoder import Encoder
from amd.tokens import patchify, position_table
from tests.support.runs.peers import PEER, TIMM, close, perturbed

IMAGE = ClipConfig(frames=1, tubelet=1, size=(16, 16), patch=4)
VIDEO = ClipConfig(frames=4, tubelet=2, size=(16, 16), patch=4)
BASE = {"width": 48, "depth": 2, "heads": 3}
LEARNED_IMAGE = {**BASE, "class_token": True, "positions": "learned"}


def encoder_of(values: dict[str, Any], clip: ClipConfig) -> Encoder:
    torch.manual_seed(7)
    return Encoder(validate(EncoderConfig, values), clip.grid, clip.token_values).eval()


def start(values: dict[str, Any], clip: ClipConfig, weights: Any, **options: Any) -> tuple[Encoder, StartingPoint]:
    encoder = encoder_of(values, clip)
    return encoder, load_starting_point(encoder, str(weights), None, clip, **options)


def rejection_message(values: dict[str, Any], clip: ClipConfig, weights: Any, **options: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        start(values, clip, weights, **options)
    return str(caught.value)


def saved(model: Any, folder: Path, **options: Any) -> Path:
    perturbed(model).save_pretrained(folder, **options)
    return folder


@torch.no_grad()
def tokens_of(encoder: Encoder, clip: ClipConfig, clips: Tensor) -> Tensor:
    index = torch.arange(encoder.grid.tokens).expand(len(clips), -1)
    final = encoder(patchify(clips, clip.tubelet, clip.patch), index).final
    assert final is not None
    return final


@pytest.mark.parametrize("model", [VideoMAEModel, VideoMAEForPreTraining])
@pytest.mark.parametrize("shard", ["5GB", "100KB"], ids=["one-file", "sharded"])
def test_features_match_transformers_for_a_videomae_folder(tmp_path: Path, model: Any, shard: str) -> None:
    settings = VideoMAEConfig(**PEER, num_frames=4, tubelet_size=2, use_mean_pooling=False)
    peer = model(settings)
    saved(peer, tmp_path, max_shard_size=shard)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard == "100KB")
    encoder, point = start(BASE, VIDEO, tmp_path)
    clips = torch.randn(2, 3, 4, 16, 16)
    with torch.no_grad():
        expected = getattr(peer, "videomae", peer)(clips.transpose(1, 2)).last_hidden_state
    close(tokens_of(encoder, VIDEO, clips), expected)
    assert point.pooling == "mean"


def test_pooled_features_match_transformers_for_a_fine_tuned_videomae_folder(tmp_path: Path) -> None:
    peer = VideoMAEForVideoClassification(VideoMAEConfig(**PEER, num_frames=4, tubelet_size=2, num_labels=5))
    peer.fc_norm.eps = 1e-6  # the official value; transformers keeps torch's default of 1e-5
    encoder, point = start(BASE, VIDEO, saved(peer, tmp_path))
    clips = torch.randn(2, 3, 4, 16, 16)
    with torch.no_grad():
        expected = peer.fc_norm(peer.videomae(clips.transpose(1, 2)).last_hidden_state.mean(1))
        close(encode(encoder, VIDEO, clips, point.pooling), expected)
    assert point.pooling == "mean_then_norm"


@pytest.mark.parametrize("model", [ViTModel, ViTForImageClassification])
def test_features_match_transformers_for_a_vit_folder(tmp_path: Path, model: Any) -> None:
    peer = model(ViTConfig(**PEER))
    encoder, _ = start(LEARNED_IMAGE, IMAGE, saved(peer, tmp_path))
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        expected = getattr(peer, "vit", peer)(images).last_hidden_state
    close(tokens_of(encoder, IMAGE, images[:, :, None]), expected)


def test_features_match_transformers_for_a_vit_mae_folder(tmp_path: Path) -> None:
    peer = perturbed(ViTMAEForPreTraining(ViTMAEConfig(**PEER, mask_ratio=0.0, decoder_hidden_size=32)))
    table = position_table("sincos_2d", IMAGE.grid, 48)
    peer.vit.embeddings.position_embeddings.data.copy_(torch.cat([torch.zeros(1, 48), table])[None])
    peer.save_pretrained(tmp_path)
    encoder, _ = start({**BASE, "class_token": True, "positions": "sincos_2d"}, IMAGE, tmp_path)
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        theirs = peer.vit(images, noise=torch.arange(16.0).expand(2, -1)).last_hidden_state
    close(tokens_of(encoder, IMAGE, images[:, :, None]), theirs)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"init_values": 0.5},
        {"no_embed_class": True},
        {"class_token": False, "global_pool": "avg", "fc_norm": False},
    ],
    ids=["plain", "layer-scale", "no-class-position", "no-class-token"],
)
def test_features_match_timm_for_a_vit_file(tmp_path: Path, options: dict[str, Any]) -> None:
    peer = perturbed(timm.models.VisionTransformer(**TIMM, num_classes=3, **options))
    save_file(peer.state_dict(), tmp_path / "vit.safetensors")
    values = LEARNED_IMAGE | {"class_token": options.get("class_token", True)}
    encoder, _ = start(values, IMAGE, tmp_path / "vit.safetensors")
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        close(tokens_of(encoder, IMAGE, images[:, :, None]), peer.forward_features(images))


def test_a_timm_model_initialises_image_and_video_encoders(monkeypatch: pytest.MonkeyPatch) -> None:
    peer = perturbed(timm.models.VisionTransformer(**TIMM, num_classes=0))
    peer.pretrained_cfg = {"mean": IMAGE.mean, "std": IMAGE.std}
    monkeypatch.setattr(timm, "create_model", lambda *_, **__: peer)
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        expected = peer.forward_features(images)
    encoder, point = start(LEARNED_IMAGE, IMAGE, "timm:vit_tiny_patch16_224")
    close(tokens_of(encoder, IMAGE, images[:, :, None]), expected)
    assert point.lineage["weights"] == "timm:vit_tiny_patch16_224"
    still = ClipConfig(frames=2, tubelet=2, size=(16, 16), patch=4)  # one tubelet with the same image twice
    encoder, _ = start(LEARNED_IMAGE, still, "timm:vit_tiny_patch16_224")
    close(tokens_of(encoder, still, images[:, :, None].expand(-1, -1, 2, -1, -1)), expected)
    assert "it has 3 heads: set finetune.encoder.heads=3" in rejection_message(
        LEARNED_IMAGE | {"heads": 4}, IMAGE, "timm:vit_tiny_patch16_224", section="finetune.encoder"
    )


def timm_file(folder: Path) -> tuple[Any, str]:
    peer = perturbed(timm.models.VisionTransformer(**TIMM, num_classes=0))
    save_file(peer.state_dict(), folder / "vit.safetensors")
    return peer, str(folder / "vit.safetensors")


def test_learned_positions_are_unchanged_at_the_same_size(tmp_path: Path) -> None:
    peer, path = timm_file(tmp_path)
    encoder, _ = start(LEARNED_IMAGE, IMAGE, path)
    assert torch.equal(encoder.positions, peer.pos_embed[0, 1:])
    assert isinstance(encoder.positions, nn.Parameter)
    assert "positions" in encoder.state_dict()
    assert torch.equal(encoder.class_token, peer.cls_token + peer.pos_embed[:, :1])


@pytest.mark.parametrize("size", [(24, 24), (32, 16), (8, 8)])
def test_learned_positions_at_a_different_size_match_timm_positions(tmp_path: Path, size: tuple[int, int]) -> None:
    peer, path = timm_file(tmp_path)
    clip = ClipConfig(frames=1, tubelet=1, size=size, patch=4)
    encoder, _ = start(LEARNED_IMAGE, clip, path)
    expected = resample_abs_pos_embed(peer.pos_embed, [size[0] // 4, size[1] // 4])
    close(encoder.positions, expected[0, 1:])


def test_resampling_in_time_is_linear_and_keeps_constant_values() -> None:
    old, width = TokenGrid(2, 3, 3), 5
    table = torch.randn(old.tokens, width)
    assert torch.equal(resample(table, old, old), table)
    frames = resample(table, old, TokenGrid(4, 3, 3)).unflatten(0, (4, 9))
    first, last = table.unflatten(0, (2, 9))
    close(frames, torch.stack([first, 0.75 * first + 0.25 * last, 0.25 * first + 0.75 * last, last]))
    still = resample(torch.ones(9, width), TokenGrid(1, 3, 3), TokenGrid(3, 5, 4))
    close(still, torch.ones(60, width))


def test_fixed_positions_are_recomputed_for_a_longer_and_larger_clip(golden: Path) -> None:
    values = {"width": 48, "depth": 4, "heads": 3}
    clip = ClipConfig(frames=8, tubelet=2, size=(24, 32), patch=4)
    encoder, point = start(values, clip, golden / "student_state.safetensors")
    assert torch.equal(encoder.positions, position_table("sincos_1d", clip.grid, 48))
    assert torch.equal(encoder.norm.weight, load_file(golden / "student_state.safetensors")["encoder.norm.weight"])
    assert point.layout == "VideoMAE or AMD pre-training"


def test_a_mae_file_loads_at_a_different_size_and_mismatched_positions_are_reported(golden: Path) -> None:
    values = {"width": 24, "depth": 2, "heads": 3, "class_token": True, "positions": "sincos_2d"}
    clip = ClipConfig(frames=1, tubelet=1, size=(32, 24), patch=4)
    encoder, point = start(values, clip, golden / "mae_state.safetensors")
    assert point.position_grid == (4, 4)
    assert torch.equal(encoder.positions, position_table("sincos_2d", clip.grid, 24, origin=(4, 4)))
    message = rejection_message(values | {"positions": "sincos_1d"}, clip, golden / "mae_state.safetensors")
    assert "its position embeddings are sincos_2d, not sincos_1d: set encoder.positions=sincos_2d" in message


def test_learned_positions_are_rejected_if_the_config_requires_fixed_positions(tmp_path: Path) -> None:
    message = rejection_message({**BASE, "class_token": True, "positions": "sincos_2d"}, IMAGE, timm_file(tmp_path)[1])
    assert "its position embeddings are learned, not sincos_2d: set encoder.positions=learned" in message


def test_learned_positions_are_initialised_from_fixed_positions_if_the_file_has_no_table(golden: Path) -> None:
    values = {"width": 48, "depth": 4, "heads": 3, "positions": "learned"}
    encoder, _ = start(values, VIDEO, golden / "student_state.safetensors")
    assert torch.equal(encoder.positions, position_table("sincos_1d", VIDEO.grid, 48))


@pytest.mark.parametrize(
    ("change", "values"),
    [
        ({"patch": 8}, "its patch is 4x4, which the patch embedding determines: set clip.patch=4"),
        ({"tubelet": 4}, "its tubelet is 2 frames, which the patch embedding determines: set clip.tubelet=2"),
        ({"patch": 8, "tubelet": 1}, "set clip.patch=4"),
    ],
)
def test_a_different_token_size_is_rejected_even_if_shapes_match(golden: Path, change: dict, values: str) -> None:
    clip = ClipConfig(**(VIDEO.model_dump() | change))
    message = rejection_message({"width": 48, "depth": 4, "heads": 3}, clip, golden / "student_state.safetensors")
    assert values in message


def test_all_mismatches_are_reported_together(tmp_path: Path) -> None:
    saved(VideoMAEModel(VideoMAEConfig(**PEER, num_frames=4, use_mean_pooling=False)), tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    lost = [key for key in state if key.endswith(("v_bias", "value.bias"))]
    assert len(lost) == 2
    kept = {key: value for key, value in state.items() if key not in lost} | {"surprise": torch.zeros(1)}
    save_file(kept, tmp_path / "model.safetensors")
    message = rejection_message({"width": 48, "depth": 2, "heads": 4}, VIDEO, tmp_path)
    for part in ("it has 3 heads", "missing 2: blocks.0.attn.v_bias, blocks.1.attn.v_bias", "unexpected 1: surprise"):
        assert part in message


def test_missing_biases_become_zero_and_zero_biases_trigger_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    peer = VideoMAEModel(VideoMAEConfig(**PEER, num_frames=4, use_mean_pooling=False, qv_bias=False))
    saved(peer, tmp_path)
    with caplog.at_level(logging.WARNING):
        encoder, _ = start(BASE, VIDEO, tmp_path)
    clips = torch.randn(1, 3, 4, 16, 16)
    with torch.no_grad():
        close(tokens_of(encoder, VIDEO, clips), peer(clips.transpose(1, 2)).last_hidden_state)
    assert "all attention biases are zero" in caplog.text


@pytest.mark.parametrize(
    ("field", "value", "values"),
    [
        ("hidden_act", "relu", "its activation is relu"),
        ("layer_norm_eps", 1e-5, "epsilon"),
        ("model_type", "bert", "is not one of videomae, vit_mae, vit"),
    ],
)
def test_a_folder_with_an_incompatible_model_is_rejected(tmp_path: Path, field: str, value: Any, values: str) -> None:
    saved(ViTModel(ViTConfig(**PEER)), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {field: value}))
    assert values in rejection_message(LEARNED_IMAGE, IMAGE, tmp_path)


def test_a_different_pixel_normalisation_in_a_folder_is_reported(tmp_path: Path) -> None:
    saved(ViTModel(ViTConfig(**PEER)), tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.5] * 3}))
    message = rejection_message(LEARNED_IMAGE, IMAGE, tmp_path)
    assert "set clip.mean=[0.5, 0.5, 0.5]" in message
    assert "set clip.std=[0.5, 0.5, 0.5]" in message


def test_an_index_that_lists_missing_tensors_is_rejected(tmp_path: Path) -> None:
    saved(ViTModel(ViTConfig(**PEER)), tmp_path, max_shard_size="100KB")
    index = tmp_path / "model.safetensors.index.json"
    places = json.loads(index.read_text())
    places["weight_map"]["layernorm.surprise"] = next(iter(places["weight_map"].values()))
    index.write_text(json.dumps(places))
    assert "1 tensors listed in the index are missing" in rejection_message(LEARNED_IMAGE, IMAGE, tmp_path)
    index.write_text("{}")
    assert "not a valid weight-file index" in rejection_message(LEARNED_IMAGE, IMAGE, tmp_path)


def publish(folder: Path, values: dict[str, Any], clip: ClipConfig, **card: Any) -> Encoder:
    encoder = perturbed(encoder_of(values, clip))
    save_encoder(str(folder), encoder, Card(id="e1", encoder=encoder.config, clip=clip, **card))
    return encoder


def test_licence_and_lineage_of_a_published_encoder_are_inherited(tmp_path: Path) -> None:
    teacher = {"weights": "videomae.pth"}
    source = publish(tmp_path / "encoders" / "e1", BASE, VIDEO, weights_license="CC-BY-NC-4.0", teacher=teacher)
    encoder = encoder_of(BASE, VIDEO)
    point = load_starting_point(encoder, "e1", str(tmp_path), VIDEO, section="encoder")
    assert all(torch.equal(a, b) for a, b in zip(source.parameters(), encoder.parameters(), strict=True))
    assert point.weights_license == "CC-BY-NC-4.0"
    assert point.lineage["teacher"] == teacher
    assert point.lineage["id"] == "e1"


def test_a_published_encoder_with_learned_positions_loads_at_the_same_and_a_larger_size(tmp_path: Path) -> None:
    values = BASE | {"positions": "learned"}
    source = publish(tmp_path, values, VIDEO)
    encoder, _ = start(values, VIDEO, tmp_path)
    assert torch.equal(encoder.positions, source.positions)
    longer = ClipConfig(**(VIDEO.model_dump() | {"frames": 8, "size": (24, 24)}))
    encoder, _ = start(values, longer, tmp_path)
    close(encoder.positions, resample(source.positions.detach(), VIDEO.grid, longer.grid))


def test_a_published_encoder_with_different_positions_or_heads_is_rejected(tmp_path: Path) -> None:
    publish(tmp_path, BASE | {"positions": "sincos_2d", "position_base": 100.0}, VIDEO)
    message = rejection_message(BASE | {"heads": 4}, VIDEO, tmp_path, section="student.encoder")
    assert "set student.encoder.heads=3" in message
    assert "set student.encoder.positions=sincos_2d" in message
    assert "set student.encoder.position_base=100" in message


def test_the_final_norm_can_be_reinitialised(golden: Path) -> None:
    values = {"width": 48, "depth": 4, "heads": 3}
    encoder, _ = start(values, VIDEO, golden / "student_state.safetensors", final_norm=False)
    assert torch.equal(encoder.norm.weight, torch.ones(48))
    assert encoder.blocks[0].attn.q_bias.any()


def test_a_fine_tuned_encoder_initialises_another_encoder_with_its_pooled_norm(tmp_path: Path) -> None:
    classifier = perturbed(Classifier(validate(EncoderConfig, BASE), VIDEO.grid, VIDEO.token_values, 5))
    official = {"head.weight": classifier.head.weight, "head.bias": classifier.head.bias}
    for key, value in classifier.encoder.state_dict().items():
        if key == "patch_embed.weight":
            value = value.unflatten(1, (2, 4, 4, 3)).movedim(-1, 1)
        key = key.replace("patch_embed.", "patch_embed.proj.").replace("norm.", "fc_norm.", int(key[:5] == "norm."))
        official[key] = value
    torch.save({"module": {key: value.detach().contiguous() for key, value in official.items()}}, tmp_path / "ft.pth")
    encoder, point = start(BASE, VIDEO, tmp_path / "ft.pth")
    clips = torch.randn(2, 3, 4, 16, 16)
    index = torch.arange(32).expand(2, -1)
    with torch.no_grad():
        expected = classifier.features(patchify(clips, 2, 4), index)
        assert torch.equal(encode(encoder, VIDEO, clips, point.pooling), expected)


def mvd_state(clip: ClipConfig) -> dict[str, Tensor]:
    """Return the state of an MVD student: unprefixed encoder keys, one decoder per teacher, tables as parameters."""
    encoder = perturbed(encoder_of(BASE, clip))
    state = {f"blocks.{key}": value for key, value in encoder.blocks.state_dict().items()}
    state |= {"norm.weight": encoder.norm.weight, "norm.bias": encoder.norm.bias}
    state["patch_embed.proj.weight"] = encoder.patch_embed.weight.unflatten(1, (2, 4, 4, 3)).movedim(-1, 1)
    state["patch_embed.proj.bias"] = encoder.patch_embed.bias
    state["pos_embed"] = position_table("sincos_3d", clip.grid, 48)[None]
    for side in ("img", "vid"):
        state[f"mask_token_{side}"] = torch.zeros(1, 1, 48)
        state[f"pos_embed_{side}"] = state["pos_embed"]
        state[f"down_{side}.weight"] = torch.zeros(48, 48)
        state[f"decoder_{side}.blocks.0.mlp.fc1.weight"] = torch.zeros(192, 48)
        state[f"decoder_{side}.head.bias"] = torch.zeros(7)
    return {key: value.detach().clone().contiguous() for key, value in state.items()}


def test_an_mvd_student_initialises_an_encoder_with_3d_positions_at_any_size(tmp_path: Path) -> None:
    state = mvd_state(VIDEO)
    torch.save({"model": state}, tmp_path / "mvd.pth")
    values = BASE | {"positions": "sincos_3d"}
    for frames, size in ((4, 16), (4, 24), (8, 16)):
        clip = ClipConfig(frames=frames, tubelet=2, size=(size, size), patch=4)
        encoder, _ = start(values, clip, tmp_path / "mvd.pth")
        assert torch.equal(encoder.blocks[1].attn.v_bias, state["blocks.1.attn.v_bias"])
        assert torch.equal(encoder.positions, position_table("sincos_3d", clip.grid, 48))
    both = ClipConfig(frames=8, tubelet=2, size=(24, 24), patch=4)  # the grid of the table is then unknown
    assert "its table of 32 position embeddings" in rejection_message(values, both, tmp_path / "mvd.pth")
    assert "set encoder.positions=sincos_3d" in rejection_message(BASE, VIDEO, tmp_path / "mvd.pth")
