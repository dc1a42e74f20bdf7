"""Decode still images to upright 8-bit RGB. Does not import configs or storage.

Truncated images, and images with more than MAX_PIXELS, raise an error. Only the formats in FORMATS are opened, because
Pillow passes some other formats to external programs (EPS to Ghostscript) or recognises them without a magic number.
"""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

FORMATS = ("JPEG", "PNG", "GIF", "BMP", "PPM", "WEBP", "TIFF", "AVIF", "JPEG2000", "QOI")
MAX_PIXELS = 178_956_970  # half a gigabyte of RGB; Pillow's own limit
_MAGIC_NUMBERS = (
    b"\xff\xd8\xff",  # JPEG
    b"\x89PNG\r\n\x1a\n",
    b"GIF8",
    b"BM",
    b"II*\x00",  # TIFF, little-endian and big-endian, and BigTIFF
    b"MM\x00*",
    b"II+\x00",
    b"MM\x00+",
    b"\x00\x00\x00\x0cjP  \r\n\x87\n",  # JPEG 2000
    b"\xffO\xffQ",
    b"qoif",
)
_ORIENTATION = 0x0112
_TRANSPOSES = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class ImageError(Exception):
    """Raised for an image that cannot be decoded, with a one-sentence reason."""


def is_image(head: bytes) -> bool:
    """Return whether a file that starts with `head` (16 bytes or more) is an image in one of FORMATS."""
    if head[4:8] == b"ftyp":
        return head[8:12] in (b"avif", b"avis", b"mif1", b"msf1")
    if head[:4] == b"RIFF":
        return head[8:12] == b"WEBP"
    if head[:1] == b"P" and head[1:2] in (b"1", b"2", b"3", b"4", b"5", b"6", b"7", b"f"):
        return head[2:3].isspace()
    return head.startswith(_MAGIC_NUMBERS)


def read_image(source: Path | bytes, max_pixels: int = MAX_PIXELS) -> npt.NDArray[np.uint8]:
    """Decode an image, or the first frame of an animation, to (H, W, 3) uint8. Raises ImageError on failure."""
    return np.asarray(load_rgb(source, max_pixels))


def load_rgb(source: Path | bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode an image to an upright Pillow image in RGB mode. Raises ImageError if it is invalid or too large."""
    if not (source.stat().st_size if isinstance(source, Path) else source):
        raise ImageError("is empty (zero bytes)")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the pixel limit is checked below
            with Image.open(source if isinstance(source, Path) else io.BytesIO(source), formats=FORMATS) as image:
                if image.width * image.height > max_pixels:
                    raise ImageError(f"has {image.width}x{image.height} pixels, more than the limit of {max_pixels}")
                image.load()
                return _rgb(_upright(image))
    except UnidentifiedImageError:
        raise ImageError("is not an image that can be opened") from None
    except Image.DecompressionBombError as error:
        raise ImageError(f"has too many pixels ({error})") from None
    except (OSError, SyntaxError, ValueError, EOFError, IndexError, TypeError) as error:  # raised for broken files
        raise ImageError(f"cannot be decoded ({error})") from None


def _upright(image: Image.Image) -> Image.Image:
    try:
        transpose = _TRANSPOSES.get(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # a broken EXIF block does not affect the pixels
        return image
    return image if transpose is None else image.transpose(transpose)


def _rgb(image: Image.Image) -> Image.Image:
    """Convert to RGB: scale 16-bit images and composite transparency on white; Pillow converts other modes."""
    if image.mode.startswith("I;16") or image.mode == "I":
        values = np.asarray(image).astype(np.int64)
        scaled = values >> 8 if image.mode.startswith("I;16") or values.max(initial=0) > 255 else values
        return Image.fromarray(scaled.clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ImageError("has floating-point pixels whose range is unknown; convert it to 8 or 16 bits per channel")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")
