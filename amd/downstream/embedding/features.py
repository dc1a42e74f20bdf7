"""Frozen features of labelled data.

Small sets that several encoders embed are decoded into memory once; large sets are embedded batch by batch, so only the
features are held in memory. Clips are taken from the middle of each sample, without random augmentation. Unreadable
samples are skipped, counted and reported, never replaced. Does not import Ray.
Shapes: n samples, B batch, T frames, H height, W width, D encoder width.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from typing import Literal, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from amd.artifacts.weights import Card, Pooling, encode, load_encoder, whole_clips
from amd.config import ClipConfig, ConfigError, DataConfig, ScalingConfig, ViewsConfig
from amd.data.dataset.manifest import Manifest
from amd.data.dataset.open import open_manifest
from amd.data.dataset.record import FrameChooser
from amd.data.decoding.reader import DecodedFrames, SampleReader
from amd.data.faults import BadSampleLedger, DamagedSample, UnreadableSample
from amd.data.loading.clip_dataset import ClipTransform, Records, Sample
from amd.data.loading.frame_sampling import middle_chooser, views_chooser
from amd.data.loading.loader import Batch, ClipLoader
from amd.data.loading.transforms import clip_view, spatial_views
from amd.device import autocast, choose_device, choose_precision
from amd.downstream.arrays import Array, Features, Labels
from amd.downstream.embedding.cache import Part
from amd.downstream.embedding.thumbnails import ThumbnailTransform
from amd.models.encoder import Encoder
from amd.storage import is_remote, local_path

logger = logging.getLogger(__name__)
BATCH, BATCH_BYTES = 128, 2**26
FeaturePooling = Literal["mean", "mean_then_norm", "class_token"]
D = TypeVar("D", bound=DataConfig)


class LabelledClips(NamedTuple):
    clips: Tensor  # (n, 3, T, H, W) uint8
    labels: Labels  # (n,)


def read_labelled(data: DataConfig, clip: ClipConfig) -> LabelledClips:
    """Decode the middle clip of every sample of `data.train`, in manifest order.

    Keeps all clips in memory, so use it only for small data sets, as in probes. Raises ConfigError for samples without
    a label, and DataFault if more than data.max_bad_fraction of the samples cannot be read.
    """
    manifest = open_manifest(data)
    _check_labels(data, manifest)
    data = data.model_copy(update={"repeats": 1})
    ledger = BadSampleLedger()
    clips, labels = [], []
    with ClipLoader(data, clip, manifest, batch_size=min(BATCH, len(manifest)), train=False) as loader:
        for step in loader.steps(0, loader.steps_per_epoch):
            for batch in step:
                clips.append(batch.clips)
                labels.append(batch.labels)
                for bad in ledger.add(batch.bad):
                    logger.warning("skipped: %s: %s", bad["location"], bad["reason"])
    if ledger.exceeds(data.max_bad_fraction, len(manifest)) or len(ledger) == len(manifest):
        raise ledger.fault(data.max_bad_fraction, len(manifest))
    return LabelledClips(torch.cat(clips), torch.cat(labels).numpy())


def with_absolute_paths(data: D) -> D:
    """Make local paths absolute: cache keys contain them, and Ray workers run in other working directories."""
    urls = {name: getattr(data, name, None) for name in ("train", "test", "root", "cache_dir")}
    return data.model_copy(
        update={
            name: str(local_path(url))
            for name, url in urls.items()
            if url and not is_remote(url) and not url.startswith("demo:")
        }
    )


@torch.inference_mode()
def embed(encoder: Encoder, clip: ClipConfig, labelled: LabelledClips, pooling: Pooling = "mean") -> Features:
    """Embed every clip on the encoder's device."""
    device = encoder.positions.device
    parts = [encode(encoder, clip, chunk.to(device), pooling).float().cpu() for chunk in labelled.clips.split(BATCH)]
    return Features(torch.cat(parts).numpy(), labelled.labels)


