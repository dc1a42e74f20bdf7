from __future__ import annotations

import pytest
import torch

from amd.config import TokenGrid, TrainConfig
from amd.losses import normalized_pixels, pixel_targets, reconstruction
from amd.masks import sample_token_sets
from amd.models.student import Student
from amd.reconstruction import HIDDEN, draw_mask, reconstruct
from amd.tokens import TokenSets, patchify, take_tokens
from tests.support.runs.configs import tiny_image_config, tiny_video_config

CONFIGS = {"image": tiny_image_config(), "video": tiny_video_config()}


def noise(config: TrainConfig, count: int = 3) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, config.clip.frames, *config.clip.size), dtype=torch.uint8)


@pytest.mark.parametrize("name", CONFIGS)
@torch.inference_mode()
def test_reconstruct_matches_the_student_on_the_same_tokens(name: str) -> None:
    config = CONFIGS[name]
    clip, kind, clips = config.clip, config.objective.pixels, noise(config)
    student = Student(config).eval()
    masked = draw_mask(config.mask.strategy, config.mask.student_ratio, clip.grid, seed=5)
    found = reconstruct(student.encoder, student.decoder, clips, masked, clip, kind)

    drawn = sample_token_sets(config.mask, clip.grid, 1, torch.Generator().manual_seed(5))
    sets = TokenSets(*(index.expand(3, -1) for index in drawn))
    visible, hidden = sets.student_visible, sets.student_masked
    pixels = patchify(clips, clip.tubelet, clip.patch)
    reconstructed = student(normalized_pixels(take_tokens(pixels, visible), clip), sets).reconstructed
    targets = pixel_targets(take_tokens(pixels, hidden), clip, kind)
    assert found.losses.mean().item() == pytest.approx(reconstruction(reconstructed, targets).item(), rel=1e-5)
    covered = patchify(found.masked, clip.tubelet, clip.patch)
    assert torch.equal(take_tokens(covered, visible), take_tokens(pixels, visible))
    assert (take_tokens(covered, hidden).unflatten(-1, (-1, 3)) == torch.tensor(HIDDEN)).all()
    shown = patchify(found.reconstructed, clip.tubelet, clip.patch)
    torch.testing.assert_close(take_tokens(shown, visible), take_tokens(pixels, visible) / 255)
    assert not torch.equal(take_tokens(shown, hidden), take_tokens(pixels, hidden) / 255)


@pytest.mark.parametrize("kind", ["unit", "normalized", "per_patch", "per_channel"])
@torch.inference_mode()
def test_a_perfect_decoder_restores_the_pixels(kind: str) -> None:
    config = tiny_video_config(objective__pixels=kind)
    clip, clips = config.clip, noise(config)
    masked = draw_mask("tube", 0.75, clip.grid, seed=0)
    pixels = patchify(clips, clip.tubelet, clip.patch)
    perfect = pixel_targets(take_tokens(pixels, masked.hidden.expand(3, -1)), clip, config.objective.pixels)

    def decoder(visible: torch.Tensor, visible_index: torch.Tensor, query_index: torch.Tensor) -> torch.Tensor:
        return perfect

    found = reconstruct(Student(config).encoder, decoder, clips, masked, clip, config.objective.pixels)
    torch.testing.assert_close(found.reconstructed, clips / 255, atol=1e-5, rtol=0)
    assert found.losses.max() < 1e-10


@pytest.mark.parametrize("strategy", ["random", "tube"])
def test_masks_are_drawn_by_the_training_sampler_and_depend_on_the_seed(strategy: str) -> None:
    grid = TokenGrid(2, 4, 4)
    mask = tiny_video_config(mask__strategy=strategy, mask__student_ratio=0.7).mask
    expected = sample_token_sets(mask, grid, 1, torch.Generator().manual_seed(3))
    for _ in range(2):
        found = draw_mask(mask.strategy, 0.7, grid, seed=3)
        assert torch.equal(found.visible, expected.student_visible[0])
        assert torch.equal(found.hidden, expected.student_masked[0])
    assert not torch.equal(found.visible, draw_mask(mask.strategy, 0.7, grid, seed=4).visible)


@pytest.mark.parametrize(
    ("ratio", "reason"),
    [(-0.1, "at least 0"), (0, "none of the 32 tokens to reconstruct"), (0.06, "tube masking"), (1, "less than 1")],
)
def test_a_mask_without_visible_or_hidden_tokens_raises(ratio: float, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        draw_mask("tube", ratio, TokenGrid(2, 4, 4), seed=0)
    assert len(draw_mask("tube", 0.0625, TokenGrid(2, 4, 4), seed=0).hidden) == 2
    assert len(draw_mask("tube", 0.99, TokenGrid(2, 4, 4), seed=0).visible) == 2


def test_pixels_and_losses_are_float32_under_autocast() -> None:
    config = CONFIGS["video"]
    student, clips = Student(config).eval(), noise(config)
    masked = draw_mask("tube", 0.75, config.clip.grid, seed=0)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        found = reconstruct(student.encoder, student.decoder, clips, masked, config.clip, "per_channel")
    assert (found.reconstructed.dtype, found.losses.dtype) == (torch.float32, torch.float32)
