"""Tests for round trips between our keys and the official layouts (official.py, layouts.py)."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from amd.exchange.load import load_student_state
from amd.exchange.official import to_mae, to_official
from amd.exchange.source import to_student
from amd.models.student import Student
from tests.support.runs.configs import mae, tiny_image_config, tiny_video_config


def golden_student(golden: Path) -> dict[str, torch.Tensor]:
    return load_file(golden / "student_state.safetensors") | load_file(golden / "student_extra.safetensors")


def test_an_official_amd_state_survives_a_round_trip(golden: Path) -> None:
    config, state = tiny_video_config(), golden_student(golden)
    student = Student(config)
    load_student_state(student, state, "golden")
    back = to_official(student.state_dict(), config.clip)
    assert set(back) == set(state)
    for key, tensor in state.items():
        if re.match(r"generators\.\d\.norm\.", key):  # unused by the official code, so conversion fills it
            assert torch.equal(back[key], torch.full_like(tensor, float(key.endswith("weight"))))
        else:
            assert torch.equal(back[key], tensor), key


def test_generator_tokens_missing_from_official_files_keep_their_initialisation(golden: Path) -> None:
    student = Student(tiny_video_config())
    before = [generator.mask_token.detach().clone() for generator in student.generators]
    load_student_state(student, load_file(golden / "student_state.safetensors"), "golden")
    assert all(torch.equal(a, b.mask_token) for a, b in zip(before, student.generators, strict=True))


def test_a_mae_state_survives_a_round_trip_except_for_key_biases(golden: Path) -> None:
    state = load_file(golden / "mae_state.safetensors")
    config = mae(
        tiny_image_config(),
        student__encoder__width=24,
        student__encoder__depth=2,
        student__decoder__width=16,
        student__decoder__depth=1,
    )
    student = Student(config)
    load_student_state(student, state, "golden")
    back = to_mae(student.state_dict(), config.clip)
    assert set(back) == {key for key in state if not key.endswith("pos_embed")}
    for key, tensor in back.items():
        expected = state[key].clone()
        if key.endswith("qkv.bias"):
            third = len(expected) // 3
            assert expected[:third].any()
            assert expected[-third:].any()
            expected[third : 2 * third] = 0
        assert torch.equal(tensor, expected), key


@pytest.mark.parametrize("config", [tiny_video_config(), mae(tiny_video_config())], ids=["amd", "videomae"])
def test_a_student_survives_a_round_trip_through_the_official_layout(config) -> None:
    student = Student(config)
    back = to_student(to_official(student.state_dict(), config.clip))
    assert not back.unknown
    assert set(back.state) == set(student.state_dict())
    assert all(torch.equal(back.state[key], tensor) for key, tensor in student.state_dict().items())


def test_layer_scale_is_folded_into_the_preceding_layer() -> None:
    gamma, weight, bias, x = torch.rand(4), torch.rand(4, 3), torch.rand(4), torch.rand(5, 3)
    state = {
        "patch_embed.proj.weight": torch.zeros(4, 3, 2, 2),
        "blocks.0.mlp.fc2.weight": weight,
        "blocks.0.mlp.fc2.bias": bias,
    }
    for name in ("gamma_2", "ls2.gamma"):
        folded = to_student(state | {f"blocks.0.{name}": gamma}).state
        got = torch.nn.functional.linear(
            x, folded["encoder.blocks.0.mlp.fc2.weight"], folded["encoder.blocks.0.mlp.fc2.bias"]
        )
        torch.testing.assert_close(got, gamma * torch.nn.functional.linear(x, weight, bias))
        assert not [key for key in folded if "gamma" in key]


def test_a_convolution_and_the_flat_linear_map_produce_the_same_embedding() -> None:
    from amd.tokens import patchify

    weight, clips = torch.rand(5, 3, 2, 4, 4), torch.rand(1, 3, 4, 8, 8)
    flat = to_student({"patch_embed.proj.weight": weight}).state["encoder.patch_embed.weight"]
    got = patchify(clips, 2, 4) @ flat.T
    expected = torch.nn.functional.conv3d(clips, weight, stride=(2, 4, 4)).flatten(2).transpose(1, 2)
    torch.testing.assert_close(got, expected)
