"""The ranks of a run: who they are, how they average gradients, and how they agree on what to do next.

With one rank nothing is sent. Knows torch.distributed; nothing of Ray, files or losses.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

T = TypeVar("T")


class Signals(NamedTuple):
    """What a rank has to tell the others at the end of a step; summed over ranks, so any rank can raise any of them."""

    stop: int = 0  # asked to stop: SIGTERM, cancel
    save: int = 0  # rank 0's clock says that a checkpoint is due
    look: int = 0  # rank 0's clock says that it is time to ask for preemption
    bad: int = 0  # samples newly found bad


class Team:
    """This process among its peers. `exchange` is how ranks agree: its answer is the same on all of them."""

    def __init__(self, rank: int = 0, world: int = 1, device: torch.device | None = None) -> None:
        self.rank, self.world = rank, world
        self.device = device or torch.device("cpu")
        # A group of its own on the CPU: agreeing must neither wait for the device nor mix with gradients.
        self._control: Any = dist.new_group(backend="gloo") if world > 1 else None
        self._pending: tuple[Any, Tensor] | None = None

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def exchange(self, signals: Signals) -> Signals:
        """Send this step's signals, return the sum of those of the step before: nobody waits for a message on its way.

        Every rank calls it once a step, so all see the same answer at the same step.
        """
        if self.world == 1:
            return signals
        answer = self.collect()
        message = torch.tensor(signals, dtype=torch.int64)
        self._pending = (dist.all_reduce(message, group=self._control, async_op=True), message)
        return answer

    def collect(self) -> Signals:
        """The sum of the signals still on their way; none where there are none."""
        if self._pending is None:
            return Signals()
        work, message = self._pending
        self._pending = None
        work.wait()
        return Signals(*message.tolist())

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model with its gradients averaged over ranks; itself with one rank."""
        if self.world == 1:
            return model
        with warnings.catch_warnings():  # the newer name of broadcast_buffers is not in the oldest torch we take
            warnings.simplefilter("ignore", FutureWarning)
            wrapped = DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)
        if self.device.type == "cpu" and self.world > 2:
            # Through a lambda: DDP reads annotations as values, and ours are strings.
            wrapped.register_comm_hook(self.world, lambda world, bucket: average_in_rank_order(world, bucket))
        return wrapped

    def quiet(self, model: nn.Module, quiet: bool) -> AbstractContextManager[None]:
        """No gradient traffic inside, where `quiet`: all but the last micro-batch of a step."""
        return model.no_sync() if quiet and isinstance(model, DistributedDataParallel) else nullcontext()

    def sum(self, values: Tensor) -> Tensor:
        """Sum over ranks, in place, on the device."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def gather(self, value: T) -> list[T]:
        """The values of all ranks, in rank order, on every rank. Plain data only."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value, group=self._control)
        return values

    def from_leader(self, make: Callable[[], T]) -> T:
        """What `make` gives on rank 0, on every rank."""
        if self.world == 1:
            return make()
        box = [make() if self.leads else None]
        dist.broadcast_object_list(box, src=0, group=self._control)
        value: Any = box[0]
        return value  # type: ignore[no-any-return]


def average_in_rank_order(world: int, bucket: Any) -> torch.futures.Future[Tensor]:
    """A DDP hook for the CPU: gather and add in rank order, so a sum never depends on where it lies in a bucket.

    DDP lays its buckets out anew after the first step, and a ring adds the ranks in an order that depends on the
    layout: with three ranks or more a resumed run, which starts with the first layout again, would differ in the last
    bit. Two ranks need no care, a + b = b + a. Costs more traffic than a ring, which on CPU is not what one waits for.
    """
    mine = bucket.buffer()
    parts = [torch.empty_like(mine) for _ in range(world)]
    future = dist.all_gather(parts, mine, async_op=True).get_future()

    def add(_: torch.futures.Future[Any]) -> Tensor:
        total = parts[0]
        for part in parts[1:]:
            total += part
        return total.div_(world)

    return future.then(add)
