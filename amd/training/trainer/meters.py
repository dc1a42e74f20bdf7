"""What a run measures between two lines of its log: sums that stay on the device until then, and wall clocks.

Knows nothing of where the numbers go.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from amd.training.process_group import Team


class Health:
    """Whether every step so far gave numbers, kept on the device: looking costs a wait, so it is done rarely.

    `found` feeds the fused optimizer's `found_inf`: from the first step without a number on, steps change nothing, so
    the weights stay those of the last good step.
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
        """Waits for the device."""
        step = int(self.first_bad.item())
        return step if step >= 0 else None


class Meter:
    """Means over the steps since the last line of the log, the same on all ranks."""

    def __init__(self, team: Team, names: Sequence[str]) -> None:
        """`names`: of the loss terms, in their order."""
        self._team, self._names = team, tuple(names)
        self._reset()

    def add_losses(self, terms: Sequence[Tensor], share: float) -> None:
        """`share`: this micro-batch's part of the global batch."""
        self._losses += torch.stack([term.detach().float() for term in terms]) * share

    def add_step(self, norm: Tensor, data_s: float) -> None:
        self._norm += norm
        self._steps += 1
        self._data_s += data_s

    def read(self, clips_per_step: int) -> dict[str, float]:
        """The means, and a fresh start. The one wait for the device, and the one all-reduce, of a logging interval."""
        clocks = torch.tensor([self._data_s, time.perf_counter() - self._since], device=self._losses.device)
        *losses, data_s, seconds = self._team.sum(torch.cat([self._losses, clocks])).tolist()
        data_s, seconds = data_s / self._team.world, seconds / self._team.world
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
        device = self._team.device
        self._losses = torch.zeros(len(self._names), device=device)
        self._norm = torch.zeros((), device=device)
        self._steps, self._data_s = 0, 0.0
        self._since = time.perf_counter()


def matmul_rate(device: torch.device, dtype: torch.dtype, seconds: float = 0.2) -> float:
    """The machine's own rate of large matrix multiplications, FLOP/s: what `speed/mfu` is a fraction of."""
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
