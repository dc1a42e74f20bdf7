"""Communication between the ranks of a run: gradient averaging, collectives, and signals exchanged after every step.

A single rank does not communicate. Uses torch.distributed; does not import Ray.
"""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from amd.data.loading.processes import shared_memory_id

T = TypeVar("T")


class Signals(NamedTuple):
    """Signals from a rank at the end of a step. They are summed over ranks, so any rank can raise any signal."""

    stop: int = 0  # stop requested by SIGTERM or cancel
    save: int = 0  # a checkpoint is due by rank 0's clock
    poll_preemption: int = 0  # a preemption check is due by rank 0's clock
    bad: int = 0  # newly found bad or damaged samples


class ProcessGroup:
    """This process and its peers. `exchange` returns the same result on every rank, so ranks act on it together."""

    def __init__(self, rank: int = 0, world: int = 1, device: torch.device | None = None) -> None:
        self.rank, self.world = rank, world
        self.device = device or torch.device("cpu")
        # A separate CPU group: signals must neither wait for the device nor mix with gradients.
        self._control: Any = dist.new_group(backend="gloo") if world > 1 else None
        self._pending: tuple[Any, Tensor] | None = None
        machine = shared_memory_id()
        self.node_ranks = self.gather(machine).count(machine)
        """Ranks on this machine that share its memory, including this one."""

    def close(self) -> None:
        """Release the control group's connections and threads. Does not wait for other ranks."""
        group, self._control, self._pending = self._control, None, None
        if group is not None:
            dist.destroy_process_group(group)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def signal_delay(self) -> int:
        """Number of steps until `exchange` returns a signal."""
        return int(self.world > 1)

    def exchange(self, signals: Signals) -> Signals:
        """Send this step's signals and return the sum of the previous step's, so that no rank waits for a message.

        Every rank calls this once per step, so all get the same result at the same step.
        """
        if self.world == 1:
            return signals
        received = self.collect()
        message = torch.tensor(signals, dtype=torch.int64)
        self._pending = (dist.all_reduce(message, group=self._control, async_op=True), message)
        return received

    def collect(self) -> Signals:
        """Return the sum of the pending signals, or zeros if none are pending."""
        if self._pending is None:
            return Signals()
        work, message = self._pending
        self._pending = None
        work.wait()
        return Signals(*message.tolist())

    def wrap(self, model: nn.Module) -> nn.Module:
        """Wrap the model in DDP; with one rank, return it unchanged."""
        if self.world == 1:
            return model
        with warnings.catch_warnings():  # the oldest supported torch lacks the new name of broadcast_buffers
            warnings.simplefilter("ignore", FutureWarning)
            wrapped = DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)
        if self.device.type == "cpu" and self.world > 2:
            # Through a lambda: DDP evaluates annotations as values, and ours are strings.
            wrapped.register_comm_hook(self.world, lambda world, bucket: average_in_rank_order(world, bucket))
        return wrapped

    def quiet(self, model: nn.Module, quiet: bool) -> AbstractContextManager[None]:
        """Return a context that skips gradient synchronisation if `quiet`.

        Used for all micro-batches of a step except the last.
        """
        return model.no_sync() if quiet and isinstance(model, DistributedDataParallel) else nullcontext()

    def sum(self, values: Tensor) -> Tensor:
        """Sum a tensor over ranks, in place and on its device."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def gather(self, value: T) -> list[T]:
        """Gather every rank's value on all ranks, in rank order. Values must be picklable."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value, group=self._control)
        return values

    def broadcast_from_main(self, make: Callable[[], T]) -> T:
        """Call `make` on rank 0 and return its result, or raise its error, on every rank."""
        if self.world == 1:
            return make()
        value: Any = None
        error: Exception | None = None
        if self.is_main:
            try:
                value = make()
            except Exception as raised:  # sent too, or the other ranks would wait until their connection times out
                error = raised
        box: list[Any] = [value, _picklable(error)]
        dist.broadcast_object_list(box, src=0, group=self._control)
        if error is not None:
            raise error
        value, error = box
        if error is not None:
            raise error
        return value  # type: ignore[no-any-return]


def _picklable(error: Exception | None) -> Exception | None:
    """Return the error if other processes can unpickle it, else a RuntimeError with the same message."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def average_in_rank_order(world: int, bucket: Any) -> torch.futures.Future[Tensor]:
    """Average gradients in rank order, so that sums do not depend on the bucket layout. DDP hook for use on CPU.

    DDP rebuilds its buckets after the first step, and a ring all-reduce adds ranks in an order that depends on the
    layout: with three or more ranks, a resumed run, which starts again with the first layout, would differ in the last
    bit. With two ranks, the order does not matter. Costs more traffic than a ring all-reduce, but traffic is not the
    bottleneck on CPU.
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
