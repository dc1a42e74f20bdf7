"""A network and one optimiser step, on one rank. Nothing in a step waits for the device, reads a file or logs.

The global batch may be cut into any number of ranks and micro-batches: every micro-batch weighs as much as it has
samples, so the gradient is that of the whole batch. What the loss is, subclasses say: `distiller` for pre-training, and
fine-tuning its own.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from amd.config import RunConfig
from amd.data.loading import order
from amd.data.loading.loader import Batch
from amd.device import autocast, choose_precision
from amd.models.layers import Block
from amd.training.checkpoints.state import stream_seed
from amd.training.process_group import Team
from amd.training.trainer.meters import Health, Meter
from amd.training.trainer.optimizer import clip_gradients, set_lr


class Learner(ABC):
    """What one rank trains. Subclasses set `network` and `optimizer` after this constructor, and give the loss."""

    network: nn.Module
    model: nn.Module  # what is run forward: the network, or DDP around it once `join` was called
    optimizer: torch.optim.Optimizer
    losses: tuple[str, ...] = ("loss/total",)
    """Metric names of what `loss` returns; the first is what is minimised."""

    def __init__(self, config: RunConfig, team: Team) -> None:
        self.run, self.team, self.device = config, team, team.device
        self.precision = choose_precision(config.scaling.precision, self.device)
        self.share = order.share(config.optim.batch_size, team.rank, team.world)
        self.health, self.meter = Health(self.device), Meter(team, self.losses)
        self.trail: list[tuple[int, Tensor, Tensor]] = []  # step, records, loss of each micro-batch since the last look
        torch.manual_seed(config.seed)  # the same weights on every rank

    @abstractmethod
    def loss(self, clips: Tensor, batch: Batch, row: int) -> Sequence[Tensor]:
        """The terms of a micro-batch, scalars in the order of `losses`.

        `clips` is batch.clips on the device; the first of them is clip `row` of the global batch.
        """

    def begin(self, step: int) -> None:
        """Before the first micro-batch of a step. Every draw of a step is a function of seed, step and rank."""
        torch.manual_seed(stream_seed(self.run.seed, "paths", step, self.team.rank))  # which paths drop_path drops

    def end(self) -> None:
        """After the optimizer's step."""

    def extra_state(self) -> dict[str, dict[str, Tensor]]:
        """Tensors that a checkpoint keeps beside network and optimizer, by file."""
        return {}

    def load_extra_state(self, tensors: dict[str, dict[str, Tensor]]) -> None:
        """Put them back."""

    @abstractmethod
    def parameter_counts(self) -> dict[str, int]:
        """Parameters of the parts, for people."""

    @property
    def micro_batches(self) -> int:
        """How many of them this rank takes through the networks in a step."""
        return len(order.micro_batches(self.share, self._largest))

    @property
    def _largest(self) -> int:
        return min(len(self.share), self.run.scaling.micro_batch or len(self.share))

    def join(self) -> None:
        """Average gradients with the other ranks from here on."""
        self.model = self.team.wrap(self.network)

    def learn(self, step: int, batches: Sequence[Batch], lr: float, waited_s: float = 0.0) -> None:
        """One optimiser step. A step without finite gradients changes nothing, nor does any after it (`Health`)."""
        norm = self.accumulate(step, batches)
        self.health.observe(step, norm)
        set_lr(self.optimizer, lr)
        self.optimizer.found_inf = self.health.found  # type: ignore[attr-defined]  # read by the fused kernel
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.end()
        self.meter.add_step(norm, waited_s)

    def accumulate(self, step: int, batches: Sequence[Batch]) -> Tensor:
        """Leave the gradient of the global batch in the parameters, clipped; its norm before."""
        self.begin(step)
        row = self.share.start * self.run.data.repeats
        for number, batch in enumerate(batches, start=1):
            clips = batch.clips.to(self.device, non_blocking=True)
            part = len(clips) / self.run.clips_per_step
            with self.team.quiet(self.model, number < len(batches)):
                with autocast(self.precision, self.device):
                    terms = self.loss(clips, batch, row)
                # DDP takes the mean over ranks; weighted so, it is the mean over the global batch, however it is cut.
                (terms[0] * (part * self.team.world)).backward()
            row += len(clips)
            self.meter.add_losses(terms, part)
            self.trail.append((step, batch.records, terms[0].detach()))
        return clip_gradients(self.network.parameters(), self.run.optim.clip_norm)

    def accused(self, bad_step: int) -> list[int]:
        """This rank's records in a step that gave no number: of micro-batches whose loss is not finite, or all."""
        parts = [(records, bool(loss.isfinite())) for step, records, loss in self.trail if step == bad_step]
        suspects = [records for records, finite in parts if not finite] or [records for records, _ in parts]
        return sorted({int(number) for records in suspects for number in records.tolist()})

    def rehearse(self) -> float:
        """Seconds a step will take, data apart: two micro-batches of noise forward and backward, nothing kept.

        Compiles, allocates and runs out of memory here rather than in the first step. Before `join` only.
        """
        clip = self.run.clip
        shape = (self._largest * self.run.data.repeats, 3, clip.frames, *clip.size)
        clips = torch.randint(0, 256, shape, dtype=torch.uint8, device=self.device)
        none = torch.zeros(len(clips), dtype=torch.int64)
        batch = Batch(clips, none, none, [])
        seconds = 0.0
        for _ in range(2):
            start = time.perf_counter()
            self.begin(0)
            with autocast(self.precision, self.device):
                terms = self.loss(clips, batch, 0)
            terms[0].backward()
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            seconds = time.perf_counter() - start
        self.optimizer.zero_grad(set_to_none=True)
        return seconds * self.micro_batches


def compile_blocks(network: nn.Module) -> None:
    """torch.compile every transformer block in place; state keys stay as they are."""
    for module in network.modules():
        if isinstance(module, Block):
            module.compile()


def count(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())
