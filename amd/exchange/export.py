"""Export a published encoder to another format, and verify that the export produces the same output.

Files are written to a temporary folder and moved only after the reloaded export and the published encoder agree on
random pixels.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
import uuid
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from amd.artifacts.card import Card
from amd.artifacts.model_card import model_card
from amd.artifacts.weights import load_classifier, load_encoder
from amd.config import ConfigError
from amd.config import ExportFormat as Format
from amd.exchange.formats import EXPORTERS, Exporter, PixelEncoder, Written, example
from amd.storage import exists, filesystem, is_remote, local_path

TOLERANCE = 1e-5  # relative to the largest value of the output, in float32
BATCHES = (1, 3)  # sizes to compare; exporters trace with a different one
SIDECAR = "export.json"


class ExportReport(BaseModel):
    model_config = ConfigDict(frozen=True)

    encoder: str
    format: Format
    output: str
    files: tuple[str, ...]
    deviation: float
    """Largest difference from the published encoder's output, as a fraction of the largest value in that output."""
    size_mib: float
    weights_license: str | None

    def __str__(self) -> str:
        text = f"{self.encoder} as {self.format}: {self.output} ({self.size_mib:.1f} MiB: {', '.join(self.files)})\n"
        text += "the reloaded export differs from the published encoder by at most "
        text += f"{self.deviation:.1e} of the largest value"
        return text + (f"\nlicence of the weights: {self.weights_license}" if self.weights_license else "")


def export(url: str, format: Format, output: str) -> ExportReport:
    """Export the published encoder in folder `url` to `output`: a folder for timm and huggingface, otherwise a file.

    A JSON file next to it describes the input and output. Raises ConfigError if the format cannot represent the
    encoder, `output` exists or has the wrong suffix, or the reloaded export produces a different output.
    """
    if format not in EXPORTERS:
        raise ConfigError([f"format={format}: choose one of {', '.join(get_args(Format))}"])
    exporter = EXPORTERS[format]
    model = _load(url)
    _check(model.card, format, exporter, output)
    with tempfile.TemporaryDirectory(prefix="amd-export-") as temporary:
        path = Path(temporary) / Path(output.rstrip("/")).name
        if not exporter.suffixes:
            path.mkdir()
        written = _without_warnings(lambda: exporter.write(model, path))
        deviation = _deviation(model, written.run, format)
        _describe(model.card, format, path, written, deviation)
        files = sorted(item for item in Path(temporary).rglob("*") if item.is_file())
        size = sum(item.stat().st_size for item in files) / 2**20
        _move(Path(temporary), output)
    return ExportReport(
        encoder=model.card.id,
        format=format,
        output=output,
        files=tuple(item.name for item in files),
        deviation=deviation,
        size_mib=round(size, 3),
        weights_license=model.card.weights_license,
    )


def _load(url: str) -> PixelEncoder:
    encoder, card = load_encoder(url)
    if card.head is None:
        return PixelEncoder(encoder, None, card).eval()
    classifier, card = load_classifier(url)
    return PixelEncoder(classifier.encoder, classifier.head, card).eval()


def _check(card: Card, format: Format, exporter: Exporter, output: str) -> None:
    if obstacle := exporter.obstacle(card):
        others = ", ".join(name for name, other in EXPORTERS.items() if other.obstacle(card) is None)
        raise ConfigError([f"format={format} cannot represent {card.id}: {obstacle}; formats that can: {others}"])
    suffix = Path(output).suffix
    if exporter.suffixes and suffix not in exporter.suffixes:
        raise ConfigError(
            [f"output={output}: {format} writes a single file; its name must end in {' or '.join(exporter.suffixes)}"]
        )
    if exists(output):
        raise ConfigError([f"output={output}: already exists; choose another path, or remove it first"])


def _without_warnings(write: Callable[[], Written]) -> Written:
    """Suppress warnings from the export libraries."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return write()


@torch.no_grad()
def _deviation(model: PixelEncoder, run: Callable[[Tensor], Tensor], format: Format) -> float:
    worst = 0.0
    for batch in BATCHES:
        pixels = example(model.card, batch)
        ours, theirs = model(pixels), run(pixels)
        if ours.shape != theirs.shape:
            raise ConfigError(
                [f"{format}: the reloaded export returns shape {list(theirs.shape)}, expected {list(ours.shape)}"]
            )
        worst = max(worst, float((ours - theirs).abs().max() / ours.abs().max()))
    if not worst <= TOLERANCE:
        hint = ""
        if format == "huggingface" and model.card.head:
            hint = "; transformers' VideoMAE classifier uses a norm with epsilon 1e-5, ours uses 1e-6"
        raise ConfigError(
            [
                f"{format}: the reloaded export differs from the published encoder by {worst:.1e} of the largest "
                f"value, more than {TOLERANCE:.0e}; nothing was written{hint}"
            ]
        )
    return worst


def _describe(card: Card, format: Format, path: Path, written: Written, deviation: float) -> None:
    """Write the JSON file next to the export and, if the export is a folder, the model card."""
    if path.is_dir():
        (path / "README.md").write_text(model_card(card, written.usage))
    files = sorted(path.iterdir() if path.is_dir() else path.parent.iterdir())
    sidecar = path / SIDECAR if path.is_dir() else path.with_name(path.name + ".json")
    sidecar.write_text(json.dumps(_facts(card, format, files, deviation), indent=2) + "\n")


def _facts(card: Card, format: Format, files: list[Path], deviation: float) -> dict[str, Any]:
    clip, head = card.clip, card.head
    axes = ["batch", "colour", *([] if clip.is_image else ["frame"]), "row", "column"]
    return {
        "encoder": card.id,
        "format": format,
        "heads": card.encoder.heads,
        "input": {
            "pixels": "float32 RGB in [0, 1], less mean, divided by std",
            "axes": axes,
            "shape": [None, 3, *([] if clip.is_image else [clip.frames]), *clip.size],
            "mean": list(clip.mean),
            "std": list(clip.std),
            "interpolation": card.interpolation,
            "sampling_rate_frames": None if clip.is_image else clip.sampling_rate_frames,
        },
        "output": {
            "kind": card.output,
            "shape": [None, head.classes if head else card.encoder.width],
            "pooling": card.pooling,
            "multi_label": head.multi_label if head else None,
            "labels": list(head.labels) if head and head.labels else None,
        },
        "deviation": deviation,
        "weights_license": card.weights_license,
        "non_commercial": card.is_non_commercial,
        "teacher": card.teacher,
        "start": card.start,
        "source_sha256": card.sha256,
        "sha256": {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files},
        "versions": card.versions,
    }


def _move(folder: Path, output: str) -> None:
    """Move the files of `folder` to `output`; the export itself is moved last, atomically."""
    name = Path(output.rstrip("/")).name
    parent = output.rstrip("/").removesuffix(name)
    for item in sorted(folder.iterdir(), key=lambda item: item.name == name):
        if is_remote(output):
            fs, path = filesystem(parent + item.name)
            fs.put(str(item), path, recursive=item.is_dir())
            continue
        target = local_path(parent + item.name)
        target.parent.mkdir(parents=True, exist_ok=True)
        staged = target.with_name(f".{item.name}.{uuid.uuid4().hex[:8]}")
        shutil.move(item, staged)
        staged.replace(target)
