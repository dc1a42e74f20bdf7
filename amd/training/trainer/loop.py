"""The training loop on one rank, for every kind of run, in one process or on a Ray Train worker.

Schedules steps, logging, checkpoints and evaluation. Subclasses of `Training` define what is trained; `RunHooks` hides
Ray, signals and terminals.
"""

from __future__ import annotations

import math
import os
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch

from amd.config import RunConfig
from amd.data.dataset.open import open_manifest
from amd.data.loading.clip_dataset import Records
from amd.data.loading.loader import Batch, ClipLoader
from amd.storage import join
from amd.training.checkpoints.state import capture, restore
from amd.training.checkpoints.store import CheckpointStore
from amd.training.failures import NonFinite
from amd.training.process_group import ProcessGroup, Signals
from amd.training.reporting.bad_samples import BadSamples
from amd.training.reporting.metrics import MetricsWriter, open_metrics
from amd.training.run_folder import RunSpec, run_folder
from amd.training.stall_watchdog import StallWatchdog
from amd.training.trainer.learner import Learner
from amd.training.trainer.meters import matmul_rate
from amd.training.trainer.open_data import open_on_main
from amd.training.trainer.optimizer import cosine_lr
from amd.training.trainer.periodic import PeriodicRequest
from amd.training.trainer.run_hooks import Interrupted, LoopResult, RunHooks

PREEMPTION_POLL_S = 5.0  # between joint checks for a pending preemption


