"""Measurements between log lines: sums kept on the device, and wall-clock times. Writes no metrics."""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from amd.training.process_group import ProcessGroup


class GradientHealth:
    """Tracks, on the device, whether all gradients so far have been finite.

    Reading the result synchronises with the device, so read it rarely.

    `found` is the fused optimizer's `found_inf`: from the first non-finite step on, steps have no effect, so the
    weights remain as they were after the last good step.
    """

    def __init__(self, device: torch.device) -> None:
        self.found = torch.zeros((), device=device)
        self.first_bad = torch.full((), -1, dtype=torch.int64, device=device)

    def observe(self, step: int, norm: Tensor) -> None:
        bad = ~torch.isfinite(norm)
        first = bad & (self.first_bad < 0)
        self.first_bad = torch.where(first, step, self.first_bad)
        self.found = torch.maximum(self.found, bad.to(self.found.dtype))

    def first_bad_step(self) -> int | None:
        """Return the first non-finite step, or None. Synchronises with the device."""
        step = int(self.first_bad.item())
        return step if step >= 0 else None


class StepMeter:
    """Averages metrics over the steps since the last log line; the averages are identical on all ranks."""

    def __init__(self, group: ProcessGroup, names: Sequence[str]) -> None:
        """Create a meter. `names`: metric names of the loss terms, in order."""
        self._group, self._names = group, tuple(names)
        self._reset()

    def add_losses(self, terms: Sequence[Tensor], share: float) -> None:
        """Add a micro-batch's loss terms; `share` is its fraction of the global batch."""
        self._losses += torch.stack([term.detach().float() for term in terms]) * share

    def add_step(self, norm: Tensor, data_s: float) -> None:
        self._norm += norm
        self._steps += 1
        self._data_s += data_s

    def read(self, clips_per_step: int) -> dict[str, float]:
        """Return the means and reset. Performs the only device synchronisation and all-reduce of a logging interval."""
        clocks = torch.tensor([self._data_s, time.perf_counter() - self._since], device=self._losses.device)
        *losses, data_s, seconds = self._group.sum(torch.cat([self._losses, clocks])).tolist()
        data_s, seconds = data_s / self._group.world, seconds / self._group.world
        norm = float(self._norm)
        steps = max(1, self._steps)
        values = {name: value / steps for name, value in zip(self._names, losses, strict=True)}
        values |= {
            "optim/grad_norm": norm / steps,
            "time/step_s": seconds / steps,
            "time/data_s": data_s / steps,
            "speed/samples_per_s": clips_per_step * steps / seconds,
        }
        self._reset()
        return values

    def _reset(self) -> None:
        device = self._group.device
        self._losses = torch.zeros(len(self._names), device=device)
        self._norm = torch.zeros((), device=device)
        self._steps, self._data_s = 0, 0.0
        self._since = time.perf_counter()


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Return the throughput of large matrix multiplications in FLOP/s, the denominator of `speed/mfu`.

    Measured once per process, so later runs and attempts start sooner.
    """
    return _measured_rate(device, dtype, torch.get_num_threads())


@functools.cache
def _measured_rate(device: torch.device, dtype: torch.dtype, threads: int, seconds: float = 0.2) -> float:
    """Measure the throughput. `threads` is the process's current thread count and serves only as a cache key."""
    size = 8192 if device.type == "cuda" else 768
    a = torch.randn(size, size, device=device, dtype=dtype)
    b = torch.randn(size, size, device=device, dtype=dtype)
    best, until = 0.0, time.perf_counter() + seconds
    torch.mm(a, b)
    while time.perf_counter() < until or not best:
        _wait(device)
        start = time.perf_counter()
        torch.mm(a, b)
        _wait(device)
        best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