@torch.inference_mode()
def embed_file(url: str, path: str) -> Array:
    """Embed one image or video file with a published encoder: (D,). Raises BadSample if it cannot be read."""
    encoder, card = load_encoder(url)
    with closing(SampleReader(DataConfig(train=path))) as reader:
        clips = cut_clips(reader.read_file(path, file_chooser(card)), card)
        if reader.last_read is not None and reader.last_read.damage is not None:
            logger.warning("using only the frames that decode: %s %s", path, reader.last_read.damage)
    values: Array = encode(encoder, card.clip, clips, card.pooling)[0].float().numpy()
    return values


def file_chooser(card: Card, views: ViewsConfig | None = None) -> FrameChooser:
    """Return a frame chooser for a file: it selects the middle clip or, with `views`, the clips of a multi-view test.

    The single frame of an image is repeated for a video encoder.
    """
    return middle_chooser(card.clip) if views is None else views_chooser(card.clip, views)


def cut_clips(frames: DecodedFrames, card: Card, views: ViewsConfig | None = None) -> Tensor:
    """Cut frames into the clips that a card specifies: (views, 3, T, H, W) uint8, ordered by segment, then by crop."""
    data, crops = DataConfig(train="", interpolation=card.interpolation), 1 if views is None else views.crops
    cuts = spatial_views(torch.from_numpy(frames.pixels), data, card.clip, crops)  # crops of (U, *size, 3)
    segments = torch.from_numpy(frames.order).split(card.clip.frames)
    return torch.stack([clip_view(cut[segment]) for segment in segments for cut in cuts])


