"""Untrusted files for tests, created with Pillow, PyAV and raw bytes: unusual but valid, broken, and malicious.

Each file has an expected outcome: known pixels, a rejection with a known reason, or either of the two.
"""

from __future__ import annotations

import gzip
import io
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
from PIL import Image, ImageSequence
from PIL.PngImagePlugin import PngInfo

from tests.support.data.videos import patch_box, pictures, set_rotation, write_audio_only, write_video

FRAMES = 200  # maximum number of frames per video in the tests


class HostileFile(NamedTuple):
    name: str
    content: bytes
    expected_png: bytes | None = None
    """PNG of the expected pixels, which must have the same embedding."""
    rejection: str | None = None
    """Regular expression that the rejection reason must match."""
    decodable: bool = False
    """Whether the file must be decoded although its exact pixels are unknown."""


def corpus(folder: Path) -> list[HostileFile]:
    """Return all hostile files. Videos are written to `folder`."""
    files = [*unusual_images(), *broken_images(), *non_images(), *unusual_videos(folder), *broken_videos(folder)]
    assert len({file.name for file in files}) == len(files)
    return files


def noise(width: int = 24, height: int = 18, seed: int = 0) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def saved(image: Image.Image, format: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def png(image: Image.Image) -> bytes:
    return saved(image, "PNG")


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def raw_png(width: int, height: int, depth: int, colour: int, rows: bytes, extra: bytes = b"") -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    body = chunk(b"IHDR", header) + extra + chunk(b"IDAT", zlib.compress(rows, 9)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def on_white(image: Image.Image) -> Image.Image:
    rgba = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, (255, 255, 255, 255)), rgba).convert("RGB")


TURNS: dict[int, Callable[[np.ndarray], np.ndarray]] = {  # EXIF orientation -> displayed pixels
    2: lambda p: p[:, ::-1],
    3: lambda p: p[::-1, ::-1],
    4: lambda p: p[::-1],
    5: lambda p: p.transpose(1, 0, 2),
    6: lambda p: np.rot90(p, 3),
    7: lambda p: p[::-1, ::-1].transpose(1, 0, 2),
    8: lambda p: np.rot90(p, 1),
}


