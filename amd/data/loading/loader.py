"""Load batches of clips for one training worker: loader processes read, augment and collate in a fixed order.

Imports neither models nor Ray. Every random choice is a function of (seed, epoch, position in the epoch's order), so
the stream is bit-identical for any number of loader processes and training workers, and from any step.

Loader processes are forked from a fork server that has only imported torch, which takes milliseconds. Forking the
training process is unsafe: a thread of torch, Ray, s3fs or a checkpoint upload may hold a lock at that moment, and a
reader opened before a fork hangs. The manifest stays in the training process; each work item carries its records.
Clips are passed as uint8 in shared memory.
Shapes: B samples, R repeats, T frames, H height, W width.
"""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from types import TracebackType
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from amd.config import ClipConfig, DataConfig, ViewsConfig
from amd.data.dataset.record import FrameChooser
from amd.data.decoding.reader import BadSample, ReadFacts, SampleReader, check_decoder
from amd.data.faults import BadSampleLedger, DamagedSample, DataFault, LoaderCrash, SampleLedger, UnreadableSample
from amd.data.loading import frame_sampling, order, processes, transforms
from amd.data.loading.order import EpochPlan, SampleRange
from amd.storage import is_remote

__all__ = ["BadSampleLedger", "Batch", "ClipLoader", "DataFault", "LoaderCrash", "UnreadableSample"]


logger = logging.getLogger(__name__)


class Batch(NamedTuple):
    """The clips of one micro-batch. Row i x R + k is the k-th clip of sample i."""

    clips: Tensor  # (B x R, 3, T, H, W) uint8; channels last in memory, as decoded
    labels: Tensor  # (B x R,) int64, -1 if unlabelled
    records: Tensor  # (B x R,) int64, record numbers
    bad: list[UnreadableSample]  # samples that could not be read; in training, others replace them
    extras: tuple[Any, ...] = ()  # B x R values that a ClipTransform returned with the clips
    damaged: Sequence[DamagedSample] = ()  # videos of which only some frames are used
    decoders: Sequence[str] = ()  # decoder of each video


class Sample(Protocol):
    """A record, or a task-specific sample with more attributes."""

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
        """Start to fetch samples that will be read next from remote storage."""

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
    """A micro-batch to read. Items of an earlier `run` of the loop are discarded."""

    run: int
    sample_range: SampleRange
    records: list[Sample]  # of sample_range.numbers
    following: WorkItem | None = None  # the next item of the same loader process, if its samples are fetched ahead


class ClipLoader:
    """Loads the samples of a manifest for one rank. Use it as a context manager, or call `close()`.

    batch_size: samples per optimizer step, across all ranks; micro_batch: maximum samples in one Batch.
    With train=False, for evaluation, every record is read once in manifest order (the last step may be short), with the
    middle clip and a center crop; unreadable samples are reported and skipped without a substitute. `views`: several
    test views per record; row i x V + k of a Batch is view k of sample i, with k = segment x crops + crop. `transform`
    replaces the crop and flip of `data`; like `open_reader` it is pickled to the loader processes. `node_ranks`: ranks
    that share this machine's memory. Raises ConfigError if the data has no samples, or fewer than one step needs, or if
    its decoder is not installed.
    """

    def __init__(
        self,
        data: DataConfig,
        clip: ClipConfig,
        manifest: Records,
        *,
        batch_size: int,
        rank: int = 0,
        world: int = 1,
        micro_batch: int | None = None,
        seed: int = 0,
        train: bool = True,
        views: ViewsConfig | None = None,
        transform: ClipTransform | None = None,
        open_reader: Callable[[DataConfig], Reader] = SampleReader,
        node_ranks: int = 1,
    ) -> None:
        assert not (train and views), "views are for evaluation"
        check_decoder(data)
        order.check_counts(data, len(manifest), batch_size, train)
        share = len(order.share(batch_size, rank, world))
        micro_batch = min(micro_batch or share, share) or 1
        self.data, self.manifest = data, manifest
        self.plan = EpochPlan(
            len(manifest), batch_size, rank=rank, world=world, micro_batch=micro_batch, seed=seed, train=train
        )
        self._steps = range(0)
        self._current_run = None
        if data.loader_workers:
            clip_bytes = clip.frames * clip.size[0] * clip.size[1] * 3
            processes.check_shared_memory(data, micro_batch, _clips_per_sample(data, views), clip_bytes, node_ranks)
            self._current_run = processes.fork_server(*_heavy_modules(data, train)).Value("q", 0)
        self._dataset = _ClipDataset(data, clip, seed, train, views, transform, open_reader, self._current_run)
        self._loader: DataLoader[Any] | None = None
        self._damaged = SampleLedger[DamagedSample]()

    @property
    def steps_per_epoch(self) -> int:
        return self.plan.steps_per_epoch

    def steps(self, start_step: int, stop_step: int) -> Iterator[list[Batch]]:
        """Yield this rank's micro-batches for each optimizer step; steps are numbered over the whole run, from 0.

        Each loader process prefetches data.prefetch_batches micro-batches. Leaving the loop early discards them.
        Raises DataFault if a position has no readable record, or LoaderCrash if a loader process dies.
        """
        self._steps = range(start_step, stop_step)
        batches = self._batches()
        try:
            for step in self._steps:
                yield [next(batches) for _ in self.plan.rank_micro_batches(step)]
        except GeneratorExit:
            self._drop_pending()
            raise

    def pids(self) -> list[int]:
        """Return the ids of the loader processes."""
        return [] if self._loader is None else processes.worker_pids(self._loader)

    def close(self) -> None:
        """Stop the loader processes; each may first finish its current sample."""
        self._drop_pending()
        loader, self._loader = self._loader, None
        if loader is not None:
            processes.stop_workers(loader)
        self._dataset.close()

    def __enter__(self) -> ClipLoader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def __iter__(self) -> Iterator[WorkItem]:
        """Yield the work items of the requested steps, which the DataLoader distributes to its processes."""
        run = self._current_run.value if self._current_run is not None else 0
        ranges = self.plan.sample_ranges(self._steps.start, self._steps.stop)
        items = (WorkItem(run, one, [self.manifest[number] for number in one.numbers]) for one in ranges)
        if self.data.read_ahead_mib and is_remote(self.manifest[0].name):
            # torch hands items to its processes in turn, so that item n is followed by item n + loader_workers.
            pairs = order.with_following(items, max(1, self.data.loader_workers))
            items = (item._replace(following=following) for item, following in pairs)
        yield from items

    def _drop_pending(self) -> None:
        if self._current_run is not None:
            self._current_run.value += 1

    def _batches(self) -> Iterator[Batch]:
        if self._loader is None:
            self._loader = self._open()
        with processes.hide_main_module():
            batches = iter(self._loader)
        while True:
            try:
                batch: WorkerBatch | DataFault | LoaderCrash | None = next(batches, None)
            except RuntimeError as error:
                if not processes.is_worker_death(error):
                    raise
                self.close()
                raise LoaderCrash(
                    f"a loader process for data.train={self.data.train} died: it was killed, ran out of memory, or "
                    f"crashed in a library ({error}). If memory is short, lower data.loader_workers="
                    f"{self.data.loader_workers} or data.prefetch_batches={self.data.prefetch_batches}"
                ) from None
            if batch is None:
                return
            if isinstance(batch, DataFault | LoaderCrash):
                raise batch
            labels, records = torch.from_numpy(batch.labels), torch.from_numpy(batch.records)
            if not self._dataset.train:  # a training run lists them in its folder
                for sample in self._damaged.add(batch.damaged):
                    logger.warning("used as far as it decodes: %s %s", sample["location"], sample["reason"])
            yield Batch(batch.clips, labels, records, batch.bad, batch.extras, batch.damaged, batch.decoders)

    def _open(self) -> DataLoader[Any]:
        worker_options: dict[str, Any] = {
            "multiprocessing_context": processes.fork_server(),
            "persistent_workers": True,
            "prefetch_factor": self.data.prefetch_batches,
            "worker_init_fn": partial(processes.init_worker, dict(os.environ)),
        }
        return DataLoader(
            self._dataset,
            batch_size=None,
            sampler=self,  # any iterable of dataset indices; here, work items
            collate_fn=_identity,
            num_workers=self.data.loader_workers,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # otherwise each start would draw from torch's global stream
            **(worker_options if self.data.loader_workers else {}),
        )


