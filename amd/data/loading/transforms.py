"""Crop, resize, flip and augment frames into clips. Input and output are uint8; randomness is passed in.

Frames are (T, H, W, 3) with channels last, as decoded; resizing preserves this memory order, which makes it twice as
fast, and `clip_view` views the result as (3, T, H, W). Does not import models.
Shapes: T frames, H height, W width.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor
from torch.nn import functional

from amd.config import ClipConfig, Crop, DataConfig, Interpolation
from amd.data.loading.rand_augment import rand_augment

Size = tuple[int, int]  # height, width

SCALES = (1.0, 0.875, 0.75, 0.66)  # relative to the short side; from GroupMultiScaleCrop in AMD and VideoMAE
# Offsets (x, y) of a multi-scale crop in quarters of the remaining space, in the official order.
CORNERS = ((0, 0), (4, 0), (0, 4), (4, 4), (2, 2), (0, 2), (4, 2), (2, 4), (2, 0), (1, 1), (3, 1), (1, 3), (3, 3))


class Box(NamedTuple):
    """A rectangle inside a frame, in pixels."""

    top: int
    left: int
    height: int
    width: int


def multi_scale_box(frame: Size, size: Size, draws: random.Random) -> Box:
    """Draw one of four scales for each side, at most one step apart, and one of 13 positions, as in AMD and VideoMAE.

    The sides scale the largest box of the output's shape that fits the frame. For square outputs, this is the official
    rule (the frame's short side); for non-square outputs, the official code would distort a square crop.
    """
    full_height, full_width = _largest(frame, size)
    heights = [_snap(max(1, int(full_height * scale)), size[0]) for scale in SCALES]
    widths = [_snap(max(1, int(full_width * scale)), size[1]) for scale in SCALES]
    pairs = [(h, w) for i, h in enumerate(heights) for j, w in enumerate(widths) if abs(i - j) <= 1]
    height, width = draws.choice(pairs)
    height, width = min(height, frame[0]), min(width, frame[1])  # snapping may exceed the frame
    x, y = draws.choice(CORNERS)
    return Box(y * ((frame[0] - height) // 4), x * ((frame[1] - width) // 4), height, width)


def random_resized_box(frame: Size, size: Size, scale: tuple[float, float], draws: random.Random) -> Box:
    """Draw a box of random area, position and aspect ratio (3:4 to 4:3, relative to the output), as in MAE.

    `scale`: range of the area, as fractions of the frame. After ten draws that do not fit the frame, the result is the
    largest central box with an allowed aspect ratio, as in torchvision.
    """
    height, width = frame
    shape = size[1] / size[0]
    low, high = 3 / 4 * shape, 4 / 3 * shape  # width over height
    for _ in range(10):
        area = height * width * draws.uniform(*scale)
        aspect = math.exp(draws.uniform(math.log(low), math.log(high)))
        box_height, box_width = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
        if 0 < box_height <= height and 0 < box_width <= width:
            top, left = draws.randrange(height - box_height + 1), draws.randrange(width - box_width + 1)
            return Box(top, left, box_height, box_width)
    aspect = min(max(width / height, low), high)
    return _middle(frame, min(height, max(1, round(width / aspect))), min(width, max(1, round(height * aspect))))


def center_box(frame: Size, size: Size, fraction: float = 1.0) -> Box:
    """Return the largest centered box with the output's aspect ratio, with its sides scaled by `fraction`.

    Equivalent to resizing the frame's short side and taking a center crop.
    """
    height, width = _largest(frame, size)
    return _middle(frame, max(1, round(height * fraction)), max(1, round(width * fraction)))


def resize_box(frames: Tensor, box: Box, size: Size, interpolation: Interpolation = "bilinear") -> Tensor:
    """Crop every frame to the box and resize it with antialiasing: (T, H, W, 3) uint8 -> (T, *size, 3) uint8.

    Pixel values differ from PIL's crop and resize by at most 1 (out of 255), but resizing is ten times as fast.
    """
    cut = frames[:, box.top : box.top + box.height, box.left : box.left + box.width]
    if (box.height, box.width) == size:
        return cut
    planes = cut.permute(0, 3, 1, 2)  # (T, 3, h, w), channels last in memory: torch's fast path for uint8
    resized = functional.interpolate(planes, size, mode=interpolation, antialias=True)
    return resized.permute(0, 2, 3, 1)


def mirror(frames: Tensor) -> Tensor:
    """Flip frames (T, H, W, 3) horizontally."""
    return (
        frames.permute(0, 3, 1, 2).flip(3).permute(0, 2, 3, 1)
    )  # flipping planes is 30 times as fast as moving pixels


def clip_view(frames: Tensor) -> Tensor:
    """View (..., T, H, W, 3) as (..., 3, T, H, W) without copying."""
    return frames.movedim(-1, -4)


BOXES: dict[Crop, Callable[[Size, Size, DataConfig, random.Random], Box]] = {
    "multi_scale": lambda frame, size, data, draws: multi_scale_box(frame, size, draws),
    "random_resized": lambda frame, size, data, draws: random_resized_box(frame, size, data.crop_scale, draws),
    "center": lambda frame, size, data, draws: center_box(frame, size),
}


def augment(frames: Tensor, data: DataConfig, clip: ClipConfig, draws: random.Random) -> Tensor:
    """Crop, flip and augment all frames in the same way: (T, H, W, 3) -> (T, *clip.size, 3) uint8.

    RandAugment follows the flip for images, as in timm and MAE, and precedes the crop for video, as in VideoMAE.
    Called once per repeat, with new draws on the same decoded frames.
    """
    policy = data.rand_augment
    if policy is not None and not clip.is_image:
        frames = rand_augment(frames, policy, clip, draws)
    box = BOXES[data.crop](_frame_size(frames), clip.size, data, draws)
    resized = resize_box(frames, box, clip.size, data.interpolation)
    flipped = mirror(resized) if data.flip and draws.random() < 0.5 else resized
    return rand_augment(flipped, policy, clip, draws) if policy is not None and clip.is_image else flipped


def center(frames: Tensor, data: DataConfig, clip: ClipConfig) -> Tensor:
    """Center-crop frames to an evaluation clip, without flipping: (T, H, W, 3) -> (T, *clip.size, 3) uint8."""
    box = center_box(_frame_size(frames), clip.size, data.center_fraction)
    return resize_box(frames, box, clip.size, data.interpolation)


def spatial_views(frames: Tensor, data: DataConfig, clip: ClipConfig, crops: int) -> list[Tensor]:
    """Return `crops` views along the longer side, each (T, *clip.size, 3), as in the official evaluation.

    Frames are resized to just cover clip.size; crop j of n starts at int(j * slack / (n - 1)). A single crop is taken
    from the center (the official code divides by zero in this case).
    """
    if crops == 1:
        return [center(frames, data, clip)]
    (height, width), (out_height, out_width) = _frame_size(frames), clip.size
    scale = max(out_height / height, out_width / width)
    covering = (max(out_height, int(height * scale)), max(out_width, int(width * scale)))
    resized = resize_box(frames, Box(0, 0, height, width), covering, data.interpolation)
    slack_y, slack_x = covering[0] - out_height, covering[1] - out_width
    starts = [(int(j * slack_y / (crops - 1)), int(j * slack_x / (crops - 1))) for j in range(crops)]
    return [resized[:, top : top + out_height, left : left + out_width] for top, left in starts]


def _frame_size(frames: Tensor) -> Size:
    return frames.shape[1], frames.shape[2]


def _largest(frame: Size, size: Size) -> Size:
    """Return the height and width of the largest box with the aspect ratio of `size` that fits in the frame."""
    height = min(frame[0], frame[1] * size[0] // size[1])
    width = min(frame[1], frame[0] * size[1] // size[0])
    return max(1, height), max(1, width)


def _middle(frame: Size, height: int, width: int) -> Box:
    return Box((frame[0] - height) // 2, (frame[1] - width) // 2, height, width)


def _snap(side: int, output: int) -> int:
    """Snap a side to the output's length if they differ by at most 2 pixels, so that no resizing is needed."""
    return output if abs(side - output) < 3 else side
