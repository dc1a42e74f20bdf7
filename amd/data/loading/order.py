"""Sample order: the permutation of an epoch and each rank's share of an optimizer step. No I/O; torch-free.

Everything is a function of (seed, epoch, position in the epoch's order), so the stream of samples depends neither on
the number of ranks nor on the step at which a run resumed.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import count, islice
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from amd.config import ConfigError, DataConfig

T = TypeVar("T")
Numbers = npt.NDArray[np.int32]

MAX_ATTEMPTS = 32  # records tried per position; with 50 % bad files, all of them fail once in 4 billion positions


def epoch_order(records: int, seed: int, epoch: int) -> Numbers:
    """Return the permutation of the record indices for a seed and epoch. 10 million records take about a second.

    Uses RandomState, whose stream numpy guarantees to be stable, so a run that resumes with another numpy version keeps
    its order.
    """
    order = np.arange(records, dtype=np.int32)
    np.random.RandomState(np.random.MT19937(np.random.SeedSequence([seed, epoch]))).shuffle(order)
    return order


def sample_draws(seed: int, epoch: int, position: int, attempt: int = 0) -> random.Random:
    """Return the random generator for a sample's frames, crops and flips.

    `attempt`: number of records already tried at this position.
    """
    return random.Random(f"{seed}/{epoch}/{position}/{attempt}")


def share(batch: int, rank: int, world: int) -> range:
    """Return a rank's positions in a global batch; shares differ by at most one if `world` does not divide it."""
    return range(rank * batch // world, (rank + 1) * batch // world)


def micro_batches(positions: range, most: int) -> list[range]:
    """Split a range into consecutive slices of up to `most` positions."""
    return [positions[i : i + most] for i in range(0, len(positions), most)]


def with_following(items: Iterable[T], processes: int, distance: int) -> Iterator[tuple[T, tuple[T, ...] | None]]:
    """Yield items that are handed to processes in turn, some of them with the next items for the same process.

    A process always knows at least its next `distance` items, or all that are left. If every item had a list, each list
    would mostly repeat the previous one, so only one item in distance / 2 has a list; the others have None.
    """
    every = max(1, distance // 2)
    source = iter(items)
    waiting = deque(islice(source, processes * (distance + every - 1) + 1))
    for number in count():
        if not waiting:
            return
        has_list = number // processes % every == 0
        following = tuple(islice(waiting, processes, None, processes)) if has_list else None
        yield waiting.popleft(), following
        waiting.extend(islice(source, 1))


class SampleRange(NamedTuple):
    """The records of one micro-batch."""

    epoch: int
    position: int  # position of the first sample in the epoch's order
    size: int  # samples to read
    numbers: list[int]  # records at those positions, then substitutes for unreadable ones


class EpochPlan:
    """Records that one rank reads in each step; steps are numbered over the whole run.

    Incomplete last steps are dropped. With train=False, records are in manifest order, the last step may be short, and
    there are no substitutes.
    """

    def __init__(
        self, records: int, batch_size: int, *, rank: int, world: int, micro_batch: int, seed: int, train: bool = True
    ) -> None:
        self.records, self.batch_size, self.rank, self.world = records, batch_size, rank, world
        self.micro_batch, self.seed, self.train = micro_batch, seed, train
        self.steps_per_epoch = records // batch_size if train else -(-records // batch_size)
        self._order: tuple[int, Numbers] | None = None

    def rank_micro_batches(self, step: int) -> list[range]:
        """Return this rank's micro-batches as positions in a step's global batch."""
        start = step % self.steps_per_epoch * self.batch_size
        size = min(self.batch_size, self.records - start)
        return micro_batches(share(size, self.rank, self.world), self.micro_batch)

    def sample_ranges(self, start_step: int, stop_step: int) -> Iterator[SampleRange]:
        """Yield the micro-batches of these steps in order."""
        spare = min(MAX_ATTEMPTS, self.records) - 1 if self.train else 0
        for step in range(start_step, stop_step):
            epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
            order = self._epoch(epoch)
            for positions in self.rank_micro_batches(step):
                position = step_in_epoch * self.batch_size + positions.start
                numbers = order.take(np.arange(position, position + len(positions) + spare), mode="wrap")
                yield SampleRange(epoch, position, len(positions), numbers.tolist())

    def _epoch(self, epoch: int) -> Numbers:
        if self._order is None or (self._order[0] != epoch and self.train):
            manifest_order = np.arange(self.records, dtype=np.int32)
            self._order = epoch, epoch_order(self.records, self.seed, epoch) if self.train else manifest_order
        return self._order[1]


def check_counts(data: DataConfig, records: int, batch_size: int, train: bool) -> None:
    """Raise ConfigError if the data has no samples, or too few for one training step."""
    if not records:
        raise ConfigError([f"data.train={data.train}: has no samples; check the data with `amd validate`"])
    if train and records < batch_size:
        raise ConfigError(
            [
                f"optim.batch_size={batch_size} is above the {records} samples of data.train={data.train}: a step "
                f"needs distinct samples; lower optim.batch_size to {records} or less, or add data"
            ]
        )