class _ClipDataset(Dataset[Any]):
    """Reads work items, in a loader process or in the training process; opens its reader where it runs."""

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
        self.clips_per_sample = _clips_per_sample(data, views)
        self._transform, self._open_reader, self._current_run = transform, open_reader, current_run
        self._reader: Reader | None = None
        self._unreadable: dict[int, UnreadableSample] = {}
        self._damaged: list[DamagedSample] = []  # of the current batch
        self._decoders: list[str] = []

    def __getitem__(self, item: WorkItem) -> WorkerBatch | DataFault | LoaderCrash:
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
                if i == 0:
                    self._expect(item)
                found = self._fill(clips[len(labels) :][:repeats], item, i, bad, extras)
            except (DataFault, LoaderCrash) as fault:
                return fault  # returned, since torch adds a traceback to the message of a raised one
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

    def _expect(self, item: WorkItem) -> None:
        """Start to fetch the remote samples of this item and the following one, without substitutes."""
        if not self.data.read_ahead_mib or not is_remote(item.records[0].name):
            return
        samples = []
        for part in (item,) if item.following is None else (item, item.following):
            for i, number in enumerate(part.sample_range.numbers[: part.sample_range.size]):
                if number not in self._unreadable:
                    samples.append((part.records[i], self._chooser(self._draws(part.sample_range, i))))
        self._reader_of_process().expect(samples)

    def _is_outdated(self, item: WorkItem) -> bool:
        return self._current_run is not None and item.run != self._current_run.value

    def _fill(
        self, out: Tensor, item: WorkItem, i: int, bad: list[UnreadableSample], extras: list[Any]
    ) -> tuple[int, int] | None:
        """Write the clips of the first readable record for position i to `out` (R, T, H, W, 3); return (index, label).

        Appends unreadable samples to `bad` and the values of a ClipTransform to `extras`. Evaluation tries only the
        record at that position.
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
            f"data.train={self.data.train}: {len(unreadable)} samples in a row cannot be read; check with "
            f"`amd validate data.train={self.data.train}`\n"
            + "\n".join(f"  {sample['location']}: {sample['reason']}" for sample in unreadable)
        )

    def _read(self, number: int, record: Sample, draws: frame_sampling.Draws) -> Tensor | UnreadableSample:
        """Return frames (T, H, W, 3) uint8, or the unreadable sample.

        A sample that has failed is not read again, because reading it may take until the time limit.
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
        """Note how a video was read, for the current batch."""
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


def _clips_per_sample(data: DataConfig, views: ViewsConfig | None) -> int:
    return views.segments * views.crops if views else data.repeats


def _heavy_modules(data: DataConfig, train: bool) -> list[str]:
    """Return slow imports to preload in the fork server rather than in every loader process."""
    return ["timm.data.auto_augment"] if train and data.rand_augment else []


def _identity(batch: Any) -> Any:
    return batch