class Embedder:
    """A frozen encoder on its device: one feature per clip."""

    def __init__(self, encoder: Encoder, clip: ClipConfig, pooling: FeaturePooling, scaling: ScalingConfig) -> None:
        """Use the device, precision and micro_batch from `scaling`.

        Raises ConfigError if a required class token or GPU is missing.
        """
        if pooling == "class_token" and encoder.class_token is None:
            raise ConfigError(
                ["pooling=class_token: this encoder has no class token; set pooling=card or pooling=mean"]
            )
        self.clip, self.pooling = clip, pooling
        self.device = choose_device(scaling.device)
        self.precision = choose_precision(scaling.precision, self.device)
        self.encoder = encoder.eval().requires_grad_(False).to(self.device)
        self.width = encoder.config.width
        pixels = 3 * clip.frames * clip.size[0] * clip.size[1]
        self.batch = scaling.micro_batch or max(1, min(BATCH, BATCH_BYTES // pixels))
        """Number of clips per batch."""

    @torch.no_grad()  # not inference mode: heads are trained on these features
    def __call__(self, clips: Tensor) -> Tensor:
        """Embed clips: (B, 3, T, H, W) uint8 -> (B, D) float32 on the device."""
        clips = clips.to(self.device, non_blocking=True)
        if self.pooling == "class_token":
            return self.tokens(clips)[:, 0]
        with autocast(self.precision, self.device):
            return encode(self.encoder, self.clip, clips, self.pooling).float()

    @torch.no_grad()
    def tokens(self, clips: Tensor) -> Tensor:
        """Encode clips: (B, 3, T, H, W) uint8 -> (B, [1 +] N, D) float32 after the last norm, class token first."""
        clips = clips.to(self.device, non_blocking=True)
        with autocast(self.precision, self.device):
            final: Tensor | None = self.encoder(*whole_clips(self.encoder, self.clip, clips)).final
        assert final is not None
        return final.float()


def embed_spans(
    embedder: Embedder, data: DataConfig, manifest: Records, spans: Iterable[range], *, thumbnails: bool = False
) -> Iterator[Part]:
    """Embed spans of records and yield one part per span."""
    for span in spans:
        yield embed_records(embedder, data, ManifestSlice(manifest, span), span.start, thumbnails=thumbnails)


def embed_records(
    embedder: Embedder, data: DataConfig, records: Records, start: int, *, thumbnails: bool = False
) -> Part:
    """Embed consecutive records; `start` is the first record's index in its manifest."""
    values, numbers = [torch.zeros(0, embedder.width)], []
    bad, damaged, images = list[UnreadableSample](), list[DamagedSample](), list[bytes]()
    transform = ThumbnailTransform(data, embedder.clip) if thumbnails else None
    for found in whole_samples(embedder, data, records, transform):
        if len(found.clips):
            values.append(embedder(found.clips).cpu())
        numbers.append(found.records + start)
        images += found.extras
        bad += [UnreadableSample({**sample, "record": sample["record"] + start}) for sample in found.bad]
        damaged += [DamagedSample({**sample, "record": sample["record"] + start}) for sample in found.damaged]
    return Part(start, torch.cat(values).numpy(), torch.cat(numbers).numpy(), bad, damaged, images)


def whole_samples(
    embedder: Embedder, data: DataConfig, records: Records, transform: ClipTransform | None = None
) -> Iterator[Batch]:
    """Yield the middle clips of all records in order, in batches for the embedder. Default transform: center crop."""
    data, batch = data.model_copy(update={"repeats": 1}), min(embedder.batch, len(records))
    loader = ClipLoader(data, embedder.clip, records, batch_size=batch, train=False, transform=transform)
    with loader:
        yield from itertools.chain.from_iterable(loader.steps(0, loader.steps_per_epoch))


class EmbeddedRecords(NamedTuple):
    """Features of the readable records in a data set, in manifest order."""

    values: Array  # (n, D)
    records: Labels  # (n,) record numbers
    bad: list[UnreadableSample]


def gather(parts: Iterable[Part], samples: int, max_bad_fraction: float) -> EmbeddedRecords:
    """Merge parts that arrive in any order. Raises DataFault as soon as too many samples are unreadable."""
    ledger = BadSampleLedger()
    values = np.zeros((0, 0), np.float32)
    read = np.zeros(samples, bool)
    for part in parts:
        if not values.size:
            values = np.empty((samples, part.values.shape[1]), np.float32)  # allocated once: the largest array
        values[part.records] = part.values
        read[part.records] = True
        for bad in ledger.add(part.bad):
            logger.warning("skipped: %s: %s", bad["location"], bad["reason"])
        if ledger.exceeds(max_bad_fraction, samples):
            raise ledger.fault(max_bad_fraction, samples)
    if not read.any():
        raise ledger.fault(max_bad_fraction, samples)
    return EmbeddedRecords(values if read.all() else values[read], np.flatnonzero(read), list(ledger))


def augmented(
    embedder: Embedder,
    data: DataConfig,
    manifest: Manifest,
    *,
    batch: int,
    epochs: int,
    seed: int,
    compute: Callable[[Tensor], Tensor] | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield features (B, D) and labels (B,) of augmented samples, in a new order every epoch.

    `compute`: function that computes features of clips, such as `embedder.tokens`. Default: the embedder itself.
    An unreadable sample is replaced by the next one in the epoch's order, as in training.
    """
    ledger = BadSampleLedger()
    with ClipLoader(data, embedder.clip, manifest, batch_size=batch, micro_batch=embedder.batch, seed=seed) as loader:
        for step in loader.steps(0, epochs * loader.steps_per_epoch):
            for found in step:
                for bad in ledger.add(found.bad):
                    logger.warning("replaced by the next sample: %s: %s", bad["location"], bad["reason"])
            if ledger.exceeds(data.max_bad_fraction, len(manifest)):
                raise ledger.fault(data.max_bad_fraction, len(manifest))
            features = [(compute or embedder)(found.clips) for found in step]
            yield torch.cat(features), torch.cat([found.labels for found in step])


class ManifestSlice:
    """Consecutive records of a manifest."""

    def __init__(self, manifest: Records, span: range) -> None:
        self._manifest, self._span = manifest, span

    def __len__(self) -> int:
        return len(self._span)

    def __getitem__(self, number: int) -> Sample:
        return self._manifest[self._span[number]]


def _check_labels(data: DataConfig, manifest: Manifest) -> None:
    unlabelled = np.flatnonzero(manifest.labels < 0)
    if len(unlabelled):
        first = manifest[int(unlabelled[0])].name
        raise ConfigError(
            [
                f"{data.train}: {len(unlabelled)} samples have no label (first: {first}); "
                "every sample of a probe must be labelled"
            ]
        )
