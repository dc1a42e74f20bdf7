from __future__ import annotations

import io

import pytest
import torch
from PIL import Image

from amd.visualization import LOSSLESS_PIXELS, SHEET_FRAMES, SHEET_SIDE, sample_sheet, webp_bytes


def test_a_sheet_shows_images_side_by_side_and_a_row_of_frames_per_video() -> None:
    images = torch.randint(0, 256, (3, 3, 1, 4, 6), dtype=torch.uint8)
    assert sample_sheet(images).size == (3 * 6, 4)
    videos = torch.arange(2 * 16).reshape(2, 1, 16, 1, 1).expand(2, 3, 16, 4, 6).to(torch.uint8)
    sheet = sample_sheet(videos)
    assert sheet.size == (SHEET_FRAMES * 6, 2 * 4)
    assert [sheet.getpixel((6 * column, 4)) for column in (0, SHEET_FRAMES - 1)] == [(16, 16, 16), (31, 31, 31)]


def test_a_large_sheet_is_downscaled() -> None:
    assert sample_sheet(torch.zeros(8, 3, 1, 512, 512, dtype=torch.uint8)).size == (SHEET_SIDE, SHEET_SIDE // 8)


def test_small_sheets_are_lossless_and_large_sheets_fit_the_size_limit() -> None:
    noise = torch.randint(0, 256, (8, 3, 1, 32, 32), dtype=torch.uint8)
    small = sample_sheet(noise)
    assert Image.open(io.BytesIO(webp_bytes(small, 2**20))).tobytes() == small.tobytes()
    large = sample_sheet(torch.randint(0, 256, (8, 3, 8, 96, 96), dtype=torch.uint8))
    assert large.width * large.height > LOSSLESS_PIXELS
    assert len(webp_bytes(large, 2**18)) <= 2**18
    with pytest.raises(ValueError, match="does not fit in 100 bytes"):
        webp_bytes(large, 100)
