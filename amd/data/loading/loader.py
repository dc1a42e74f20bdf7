"""Load batches of clips for one training worker: loader processes read, augment and collate in deterministic order.

Imports neither models nor Ray. Every random choice is a function of (seed, epoch, position in the epoch's order), so
the stream is bit-identical for any number of loader processes and training workers, and from any step.

Loader processes are forked in milliseconds from a fork server that has only imported torch. Forking the training
process is unsafe: a thread of torch, Ray, s3fs or a checkpoint upload may hold a lock during the fork, and a reader
opened before a fork hangs. The manifest stays in the training process; each work item carries its records.
Clips are passed as uint8 in shared memory.
Shapes: B samples, R repeats, T frames, H height, W width.
"""

from __future__ import annotations

import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from amd.config import ClipConfig, DataConfig, ViewsConfig
from amd.data.decoding.reader import SampleReader, check_decoder
from amd.data.faults import (
    BadSampleLedger,
    DamagedSample,
    DataFault,
    LoaderCrash,
    LoadingFault,
    SampleLedger,
    UnreadableSample,
)
from amd.data.loading import order, processes
from amd.data.loading.clip_dataset import (
    ClipDataset,
    ClipTransform,
    Reader,
    Records,
    WorkerBatch,
    WorkItem,
    clips_per_sample_of,
)
from amd.data.loading.order import EpochPlan
from amd.storage import is_remote

__all__ = ["BadSampleLedger", "Batch", "ClipLoader", "DataFault", "LoaderCrash", "UnreadableSample"]


READ_AHEAD_SAMPLES = 64  # fetched ahead by a loader process, so that small batches do not wait for every request

logger = logging.getLogger(__name__)


class Batch(NamedTuple):
    """The clips of one micro-batch. Row i x R + k is clip k of sample i."""

    clips: Tensor  # (B x R, 3, T, H, W) uint8; channels last in memory, as decoded
    labels: Tensor  # (B x R,) int64, -1 if unlabelled
    records: Tensor  # (B x R,) int64, record numbers
    bad: list[UnreadableSample]  # samples that could not be read; in training, they are replaced by others
    extras: tuple[Any, ...] = ()  # B x R values that a ClipTransform returned with the clips
    damaged: Sequence[DamagedSample] = ()  # partially decoded videos
    decoders: Sequence[str] = ()  # decoder of each video


class ClipLoader:
    """Loads the samples of a manifest for one rank. Use it as a context manager, or call `close()`.

    batch_size: samples per optimizer step, across all ranks; micro_batch: maximum samples in one Batch.
    With train=False, for evaluation, every record is read once in manifest order (the last step may be short), with the
    middle clip and a center crop; unreadable samples are reported and skipped without a substitute. `views`: several
    test views per record; row i x V + k of a Batch is view k of sample i, with k = segment x crops + crop. `transform`
    replaces the crop and flip configured in `data`; like `open_reader`, it is pickled and sent to the loader processes.
    `node_ranks`: number of ranks that share this machine's memory. Raises ConfigError if the data has no samples or too
    few for one step, or if the decoder is not installed.
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
            processes.check_shared_memory(data, micro_batch, clips_per_sample_of(data, views), clip_bytes, node_ranks)
            self._current_run = processes.fork_server(*_heavy_modules(data, train)).Value("q", 0)
        self._dataset = ClipDataset(data, clip, seed, train, views, transform, open_reader, self._current_run)
        self._loader: DataLoader[Any] | None = None
        self._damaged = SampleLedger[DamagedSample]()

    @property
    def steps_per_epoch(self) -> int:
        return self.plan.steps_per_epoch

    def steps(self, start_step: int, stop_step: int) -> Iterator[list[Batch]]:
        """Yield this rank's micro-batches for each optimizer step; steps are numbered over the whole run, from 0.

        Each loader process prefetches data.prefetch_batches micro-batches. Prefetched micro-batches are discarded if
        the loop exits early. Raises DataFault if a position has no readable record, StorageUnreachable if the data's
        remote store does not respond, or LoaderCrash if a loader process dies.
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
        """Return the process IDs of the loader processes."""
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
        """Yield the work items for the requested steps; the DataLoader distributes them to its processes."""
        run = self._current_run.value if self._current_run is not None else 0
        ranges = self.plan.sample_ranges(self._steps.start, self._steps.stop)
        items = (WorkItem(run, one, [self.manifest[number] for number in one.numbers]) for one in ranges)
        if self.data.read_ahead_mib and is_remote(self.manifest[0].name):
            distance = math.ceil(READ_AHEAD_SAMPLES / self.plan.micro_batch)
            pairs = order.with_following(items, max(1, self.data.loader_workers), distance)  # as torch distributes them
            items = (item.with_following(following) for item, following in pairs)
        yield from items

    def _drop_pending(self) -> None:
        if self._current_run is not None:
            self._current_run.value += 1

    def _batches(self) -> Iterator[Batch]:
        with warnings.catch_warnings():
            # Torch warns about more processes than CPUs, but they wait for storage most of the time.
            warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)
            if self._loader is None:
                self._loader = self._open()
            with processes.hide_main_module():
                batches = iter(self._loader)
        while True:
            try:
                batch: WorkerBatch | LoadingFault | None = next(batches, None)
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
            if isinstance(batch, LoadingFault):
                raise batch
            labels, records = torch.from_numpy(batch.labels), torch.from_numpy(batch.records)
            if not self._dataset.train:  # a training run lists them in its folder
                for sample in self._damaged.add(batch.damaged):
                    logger.warning("using only the frames that decode: %s %s", sample["location"], sample["reason"])
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


def _heavy_modules(data: DataConfig, train: bool) -> list[str]:
    """Return slow-to-import modules to preload in the fork server rather than in every loader process."""
    return ["timm.data.auto_augment"] if train and data.rand_augment else []


def _identity(batch: Any) -> Any:
    return batch
