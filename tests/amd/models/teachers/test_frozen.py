from __future__ import annotations

import torch

from amd.models.encoder import Encoder
from amd.models.teachers.frozen import Teacher
from tests.support.runs.configs import tiny_image_config


def test_weights_stored_in_bf16_produce_the_same_features_as_autocast() -> None:
    config = tiny_image_config()
    assert config.teacher is not None
    torch.manual_seed(0)
    encoder = Encoder(config.teacher.encoder, config.clip.grid, config.clip.token_values)
    teacher = Teacher(encoder, (2, 4))
    tokens, index = torch.randn(2, 8, 48), torch.arange(8).expand(2, -1)
    with torch.autocast("cpu", torch.bfloat16):
        cast = teacher(tokens, index)
        stored = teacher.cast_linear_layers(torch.bfloat16)(tokens, index)
    assert all(torch.equal(a, b) for a, b in zip(cast, stored, strict=True))
    assert {p.dtype for p in teacher.parameters()} == {torch.float32, torch.bfloat16}


def test_teacher_features_have_no_autograd_graph() -> None:
    config = tiny_image_config()
    assert config.teacher is not None
    teacher = Teacher(Encoder(config.teacher.encoder, config.clip.grid, config.clip.token_values), (4,))
    (features,) = teacher(torch.randn(1, 3, 48), torch.arange(3)[None])
    assert features.is_inference()
    assert not features.requires_grad
