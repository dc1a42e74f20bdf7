from __future__ import annotations

import pytest
import torch

from amd.config import ENCODER_SIZES, EncoderConfig, TokenGrid
from amd.models.encoder import Encoder
from amd.models.student import Student
from amd.presets.pretraining import PRESETS
from tests.support.runs.configs import tiny_image_config, tiny_video_config


def test_blocks_after_the_last_intermediate_are_skipped_when_the_final_norm_is_not_requested() -> None:
    config = tiny_video_config()
    encoder = Encoder(config.student.encoder, config.clip.grid, config.clip.token_values)
    ran = []
    for number, block in enumerate(encoder.blocks, start=1):
        block.register_forward_hook(lambda *_, number=number: ran.append(number))
    encoded = encoder(torch.randn(1, 5, 96), torch.arange(5)[None], intermediates=(3, 1), final=False)
    assert ran == [1, 2, 3]
    assert encoded.final is None
    assert [tuple(features.shape) for features in encoded.intermediates] == [(1, 5, 48)] * 2


def test_the_class_token_is_the_first_token_and_is_excluded_from_intermediates() -> None:
    config = tiny_image_config()
    encoder = Encoder(config.student.encoder, config.clip.grid, config.clip.token_values)
    encoded = encoder(torch.randn(2, 4, 48), torch.arange(4).expand(2, -1), intermediates=(2,))
    assert encoded.final is not None
    assert encoded.final.shape == (2, 5, 48)
    assert encoded.intermediates[0].shape == (2, 4, 48)


def test_features_depend_on_token_positions_but_not_on_token_order() -> None:
    config = tiny_video_config()
    encoder = Encoder(config.student.encoder, config.clip.grid, config.clip.token_values)
    tokens, index = torch.randn(1, 6, 96), torch.tensor([[1, 4, 9, 16, 25, 31]])
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    a = encoder(tokens, index).final
    b = encoder(tokens[:, order], index[:, order]).final
    assert a is not None
    torch.testing.assert_close(a[:, order], b, rtol=1e-4, atol=1e-5)


def test_the_linear_patch_embedding_matches_the_official_convolution() -> None:
    from amd.tokens import patchify

    config = tiny_video_config()
    encoder = Encoder(config.student.encoder, config.clip.grid, config.clip.token_values)
    kernel = encoder.patch_embed.weight.reshape(48, 2, 4, 4, 3).permute(0, 4, 1, 2, 3)
    clips = torch.randn(2, 3, 4, 16, 16)
    official = torch.nn.functional.conv3d(clips, kernel, encoder.patch_embed.bias, stride=(2, 4, 4))
    ours = encoder.patch_embed(patchify(clips, 2, 4))
    torch.testing.assert_close(ours, official.flatten(2).transpose(1, 2), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("size", "millions"), [("S", 22.03), ("B", 86.53), ("L", 304.27)])
def test_published_sizes_have_the_official_parameter_counts(size: str, millions: float) -> None:
    with torch.device("meta"):
        encoder = Encoder(EncoderConfig(size=size), TokenGrid(8, 14, 14), 1536)
    head = ENCODER_SIZES[size].width * 400 + 400  # the official number includes a head for 400 classes
    assert (sum(p.numel() for p in encoder.parameters()) + head) / 1e6 == pytest.approx(millions, abs=0.01)


@pytest.mark.parametrize(("name", "millions"), [("k400-vit-s", 75.200704), ("k400-vit-b", 146.17)])
def test_the_papers_students_have_the_official_parameter_counts(name: str, millions: float) -> None:
    with torch.device("meta"):
        student = Student(PRESETS[name].config)
    # We train two generator mask tokens that the official list lacks, and omit its two unused norms.
    ours = sum(p.numel() for p in student.parameters()) - 2 * 1024 + 4 * 1024
    assert ours / 1e6 == pytest.approx(millions, abs=0.005)


def test_patch_embedding_and_decoder_input_keep_the_pytorch_initialisation_as_in_videomae() -> None:
    torch.manual_seed(0)
    student = Student(tiny_video_config())
    assert student.encoder.patch_embed.weight.abs().max() <= 1 / 96**0.5
    assert student.decoder is not None
    assert student.decoder.input.weight.abs().max() <= 1 / 48**0.5
    assert student.decoder.mask_token.abs().max() <= 0.02
    assert student.encoder.blocks[0].mlp.fc1.bias.abs().max() == 0  # type: ignore[union-attr, operator]
