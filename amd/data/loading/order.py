"""Who reads what, and when: the order of an epoch, and each training worker's share of a step. Pure; torch-free.

Everything follows from (seed, epoch, position in the epoch's order), so that the stream of samples does not depend on
how many workers read it, nor on where a run was taken up again.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[np.int32]

TRIES = 32  # records tried for one place before the data is given up: of 50 % bad files, once in 4 billion places


def epoch_order(records: int, seed: int, epoch: int) -> Numbers:
    """A permutation of the record numbers, the same for the same seed and epoch. 10 million take about a second.

    numpy promises that RandomState's stream stays as it is, which it does not for its newer Generator: a run taken up
    again under another numpy reads on in the same order.
    """
    order = np.arange(records, dtype=np.int32)
    np.random.RandomState(np.random.MT19937(np.random.SeedSequence([seed, epoch]))).shuffle(order)
    return order


def sample_draws(seed: int, epoch: int, position: int, attempt: int = 0) -> random.Random:
    """The randomness of one sample: its frames, crops and flips. `attempt` counts the records tried in that place."""
    return random.Random(f"{seed}/{epoch}/{position}/{attempt}")


def share(batch: int, rank: int, world: int) -> range:
    """Which places of a global batch a rank reads. Equal, or one apart where `world` does not divide."""
    return range(rank * batch // world, (rank + 1) * batch // world)


def micro_batches(places: range, most: int) -> list[range]:
    """Consecutive slices of at most `most` places."""
    return [places[i : i + most] for i in range(0, len(places), most)]


class Span(NamedTuple):
    """The records of one micro-batch."""

    epoch: int
    position: int  # of its first place in the epoch's order
    places: int
    numbers: list[int]  # records in those places, then in the places after them, which stand in for bad ones


class Plan:
    """What one rank reads in each step. Steps count over the whole run; an epoch's incomplete last step is dropped.

    train=False: manifest order, nothing dropped (the last step is short), no stand-ins.
    """

    def __init__(
        self, records: int, batch_size: int, *, rank: int, world: int, micro_batch: int, seed: int, train: bool = True
    ) -> None:
        self.records, self.batch_size, self.rank, self.world = records, batch_size, rank, world
        self.micro_batch, self.seed, self.train = micro_batch, seed, train
        self.steps_per_epoch = records // batch_size if train else -(-records // batch_size)
        self._order: tuple[int, Numbers] | None = None

    def parts(self, step: int) -> list[range]:
        """This rank's micro-batches, as places in the step's global batch."""
        start = step % self.steps_per_epoch * self.batch_size
        size = min(self.batch_size, self.records - start)
        return micro_batches(share(size, self.rank, self.world), self.micro_batch)

    def spans(self, start_step: int, stop_step: int) -> Iterator[Span]:
        """The micro-batches of these steps, one after the other."""
        spare = min(TRIES, self.records) - 1 if self.train else 0
        for step in range(start_step, stop_step):
            epoch, place = divmod(step, self.steps_per_epoch)
            order = self._epoch(epoch)
            for part in self.parts(step):
                position = place * self.batch_size + part.start
                taken = order.take(np.arange(position, position + len(part) + spare), mode="wrap")
                yield Span(epoch, position, len(part), taken.tolist())

    def _epoch(self, epoch: int) -> Numbers:
        if self._order is None or (self._order[0] != epoch and self.train):
            fixed = np.arange(self.records, dtype=np.int32)
            self._order = epoch, epoch_order(self.records, self.seed, epoch) if self.train else fixed
        return self._order[1]
