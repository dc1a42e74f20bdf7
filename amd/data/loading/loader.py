"""Batches of clips for one training worker: read, cut and put together in processes of their own, in a fixed order.

Knows nothing of networks or Ray. Every random choice follows from (seed, epoch, position in the epoch's order), so the
stream is the same to the bit for any number of reading processes, any number of training workers, any place to start.

Reading processes come from a fork server: a process that has imported torch and nothing else, from which each is forked
in milliseconds. Forking the training process itself is unsafe: a thread of torch, Ray, s3fs or a checkpoint upload may
hold a lock in that very moment, and a reader opened before a fork hangs. The manifest stays in the training process; a
reading process is given the records it is to read with each piece of work. Clips travel in shared memory, as uint8.
Shapes: B samples, R repeats, T frames, H height, W width.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from functools import partial
from types import TracebackType
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from amd.config import ClipConfig, ConfigError, DataConfig, ViewsConfig
from amd.data.decoding.reader import BadSample, SampleReader
from amd.data.faults import Bad, BadSampleLedger, DataFault, LoaderCrash
from amd.data.loading import frame_sampling, order, processes, transforms
from amd.data.loading.order import Plan, Span

__all__ = ["Bad", "BadSampleLedger", "Batch", "ClipLoader", "DataFault", "LoaderCrash"]


class Batch(NamedTuple):
    """The clips of one micro-batch. Row i x R + k is the k-th clip of sample i."""

    clips: Tensor  # (B x R, 3, T, H, W) uint8; colours last in memory, as they were decoded
    labels: Tensor  # (B x R,) int64, -1 where there is none
    records: Tensor  # (B x R,) int64, record numbers
    bad: list[Bad]  # samples that could not be read, whose places were taken by others
    extras: tuple[Any, ...] = ()  # B x R things that a `Cut` gave beside the clips


class Sample(Protocol):
    """A record, or what stands for one where a task knows more of it."""

    @property
    def name(self) -> str: ...
    @property
    def label(self) -> int | None: ...


class Records(Protocol):
    """A manifest."""

    def __len__(self) -> int: ...
    def __getitem__(self, number: int, /) -> Sample: ...


class Reader(Protocol):
    def read_clip(self, record: Any, choose: frame_sampling.Choose) -> npt.NDArray[np.uint8]: ...
    def close(self) -> None: ...


Cut = Callable[[Tensor, Any, random.Random], tuple[Tensor, Any]]
"""Frames (T, H, W, 3), their record and its draws -> the clip (T, *clip.size, 3), and what belongs to it (boxes that
moved with the pixels)."""


class Filled(NamedTuple):
    """A Batch on its way out of a reading process: only clips in shared memory, each tensor there takes a file."""

    clips: Tensor
    labels: npt.NDArray[np.int64]
    records: npt.NDArray[np.int64]
    bad: list[Bad]
    extras: tuple[Any, ...]


class Work(NamedTuple):
    """A micro-batch to read. Work of an earlier `run` of the loop is not wanted any more."""

    run: int
    span: Span
    records: list[Sample]  # of span.numbers


class ClipLoader:
    """Reads a manifest for one rank of a training. Close it, or use it in a `with`.

    batch_size: samples per optimiser step over all ranks; micro_batch: most samples in one Batch.
    train=False is for evaluation: manifest order, every record once (the last step is short), the middle clip, a
    center crop; bad samples are named and left out, not stood in for. `views` of a test look at every record several
    times instead: row i x V + k of a Batch is view k of sample i, k = segment x crops + crop.
    `cut` cuts clips in place of data.crop and the like; it travels to the reading processes, as `open_reader` does.
    Raises ConfigError for data without samples, or fewer than a step takes.
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
        cut: Cut | None = None,
        open_reader: Callable[[DataConfig], Reader] = SampleReader,
    ) -> None:
        assert not (train and views), "views are for tests"
        _check_counts(data, len(manifest), batch_size, train)
        share = len(order.share(batch_size, rank, world))
        micro_batch = min(micro_batch or share, share) or 1
        self.data, self.manifest = data, manifest
        self.plan = Plan(
            len(manifest), batch_size, rank=rank, world=world, micro_batch=micro_batch, seed=seed, train=train
        )
        self._steps = range(0)
        self._current = None
        if data.loader_workers:
            clip_bytes = clip.frames * clip.size[0] * clip.size[1] * 3
            processes.check_shared_memory(data, micro_batch, _clips_per_sample(data, views), clip_bytes)
            self._current = processes.fork_server(*_heavy_modules(data, train)).Value("q", 0)
        self._reading = _Reading(data, clip, seed, train, views, cut, open_reader, self._current)
        self._loader: DataLoader[Any] | None = None

    @property
    def steps_per_epoch(self) -> int:
        return self.plan.steps_per_epoch

    def steps(self, start_step: int, stop_step: int) -> Iterator[list[Batch]]:
        """This rank's micro-batches of each optimiser step; steps count over the whole run, from 0.

        Reads ahead data.prefetch_batches micro-batches per reading process. Leaving the loop early drops what was read.
        Raises DataFault where no readable record is found for a place, LoaderCrash when a reading process ends.
        """
        self._steps = range(start_step, stop_step)
        batches = self._batches()
        try:
            for step in self._steps:
                yield [next(batches) for _ in self.plan.parts(step)]
        except GeneratorExit:
            self._drop_pending()
            raise

    def close(self) -> None:
        """Ends the reading processes, at most one sample later."""
        self._drop_pending()
        loader, self._loader = self._loader, None
        if loader is not None:
            processes.stop(loader)
        self._reading.close()

    def __enter__(self) -> ClipLoader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def __iter__(self) -> Iterator[Work]:
        """The work of the steps asked for; the DataLoader hands it to its processes."""
        run = self._current.value if self._current is not None else 0
        for span in self.plan.spans(self._steps.start, self._steps.stop):
            yield Work(run, span, [self.manifest[number] for number in span.numbers])

    def _drop_pending(self) -> None:
        if self._current is not None:
            self._current.value += 1

    def _batches(self) -> Iterator[Batch]:
        if self._loader is None:
            self._loader = self._open()
        with processes.main_hidden():
            batches = iter(self._loader)
        while True:
            try:
                batch: Filled | DataFault | None = next(batches, None)
            except RuntimeError as error:
                if not processes.is_death(error):
                    raise
                self.close()
                raise LoaderCrash(
                    f"a process that reads data.train={self.data.train} ended by itself: killed, out of memory, or a "
                    f"crash in a library ({error}). If memory is short, lower data.loader_workers="
                    f"{self.data.loader_workers} or data.prefetch_batches={self.data.prefetch_batches}"
                ) from None
            if batch is None:
                return
            if isinstance(batch, DataFault):
                raise batch
            labels, records = torch.from_numpy(batch.labels), torch.from_numpy(batch.records)
            yield Batch(batch.clips, labels, records, batch.bad, batch.extras)

    def _open(self) -> DataLoader[Any]:
        several: dict[str, Any] = {
            "multiprocessing_context": processes.fork_server(),
            "persistent_workers": True,
            "prefetch_factor": self.data.prefetch_batches,
            "worker_init_fn": partial(processes.enter, dict(os.environ)),
        }
        return DataLoader(
            self._reading,
            batch_size=None,
            sampler=self,  # any iterable of what the dataset is asked for
            collate_fn=_as_it_is,
            num_workers=self.data.loader_workers,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # without one, each start would draw from torch's global stream
            **(several if self.data.loader_workers else {}),
        )


