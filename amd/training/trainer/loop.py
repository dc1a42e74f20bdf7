"""The training loop of one rank, for every kind of run. The same code runs in one process and on a Ray Train worker.

Knows the run's folder, its data and when things are due; nothing of what is trained (subclasses of `Training` do), nor
of Ray, signals or terminals, which stand behind `Edge`.
"""

from __future__ import annotations

import math
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from amd.config import RunConfig
from amd.data.dataset.open import open_manifest
from amd.data.loading.loader import Batch, ClipLoader, Records
from amd.storage import join
from amd.training.checkpoints.state import capture, restore
from amd.training.checkpoints.store import CheckpointStore
from amd.training.failures import NonFinite
from amd.training.process_group import Signals, Team
from amd.training.reporting.bad_samples import BadSamples
from amd.training.reporting.metrics import Metrics, open_metrics
from amd.training.run_folder import RunSpec, run_folder
from amd.training.trainer.learner import Learner
from amd.training.trainer.meters import matmul_rate
from amd.training.trainer.optimizer import cosine_lr

LOOK_EVERY_S = 5.0  # how often ranks ask together whether one of them is about to be preempted

Event = dict[str, Any]  # {"kind": "start" | "step" | "checkpoint" | "warning", …}: plain data, it crosses processes


class Edge(Protocol):
    """What lies around the loop."""

    def stop_requested(self) -> bool:
        """Whether this process knows of a SIGTERM or cancel; cheap, asked at every step."""

    def preempted(self) -> bool:
        """Whether a node of the team is about to be taken. A barrier: all ranks ask at the same step."""

    def tell(self, event: Event) -> None:
        """For whoever watches; only rank 0 tells."""


class Interrupted(Exception):
    """`evaluate` or `conclude` was asked to stop half way. Raised on all ranks; a run that goes on begins it again."""


@dataclass(frozen=True)
class Outcome:
    """How far a run came."""

    steps: int
    """Optimiser steps done."""
    finished: bool
    """False: it was asked to stop."""
    saved: bool
    """Whether the last step's checkpoint is committed."""
    metrics: dict[str, float] = field(default_factory=dict)


