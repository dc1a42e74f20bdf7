"""Tests for loading weights strictly into teachers, encoders and students (load.py, source.py)."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from amd.artifacts.weights import Card, save_encoder
from amd.config import ConfigError, TrainConfig, with_overrides
from amd.exchange.load import load_teacher
from amd.models.encoder import Encoder
from amd.models.student import Student
from amd.tokens import position_table
from tests.support.runs.configs import mae, tiny_image_config, tiny_video_config
from tests.support.runs.peers import load_encoder_file, load_student_file

MAE_SIZES = {"width": 24, "depth": 2, "heads": 3, "class_token": True, "positions": "sincos_2d"}


def encoder_of(config: TrainConfig) -> Encoder:
    return Encoder(config.student.encoder, config.clip.grid, config.clip.token_values)


def mae_encoder() -> Encoder:
    return encoder_of(mae(tiny_image_config(), student__encoder=MAE_SIZES))


def official(folder: Path, state: dict[str, torch.Tensor]) -> str:
    path = folder / "checkpoint.pth"
    torch.save({"model": state, "args": argparse.Namespace(lr=1.0)}, path)
    return str(path)


def rejection_message(encoder: Encoder, url: str, *, intermediates_only: bool = False) -> str:
    before = {key: tensor.clone() for key, tensor in encoder.state_dict().items()}
    with pytest.raises(ConfigError) as caught:
        load_encoder_file(encoder, url, intermediates_only=intermediates_only)
    assert all(torch.equal(before[key], tensor) for key, tensor in encoder.state_dict().items())
    assert all(line.startswith(f"weights={url}") for line in caught.value.problems)
    return str(caught.value)


def test_an_official_video_pretraining_file_fills_the_whole_encoder(golden: Path, tmp_path: Path) -> None:
    state = load_file(golden / "student_state.safetensors")
    encoder = encoder_of(tiny_video_config())
    load_encoder_file(encoder, official(tmp_path, state))
    for name, own in (("norm.weight", "norm.weight"), ("blocks.3.mlp.fc2.bias", "blocks.3.mlp.fc2.bias")):
        assert torch.equal(encoder.state_dict()[own], state[f"encoder.{name}"])


def test_attention_biases_are_loaded(golden: Path, tmp_path: Path) -> None:
    state = load_file(golden / "mae_state.safetensors")
    encoder = mae_encoder()
    load_encoder_file(encoder, official(tmp_path, state))
    for i, block in enumerate(encoder.blocks):
        query, _, value = state[f"blocks.{i}.attn.qkv.bias"].chunk(3)
        assert torch.equal(block.attn.q_bias, query)
        assert torch.equal(block.attn.v_bias, value)
        assert query.any()
        assert value.any()


def test_missing_and_unexpected_keys_are_listed_together(golden: Path, tmp_path: Path) -> None:
    state = load_file(golden / "mae_state.safetensors")
    del state["blocks.1.attn.qkv.bias"], state["norm.weight"]
    state["blocks.0.attn.rel_pos"] = torch.zeros(3)
    message = rejection_message(mae_encoder(), official(tmp_path, state))
    assert "missing 3: blocks.1.attn.q_bias, blocks.1.attn.v_bias, norm.weight" in message
    assert "unexpected 1: blocks.0.attn.rel_pos" in message


def test_long_lists_are_truncated_with_a_count(golden: Path, tmp_path: Path) -> None:
    state = {key: value for key, value in load_file(golden / "mae_state.safetensors").items() if "blocks.1" not in key}
    message = rejection_message(mae_encoder(), official(tmp_path, state))
    assert "missing 13: " in message
    assert " and 5 more" in message
    assert "the file has 1 block fewer than encoder.depth" in message


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"width": 32, "heads": 4}, ["weights of a different architecture", "32x48 in the config", "encoder.width"]),
        (
            {"mlp_ratio": 2.0},
            ["blocks.0.mlp.fc1.weight 96x24 in the file, 48x24 in the config", "check encoder.mlp_ratio"],
        ),
        ({"depth": 1}, ["unexpected 13: blocks.1.attn", "1 block more than encoder.depth"]),
        ({"depth": 3}, ["missing 13: blocks.2.attn", "1 block fewer than encoder.depth"]),
        ({"class_token": False}, ["unexpected 1: class_token", "set encoder.class_token=true"]),
        ({"positions": "sincos_1d"}, ["its position embeddings are sincos_2d", "set encoder.positions=sincos_2d"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_weights_of_a_different_architecture_are_rejected_with_the_field_to_change(
    golden: Path, change: dict, expected: list[str]
) -> None:
    encoder = encoder_of(mae(tiny_image_config(), student__encoder=MAE_SIZES | change))
    message = rejection_message(encoder, str(golden / "mae_state.safetensors"), intermediates_only=True)
    for part in expected:
        assert part in message, message


def test_weights_for_a_different_clip_are_rejected_with_the_fields_to_check(golden: Path) -> None:
    for change, expected in (
        ({"clip__size": 32}, "the file has 17x24, the config 64x24 (tokens, width); check clip.size and clip.patch"),
        ({"clip__patch": 2, "clip__size": 8}, "check clip.patch and clip.tubelet"),
    ):
        encoder = encoder_of(mae(tiny_image_config(**change), student__encoder=MAE_SIZES))
        assert expected in rejection_message(encoder, str(golden / "mae_state.safetensors"))


def test_non_finite_weights_are_rejected(golden: Path, tmp_path: Path) -> None:
    state = load_file(golden / "mae_state.safetensors")
    state["norm.weight"][3] = float("nan")
    assert "NaN or infinite values in norm.weight" in rejection_message(mae_encoder(), official(tmp_path, state))


def test_an_unknown_layout_is_rejected_with_a_list_of_known_layouts(tmp_path: Path) -> None:
    save_file({"conv1.weight": torch.zeros(2)}, tmp_path / "resnet.safetensors")
    message = rejection_message(mae_encoder(), str(tmp_path / "resnet.safetensors"))
    assert "keys match no known layout (first keys: conv1.weight" in message
    assert "timm" in message


def test_a_fine_tuned_file_can_be_a_teacher_but_not_an_encoder(golden: Path) -> None:
    config = tiny_video_config()
    assert config.teacher is not None
    encoder = Encoder(config.teacher.encoder, config.clip.grid, config.clip.token_values)
    path = str(golden / "teacher_state.safetensors")
    assert "use it as a teacher" in rejection_message(encoder, path)
    load_encoder_file(encoder, path, intermediates_only=True)
    assert torch.equal(encoder.norm.weight, torch.ones(64))
    assert torch.equal(encoder.blocks[3].attn.v_bias, load_file(path)["blocks.3.attn.v_bias"])


def test_half_precision_weights_load(golden: Path, tmp_path: Path) -> None:
    state = load_file(golden / "mae_state.safetensors")
    encoder = mae_encoder()
    load_encoder_file(encoder, official(tmp_path, {key: value.half() for key, value in state.items()}))
    torch.testing.assert_close(encoder.norm.weight.detach(), state["norm.weight"], atol=1e-3, rtol=1e-3)


def test_a_published_encoder_loads_by_folder_and_by_id(tmp_path: Path) -> None:
    config = with_overrides(tiny_video_config(), {"storage": str(tmp_path), "teacher.weights": "my-teacher"})
    assert config.teacher is not None
    source = Encoder(config.teacher.encoder, config.clip.grid, config.clip.token_values)
    folder = tmp_path / "encoders" / "my-teacher"
    folder.mkdir(parents=True)
    save_file(source.state_dict(), folder / "encoder.safetensors")
    by_id = load_teacher(config)
    by_folder = load_teacher(with_overrides(config, {"teacher.weights": str(folder)}))
    for teacher in (by_id, by_folder):
        for key, tensor in source.state_dict().items():
            assert torch.equal(teacher.encoder.state_dict()[key], tensor)


def test_a_published_teacher_of_another_size_interpolates_its_2d_positions(tmp_path: Path) -> None:
    config = with_overrides(tiny_image_config(), {"clip.size": [24, 32], "teacher.weights": str(tmp_path)})
    assert config.teacher is not None
    clip = tiny_image_config().clip
    source = Encoder(config.teacher.encoder, clip.grid, clip.token_values)
    save_encoder(str(tmp_path), source, Card(id="teacher", encoder=source.config, clip=clip))
    expected = position_table("sincos_2d", config.clip.grid, source.config.width, origin=(4, 4))
    assert torch.equal(load_teacher(config).encoder.positions, expected)


def test_missing_teacher_weights_are_reported_in_one_line() -> None:
    with pytest.raises(ConfigError, match=r"teacher\.weights=nowhere\.pth: no such file") as caught:
        load_teacher(with_overrides(tiny_video_config(), {"teacher.weights": "nowhere.pth"}))
    assert len(caught.value.problems) == 1


def test_the_error_for_a_mismatched_teacher_lists_the_teacher_fields(golden: Path) -> None:
    weights = str(golden / "student_state.safetensors")
    config = with_overrides(tiny_video_config(), {"teacher.weights": weights})
    with pytest.raises(ConfigError, match=r"teacher\.encoder\.width") as caught:
        load_teacher(config)
    assert all(line.startswith(f"teacher.weights={weights} (") for line in caught.value.problems)


def test_every_message_about_teacher_weights_starts_with_the_field_name(tmp_path: Path) -> None:
    (tmp_path / "page.pth").write_bytes(b"<html>Sign in</html>")
    save_file({"conv1.weight": torch.zeros(2)}, tmp_path / "resnet.safetensors")
    save_file({"patch_embed.proj.weight": torch.full((4, 3, 2, 2), torch.nan)}, tmp_path / "diverged.safetensors")
    (tmp_path / "llama").mkdir()
    save_file({"encoder.patch_embed.weight": torch.zeros(4, 8)}, tmp_path / "llama" / "model.safetensors")
    (tmp_path / "llama" / "config.json").write_text('{"model_type": "llama"}')
    for name in ("missing.pth", "page.pth", "resnet.safetensors", "diverged.safetensors", "llama"):
        weights = str(tmp_path / name)
        with pytest.raises(ConfigError) as caught:
            load_teacher(with_overrides(tiny_video_config(), {"teacher.weights": weights}))
        assert all(line.startswith(f"teacher.weights={weights}: ") for line in caught.value.problems), name


def test_a_whole_student_loads_from_its_file_and_mismatches_are_listed(tmp_path: Path) -> None:
    source, path = Student(tiny_video_config()), str(tmp_path / "student.safetensors")
    save_file(source.state_dict(), path)
    target = Student(tiny_video_config())
    load_student_file(target, path)
    assert all(torch.equal(a, b) for a, b in zip(source.parameters(), target.parameters(), strict=True))
    wider = Student(tiny_video_config(student__decoder__width=64))
    with pytest.raises(ConfigError, match=r"student\.decoder\.width"):
        load_student_file(wider, path)
    with pytest.raises(ConfigError, match=r"unexpected \d+: generators"):
        load_student_file(Student(mae(tiny_video_config())), str(tmp_path / "student.safetensors"))


def learned(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    positions = torch.randn(1, 17, 24, generator=torch.Generator().manual_seed(0))
    return {key: value for key, value in state.items() if not key.startswith("decoder")} | {"pos_embed": positions}


def test_only_a_teacher_adopts_learned_position_embeddings(golden: Path, tmp_path: Path) -> None:
    state = learned(load_file(golden / "mae_state.safetensors"))
    path = official(tmp_path, state)
    encoder = mae_encoder()
    assert "its position embeddings are learned" in rejection_message(encoder, path)
    load_encoder_file(encoder, path, intermediates_only=True)
    assert torch.equal(encoder.positions, state["pos_embed"][0, 1:])
    assert torch.equal(encoder.class_token[0, 0], state["cls_token"][0, 0] + state["pos_embed"][0, 0])


def test_a_3d_position_table_is_distinguished_from_a_learned_position_table(tmp_path: Path) -> None:
    config = tiny_video_config()
    source = encoder_of(config)
    table = position_table("sincos_3d", config.clip.grid, 48)[None]
    save_file(source.state_dict() | {"positions": table}, tmp_path / "mvd.safetensors")
    message = rejection_message(encoder_of(config), str(tmp_path / "mvd.safetensors"), intermediates_only=True)
    assert "set encoder.positions=sincos_3d" in message
