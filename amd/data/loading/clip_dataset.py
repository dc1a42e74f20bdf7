"""Read, augment and collate work items, in a loader process or in the training process.

Each work item that the DataLoader distributes contains its records, so no manifest is copied to a loader process.
Shapes: B samples, R repeats, T frames, H height, W width.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from amd.config import ClipConfig, DataConfig, ViewsConfig
from amd.data.dataset.record import FrameChooser
from amd.data.decoding.reader import BadSample, ReadFacts
from amd.data.faults import DamagedSample, DataFault, LoaderCrash, LoadingFault, UnreadableSample
from amd.data.loading import frame_sampling, order, processes, transforms
from amd.data.loading.order import SampleRange
from amd.storage import StorageUnreachable


class Sample(Protocol):
    """A record, or a task-specific sample with additional attributes."""

    @property
    def name(self) -> str: ...
    @property
    def label(self) -> int | None: ...


class Records(Protocol):
    """A sequence of samples, such as a Manifest."""

    def __len__(self) -> int: ...
    def __getitem__(self, number: int, /) -> Sample: ...


class Reader(Protocol):
    def expect(self, samples: Iterable[tuple[Any, FrameChooser]]) -> None:
        """Start fetching the remote samples that will be read next."""

    def read_clip(self, record: Any, choose: FrameChooser) -> npt.NDArray[np.uint8]: ...
    def close(self) -> None: ...


ClipTransform = Callable[[Tensor, Any, random.Random], tuple[Tensor, Any]]
"""Signature: (frames (T, H, W, 3), record, random generator) -> (clip (T, *clip.size, 3), extra), where extra is any
value that belongs to the clip, such as its transformed boxes."""


class WorkerBatch(NamedTuple):
    """A Batch as sent by a loader process.

    Only `clips` is a tensor, because each tensor in shared memory costs a file descriptor.
    """

    clips: Tensor
    labels: npt.NDArray[np.int64]
    records: npt.NDArray[np.int64]
    bad: list[UnreadableSample]
    extras: tuple[Any, ...]
    damaged: list[DamagedSample]
    decoders: list[str]


class WorkItem(NamedTuple):
    """A micro-batch to read. Items from an earlier `run` of the loop are discarded."""

    run: int
    sample_range: SampleRange
    records: list[Sample]  # records with the numbers in sample_range.numbers
    following: tuple[WorkItem, ...] | None = None
    """Next items for the same loader process, whose samples are fetched ahead; None: those of an earlier item."""

    def with_following(self, items: Iterable[WorkItem] | None) -> WorkItem:
        """Add the next items, without their substitute records, which are not fetched ahead."""
        if items is None:
            return self
        return self._replace(
            following=tuple(item._replace(records=item.records[: item.sample_range.size]) for item in items)
        )


class ClipDataset(Dataset[Any]):
    """Reads work items, with a reader opened in the process that uses it: a loader process or the training process."""

    def __init__(
        self,
        data: DataConfig,
        clip: ClipConfig,
        seed: int,
        train: bool,
        views: ViewsConfig | None,
        transform: ClipTransform | None,
        open_reader: Callable[[DataConfig], Reader],
        current_run: Any,
    ) -> None:
        self.data, self.clip, self.seed, self.train, self.views = data, clip, seed, train, views
        self.clips_per_sample = clips_per_sample_of(data, views)
        self._transform, self._open_reader, self._current_run = transform, open_reader, current_run
        self._reader: Reader | None = None
        self._unreadable: dict[int, UnreadableSample] = {}
        self._damaged: list[DamagedSample] = []  # in the current batch
        self._decoders: list[str] = []

    def __getitem__(self, item: WorkItem) -> WorkerBatch | LoadingFault:
        repeats, sample_range = self.clips_per_sample, item.sample_range
        clips = processes.empty_uint8(sample_range.size * repeats, self.clip.frames, *self.clip.size, 3)
        labels: list[int] = []
        numbers: list[int] = []
        bad: list[UnreadableSample] = []
        extras: list[Any] = []
        self._damaged, self._decoders = [], []
        for i in range(sample_range.size):
            if self._is_outdated(item):
                break
            try:
                if i == 0 and item.following is not None:
                    self._expect(item, *item.following)
                found = self._fill(clips[len(labels) :][:repeats], item, i, bad, extras)
            except (DataFault, LoaderCrash, StorageUnreachable) as fault:
                return fault  # returned, because torch adds a traceback to the message of a raised exception
            if found is not None:
                number, label = found
                numbers += [number] * repeats
                labels += [label] * repeats
        clips = transforms.clip_view(clips[: len(labels)])
        arrays = np.array(labels, np.int64), np.array(numbers, np.int64)
        return WorkerBatch(clips, *arrays, bad, tuple(extras), self._damaged, self._decoders)

    def close(self) -> None:
        if self._reader is not None:
            self._reader.close()
            self._reader = None

    def _expect(self, *items: WorkItem) -> None:
        """Start fetching the remote samples for these items."""
        samples = []
        for item in items:
            for i, number in enumerate(item.sample_range.numbers[: item.sample_range.size]):
                if number not in self._unreadable:
                    samples.append((item.records[i], partial(self._frames_of, item.sample_range, i)))
        self._reader_of_process().expect(samples)

    def _frames_of(self, sample_range: SampleRange, i: int, total: int) -> npt.NDArray[np.int64]:
        """Return the frame numbers that the sample at position i will use. Only frame folders need them in advance."""
        return self._chooser(self._draws(sample_range, i))(total)

    def _is_outdated(self, item: WorkItem) -> bool:
        return self._current_run is not None and item.run != self._current_run.value

    def _fill(
        self, out: Tensor, item: WorkItem, i: int, bad: list[UnreadableSample], extras: list[Any]
    ) -> tuple[int, int] | None:
        """Write the clips of the first readable record for position i to `out` (R, T, H, W, 3); return (index, label).

        Appends unreadable samples to `bad`, and values returned by a ClipTransform to `extras`. Evaluation tries only
        the record at position i, and returns None if it is unreadable. Raises DataFault in training if no record is
        readable.
        """
        sample_range, unreadable = item.sample_range, list[UnreadableSample]()
        for attempt in range(1 + len(sample_range.numbers) - sample_range.size):
            number, record = sample_range.numbers[i + attempt], item.records[i + attempt]
            draws = self._draws(sample_range, i, attempt)
            frames = self._read(number, record, draws)
            if isinstance(frames, Tensor):
                for row, clip in zip(out, self._clips(frames, record, draws, extras), strict=True):
                    row.copy_(clip)
                bad += unreadable
                return number, -1 if record.label is None else record.label
            unreadable.append(frames)
        bad += unreadable
        if not self.train:
            return None
        raise DataFault(
            f"data.train={self.data.train}: {len(unreadable)} samples in a row cannot be read; check the data with "
            f"`amd validate data.train={self.data.train}`\n"
            + "\n".join(f"  {sample['location']}: {sample['reason']}" for sample in unreadable)
        )

    def _read(self, number: int, record: Sample, draws: frame_sampling.Draws) -> Tensor | UnreadableSample:
        """Return frames (T, H, W, 3) uint8, or an UnreadableSample if the sample is unreadable.

        A failed sample is not read again, because every attempt may take as long as the time limit.
        """
        if number in self._unreadable:
            return self._unreadable[number]
        try:
            reader = self._reader_of_process()
            frames = torch.from_numpy(reader.read_clip(record, self._chooser(draws)))
            self._note(number, record, getattr(reader, "last_read", None))
            return frames
        except BadSample as error:
            self._unreadable[number] = UnreadableSample(record=number, location=record.name, reason=error.reason)
            return self._unreadable[number]

    def _reader_of_process(self) -> Reader:
        if self._reader is None:
            self._reader = self._open_reader(self.data)
        return self._reader

    def _draws(self, sample_range: SampleRange, i: int, attempt: int = 0) -> random.Random:
        return order.sample_draws(self.seed, sample_range.epoch, sample_range.position + i, attempt)

    def _note(self, number: int, record: Sample, facts: ReadFacts | None) -> None:
        """Record how a video was read, for the current batch."""
        if facts is None:
            return
        self._decoders.append(facts.decoder)
        if facts.damage is not None:
            self._damaged.append(DamagedSample(record=number, location=record.name, reason=str(facts.damage)))

    def _chooser(self, draws: frame_sampling.Draws) -> FrameChooser:
        if self.train:
            return frame_sampling.training_chooser(self.data, self.clip, draws)
        return (
            frame_sampling.views_chooser(self.clip, self.views)
            if self.views
            else frame_sampling.middle_chooser(self.clip)
        )

    def _clips(self, frames: Tensor, record: Sample, draws: random.Random, extras: list[Any]) -> Iterator[Tensor]:
        """Yield the clips of one sample, each (T, *clip.size, 3)."""
        if self._transform is not None:
            for _ in range(self.clips_per_sample):
                clip, extra = self._transform(frames, record, draws)
                extras.append(extra)
                yield clip
            return
        if self.views is None:
            for _ in range(self.data.repeats):
                yield (
                    transforms.augment(frames, self.data, self.clip, draws)
                    if self.train
                    else transforms.center(frames, self.data, self.clip)
                )
            return
        for segment in frames.split(self.clip.frames):
            yield from transforms.spatial_views(segment, self.data, self.clip, self.views.crops)


def clips_per_sample_of(data: DataConfig, views: ViewsConfig | None) -> int:
    return views.segments * views.crops if views else data.repeats
