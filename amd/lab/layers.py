"""Draw the token sets of one clip as layers: clips of the same shape, each showing one role of the tokens.

Takes tensors and returns uint8 clips; does not import models.
Shapes: B batch, N tokens, P pixel values per token, K tokens in a set, T frames, H height, W width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from amd.config import ClipConfig
from amd.reconstruction import HIDDEN, as_clips, cover_hidden
from amd.tokens import TokenSets, put_tokens, take_tokens

Colour = tuple[int, int, int]

DIRECT, GENERATION = (18, 150, 96), (66, 135, 245)  # RGB colours of direct and generation alignment
MASKED = (148, 148, 146)  # colour of tokens that neither network sees
PLAIN = (148, 163, 184)  # colour of every pixel if no clip is given
LOW_ERROR, HIGH_ERROR = (255, 240, 217), (165, 15, 21)
COLUMNS = 16  # frames per row of a sprite sheet; keeps sheets within the size limit of browser canvases


def plain_clip(clip: ClipConfig) -> Tensor:
    """Return a single-coloured clip, (3, T, H, W) uint8, on which token sets are drawn if there is no input."""
    colour = torch.tensor(PLAIN, dtype=torch.uint8)[:, None, None, None]
    return colour.expand(3, clip.frames, *clip.size).clone()


def student_view(pixels: Tensor, sets: TokenSets, clip: ClipConfig) -> Tensor:
    """Paint over all tokens except the student-visible ones: (B, N, P) uint8 -> (B, N, P) uint8."""
    return cover_hidden(pixels, sets.student_visible, clip)


def teacher_view(pixels: Tensor, sets: TokenSets, clip: ClipConfig) -> Tensor:
    """Paint over all tokens that the teacher does not see, and outline the teacher-only ones."""
    seen = torch.cat([sets.student_visible, sets.teacher_only], dim=1)
    outlined = _outlined(take_tokens(pixels, sets.teacher_only), clip)
    return put_tokens(cover_hidden(pixels, seen, clip), sets.teacher_only, outlined)


def roles_view(pixels: Tensor, sets: TokenSets, clip: ClipConfig) -> Tensor:
    """Colour tokens by role: direct alignment, generation alignment, reconstruction only, or none.

    Tokens that a network sees are tinted; the remaining ones are filled with a plain colour.
    """
    view = cover_hidden(pixels, sets.student_visible, clip)
    view = put_tokens(view, sets.reconstructed, _plain(sets.reconstructed, MASKED, clip))
    for index, colour in ((sets.student_visible, DIRECT), (sets.teacher_only, GENERATION)):
        tinted = (take_tokens(pixels, index).float() + _plain(index, colour, clip).float()) / 2
        view = put_tokens(view, index, tinted.to(torch.uint8))
    return view


def masked_view(pixels: Tensor, sets: TokenSets, clip: ClipConfig) -> Tensor:
    """Show only reconstructed tokens: the inverse of the student's view if all masked tokens are reconstructed."""
    return cover_hidden(pixels, sets.reconstructed, clip)


def rebuilt_view(rebuilt: Tensor, sets: TokenSets, clip: ClipConfig) -> Tensor:
    """Cover the masked tokens that the decoder does not reconstruct. `rebuilt`: pixels, (B, N, P) uint8."""
    return cover_hidden(rebuilt, torch.cat([sets.student_visible, sets.reconstructed], dim=1), clip)


def error_view(errors: Tensor, index: Tensor, clip: ClipConfig) -> Tensor:
    """Colour the tokens at `index` (B, K) by their `errors` (B, K), relative to the largest; return (B, N, P) uint8."""
    share = (errors / errors.amax(dim=1, keepdim=True).clamp(min=1e-12))[..., None]  # (B, K, 1)
    low, high = _plain(index, LOW_ERROR, clip), _plain(index, HIGH_ERROR, clip)
    colours = (low + share * (high.float() - low.float())).round().to(torch.uint8)
    shape = (len(errors), clip.grid.tokens, clip.token_values)
    blank = torch.tensor(HIDDEN, dtype=torch.uint8).repeat(clip.token_values // 3).expand(shape)
    return put_tokens(blank, index, colours)


def sprite_columns(frames: int) -> int:
    """Return the number of frames per row of a sprite sheet."""
    return min(frames, COLUMNS)


def sprite_sheet(frames: Tensor) -> Tensor:
    """Tile the frames of a clip (3, T, H, W) into one image (H', W', 3), row by row, COLUMNS frames per row."""
    _, count, height, width = frames.shape
    columns = sprite_columns(count)
    rows = -(-count // columns)
    sheet = torch.tensor(HIDDEN, dtype=torch.uint8).repeat(rows * height, columns * width, 1)
    for number in range(count):
        top, left = number // columns * height, number % columns * width
        sheet[top : top + height, left : left + width] = frames[:, number].permute(1, 2, 0)
    return sheet


def single_clip(tokens: Tensor, clip: ClipConfig) -> Tensor:
    """Convert the tokens of one clip to frames: (1, N, P) -> (3, T, H, W)."""
    return as_clips(tokens, clip)[0]


def _plain(index: Tensor, colour: Colour, clip: ClipConfig) -> Tensor:
    """Return single-coloured tokens (B, K, P) uint8 for an index (B, K)."""
    values = torch.tensor(colour, dtype=torch.uint8).repeat(clip.token_values // 3)
    return values.expand(*index.shape, -1)


def _outlined(tokens: Tensor, clip: ClipConfig) -> Tensor:
    """Draw a coloured border around tokens (B, K, P): a twelfth of the patch wide, at least one pixel."""
    cut = tokens.unflatten(-1, (clip.tubelet, clip.patch, clip.patch, 3)).clone()
    border, colour = max(1, clip.patch // 12), torch.tensor(GENERATION, dtype=torch.uint8)
    cut[..., :border, :, :] = cut[..., -border:, :, :] = cut[..., :, :border, :] = cut[..., :, -border:, :] = colour
    outlined: Tensor = cut.flatten(2)
    return outlined
