"""Encode reconstructions as PNGs. Runs in the replica: Pillow and torch are not installed in the control plane.

Shapes: T frames, H height, W width.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from amd.visualization import Views, as_bytes, draw

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

PAGE_FRAMES = 8  # number of evenly spaced video frames in the overview
TILE = 192  # approximate height in pixels to which small frames are enlarged


def with_pngs(item: Mapping[str, Any]) -> dict[str, Any]:
    """Replace a result's clips with PNGs; video frames are tiled from left to right."""
    views = _views(item)
    return {
        **item,
        "original": _frames_png(views.input),
        "masked": _frames_png(views.student),
        "rebuilt": _frames_png(views.reconstructed),
    }


def overview_png(encoder: str, item: Mapping[str, Any]) -> bytes:
    """Return one PNG with the clip, its visible tokens and the reconstruction in three rows."""
    views = _views(item)
    caption = (
        f"{len(item['visible'])} visible tokens, mask ratio {item['mask_ratio']:g}, seed {item['seed']}; "
        f"error on hidden tokens {item['loss']:.3g}"
    )
    zoom = max(1, TILE // views.input.shape[-2])
    return png_bytes(draw(views, encoder, caption, zoom=zoom, frames=PAGE_FRAMES))


def _views(item: Mapping[str, Any]) -> Views:
    original, masked, reconstructed = (torch.from_numpy(item[name])[None] for name in ("original", "masked", "rebuilt"))
    return Views(original, masked, None, as_bytes(reconstructed))


def _frames_png(clips: Tensor) -> bytes:
    """Tile (1, 3, T, H, W) uint8 into one image of H x (T * W)."""
    row = clips[0].permute(2, 1, 3, 0).flatten(1, 2)  # (H, T * W, 3)
    return png_bytes(Image.fromarray(row.contiguous().numpy()))


def png_bytes(picture: Picture) -> bytes:
    """Encode an image as a PNG."""
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()
