"""Helpers that publish tiny encoders, create images and videos for them, and find decoding processes."""

from __future__ import annotations

import asyncio
import io
import os
from collections.abc import Awaitable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image

from amd.artifacts.weights import Card, HeadCard, save_encoder
from amd.config import ClipConfig, EncoderConfig
from amd.models.classifier import Classifier
from amd.models.encoder import Encoder
from tests.support.data.videos import pictures, write_video

T = TypeVar("T")
SMALL = EncoderConfig(width=24, depth=2, heads=3)
IMAGE = ClipConfig(frames=1, size=(16, 16), patch=4, tubelet=1)
VIDEO = ClipConfig(frames=4, size=(16, 16), patch=4, tubelet=2, sampling_rate_frames=2)


def publish(folder: Path, clip: ClipConfig = IMAGE, seed: int = 0, **card: Any) -> str:
    """Publish an encoder with random weights. Its ID is the folder's name."""
    torch.manual_seed(seed)
    encoder = Encoder(SMALL, clip.grid, clip.token_values)
    save_encoder(str(folder), encoder, Card(id=folder.name, encoder=SMALL, clip=clip, **card))
    return str(folder)


def publish_classifier(folder: Path, clip: ClipConfig = IMAGE, classes: int = 7, **head: Any) -> tuple[str, Classifier]:
    torch.manual_seed(1)
    classifier = Classifier(SMALL, clip.grid, clip.token_values, classes, init_scale=50.0).eval()
    card = Card(
        id=folder.name,
        encoder=SMALL,
        clip=clip,
        pooling="mean_then_norm",
        head=HeadCard(classes=classes, **head),
        objective="finetune",
    )
    save_encoder(str(folder), classifier.encoder, card, classifier.head)
    return str(folder), classifier


def picture(seed: int = 0, size: tuple[int, int] = (40, 30)) -> bytes:
    """Create a PNG of random pixels."""
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, "PNG")
    return file.getvalue()


def film(path: Path, seed: int = 0, frames: int = 16) -> Path:
    return write_video(path, pictures(frames, 48, 32, seed))


def run(act: Awaitable[T]) -> T:
    async def main() -> T:
        return await act

    return asyncio.run(main())


def decoding_processes() -> list[int]:
    """Return the PIDs of the decoding processes that this process started."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            ours = int(stat.read_text().rpartition(")")[2].split()[1]) == os.getpid()
            if ours and b"amd.data.decoding.worker" in (stat.parent / "cmdline").read_bytes():
                found.append(int(stat.parent.name))
        except OSError:
            continue
    return sorted(found)
