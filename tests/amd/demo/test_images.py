from __future__ import annotations

import numpy as np
import pytest
import torch

from amd.config import TrainConfig
from amd.demo.images import views
from amd.lab.layers import GENERATION
from amd.masks import sample_token_sets
from amd.models.student import Student
from amd.reconstruction import HIDDEN
from amd.tokens import TokenSets, patchify, take_tokens
from amd.visualization import as_bytes, draw
from tests.support.runs.configs import mae, tiny_image_config, tiny_video_config

CONFIGS = {"image": tiny_image_config(), "video": tiny_video_config(), "undistilled": mae(tiny_video_config())}


def inputs(config: TrainConfig, count: int = 3) -> tuple[torch.Tensor, TokenSets]:
    clip = config.clip
    clips = torch.randint(0, 256, (count, 3, clip.frames, *clip.size), dtype=torch.uint8)
    return clips, sample_token_sets(config.mask, clip.grid, count, torch.Generator().manual_seed(1))


def tokens(clips: torch.Tensor, config: TrainConfig) -> torch.Tensor:
    return patchify(clips, config.clip.tubelet, config.clip.patch)


@pytest.mark.parametrize("name", CONFIGS)
def test_each_view_shows_visible_tokens_and_hides_all_others(name: str) -> None:
    config = CONFIGS[name]
    clips, sets = inputs(config)
    shown = views(Student(config).eval(), clips, sets, config)
    pixels, blank = tokens(clips, config), torch.tensor(HIDDEN, dtype=torch.uint8).repeat(config.clip.token_values // 3)
    assert torch.equal(shown.input, clips)
    for view in (shown.student, shown.reconstructed):
        visible = sets.student_visible
        assert torch.equal(take_tokens(tokens(view, config), visible), take_tokens(pixels, visible))
    hidden = take_tokens(tokens(shown.student, config), sets.student_masked)
    assert torch.equal(hidden, blank.expand_as(hidden))
    if config.objective.kind == "mae":
        assert shown.teacher is None
        return
    assert shown.teacher is not None
    alone = take_tokens(tokens(shown.teacher, config), sets.teacher_only)
    cut = alone.unflatten(-1, (config.clip.tubelet, config.clip.patch, config.clip.patch, 3))
    assert (cut[..., 0, :, :] == torch.tensor(GENERATION, dtype=torch.uint8)).all()  # outlined
    original = take_tokens(pixels, sets.teacher_only).unflatten(-1, cut.shape[-4:])
    assert torch.equal(cut[..., 1:-1, 1:-1, :], original[..., 1:-1, 1:-1, :])


def test_pixel_values_outside_0_to_1_are_clipped() -> None:
    assert as_bytes(torch.tensor([-0.5, 0.0, 0.5, 1.0, 7.0])).tolist() == [0, 0, 128, 255, 255]


def test_a_page_has_one_row_per_view_and_wraps_samples() -> None:
    config = CONFIGS["video"]
    clips, sets = inputs(config, count=4)
    shown = views(Student(config).eval(), clips, sets, config)
    one_line = draw(shown, "title", "caption", zoom=2, frames=2)
    two_lines = draw(shown, "title", "caption", zoom=2, frames=2, across=2)
    without_teacher = draw(shown._replace(teacher=None), "title", "caption", zoom=2, frames=2)
    assert two_lines.width < one_line.width
    assert two_lines.height > one_line.height
    assert one_line.height - without_teacher.height == 2 * 16 + 4
    # The first tile is the first frame of the first sample, every pixel twice as large.
    left, top = 150, 62
    tile = np.asarray(one_line)[top : top + 32, left : left + 32]
    np.testing.assert_array_equal(tile[::2, ::2], clips[0, :, 0].permute(1, 2, 0).numpy())


def test_drawing_a_student_without_a_decoder_raises() -> None:
    config = tiny_video_config(objective__weights__reconstruction=0.0)
    clips, sets = inputs(config)
    with pytest.raises(ValueError, match=r"objective\.weights\.reconstruction=0"):
        views(Student(config), clips, sets, config)
