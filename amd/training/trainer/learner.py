"""Optimizer steps for a model on one rank. A step never waits for the device, reads files, or writes logs.

The global batch may be split over any number of ranks and micro-batches: each micro-batch is weighted by its number of
samples, so the gradient equals that of the whole batch. Subclasses define the loss: `distiller` for pre-training,
others for fine-tuning.
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
from amd.training.process_group import ProcessGroup
from amd.training.trainer.meters import GradientHealth, StepMeter
from amd.training.trainer.optimizer import clip_gradients, set_lr


class Learner(ABC):
    """Model, optimizer and loss on one rank.

    Subclasses set `network` and `optimizer` after calling this constructor.
    """

    network: nn.Module
    model: nn.Module  # called in the forward pass: the model, wrapped in DDP after `join`
    optimizer: torch.optim.Optimizer
    losses: tuple[str, ...] = ("loss/total",)
    """Metric names of the terms that `loss` returns; the first is minimised."""

    def __init__(self, config: RunConfig, group: ProcessGroup) -> None:
        self.run, self.group, self.device = config, group, group.device
        self.precision = choose_precision(config.scaling.precision, self.device)
        self.share = order.share(config.optim.batch_size, group.rank, group.world)
        self.health, self.meter = GradientHealth(self.device), StepMeter(group, self.losses)
        # Step, records and loss of each micro-batch since the last log line.
        self.recent_losses: list[tuple[int, Tensor, Tensor]] = []
        torch.manual_seed(config.seed)  # the same weights on every rank

    @abstractmethod
    def loss(self, clips: Tensor, batch: Batch, row: int) -> Sequence[Tensor]:
        """Return a micro-batch's loss terms: scalars in the order of `losses`.

        `clips` is batch.clips on the device; its first clip is clip `row` of the global batch.
        """

    def begin(self, step: int) -> None:
        """Prepare a step before its first micro-batch. Its randomness is a function of seed, step and rank."""
        torch.manual_seed(stream_seed(self.run.seed, "paths", step, self.group.rank))  # stochastic depth

    def end(self) -> None:
        """Finish a step after the optimizer has updated the weights."""

    def extra_state(self) -> dict[str, dict[str, Tensor]]:
        """Return the tensors that a checkpoint stores in addition to model and optimizer state, by file."""
        return {}

    def load_extra_state(self, tensors: dict[str, dict[str, Tensor]]) -> None:
        """Load the tensors that `extra_state` returned."""

    @abstractmethod
    def parameter_counts(self) -> dict[str, int]:
        """Return the parameter count of each part, for the log."""

    @property
    def micro_batches(self) -> int:
        """Number of micro-batches per step on this rank."""
        return len(order.micro_batches(self.share, self._largest))

    @property
    def _largest(self) -> int:
        return min(len(self.share), self.run.micro_batch)

    def join(self) -> None:
        """Wrap the model in DDP, so that gradients are averaged over ranks from now on."""
        self.model = self.group.wrap(self.network)

    def learn(self, step: int, batches: Sequence[Batch], lr: float, waited_s: float = 0.0) -> None:
        """Take one optimizer step.

        After the first non-finite gradient, steps no longer change the weights (`GradientHealth`).
        """
        norm = self.accumulate(step, batches)
        self.health.observe(step, norm)
        set_lr(self.optimizer, lr)
        self.optimizer.found_inf = self.health.found  # type: ignore[attr-defined]  # read by the fused kernel
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.end()
        self.meter.add_step(norm, waited_s)

    def accumulate(self, step: int, batches: Sequence[Batch]) -> Tensor:
        """Compute and clip the gradient of the global batch; return its norm before clipping."""
        self.begin(step)
        row = self.share.start * self.run.data.repeats
        for number, batch in enumerate(batches, start=1):
            clips = batch.clips.to(self.device, non_blocking=True)
            part = len(clips) / self.run.clips_per_step
            with self.group.quiet(self.model, number < len(batches)):
                with autocast(self.precision, self.device):
                    terms = self.loss(clips, batch, row)
                # DDP averages over ranks; with this weight the result is the mean over the global batch.
                (terms[0] * (part * self.group.world)).backward()
            row += len(clips)
            self.meter.add_losses(terms, part)
            self.recent_losses.append((step, batch.records, terms[0].detach()))
        return clip_gradients(self.network.parameters(), self.run.optim.clip_norm)

    def suspect_records(self, bad_step: int) -> list[int]:
        """Return this rank's suspect records for a non-finite step.

        These are the records in micro-batches with a non-finite loss, or all records if every loss was finite.
        """
        parts = [(records, bool(loss.isfinite())) for step, records, loss in self.recent_losses if step == bad_step]
        suspects = [records for records, finite in parts if not finite] or [records for records, _ in parts]
        return sorted({int(number) for records in suspects for number in records.tolist()})

    def warm_up(self) -> float:
        """Run forward and backward passes on two micro-batches of noise; return the estimated seconds per step.

        The estimate excludes data loading. Compiles and allocates before the first step, and changes no state. Must be
        called before `join`.
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
    """Compile every transformer block in place; state keys do not change."""
    for module in network.modules():
        if isinstance(module, Block):
            module.compile()


def count(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())
