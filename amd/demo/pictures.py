"""What a student saw and what it made of it, as a picture: input, student's view, teacher's view, reconstruction.

Tensors in, a PIL image out; `draw_run` alone knows of runs.
Shapes: B samples shown, T frames, H height, W width, N tokens, P pixel values a token, R rebuilt.
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from amd.config import ClipConfig, TrainConfig
from amd.losses import normalized_pixels, unit_pixels
from amd.masks import sample_token_sets
from amd.models.student import Student
from amd.storage import join, write_bytes
from amd.tokens import TokenSets, patchify, take_tokens, unpatchify
from amd.training.checkpoints import CheckpointStore

if TYPE_CHECKING:
    from PIL.Image import Image

PAPER, INK, FAINT = (250, 249, 246), (33, 37, 41), (134, 142, 150)
HIDDEN = (222, 218, 209)  # a token that nobody showed
TEACHER_ONLY = (66, 135, 245)  # the frame around tokens that the teacher sees and the student does not


class Views(NamedTuple):
    """Pictures of the same samples, (B, 3, T, H, W) uint8."""

    input: Tensor
    student: Tensor  # hidden tokens painted over
    teacher: Tensor | None  # as the teacher saw them, the tokens it alone saw framed; None without a teacher
    rebuilt: Tensor  # the student's own tokens, and the decoder's answer where it rebuilt


@torch.inference_mode()
def views(student: Student, clips: Tensor, sets: TokenSets, config: TrainConfig) -> Views:
    """Run the student on uint8 clips (B, 3, T, H, W). Raises ValueError for a student without a decoder."""
    clip = config.clip
    pixels = patchify(clips, clip.tubelet, clip.patch)  # (B, N, P) uint8
    answer = student(normalized_pixels(take_tokens(pixels, sets.student_visible), clip), sets)
    if answer.rebuilt is None:
        raise ValueError(
            "objective.weights.reconstruction=0: this student rebuilds no pixels, there is nothing to show"
        )
    shown = as_bytes(answer.rebuilt, take_tokens(pixels, sets.rebuilt), config)  # (B, R, P)
    seen = _paint(pixels, sets.student_visible, clip)
    teacher = None
    if config.objective.kind == "amd":
        both = torch.cat([sets.student_visible, sets.teacher_only], dim=1)
        marked = _put(
            _paint(pixels, both, clip), sets.teacher_only, _framed(take_tokens(pixels, sets.teacher_only), clip)
        )
        teacher = _clips(marked, clip)
    return Views(clips, _clips(seen, clip), teacher, _clips(_put(seen, sets.rebuilt, shown), clip))


def as_bytes(rebuilt: Tensor, original: Tensor, config: TrainConfig) -> Tensor:
    """The decoder's answer as uint8 pixels, (B, R, P).

    Targets that are normalised per token lose its mean and spread: those of the `original` are put back, as in MAE's
    demonstration.
    """
    clip, kind = config.clip, config.objective.pixels
    if kind == "unit":
        unit = rebuilt
    else:
        pixels = normalized_pixels(original, clip)
        if kind == "per_patch":
            variance, mean = torch.var_mean(pixels, dim=-1, keepdim=True)
            unit = unit_pixels(rebuilt * (variance + 1e-6).sqrt() + mean, clip)
        elif kind == "per_channel":
            variance, mean = torch.var_mean(unit_pixels(original, clip).unflatten(-1, (-1, 3)), dim=-2, keepdim=True)
            unit = (rebuilt.unflatten(-1, (-1, 3)) * variance.sqrt() + mean).flatten(-2)
        else:
            unit = unit_pixels(rebuilt, clip)
    return (unit * 255).round().clamp(0, 255).to(torch.uint8)


def _paint(pixels: Tensor, visible: Tensor, clip: ClipConfig) -> Tensor:
    """All tokens but the visible ones as blank paper, (B, N, P)."""
    blank = torch.tensor(HIDDEN, dtype=torch.uint8).repeat(clip.token_values // 3).expand_as(pixels)
    return _put(blank, visible, take_tokens(pixels, visible))


def _put(tokens: Tensor, index: Tensor, values: Tensor) -> Tensor:
    """`tokens` (B, N, P) with `values` (B, K, P) at `index` (B, K)."""
    return tokens.scatter(1, index.unsqueeze(-1).expand_as(values), values)


def _framed(tokens: Tensor, clip: ClipConfig) -> Tensor:
    """Tokens (B, K, P) with a coloured rim, one pixel wide (at least a twelfth of the patch)."""
    cut = tokens.unflatten(-1, (clip.tubelet, clip.patch, clip.patch, 3)).clone()
    rim, colour = max(1, clip.patch // 12), torch.tensor(TEACHER_ONLY, dtype=torch.uint8)
    cut[..., :rim, :, :] = cut[..., -rim:, :, :] = cut[..., :, :rim, :] = cut[..., :, -rim:, :] = colour
    framed: Tensor = cut.flatten(2)
    return framed


def _clips(tokens: Tensor, clip: ClipConfig) -> Tensor:
    return unpatchify(tokens, clip.grid, clip.tubelet, clip.patch)


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


def draw_run(root: str, folder: str, config: TrainConfig, clips: Tensor) -> str:
    """A page of clips, evenly out of `clips`, as the run's newest checkpoint sees them, in `root`/demo; its URL."""
    store = CheckpointStore(join(folder, "checkpoints"), config.checkpoint)
    found = store.load_newest()
    if found is None:
        raise FileNotFoundError(f"{folder}: no checkpoint to draw from")
    step, snapshot = found
    student = Student(config).eval()
    student.load_state_dict(snapshot.tensors["model"])
    wide = config.clip.frames > 1
    shown = clips[torch.linspace(0, len(clips) - 1, 6 if wide else 10).long()]
    draws = torch.Generator().manual_seed(0)  # the same masks for every student with the same ratios
    sets = sample_token_sets(config.mask, config.clip.grid, len(shown), draws)
    visible, tokens = sets.student_visible.shape[1], config.clip.grid.tokens
    sees = f"{'it' if config.objective.kind == 'mae' else 'the student'} sees {visible} of {tokens} tokens"
    if config.objective.kind == "amd":
        sees += f", its teacher {visible + sets.teacher_only.shape[1]} (blue: the teacher alone)"
    title = f"{config.name or 'student'}, after {step} steps"
    page = draw(views(student, shown, sets, config), title, sees, zoom=3 if wide else 4, across=3 if wide else None)
    data = io.BytesIO()
    page.save(data, "PNG")
    url = join(root, "demo", f"{config.name or 'student'}.png")
    write_bytes(url, data.getvalue())
    return url