class _Reading(Dataset[Any]):
    """Does the work, in a reading process or, without any, in the training process; its reader is opened there."""

    def __init__(
        self,
        data: DataConfig,
        clip: ClipConfig,
        seed: int,
        train: bool,
        views: ViewsConfig | None,
        cut: Cut | None,
        open_reader: Callable[[DataConfig], Reader],
        current: Any,
    ) -> None:
        self.data, self.clip, self.seed, self.train, self.views = data, clip, seed, train, views
        self.clips_per_sample = _clips_per_sample(data, views)
        self._cut, self._open_reader, self._current = cut, open_reader, current
        self._reader: Reader | None = None
        self._known: dict[int, Bad] = {}

    def __getitem__(self, work: Work) -> Filled | DataFault:
        repeats, span = self.clips_per_sample, work.span
        clips = processes.empty_bytes(span.places * repeats, self.clip.frames, *self.clip.size, 3)
        labels: list[int] = []
        numbers: list[int] = []
        bad: list[Bad] = []
        extras: list[Any] = []
        for i in range(span.places):
            if self._current is not None and work.run != self._current.value:
                break
            try:
                record = self._fill(clips[len(labels) :][:repeats], work, i, bad, extras)
            except DataFault as fault:
                return fault  # as a value: torch would put a traceback into its message
            if record is not None:
                number, label = record
                numbers += [number] * repeats
                labels += [label] * repeats
        clips = transforms.clip_view(clips[: len(labels)])
        return Filled(clips, np.array(labels, np.int64), np.array(numbers, np.int64), bad, tuple(extras))

    def close(self) -> None:
        if self._reader is not None:
            self._reader.close()
            self._reader = None

    def _fill(self, out: Tensor, work: Work, i: int, bad: list[Bad], extras: list[Any]) -> tuple[int, int] | None:
        """Clips of the first readable record for the i-th place, into `out` (R, T, H, W, 3): its number and label.

        Names the unreadable ones met in `bad`, adds to `extras` what a `Cut` gives. Evaluation looks no further
        than the place's own record.
        """
        span, met = work.span, list[Bad]()
        for attempt in range(1 + len(span.numbers) - span.places):
            number, record = span.numbers[i + attempt], work.records[i + attempt]
            draws = order.sample_draws(self.seed, span.epoch, span.position + i, attempt)
            frames = self._read(number, record, draws)
            if isinstance(frames, Tensor):
                for clip, cut in zip(out, self._cuts(frames, record, draws, extras), strict=True):
                    clip.copy_(cut)
                bad += met
                return number, -1 if record.label is None else record.label
            met.append(frames)
        bad += met
        if not self.train:
            return None
        raise DataFault(
            f"data.train={self.data.train}: {len(met)} samples in a row cannot be read; look at "
            f"`amd validate data.train={self.data.train}`\n"
            + "\n".join(f"  {sample['location']}: {sample['reason']}" for sample in met)
        )

    def _read(self, number: int, record: Sample, draws: frame_sampling.Draws) -> Tensor | Bad:
        """Frames (T, H, W, 3) uint8, or what is wrong. A bad sample is not read again: it may stall for long."""
        if number in self._known:
            return self._known[number]
        if self._reader is None:
            self._reader = self._open_reader(self.data)
        try:
            return torch.from_numpy(self._reader.read_clip(record, self._chooser(draws)))
        except BadSample as error:
            self._known[number] = Bad(record=number, location=record.name, reason=error.reason)
            return self._known[number]

    def _chooser(self, draws: frame_sampling.Draws) -> frame_sampling.Choose:
        if self.train:
            return frame_sampling.chooser(self.data, self.clip, draws)
        return (
            frame_sampling.views_chooser(self.clip, self.views)
            if self.views
            else frame_sampling.middle_chooser(self.clip)
        )

    def _cuts(self, frames: Tensor, record: Sample, draws: random.Random, extras: list[Any]) -> Iterator[Tensor]:
        """The clips of one sample, each (T, *clip.size, 3)."""
        if self._cut is not None:
            for _ in range(self.clips_per_sample):
                clip, extra = self._cut(frames, record, draws)
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
    """Imports that cost seconds: done once in the fork server rather than in every reading process."""
    return ["timm.data.auto_augment"] if train and data.rand_augment else []


def _as_it_is(batch: Any) -> Any:
    return batch


def _check_counts(data: DataConfig, records: int, batch_size: int, train: bool) -> None:
    if not records:
        raise ConfigError([f"data.train={data.train}: holds no samples; see what it finds with `amd validate`"])
    if train and records < batch_size:
        raise ConfigError(
            [
                f"optim.batch_size={batch_size} is above the {records} samples of data.train={data.train}: a step "
                f"takes that many different ones; lower optim.batch_size to {records} or less, or add data"
            ]
        )
