"""Still images to RGB: upright, 8 bits, whole. Knows nothing of configs, storage or processes.

A truncated image is an error, never half grey; an image of more pixels than MAX_PIXELS is one too.
"""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

MAX_PIXELS = 178_956_970  # half a gigabyte of RGB; the size at which Pillow refuses
_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class ImageError(Exception):
    """An image that cannot be read; one sentence."""


def read_image(source: Path | bytes) -> npt.NDArray[np.uint8]:
    """The image as (H, W, 3) uint8; the first of an animation. Raises ImageError."""
    return np.asarray(load_rgb(source))


def load_rgb(source: Path | bytes) -> Image.Image:
    """The image, upright, in mode RGB. Raises ImageError."""
    if not (source.stat().st_size if isinstance(source, Path) else source):
        raise ImageError("is empty (zero bytes)")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its own limit on pixels stands below
            with Image.open(source if isinstance(source, Path) else io.BytesIO(source)) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise ImageError(f"has {image.width}x{image.height} pixels, more than {MAX_PIXELS}")
                image.load()
                return _rgb(_upright(image))
    except UnidentifiedImageError:
        raise ImageError("is not an image that can be opened") from None
    except Image.DecompressionBombError as error:
        raise ImageError(f"has too many pixels ({error})") from None
    except (OSError, SyntaxError, ValueError, EOFError, IndexError, TypeError) as error:  # as broken files raise them
        raise ImageError(f"cannot be decoded ({error})") from None


def _upright(image: Image.Image) -> Image.Image:
    try:
        turn = _TURNS.get(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # a broken EXIF block says nothing about the pixels
        return image
    return image if turn is None else image.transpose(turn)


def _rgb(image: Image.Image) -> Image.Image:
    """16 bits are scaled, transparency lies on white, every other mode is converted by Pillow."""
    if image.mode.startswith("I;16") or image.mode == "I":
        values = np.asarray(image).astype(np.int64)
        scaled = values >> 8 if image.mode.startswith("I;16") or values.max(initial=0) > 255 else values
        return Image.fromarray(scaled.clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ImageError("holds floating-point numbers, whose range is not known; convert it to 8 or 16 bits")
    if image.has_transparency_data:
        layered = image.convert("RGBA")
        white = Image.new("RGBA", layered.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, layered).convert("RGB")
    return image.convert("RGB")
