"""Attempt a run until it ends, and decide which failures are retried, how often, and with which changes.

A failure is charged to a retry budget, which a newer checkpoint refills. Running out of GPU memory is not charged: the
next attempt uses half the samples per forward pass. Does not depend on how an attempt is carried out.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

from amd.config import ConfigError, RunConfig, with_overrides
from amd.storage import StorageUnreachable, join, write_bytes
from amd.training.checkpoints.listing import newest_step
from amd.training.failures import Budgets, Verdict, classify_failure
from amd.training.reporting.progress import Watcher
from amd.training.run_folder import RunSpec

logger = logging.getLogger(__name__)

# Returns a LoopResult as plain data, or None if the deadline has passed.
Attempt = Callable[[RunSpec], dict[str, Any] | None]


class AttemptsResult(NamedTuple):
    """Outcome of the last attempt, and the restarts before it."""

    outcome: dict[str, Any] | Verdict | None
    """The LoopResult as plain data; the verdict on the last failure; or None if stopping exceeded its deadline."""
    restarts: Counter[str]
    """Number of restarts, keyed by failure reason."""


def attempt_until_done(
    spec: RunSpec,
    config: RunConfig,
    attempt: Attempt,
    stop: threading.Event,
    watcher: Watcher,
    *,
    retry: bool = True,
) -> AttemptsResult:
    """Attempt the run until it ends, is stopped, or exhausts a retry budget.

    `retry`: whether to retry failures here; False if a launcher restarts the whole process instead.
    Raises ConfigError as soon as an attempt does, since retrying would not help.
    """
    budgets, restarts = Budgets(config.scaling.retries), Counter[str]()
    while True:
        if stop.is_set():
            return AttemptsResult({"steps": 0, "finished": False, "saved": True}, restarts)
        try:
            return AttemptsResult(attempt(spec), restarts)
        except ConfigError:
            raise
        except Exception as error:
            verdict = classify_failure(_errors_in(error))
            _store_traceback(spec, error)
        if stop.is_set() and verdict.budget != "user":
            return AttemptsResult(None, restarts)  # the stop terminated the workers too
        if not retry:
            return AttemptsResult(verdict, restarts)
        message = verdict.message.splitlines()[0]
        smaller = halve_micro_batch(config) if verdict.reason == "oom_gpu" else None
        if smaller is not None:
            config, spec = smaller, _with_micro_batch(spec, smaller.micro_batch)
            change = f" with at most {config.micro_batch} samples per forward pass"
        elif budgets.charge(verdict.budget, _newest_step(spec)):
            message, change = f"{message} ({budgets.describe(verdict.budget)})", ""
        else:
            return AttemptsResult(verdict, restarts)
        restarts[verdict.reason] += 1
        watcher.log(f"{message}; retrying from the newest checkpoint{change}")


def halve_micro_batch(config: RunConfig) -> RunConfig | None:
    """Return the config with about half the samples per forward pass, or None if that is not possible.

    Mixing augmentations need an even number of clips, so one sample fewer is tried too.
    """
    share = -(-config.optim.batch_size // config.scaling.workers[0])
    half = min(config.micro_batch, share) // 2
    for samples in (half, half - 1):
        if samples >= 1:
            try:
                return with_overrides(config, {"scaling.micro_batch": samples})
            except ConfigError:
                continue
    return None


def _with_micro_batch(spec: RunSpec, samples: int) -> RunSpec:
    scaling = {**spec.config["scaling"], "micro_batch": samples}
    return dataclasses.replace(spec, config={**spec.config, "scaling": scaling})


def _store_traceback(spec: RunSpec, error: BaseException) -> None:
    """Store the full traceback in the run folder, because the user sees only a short message."""
    text = "".join(traceback.format_exception(error))
    url = join(spec.folder, "errors", f"{time.time_ns()}.txt")
    try:
        write_bytes(url, text.encode())
    except Exception as write_error:  # storage may be the cause of the failure
        logger.warning("the traceback could not be written to %s: %s", url, write_error)


def _newest_step(spec: RunSpec) -> int:
    """Return the step of the newest checkpoint, or 0 if storage is unreachable, which may be why the run failed."""
    try:
        return newest_step(spec.folder)
    except StorageUnreachable:
        return 0


def _errors_in(error: BaseException) -> list[BaseException]:
    """Unwrap the workers' original errors from a Ray Train error."""
    inner = getattr(error, "worker_failures", None)
    if inner:
        return list(inner.values())
    cause = getattr(error, "controller_failure", None)
    return [cause if isinstance(cause, BaseException) else error]
