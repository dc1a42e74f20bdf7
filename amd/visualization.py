"""Views of clips on one page: the input, what networks saw of it, what was rebuilt. Tensors in, a PIL image out.

Knows nothing of networks.
Shapes: B samples shown, T frames, H height, W width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image

PAPER, INK, FAINT = (250, 249, 246), (33, 37, 41), (134, 142, 150)


class Views(NamedTuple):
    """Pictures of the same samples, (B, 3, T, H, W) uint8."""

    input: Tensor
    student: Tensor  # hidden tokens painted over
    teacher: Tensor | None  # as the teacher saw them, the tokens it alone saw framed; None without a teacher
    rebuilt: Tensor  # the student's own tokens, and the decoder's answer where it rebuilt


def as_bytes(unit: Tensor) -> Tensor:
    """Pixels in [0, 1] as uint8; what lies beyond is cut off."""
    return (unit * 255).round().clamp(0, 255).to(torch.uint8)


def draw(views: Views, title: str, caption: str, *, zoom: int = 4, frames: int = 4, across: int | None = None) -> Image:
    """One page: a row for each view, a column for each sample; of clips `frames` frames side by side.

    `across`: how many samples stand beside each other before a new line begins.
    """
    from PIL import Image, ImageDraw, ImageFont

    if views.teacher is None:
        rows = [("input", views.input), ("it saw", views.student), ("it rebuilt", views.rebuilt)]
    else:
        rows = [("input", views.input), ("the student saw", views.student), ("the teacher saw", views.teacher)]
        rows += [("the student rebuilt", views.rebuilt)]
    samples, _, length, height, width = views.input.shape
    shown = np.linspace(0, length - 1, num=min(frames, length)).round().astype(int)
    across = min(across or samples, samples)
    gap, label, head, foot = 10, 150, 62, 14
    cell_h, cell_w = height * zoom + 4, width * zoom + 4
    block_h, block_w = cell_h * len(rows) + 2 * gap, cell_w * len(shown) + gap
    lines = -(-samples // across)
    page = Image.new("RGB", (label + across * block_w + gap, head + lines * block_h + foot), PAPER)
    pen = ImageDraw.Draw(page)
    pen.text((gap * 2, 14), title, INK, ImageFont.load_default(20))
    pen.text((gap * 2, 40), caption, FAINT, ImageFont.load_default(13))
    small = ImageFont.load_default(14)
    for line in range(lines):
        for r, (name, pictures) in enumerate(rows):
            top = head + line * block_h + r * cell_h
            pen.text((label - gap, top + cell_h // 2), name, INK, small, anchor="rm")
            for column, sample in enumerate(range(line * across, min(samples, (line + 1) * across))):
                for f, frame in enumerate(shown):
                    pixels: npt.NDArray[np.uint8] = pictures[sample, :, frame].permute(1, 2, 0).numpy()
                    tile = Image.fromarray(pixels).resize((width * zoom, height * zoom), Image.Resampling.NEAREST)
                    page.paste(tile, (label + column * block_w + f * cell_w, top))
    return page
