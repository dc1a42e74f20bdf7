"""Benchmark a training step: throughput, time per part, and the fraction of the machine's matmul throughput.

Clips are random bytes, so no data is read (see `amd.bench.data` for reading). Throughput is measured over uninterrupted
steps; the parts are timed in separate steps, with a device synchronisation between parts. Does not import Ray.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from amd.config import TrainConfig
from amd.device import autocast, choose_device, choose_precision
from amd.distillation import distill, teacher_features
from amd.flops import step_flops
from amd.losses import alignment, normalized_pixels, pixel_targets, reconstruction, weigh
from amd.masks import sample_token_sets
from amd.models.encoder import Encoder
from amd.models.student import Student
from amd.models.teachers.frozen import Teacher
from amd.tokens import TokenSets, patchify, take_tokens
from amd.training.trainer.meters import matmul_rate
from amd.training.trainer.optimizer import build_optimizer, clip_gradients

PARTS = ("data", "teacher", "student_forward", "backward", "optimizer")


class StepBench:
    """Runs a config's training step with random weights and clips, as a whole or part by part."""

    def __init__(self, config: TrainConfig, batch: int) -> None:
        self.config = config
        self.device = choose_device(config.scaling.device)
        self.precision = choose_precision(config.scaling.precision, self.device)
        torch.manual_seed(config.seed)
        clip = config.clip
        self.student = Student(config).to(self.device)
        self.teacher: Teacher | None = None
        if config.teacher is not None:
            encoder = Encoder(config.teacher.encoder, clip.grid, clip.token_values)
            self.teacher = Teacher(encoder, tuple(pair.teacher for pair in config.objective.layers)).to(self.device)
            if self.precision == "bf16":
                self.teacher.cast_linear_layers(torch.bfloat16)
        self.optimizer = build_optimizer(self.student, config.optim)
        self.generator = torch.Generator(self.device).manual_seed(config.seed)
        shape = (batch, 3, clip.frames, *clip.size)
        self.clips = torch.randint(0, 256, shape, dtype=torch.uint8)
        if self.device.type == "cuda":
            self.clips = self.clips.pin_memory()
        if config.scaling.compile:
            self.student.compile()
            if self.teacher is not None:
                self.teacher.encoder.compile()

    def step(self) -> None:
        """Run one step as in training."""
        clips, sets = self.inputs()
        with autocast(self.precision, self.device):
            terms = distill(self.student, self.teacher, clips, sets, self.config)
        terms.total.backward()
        self._optimize()

    def timed_parts(self) -> dict[str, float]:
        """Run one step, synchronising the device between its parts; return the duration of each part in seconds."""
        config, objective = self.config, self.config.objective
        clock = _Clock(self.device)
        clips, sets = self.inputs()
        pixels = patchify(clips, config.clip.tubelet, config.clip.patch)
        targets = pixel_targets(take_tokens(pixels, sets.reconstructed), config.clip, objective.pixels)
        visible = normalized_pixels(take_tokens(pixels, sets.student_visible), config.clip)
        clock.lap("data")
        with autocast(self.precision, self.device):
            features = teacher_features(self.teacher, pixels, sets, config) if self.teacher is not None else []
            clock.lap("teacher")
            output = self.student(visible, sets)
            shared = sets.student_visible.shape[1]
            zero = torch.zeros((), device=self.device)
            terms = weigh(
                reconstruction(output.reconstructed, targets) if output.reconstructed is not None else zero,
                alignment(output.projected, [f[:, :shared] for f in features], objective) if features else zero,
                alignment(output.generated, [f[:, shared:] for f in features], objective) if output.generated else zero,
                objective,
            )
            clock.lap("student_forward")
        terms.total.backward()
        clock.lap("backward")
        self._optimize()
        clock.lap("optimizer")
        return clock.laps

    def inputs(self) -> tuple[Tensor, TokenSets]:
        clips = self.clips.to(self.device, non_blocking=True)
        return clips, sample_token_sets(self.config.mask, self.config.clip.grid, len(clips), self.generator)

    def _optimize(self) -> None:
        clip_gradients(self.student.parameters(), self.config.optim.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


class _Clock:
    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.laps: dict[str, float] = {}
        self._last = self._now()

    def _now(self) -> float:
        synchronize(self.device)
        return time.perf_counter()

    def lap(self, name: str) -> None:
        now = self._now()
        self.laps[name] = now - self._last
        self._last = now


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished all queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(work: Callable[[], object], device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - start


def bench_step(config: TrainConfig, *, batch: int = 8, steps: int = 5, warmup: int = 2) -> dict[str, Any]:
    """Measure a training step of `batch` clips; results are medians over `steps` steps.

    Returns samples/s, each part's share of the step, and the step's FLOP/s as a fraction of the machine's matmul
    throughput in the same precision. Shares refer to the synchronised step, which is slower than an uninterrupted step.
    """
    bench = StepBench(config, batch)
    for _ in range(warmup):
        bench.step()
    rate = matmul_rate(bench.device, torch.bfloat16 if bench.precision == "bf16" else torch.float32)
    whole = statistics.median(seconds(bench.step, bench.device) for _ in range(steps))
    laps = [bench.timed_parts() for _ in range(steps)]
    parts = {part: statistics.median(lap[part] for lap in laps) for part in PARTS}
    flops = step_flops(config)
    speed = flops.total * batch / whole
    return {
        "device": torch.cuda.get_device_name(bench.device) if bench.device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "precision": bench.precision,
        "compile": config.scaling.compile,
        "batch": batch,
        "step_s": whole,
        "samples_per_s": batch / whole,
        "share": {part: value / sum(parts.values()) for part, value in parts.items()},
        "gflops_per_sample": {**{k: v / 1e9 for k, v in flops._asdict().items()}, "total": flops.total / 1e9},
        "step_tflops_per_s": speed / 1e12,
        "matmul_tflops_per_s": rate / 1e12,
        "matmul_fraction": speed / rate,
        "peak_memory_gib": torch.cuda.max_memory_allocated() / 2**30 if bench.device.type == "cuda" else None,
    }