class Training(ABC):
    """One rank's part of a run, from the newest checkpoint to the end or to a stop.

    Subclasses set `learner` after this constructor, and say what a step costs, how the run is introduced, and what else
    is looked at on the way.
    """

    learner: Learner

    def __init__(self, spec: RunSpec, config: RunConfig, team: Team, edge: Edge) -> None:
        self.spec, self.team, self.edge = spec, team, edge
        self.run_config = config
        self.manifest = self.open_manifest()
        self.loader = self.open_loader()
        self.steps = config.schedule.total_steps(self.loader.steps_per_epoch)
        self.last = min(self.steps, spec.until or self.steps)  # where this part of the run ends
        self.warmup = config.schedule.total_warmup_steps(self.loader.steps_per_epoch)
        self.store = self.origin = CheckpointStore(join(spec.folder, "checkpoints"), config.checkpoint)
        self.bad = BadSamples(spec.folder, team, config.data.max_bad_fraction, len(self.manifest))
        self.metrics: Metrics | None = None  # on rank 0
        self.values: dict[str, float] = {}
        self.saved_at = self.looked_at = time.monotonic()
        self.alarmed = False
        self.workers_before = team.world

    # What subclasses give, beside `learner`

    @abstractmethod
    def flops_per_clip(self) -> float:
        """Of a whole step, forward and backward."""

    def open_manifest(self) -> Records:
        return open_manifest(self.run_config.data)

    def open_loader(self, **more: Any) -> ClipLoader:
        """`more`: as ClipLoader takes it."""
        config = self.run_config
        return ClipLoader(
            config.data,
            config.clip,
            self.manifest,
            batch_size=config.optim.batch_size,
            rank=self.team.rank,
            world=self.team.world,
            micro_batch=config.scaling.micro_batch,
            seed=config.seed,
            **more,
        )

    def introduction(self) -> dict[str, Any]:
        """More facts for the event `start`."""
        return {}

    def examine(self, done: int, batches: list[Batch]) -> None:
        """Look at the network after a step; called on every rank."""

    def wants_checkpoint(self, done: int) -> bool:
        """Whether a checkpoint is due after this step for a reason of the run's kind."""
        return False

    def evaluate(self, done: int) -> dict[str, float]:
        """Figures `eval/…` due after this step, the same on all ranks; none on most steps. A checkpoint follows.

        May raise Interrupted, as `conclude` may.
        """
        return {}

    def conclude(self, done: int) -> dict[str, float]:
        """What a finished run still owes once its last checkpoint is committed; figures, the same on all ranks."""
        return {}

    def run(self) -> Outcome:
        interrupted = False
        with self.loader:
            done = self._resume()
            self._introduce(done)
            self.learner.join()
            try:
                self._catch_up(done)
                for step, batches, waited_s in self._read(done):
                    self.learner.learn(step, batches, self._lr(step), waited_s)
                    done = step + 1
                    orders = self.team.exchange(self._signals(batches))
                    self._between_steps(done, batches, orders)
                    if orders.stop:
                        break
            except Interrupted:
                interrupted = True
        return self._close(done, interrupted)

    def _catch_up(self, done: int) -> None:
        """Evaluate the checkpoint that was loaded if its run was stopped before it could; never a parent's."""
        if not done or self.origin is not self.store:
            return
        known = self.team.from_leader(lambda: self.store.metrics(done))
        if any(name.startswith("eval/") for name in known):
            return
        if figures := self.evaluate(done):
            self.note(done, figures)
            if self.team.leads:
                self.store.add_metrics(done, figures)

    def _read(self, start: int) -> Iterator[tuple[int, list[Batch], float]]:
        """Step (from 0), this rank's micro-batches, and the seconds waited for them."""
        steps = self.loader.steps(start, self.last)
        for step in range(start, self.last):
            asked = time.perf_counter()
            batches = next(steps)
            yield step, batches, time.perf_counter() - asked

    def _lr(self, step: int) -> float:
        optim = self.run_config.optim
        return cosine_lr(step, peak=optim.lr, final=optim.final_lr, steps=self.steps, warmup=self.warmup)

    # Between steps: each thing at the same step on all ranks

    def _signals(self, batches: list[Batch]) -> Signals:
        found = [bad for batch in batches for bad in batch.bad]
        self.bad.meet(found)
        now, minutes = time.monotonic(), self.run_config.checkpoint.every_minutes
        return Signals(
            stop=int(self.edge.stop_requested()),
            save=int(self.team.leads and minutes is not None and now - self.saved_at >= 60 * minutes),
            look=int(self.team.leads and now - self.looked_at >= LOOK_EVERY_S),
            bad=len(found),
        )

    def _between_steps(self, done: int, batches: list[Batch], orders: Signals) -> None:
        if orders.bad:
            self.bad.share()
        save = bool(orders.stop or orders.save) or self._save_is_due(done) or self.bad.too_many
        if orders.look:
            self.looked_at = time.monotonic()
            if self.edge.preempted() and not self.alarmed:
                self.alarmed = save = True
                self.tell("warning", text=f"step {done}: a node is about to be taken away; saving a checkpoint")
        if save or done % self.run_config.tracking.log_every_steps == 0:
            self._log(done)
        self.examine(done, batches)
        try:  # a stop does not wait for figures: whoever goes on makes them first
            figures = {} if orders.stop and done < self.last else self.evaluate(done)
        except Interrupted:
            self._save(done, {})
            raise
        if figures:
            self.note(done, figures)
        if save or figures:
            self._save(done, figures)
        if self.bad.too_many:
            self._settle()
            raise self.bad.fault()

    def _save_is_due(self, done: int) -> bool:
        policy = self.run_config.checkpoint
        every = policy.every_steps is not None and done % policy.every_steps == 0
        return every or done in policy.pin_steps or done == self.last or self.wants_checkpoint(done)

    def _log(self, done: int) -> None:
        """Write the means since the last line. Raises NonFinite, on all ranks alike, before anything bad is kept."""
        bad_step = self.learner.health.first_bad_step()
        if bad_step is not None:
            raise NonFinite(self._accusation(bad_step))
        self.learner.trail.clear()
        values = self.learner.meter.read(self.run_config.clips_per_step)
        values["optim/lr"] = self._lr(done - 1)
        values["data/bad_samples"] = float(len(self.bad))
        values["speed/mfu"] = self.step_flops / values["time/step_s"] / self.machine_rate
        if not all(map(math.isfinite, values.values())):
            raise NonFinite(f"step {done}: the gradient is finite, but not all that was measured is: {values}")
        self.values = values
        self.note(done, values)
        self.tell("step", step=done, values=values)

    def _accusation(self, bad_step: int) -> str:
        """Which step first gave no number, and which samples were in it. All ranks put theirs together."""
        mine = [self.manifest[number].name for number in self.learner.accused(bad_step)]
        names = [name for rank in self.team.gather(mine) for name in rank]
        more = f"\n  and {len(names) - 20} more" if len(names) > 20 else ""
        return (
            f"step {bad_step + 1}: the loss or its gradient is not finite; nothing was learned from that step on, and "
            "the newest checkpoint is from before it. Lower optim.base_lr, lengthen the warm-up, set optim.clip_norm, "
            "or take scaling.precision=fp32. Samples of that step:\n"
            + "\n".join(f"  {name}" for name in names[:20])
            + more
        )

    # The ends, and what lies between them

    def _resume(self) -> int:
        """Load the newest checkpoint, if any, else the parent's; the steps done.

        Removes what a writer that died has left.
        """
        found = self.store.load_newest() if self.team.leads else None
        done = self.team.from_leader(lambda: found[0] if found else 0)
        if not done and self.spec.parent is not None:
            run_id, done = self.spec.parent
            folder = join(run_folder(self.spec.root, run_id), "checkpoints")
            self.origin = CheckpointStore(folder, self.run_config.checkpoint)
        if done:
            snapshot = found[1] if found else self.origin.load(done)
            cursor = restore(self.learner.network, self.learner.optimizer, snapshot)
            self.learner.load_extra_state(snapshot.tensors)
            self.workers_before = cursor["world"]
        if self.team.leads:
            self.store.sweep()
            self.metrics = open_metrics(
                self.spec.folder, self.spec.run_id, self.run_config.tracking, self.spec.config, done
            )
        return done

    def _introduce(self, done: int) -> None:
        """Tell what is about to happen, and how long it will take."""
        config, learner = self.run_config, self.learner
        step_s = max(self.team.gather(learner.rehearse())) if done < self.last else 0.0
        dtype = torch.bfloat16 if learner.precision == "bf16" else torch.float32
        self.machine_rate = sum(self.team.gather(matmul_rate(learner.device, dtype)))
        self.step_flops = self.flops_per_clip() * config.clips_per_step
        self.tell(
            "start",
            run_id=self.spec.run_id,
            steps=self.steps,
            done=done,
            epochs=self.steps / self.loader.steps_per_epoch,
            samples=len(self.manifest),
            batch=config.optim.batch_size,
            clips=config.clips_per_step,
            lr=config.optim.lr,
            workers=self.team.world,
            workers_before=self.workers_before,
            pids=self.team.gather(os.getpid()),
            micro_batches=learner.micro_batches,
            parameters=learner.parameter_counts(),
            clip_tokens=config.clip.grid.tokens,
            gflops_per_clip=self.flops_per_clip() / 1e9,
            device=learner.device.type,
            precision=learner.precision,
            seconds=step_s * max(0, self.last - done),
            **self.introduction(),
        )

    def _save(self, done: int, figures: dict[str, float]) -> None:
        self.saved_at = time.monotonic()
        if self.metrics is None:
            return
        self.metrics.flush()  # a checkpoint never runs ahead of the metrics before it
        cursor = {
            "step": done,
            "samples": done * self.run_config.optim.batch_size,
            "epoch": done / self.loader.steps_per_epoch,
            "seed": self.run_config.seed,
            "world": self.team.world,
            "config": self.run_config.digest(),
            "data": self.spec.data_digest,
        }
        snapshot = capture(self.learner.network, self.learner.optimizer, cursor, self.learner.extra_state())
        self.store.save(done, snapshot, self.values | figures)
        self.tell("checkpoint", step=done)

    def _settle(self) -> bool:
        """Wait for the last checkpoint, no longer than a stop may take; whether it is committed. Same on all ranks."""
        saved = self.team.from_leader(lambda: self.store.wait(self.run_config.checkpoint.deadline_s))
        if self.metrics is not None:
            self.metrics.close()
        return saved

    def _close(self, done: int, interrupted: bool) -> Outcome:
        finished = done >= self.steps and not interrupted
        if self.team.collect().bad:  # the last step's signals are still on their way
            self.bad.share()
            if self.bad.too_many:
                self._settle()
                raise self.bad.fault()
        figures: dict[str, float] = {}
        if done >= self.last and not interrupted:
            saved = self.team.from_leader(self.store.wait)
            try:
                figures = self.conclude(done) if finished else {}
            except Interrupted:
                finished = False
            if figures:
                self.note(done, figures)
            if self.metrics is not None:
                self.metrics.close()
        else:
            saved = self._settle()
        if self.team.leads and saved:
            self.store.sweep()
        return Outcome(done, finished, saved, self.values | figures)

    # For subclasses too

    def note(self, done: int, values: dict[str, float]) -> None:
        """Into the run's metrics, by rank 0."""
        if self.metrics is not None:
            epoch = done / self.loader.steps_per_epoch
            self.metrics.write({"step": done, "epoch": epoch, "time": time.time()} | values)

    def tell(self, kind: str, **facts: Any) -> None:
        """To whoever watches, by rank 0."""
        if self.team.leads:
            self.edge.tell({"kind": kind, **facts})