class Training(ABC):
    """Runs one rank, starting at the newest checkpoint, until the run ends or is stopped.

    Subclasses set `learner` after calling this constructor. They may also add evaluation, checks, and fields of the
    `start` event.
    """

    learner: Learner

    def __init__(
        self,
        spec: RunSpec,
        config: RunConfig,
        group: ProcessGroup,
        hooks: RunHooks,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.spec, self.run_config, self.group, self.hooks = spec, config, group, hooks
        self.manifest = self.open_manifest()
        self.loader = self.open_loader()
        self.steps = config.schedule.total_steps(self.loader.steps_per_epoch)
        self.last = min(self.steps, spec.until or self.steps)  # last step of this attempt
        self.warmup = config.schedule.total_warmup_steps(self.loader.steps_per_epoch)
        self.store = self.origin = CheckpointStore(join(spec.folder, "checkpoints"), config.checkpoint)
        self.bad = BadSamples(spec.folder, group, config.data.max_bad_fraction, len(self.manifest))
        self.decoders: Counter[str] = Counter()  # videos read for this rank since the start, by decoder
        self.metrics: MetricsWriter | None = None  # only on rank 0
        self.values: dict[str, float] = {}
        every_minutes = config.checkpoint.every_minutes
        self.timed_save = PeriodicRequest(None if every_minutes is None else 60 * every_minutes, clock)
        self.preemption_poll = PeriodicRequest(PREEMPTION_POLL_S, clock)
        self.saved_step, self.preemption_reported = 0, False  # step of the last checkpoint of this attempt
        self.watchdog = StallWatchdog(config.scaling.stall_timeout_s, group.rank, self.loader.pids, hooks.stalled)
        self.workers_before = group.world

    # Methods that subclasses define, in addition to `learner`

    @abstractmethod
    def flops_per_clip(self) -> float:
        """Return the FLOPs per clip for a whole step, forward and backward."""

    def open_manifest(self) -> Records:
        return open_on_main(self.group, self.run_config.data, self.spec.folder, open_manifest)

    def open_loader(self, **more: Any) -> ClipLoader:
        """Open the training data loader; `more` is passed to ClipLoader."""
        config = self.run_config
        return ClipLoader(
            config.data,
            config.clip,
            self.manifest,
            batch_size=config.optim.batch_size,
            rank=self.group.rank,
            world=self.group.world,
            micro_batch=config.micro_batch,
            seed=config.seed,
            node_ranks=self.group.node_ranks,
            **more,
        )

    def start_facts(self) -> dict[str, Any]:
        """Return additional fields for the `start` event."""
        return {}

    def after_step(self, done: int, batches: list[Batch]) -> None:
        """Inspect the model after a step. Called on every rank."""

    def is_checkpoint_due(self, done: int) -> bool:
        """Return whether this kind of run needs a checkpoint after this step."""
        return False

    def evaluate(self, done: int) -> dict[str, float]:
        """Return the `eval/…` metrics due after this step, equal on all ranks; empty on most steps.

        If any metrics are returned, a checkpoint is saved. May raise Interrupted.
        """
        return {}

    def finalize(self, done: int) -> dict[str, float]:
        """Finish a run after its last checkpoint is committed; return metrics that are equal on all ranks.

        May raise Interrupted.
        """
        return {}

    def close_reports(self, wait: bool) -> None:
        """Finish reports that are written in the background, before the metrics are closed. Called on every rank.

        `wait`: whether to wait for them, for a limited time; False after a stop request.
        """

    def run(self) -> LoopResult:
        with self.watchdog:
            return self._run()

    def _run(self) -> LoopResult:
        interrupted = False
        with self.loader:
            done = self._resume()
            self._introduce(done)
            self.learner.join()
            self.watchdog.progress(done)
            try:
                self._catch_up(done)
                for step, batches, waited_s in self._read(done):
                    self.learner.learn(step, batches, self._lr(step), waited_s)
                    done = step + 1
                    self.watchdog.progress(done)
                    signals = self.group.exchange(self._signals(batches))
                    self._between_steps(done, batches, signals)
                    if signals.stop:
                        break
            except Interrupted:
                interrupted = True
        return self._close(done, interrupted)

    def _catch_up(self, done: int) -> None:
        """Evaluate the loaded checkpoint if the run stopped before evaluating it. Skips a parent's checkpoint."""
        if not done or self.origin is not self.store:
            return
        known = self.group.broadcast_from_main(lambda: self.store.metrics(done))
        if any(name.startswith("eval/") for name in known):
            return
        if metrics := self.evaluate(done):
            self.write_metrics(done, metrics)
            if self.group.is_main:
                self.store.add_metrics(done, metrics)

    def _read(self, start: int) -> Iterator[tuple[int, list[Batch], float]]:
        """Yield the step (starting at 0), this rank's micro-batches, and the seconds spent waiting for them."""
        steps = self.loader.steps(start, self.last)
        for step in range(start, self.last):
            start_s = time.perf_counter()
            batches = next(steps)
            yield step, batches, time.perf_counter() - start_s

    def _lr(self, step: int) -> float:
        optim = self.run_config.optim
        return cosine_lr(step, peak=optim.lr, final=optim.final_lr, steps=self.steps, warmup=self.warmup)

    # Between steps: all ranks take every action at the same step

    def _signals(self, batches: list[Batch]) -> Signals:
        found = self.bad.add(
            (bad for batch in batches for bad in batch.bad),
            (damaged for batch in batches for damaged in batch.damaged),
        )
        self.decoders.update(decoder for batch in batches for decoder in batch.decoders)
        return Signals(
            stop=int(self.stop_requested()),
            save=int(self.group.is_main and self.timed_save.due()),
            poll_preemption=int(self.group.is_main and self.preemption_poll.due()),
            bad=found,
        )

    def _between_steps(self, done: int, batches: list[Batch], signals: Signals) -> None:
        if signals.bad:
            self.bad.share()
        # A checkpoint saved at the step that raised the signal has already fulfilled the request.
        timed = bool(signals.save) and self.saved_step < done - self.group.signal_delay
        save = bool(signals.stop) or timed or self._save_is_due(done) or self.bad.too_many
        if signals.poll_preemption:
            self.preemption_poll.restart()
            if self.hooks.preempted():
                save = True  # at every poll, because the steps after the last checkpoint are lost with the node
                if not self.preemption_reported:
                    self.emit("warning", text=f"step {done}: a node is about to be preempted; saving checkpoints")
                self.preemption_reported = True
        if save or done % self.run_config.tracking.log_every_steps == 0:
            self._log(done)
        self.after_step(done, batches)
        try:  # a stop does not wait for evaluation: the resumed run evaluates first
            metrics = {} if signals.stop and done < self.last else self.evaluate(done)
        except Interrupted:
            self._save(done, {})
            raise
        if metrics:
            self.write_metrics(done, metrics)
        if save or metrics:
            self._save(done, metrics)
        if self.bad.too_many:
            self._wait_for_checkpoint()
            raise self.bad.fault()

    def _save_is_due(self, done: int) -> bool:
        policy = self.run_config.checkpoint
        every = policy.every_steps is not None and done % policy.every_steps == 0
        return every or done in policy.pin_steps or done == self.last or self.is_checkpoint_due(done)

    def _log(self, done: int) -> None:
        """Log the mean metrics since the last line. Raises NonFinite on all ranks before a bad state is saved."""
        bad_step = self.learner.health.first_bad_step()
        if bad_step is not None:
            raise NonFinite(self._non_finite_message(bad_step))
        self.learner.recent_losses.clear()
        values = self.learner.meter.read(self.run_config.clips_per_step)
        values["optim/lr"] = self._lr(done - 1)
        values["data/bad_samples"] = float(len(self.bad))
        values["data/damaged_samples"] = float(self.bad.damaged)
        if self.run_config.data.decoder == "decord":
            values["data/decord_share"] = self._decord_share()
        values["speed/mfu"] = self.step_flops / values["time/step_s"] / self.machine_rate
        if not all(map(math.isfinite, values.values())):
            raise NonFinite(f"step {done}: the gradient is finite, but some metrics are not: {values}")
        self.values = values
        self.write_metrics(done, values)
        self.emit("step", step=done, values=values)

    def _decord_share(self) -> float:
        """Return the fraction of videos that decord has decoded since the start, across all ranks."""
        counts = self.group.gather((self.decoders["decord"], self.decoders.total()))
        return sum(decord for decord, _ in counts) / max(1, sum(total for _, total in counts))

    def _non_finite_message(self, bad_step: int) -> str:
        """Return a message that identifies the first non-finite step and its samples on all ranks."""
        mine = [self.manifest[number].name for number in self.learner.suspect_records(bad_step)]
        names = [name for rank in self.group.gather(mine) for name in rank]
        more = f"\n  and {len(names) - 20} more" if len(names) > 20 else ""
        return (
            f"step {bad_step + 1}: the loss or its gradient is not finite; no update was applied from that step on, "
            "and the newest checkpoint is from before it. Lower optim.base_lr, lengthen the warm-up, set "
            "optim.clip_norm, or use scaling.precision=fp32. Samples of that step:\n"
            + "\n".join(f"  {name}" for name in names[:20])
            + more
        )

    # Start and end

    def _resume(self) -> int:
        """Load the newest checkpoint, or else the parent's; return the number of completed steps.

        Removes uncommitted folders left by writers that died.
        """
        found = self.store.load_newest() if self.group.is_main else None
        done = self.group.broadcast_from_main(lambda: found[0] if found else 0)
        if not done and self.spec.parent is not None:
            run_id, done = self.spec.parent
            folder = join(run_folder(self.spec.root, run_id), "checkpoints")
            self.origin = CheckpointStore(folder, self.run_config.checkpoint)
        if done:
            snapshot = found[1] if found else self.origin.load(done)
            cursor = restore(self.learner.network, self.learner.optimizer, snapshot)
            self.learner.load_extra_state(snapshot.tensors)
            self.workers_before = cursor["world"]
        if self.group.is_main:
            self.store.sweep()
            self.metrics = open_metrics(
                self.spec.folder, self.spec.run_id, self.run_config.tracking, self.spec.config, done
            )
        return done

    def _introduce(self, done: int) -> None:
        """Warm up, and emit the `start` event with the run's facts and estimated duration."""
        config, learner = self.run_config, self.learner
        step_s = max(self.group.gather(learner.warm_up())) if done < self.last else 0.0
        dtype = torch.bfloat16 if learner.precision == "bf16" else torch.float32
        self.machine_rate = sum(self.group.gather(matmul_rate(learner.device, dtype)))
        self.step_flops = self.flops_per_clip() * config.clips_per_step
        self.emit(
            "start",
            run_id=self.spec.run_id,
            steps=self.steps,
            done=done,
            epochs=self.steps / self.loader.steps_per_epoch,
            samples=len(self.manifest),
            batch=config.optim.batch_size,
            clips=config.clips_per_step,
            lr=config.optim.lr,
            workers=self.group.world,
            workers_before=self.workers_before,
            pids=self.group.gather(os.getpid()),
            micro_batches=learner.micro_batches,
            parameters=learner.parameter_counts(),
            clip_tokens=config.clip.grid.tokens,
            gflops_per_clip=self.flops_per_clip() / 1e9,
            device=learner.device.type,
            precision=learner.precision,
            seconds=step_s * max(0, self.last - done),
            **self.start_facts(),
        )

    def _save(self, done: int, metrics: dict[str, float]) -> None:
        self.saved_step = done
        self.timed_save.restart()
        if self.metrics is None:
            return
        cursor = {
            "step": done,
            "samples": done * self.run_config.optim.batch_size,
            "epoch": done / self.loader.steps_per_epoch,
            "seed": self.run_config.seed,
            "world": self.group.world,
            "config": self.run_config.digest(),
            "data": self.spec.data_digest,
        }
        snapshot = capture(self.learner.network, self.learner.optimizer, cursor, self.learner.extra_state())
        # Metrics are stored before the checkpoint that follows them, off this thread.
        self.store.save(done, snapshot, self.values | metrics, before=self.metrics.flush)
        self.emit("checkpoint", step=done)

    def _wait_for_checkpoint(self) -> bool:
        """Wait for the last checkpoint, up to checkpoint.deadline_s; return whether it is committed."""
        saved = self.group.broadcast_from_main(lambda: self.store.wait(self.run_config.checkpoint.deadline_s))
        if self.metrics is not None:
            self.metrics.close()
        return saved

    def _close(self, done: int, interrupted: bool) -> LoopResult:
        finished = done >= self.steps and not interrupted
        if self.group.collect().bad:  # the last step's signals are still pending
            self.bad.share()
            if self.bad.too_many:
                self._wait_for_checkpoint()
                raise self.bad.fault()
        metrics: dict[str, float] = {}
        ended = done >= self.last and not interrupted
        self.close_reports(ended)
        if ended:
            saved = self.group.broadcast_from_main(self.store.wait)
            try:
                metrics = self.finalize(done) if finished else {}
            except Interrupted:
                finished = False
            if metrics:
                self.write_metrics(done, metrics)
            if self.metrics is not None:
                self.metrics.close()
        else:
            saved = self._wait_for_checkpoint()
        if self.group.is_main and saved:
            self.store.sweep()
        return LoopResult(done, finished, saved, self.values | metrics)

    # Methods that subclasses also call

    def stop_requested(self) -> bool:
        """Return whether to stop. Called once per step and evaluation batch, so it also notifies the stall watchdog."""
        self.watchdog.progress()
        return self.hooks.stop_requested()

    def write_metrics(self, done: int, values: dict[str, float]) -> None:
        """Write a step's metrics, on rank 0 only."""
        if self.metrics is not None:
            epoch = done / self.loader.steps_per_epoch
            self.metrics.write({"step": done, "epoch": epoch, "time": time.time()} | values)

    def emit(self, kind: str, **facts: Any) -> None:
        """Emit an event, on rank 0 only."""
        if self.group.is_main:
            self.hooks.emit({"kind": kind, **facts})
