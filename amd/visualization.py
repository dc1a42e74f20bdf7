"""Render clips on one page with their masked views and reconstructions, or as a sheet of samples.

Takes tensors and returns PIL images or their bytes; does not import models.
Shapes: B samples, T frames, H height, W width.
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image

BACKGROUND, TEXT_COLOUR, CAPTION_COLOUR = (250, 249, 246), (33, 37, 41), (134, 142, 150)
SHEET_FRAMES = 8  # maximum number of frames shown per video, evenly spaced
SHEET_SIDE = 2048  # maximum width and height of a sheet
LOSSLESS_PIXELS = 2**18  # larger images are encoded lossily


class Views(NamedTuple):
    """Images of the same samples, (B, 3, T, H, W) uint8."""

    input: Tensor
    student: Tensor  # hidden tokens painted over
    teacher: Tensor | None  # hidden tokens painted over, teacher-only tokens outlined; None without a teacher
    reconstructed: Tensor  # student-visible tokens, and the decoder's predictions elsewhere


def as_bytes(unit: Tensor) -> Tensor:
    """Convert pixels in [0, 1] to uint8; values outside this range are clamped."""
    return (unit * 255).round().clamp(0, 255).to(torch.uint8)


def draw(views: Views, title: str, caption: str, *, zoom: int = 4, frames: int = 4, across: int | None = None) -> Image:
    """Render one page with a row per view and a column per sample; a cell shows up to `frames` frames side by side.

    `across`: maximum number of samples per line; additional samples wrap onto the next line.
    """
    from PIL import Image, ImageDraw, ImageFont

    if views.teacher is None:
        rows = [("input", views.input), ("visible", views.student), ("reconstruction", views.reconstructed)]
    else:
        rows = [("input", views.input), ("student-visible", views.student), ("teacher-visible", views.teacher)]
        rows += [("reconstruction", views.reconstructed)]
    samples, _, length, height, width = views.input.shape
    shown = np.linspace(0, length - 1, num=min(frames, length)).round().astype(int)
    across = min(across or samples, samples)
    gap, label, head, foot = 10, 150, 62, 14
    cell_h, cell_w = height * zoom + 4, width * zoom + 4
    block_h, block_w = cell_h * len(rows) + 2 * gap, cell_w * len(shown) + gap
    lines = -(-samples // across)
    page = Image.new("RGB", (label + across * block_w + gap, head + lines * block_h + foot), BACKGROUND)
    pen = ImageDraw.Draw(page)
    pen.text((gap * 2, 14), title, TEXT_COLOUR, ImageFont.load_default(20))
    pen.text((gap * 2, 40), caption, CAPTION_COLOUR, ImageFont.load_default(13))
    small = ImageFont.load_default(14)
    for line in range(lines):
        for r, (name, images) in enumerate(rows):
            top = head + line * block_h + r * cell_h
            pen.text((label - gap, top + cell_h // 2), name, TEXT_COLOUR, small, anchor="rm")
            for column, sample in enumerate(range(line * across, min(samples, (line + 1) * across))):
                for f, frame in enumerate(shown):
                    pixels: npt.NDArray[np.uint8] = images[sample, :, frame].permute(1, 2, 0).numpy()
                    tile = Image.fromarray(pixels).resize((width * zoom, height * zoom), Image.Resampling.NEAREST)
                    page.paste(tile, (label + column * block_w + f * cell_w, top))
    return page


def sample_sheet(clips: Tensor) -> Image:
    """Tile clips (S, 3, T, H, W) uint8 into one image: images side by side, videos row by row.

    For each video, up to SHEET_FRAMES evenly spaced frames are shown. The image is scaled down to at most SHEET_SIDE
    pixels per side.
    """
    from PIL import Image

    length = clips.shape[2]
    shown = np.linspace(0, length - 1, num=min(SHEET_FRAMES, length)).round().astype(int).tolist()
    rows = clips[:, :, shown]  # (S, 3, F, H, W)
    if length == 1:
        rows = rows.transpose(0, 2)  # (1, 3, S, H, W)
    pixels = rows.permute(0, 3, 2, 4, 1).flatten(2, 3).flatten(0, 1)  # (rows * H, columns * W, 3)
    sheet = Image.fromarray(pixels.contiguous().numpy())
    sheet.thumbnail((SHEET_SIDE, SHEET_SIDE))
    return sheet


def webp_bytes(picture: Image, limit: int) -> bytes:
    """Encode an image as WebP with at most `limit` bytes: losslessly if small, else at the best quality that fits.

    Raises ValueError if even the lowest quality does not fit.
    """
    choices: list[dict[str, Any]] = [{"quality": quality} for quality in (85, 60, 30, 5)]
    if picture.width * picture.height <= LOSSLESS_PIXELS:
        choices.insert(0, {"lossless": True})
    for options in choices:
        file = io.BytesIO()
        picture.save(file, "WEBP", **options)
        if file.tell() <= limit:
            return file.getvalue()
    raise ValueError(f"an image of {picture.width}x{picture.height} pixels does not fit in {limit} bytes")