def unusual_images() -> Iterator[HostileFile]:
    plain, other = noise(), noise(seed=1)
    grey = plain.convert("L")
    yield HostileFile("grey", png(grey), png(grey.convert("RGB")))
    bits = plain.convert("1")
    yield HostileFile("one bit", png(bits), png(bits.convert("RGB")))
    deep = np.asarray(grey).astype(np.uint16) * 256 + 77
    shown = png(grey.convert("RGB"))
    yield HostileFile("16-bit grey", saved(Image.fromarray(deep), "PNG"), shown)
    yield HostileFile("16-bit TIFF", saved(Image.fromarray(deep), "TIFF"), shown)
    yield HostileFile("16-bit PGM", b"P5 24 18 65535\n" + deep.astype(">u2").tobytes(), shown)
    colours = (np.asarray(plain).astype(np.uint16) * 256 + 99).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in colours)
    yield HostileFile("16-bit colour", raw_png(24, 18, 16, 2, rows), png(plain))
    palette = plain.quantize(32)
    yield HostileFile("palette", png(palette), png(palette.convert("RGB")))
    clear = saved(palette, "PNG", transparency=3)
    yield HostileFile("palette with a transparent colour", clear, png(on_white(Image.open(io.BytesIO(clear)))))
    translucent = Image.merge("RGBA", [*plain.split(), grey])
    yield HostileFile("alpha", png(translucent), png(on_white(translucent)))
    yield HostileFile(
        "alpha in WebP", saved(translucent, "WEBP", lossless=True, exact=True), png(on_white(translucent))
    )
    translucent_grey = Image.merge("LA", [grey, other.convert("L")])
    yield HostileFile("grey with alpha", png(translucent_grey), png(on_white(translucent_grey)))
    cmyk = plain.convert("CMYK")
    yield HostileFile("CMYK", saved(cmyk, "TIFF"), png(cmyk.convert("RGB")))
    yield HostileFile("CMYK JPEG", saved(cmyk, "JPEG"), decodable=True)
    yield HostileFile("grey JPEG", saved(grey, "JPEG"), decodable=True)
    yield HostileFile("progressive JPEG", saved(plain, "JPEG", progressive=True), decodable=True)
    yield HostileFile("YCbCr TIFF", saved(plain.convert("YCbCr"), "TIFF"), decodable=True)
    for number, turn in TURNS.items():
        exif = Image.Exif()
        exif[0x0112] = number
        turned = Image.fromarray(np.ascontiguousarray(turn(np.asarray(plain))))
        yield HostileFile(f"EXIF orientation {number}", saved(plain, "PNG", exif=exif), png(turned))
    for format, options in (("GIF", {}), ("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {})):
        first, second = (plain.quantize(64), other.quantize(64)) if format == "GIF" else (plain, other)
        moving = saved(first, format, save_all=True, append_images=[second] * 3, **options)
        yield HostileFile(
            f"animated {format}", moving, png(next(ImageSequence.Iterator(Image.open(io.BytesIO(moving)))))
        )
    for format, options in (
        ("WEBP", {"lossless": True}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("BMP", {}),
        ("PPM", {}),
        ("JPEG2000", {"irreversible": False}),
    ):
        yield HostileFile(f"plain {format}", saved(plain, format, **options), png(plain))
    yield HostileFile("AVIF", saved(plain, "AVIF"), decodable=True)
    for width, height in ((1, 1), (1, 500), (3000, 1), (17, 33)):
        yield HostileFile(f"{width}x{height}", png(noise(width, height)), png(noise(width, height)))
    whole = png(plain)
    with io.BytesIO() as file:
        file.write(whole)
        with zipfile.ZipFile(file, "a") as archive:
            archive.writestr("x.html", "<script>")
        yield HostileFile("PNG that is also a ZIP", file.getvalue(), whole)
    yield HostileFile("PNG with a program appended", whole + b"\x7fELF" + bytes(4000), whole)
    yield HostileFile("JPEG with HTML appended", saved(plain, "JPEG") + b"<html><script>1</script>", decodable=True)
    exif = b"Exif\0\0MM\0*" + bytes(range(256)) * 20
    yield HostileFile("JPEG with a broken EXIF block", saved(plain, "JPEG", exif=exif), decodable=True)
    yield HostileFile("PNG with a colour profile of 1 MiB", saved(plain, "PNG", icc_profile=bytes(1 << 20)), whole)
    long = PngInfo()
    long.add_text("title", "\x00;DROP TABLE jobs;--" * 50)
    yield HostileFile("PNG with hostile metadata", saved(plain, "PNG", pnginfo=long), whole)


def broken_images() -> Iterator[HostileFile]:
    large = noise(200, 150)
    for format in ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "PPM", "AVIF", "JPEG2000"):
        content = saved(large, format)
        yield HostileFile(f"truncated {format}", content[: len(content) // 2], rejection="decoded|opened|image")
    gif = saved(large.quantize(64), "GIF")
    yield HostileFile("truncated GIF", gif[: len(gif) // 2], rejection="decoded")
    yield HostileFile("PNG signature only", b"\x89PNG\r\n\x1a\n", rejection="image")
    bad = bytearray(png(large))
    bad[len(bad) // 2] ^= 0xFF
    yield HostileFile("PNG with a wrong checksum", bytes(bad), rejection="decoded")
    yield HostileFile("PNG bomb of 60000x60000", raw_png(60000, 60000, 8, 2, bytes(1000)), rejection="pixels")
    yield HostileFile(
        "complete PNG bomb of 20000x20000", raw_png(20000, 20000, 1, 0, bytes(2501 * 20000)), rejection="pixels"
    )
    yield HostileFile("PNG at the pixel limit", raw_png(16000, 2500, 1, 0, bytes(2001 * 2500)), decodable=True)
    text = zlib.compress(bytes(200 << 20), 9)
    yield HostileFile("text bomb in a PNG", raw_png(4, 4, 8, 0, bytes(20), chunk(b"zTXt", b"a\0\0" + text)))
    profile = chunk(b"iCCP", b"a\0\0" + text)
    yield HostileFile("profile bomb in a PNG", raw_png(4, 4, 8, 0, bytes(20), profile))
    yield HostileFile(
        "PNG chunk longer than the file", b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 2**31 - 1) + b"IHDR" + bytes(99)
    )
    yield HostileFile("GIF of 65535x65535", b"GIF89a\xff\xff\xff\xff\0\0\0" + b",\0\0\0\0\xff\xff\xff\xff\0\x08\x00;")
    jpeg = bytearray(saved(large, "JPEG"))
    at = jpeg.find(b"\xff\xc0") + 5
    jpeg[at : at + 4] = struct.pack(">HH", 65500, 65500)
    yield HostileFile("JPEG of 65500x65500", bytes(jpeg), rejection="pixels")
    bmp = bytearray(saved(large, "BMP"))
    bmp[18:26] = struct.pack("<ii", 2**31 - 1, 2**31 - 1)
    yield HostileFile("BMP with sides of 2 billion pixels", bytes(bmp), rejection="pixels|decoded|opened")
    yield HostileFile(
        "PPM with sides of a billion pixels", b"P6 1000000000 1000000000 255\n" + bytes(99), rejection="pixels|opened"
    )
    tiff = bytearray(saved(noise(), "TIFF"))
    yield HostileFile("TIFF whose directories form a cycle", bytes(_with_directory_cycle(tiff)))
    yield HostileFile(
        "floating-point TIFF", saved(Image.fromarray(np.ones((8, 8), np.float32)), "TIFF"), rejection="floating-point"
    )
    yield HostileFile(
        "TIFF with its directory past the end of the file",
        b"II*\0\xff\xff\xff\x7f" + bytes(99),
        rejection="image|decoded",
    )
    webp = bytearray(saved(noise(), "WEBP", lossless=True))
    webp[21:25] = b"\xff\xff\xff\x0f"
    yield HostileFile("WebP of 16384x16384", bytes(webp), rejection="image|pixels|decoded")


def _with_directory_cycle(tiff: bytearray) -> bytearray:
    """Link the first directory to itself."""
    (start,) = struct.unpack("<I", tiff[4:8])
    (entries,) = struct.unpack("<H", tiff[start : start + 2])
    at = start + 2 + 12 * entries
    tiff[at : at + 4] = struct.pack("<I", start)
    return tiff


def non_images() -> Iterator[HostileFile]:
    neither = "neither an image nor a video|has no video stream"
    laughs = "".join(f'<!ENTITY l{n} "{f"&l{n - 1};" * 10}">' for n in range(1, 10))
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("zeros", bytes(50 << 20))
    yield HostileFile("an empty file", b"", rejection="zero bytes|neither")
    for name, content in {
        "one byte": b"\xff",
        "text": b"The quick brown fox. " * 500,
        "HTML": b"<!DOCTYPE html><html><body onload=alert(1)>",
        "a program": b"\x7fELF\x02\x01\x01" + bytes(5000),
        "a ZIP bomb": archive.getvalue(),
        "a gzip bomb": gzip.compress(bytes(50 << 20)),
        "a PDF": b"%PDF-1.7\n1 0 obj<</Type/Catalog>>endobj\n%%EOF",
        "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/passwd) run\nshowpage\n",
        "SVG": b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
        "a billion laughs": f'<!DOCTYPE l [<!ENTITY l0 "ha">{laughs}]><svg>&l9;</svg>'.encode(),
        "a playlist": b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n",
        "an FFmpeg concat list": b"ffconcat version 1.0\nfile /etc/passwd\n",
        "a session description": b"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nm=video 5004 RTP/AVP 96\n",
        "noise": np.random.default_rng(0).bytes(1 << 16),
        "zeros": bytes(1 << 16),
        "a pickle": b"\x80\x04\x95\x1f\x00\x00\x00cos\nsystem\n(S'true'\ntR.",
    }.items():
        yield HostileFile(name, content, rejection=neither)
    yield HostileFile("a script that starts like a GIF", b"GIF89a/*" + b"A" * 4000 + b"*/=1;alert(1)")
    yield HostileFile(
        "HTML that starts like a JPEG", b"\xff\xd8\xff\xe0<html><script>alert(1)</script>", rejection="image|decoded"
    )
    yield HostileFile("the first box of an mp4 only", b"\0\0\0\x18ftypisom\0\0\2\0isomiso2", rejection=neither)


def unusual_videos(folder: Path) -> Iterator[HostileFile]:
    still = [Image.fromarray(frame) for frame in pictures(1, 32, 24)]
    exact = {"codec": "ffv1", "pix_fmt": "bgr0"}
    lossless = write_video(folder / "one.mkv", [np.asarray(still[0])], **exact)
    yield HostileFile("a video of one frame", lossless.read_bytes(), png(still[0]))
    same = write_video(folder / "same.mkv", [np.asarray(still[0])] * 9, **exact)
    yield HostileFile("a still video", same.read_bytes(), png(still[0]))
    odd = np.asarray(noise(35, 27))
    yield HostileFile(
        "a video of 35x27", write_video(folder / "odd.mkv", [odd] * 3, **exact).read_bytes(), png(noise(35, 27))
    )
    tiny = np.asarray(noise(1, 1))
    yield HostileFile(
        "a video of 1x1", write_video(folder / "1.mkv", [tiny] * 3, **exact).read_bytes(), png(noise(1, 1))
    )
    for degrees in (90, 180, 270):
        path = write_video(folder / f"turned{degrees}.mp4", pictures(9, 32, 24))
        yield HostileFile(
            f"a video rotated by {degrees} degrees", set_rotation(path, degrees).read_bytes(), decodable=True
        )
    frames = pictures(9, 32, 24)
    for name, ending, options in (
        ("with 10 bits", "mp4", {"pix_fmt": "yuv420p10le"}),
        ("in grey", "mkv", {"codec": "ffv1", "pix_fmt": "gray"}),
        ("with alpha", "mkv", {"codec": "ffv1", "pix_fmt": "bgra"}),
        ("in VP9", "webm", {"codec": "libvpx-vp9"}),
        ("in MPEG-4 part 2", "avi", {"codec": "mpeg4"}),
        ("in a transport stream", "ts", {}),
        ("with audio", "mp4", {"audio": True}),
        ("with a variable frame rate", "mp4", {"times": [0, 1, 2, 300, 301, 900, 901, 902, 5000]}),
    ):
        path = write_video(folder / f"{name.replace(' ', '-')}.{ending}", frames, **options)
        yield HostileFile(f"a video {name}", path.read_bytes(), decodable=True)


def broken_videos(folder: Path) -> Iterator[HostileFile]:
    frames = pictures(30, 64, 48)
    whole = write_video(folder / "whole.mp4", frames).read_bytes()
    yield HostileFile("truncated mp4", whole[: len(whole) // 2], rejection="truncated")
    fast = write_video(folder / "fast.mp4", frames, container={"movflags": "faststart"}).read_bytes()
    yield HostileFile(
        "truncated mp4 with its index in front", fast[: len(fast) * 2 // 3], rejection="truncated|damaged"
    )
    webm = write_video(folder / "whole.webm", frames, codec="libvpx-vp9").read_bytes()
    yield HostileFile("truncated WebM", webm[: len(webm) // 2], rejection="truncated")
    stream = write_video(folder / "whole.ts", frames).read_bytes()
    yield HostileFile("truncated transport stream", stream[: len(stream) // 2])
    damaged = bytearray(whole)
    at = damaged.find(b"mdat") + 40
    damaged[at : at + 3000] = np.random.default_rng(0).bytes(3000)
    yield HostileFile("an mp4 with frames overwritten by noise", bytes(damaged))
    yield HostileFile("audio only", write_audio_only(folder / "sound.mp4").read_bytes(), rejection="no video stream")

    def ten_hours(box: bytearray, start: int) -> None:
        scale = struct.unpack(">I", box[start + 12 : start + 16])[0]
        box[start + 16 : start + 20] = struct.pack(">I", min(36_000 * scale, 2**32 - 1))

    for name in ("mvhd", "mdhd"):
        path = folder / f"long-{name}.mp4"
        path.write_bytes(whole)
        content = patch_box(path, name.encode(), ten_hours).read_bytes()
        yield HostileFile(f"ten hours according to the header ({name})", content)
    long = bytearray(webm)
    at = long.find(b"\x44\x89\x88")  # the Duration element, a double in milliseconds
    long[at + 3 : at + 11] = struct.pack(">d", 36_000_000.0)
    yield HostileFile("ten hours according to the header (WebM)", bytes(long), rejection="36000 s long, more than")

    def countless(box: bytearray, start: int) -> None:
        box[start + 8 : start + 12] = struct.pack(">I", 2**32 - 1)

    path = folder / "countless.mp4"
    path.write_bytes(whole)
    content = patch_box(path, b"stsz", countless).read_bytes()
    yield HostileFile("four billion frames according to the header", content)
    black = np.zeros((16, 16, 3), np.uint8)
    many = [black] * (FRAMES + 20)
    content = write_video(folder / "many.mp4", many).read_bytes()
    yield HostileFile("too many frames", content, rejection=f"more than the limit of {FRAMES}")
    path = write_video(folder / "many.avi", many, codec="mpeg4")
    yield HostileFile("too many frames without a frame count", path.read_bytes(), rejection=f"more than {FRAMES}")
    yield HostileFile(
        "frames of 49 million pixels", _large_frame(folder / "large.mov"), rejection="pixels per frame, more than"
    )
    small, large = (write_video(folder / f"{n}.ts", pictures(9, 16 * n, 16 * n)).read_bytes() for n in (2, 4))
    yield HostileFile("a stream whose frame size grows", small + large)
    ebml = b"\x1a\x45\xdf\xa3\x01\xff\xff\xff\xff\xff\xff\xff" + b"\x42\x82\x88matroska" + b"\x18\x53\x80\x67" * 2000
    yield HostileFile("recursively nested Matroska", ebml, rejection="opened|no video|truncated|read")
    boxes = b"\0\0\0\x18ftypisom\0\0\2\0isomiso2"
    for depth in range(1000):
        boxes += struct.pack(">I", 8 * (1000 - depth) + 8) + (b"moov", b"trak", b"mdia")[depth % 3]
    yield HostileFile("deeply nested mp4 boxes", boxes)
    yield HostileFile("AVI with an endless list", b"RIFF\xff\xff\xff\xffAVI LIST\xff\xff\xff\xffhdrl" + bytes(3000))
    yield HostileFile("empty FLV", b"FLV\x01\x05\0\0\0\x09" + bytes(4000))


def _large_frame(path: Path) -> bytes:
    with av.open(str(path), "w") as out:
        stream: Any = out.add_stream("png", rate=1)
        stream.width, stream.height, stream.pix_fmt = 7000, 7000, "gray"
        frame = av.VideoFrame.from_ndarray(np.zeros((7000, 7000), np.uint8), format="gray")
        out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return path.read_bytes()
