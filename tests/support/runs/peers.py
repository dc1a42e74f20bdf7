"""Model sizes and helpers for tests that compare our models with transformers and timm."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from amd.exchange.load import load_encoder_state, load_student_state
from amd.exchange.read import read_state
from amd.models.encoder import Encoder
from amd.models.student import Student

PEER = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 192,
    "image_size": 16,
    "patch_size": 4,
    "layer_norm_eps": 1e-6,
}
TIMM = {"embed_dim": 48, "depth": 2, "num_heads": 3, "patch_size": 4, "img_size": 16}


def perturbed(model: nn.Module) -> Any:
    """Move every parameter away from its neutral value, so that omitting any of them changes the output."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def load_encoder_file(encoder: Encoder, path: str, *, intermediates_only: bool = False) -> None:
    """Load an encoder from a weights file."""
    load_encoder_state(encoder, read_state(path), path, intermediates_only=intermediates_only)


def load_student_file(student: Student, path: str) -> None:
    """Load a complete student from a weights file."""
    load_student_state(student, read_state(path), path)
