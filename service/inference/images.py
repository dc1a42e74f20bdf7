"""A reconstruction as PNGs. Drawn in the replica, where Pillow and torch are; the control plane has neither.

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

PAGE_FRAMES = 8  # of a film, evenly
TILE = 192  # pixels that a small frame is drawn at


def drawn(item: Mapping[str, Any]) -> dict[str, Any]:
    """The answer with PNGs in place of clips; frames of a film stand side by side, the first at the left."""
    views = _views(item)
    return {**item, "original": _png(views.input), "masked": _png(views.student), "rebuilt": _png(views.rebuilt)}


def page(encoder: str, item: Mapping[str, Any]) -> bytes:
    """One PNG: the clip, what the encoder saw of it, what was rebuilt, below each other."""
    views = _views(item)
    caption = (
        f"it saw {len(item['visible'])} tokens, mask ratio {item['mask_ratio']:g}, seed {item['seed']}; "
        f"error on the others {item['loss']:.3g}"
    )
    zoom = max(1, TILE // views.input.shape[-2])
    return _file(draw(views, encoder, caption, zoom=zoom, frames=PAGE_FRAMES))


def _views(item: Mapping[str, Any]) -> Views:
    original, masked, rebuilt = (torch.from_numpy(item[name])[None] for name in ("original", "masked", "rebuilt"))
    return Views(original, masked, None, as_bytes(rebuilt))


def _png(clips: Tensor) -> bytes:
    """(1, 3, T, H, W) uint8 as one picture of H x (T * W)."""
    row = clips[0].permute(2, 1, 3, 0).flatten(1, 2)  # (H, T * W, 3)
    return _file(Image.fromarray(row.contiguous().numpy()))


def _file(picture: Picture) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()
