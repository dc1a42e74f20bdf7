"""Compute features in Ray actors, each embedding one span at a time. No other module in this package imports Ray.

Actors receive the records to read and never list data themselves; features are returned through Ray's object store,
about ten MiB at a time.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from amd.artifacts.weights import load_encoder
from amd.config import ConfigError, DataConfig, Precision, Retries, ScalingConfig
from amd.data.dataset.manifest import Manifest
from amd.data.dataset.record import Record
from amd.device import choose_precision
from amd.downstream.embedding.cache import Part
from amd.downstream.embedding.features import Embedder, FeaturePooling, embed_records
from amd.training.failures import Budgets, classify_failure
from amd.training.ray.ray_train import FORWARDED, cluster, uses_gpu

POLL_INTERVAL_S = 0.5  # between checks of the stop event


class SpanWorker:
    """Ray actor that embeds spans with an encoder on its device."""

    def __init__(self, url: str, pooling: FeaturePooling, scaling: ScalingConfig, thumbnails: bool) -> None:
        torch.set_num_threads(scaling.threads_per_worker or max(1, int(scaling.cpus_per_worker)))
        encoder, card = load_encoder(url)
        self._embedder, self._thumbnails = Embedder(encoder, card.clip, pooling, scaling), thumbnails

    def embed(self, data: DataConfig, records: list[Record], start: int) -> Part:
        return embed_records(self._embedder, data, records, start, thumbnails=self._thumbnails)


@contextmanager
def workers(
    scaling: ScalingConfig,
    url: str,
    pooling: FeaturePooling,
    log: Callable[[str], None],
    stop: threading.Event | None = None,
    *,
    thumbnails: bool = False,
) -> Iterator[tuple[Callable[[DataConfig, Manifest, Iterable[range]], Iterator[Part]], Precision]]:
    """Start actors; yield a function that embeds spans of records on them, and the precision that it uses.

    Actors live until the context exits. Lost actors are replaced, at most `scaling.retries` times since the last
    finished span. Once `stop` is set, work in progress is discarded and no more parts are returned.
    Raises ConfigError if the cluster cannot fit the minimum number of workers.
    """
    with cluster(scaling, log):
        import ray

        gpu = uses_gpu(scaling)
        count = _count(scaling, gpu)
        device = torch.device("cuda" if gpu else "cpu")
        actor_scaling = scaling.model_copy(update={"device": device.type})
        environment = {name: os.environ[name] for name in FORWARDED if name in os.environ}
        options: dict[str, Any] = {
            "num_cpus": scaling.cpus_per_worker,
            "num_gpus": int(gpu),
            "runtime_env": {"env_vars": environment},
        }
        worker_class = ray.remote(SpanWorker).options(**options)
        pool = _SpanWorkerPool(
            lambda: worker_class.remote(url, pooling, actor_scaling, thumbnails), count, scaling.retries, log
        )

        def embed(data: DataConfig, manifest: Manifest, spans: Iterable[range]) -> Iterator[Part]:
            def submit(actor: Any, span: range) -> Any:
                return actor.embed.remote(data, [manifest[number] for number in span], span.start)

            return pool.map(submit, spans, stop)

        try:
            yield embed, choose_precision(scaling.precision, device)
        finally:
            pool.close()


class _SpanWorkerPool:
    """Actors that each process one span at a time.

    Used instead of Ray's ActorPool with restarting actors: Ray never resets its restart count, so a run that takes days
    would fail after losing a few nodes.
    """

    def __init__(
        self, start_actor: Callable[[], Any], count: int, retries: Retries, log: Callable[[str], None]
    ) -> None:
        self._start_actor, self._log = start_actor, log
        self._actors = [start_actor() for _ in range(count)]
        self._budgets, self._finished = Budgets(retries), 0

    def map(
        self, submit: Callable[[Any, range], Any], spans: Iterable[range], stop: threading.Event | None
    ) -> Iterator[Part]:
        """Yield each span's part as it completes, until `stop` is set."""
        import ray

        waiting, idle = deque(spans), [*self._actors]
        running: dict[Any, tuple[Any, range]] = {}  # by result reference
        while (waiting or running) and not (stop is not None and stop.is_set()):
            while waiting and idle:
                actor, span = idle.pop(), waiting.popleft()
                running[submit(actor, span)] = (actor, span)
            ended, _ = ray.wait([*running], timeout=POLL_INTERVAL_S)
            for result in ended:
                actor, span = running.pop(result)
                try:
                    part: Part = ray.get(result)
                except ray.exceptions.RayTaskError as error:
                    raise error.cause from None  # re-raise as if it had been raised in this process
                except ray.exceptions.RayError as error:
                    idle.append(self._replace(actor, error))
                    waiting.appendleft(span)
                else:
                    self._finished += 1
                    idle.append(actor)
                    yield part

    def close(self) -> None:
        import ray

        for actor in self._actors:
            ray.kill(actor)

    def _replace(self, actor: Any, error: Exception) -> Any:
        """Replace a lost actor. Raises `error` if its retry budget is exhausted."""
        import ray

        budget = classify_failure([error]).budget
        if not self._budgets.charge(budget, self._finished):
            raise error
        self._log(f"a worker was lost ({self._budgets.describe(budget, 'part')}); replacing it")
        ray.kill(actor)
        self._actors[self._actors.index(actor)] = replacement = self._start_actor()
        return replacement


def _count(scaling: ScalingConfig, gpu: bool) -> int:
    """Return how many workers fit on the cluster, within the configured range."""
    import ray

    minimum, maximum = scaling.workers
    resources = ray.cluster_resources()
    capacity = int(resources.get("CPU", 0) // scaling.cpus_per_worker)
    if gpu:
        capacity = min(capacity, int(resources.get("GPU", 0)))
    if capacity < minimum:
        need = f"{scaling.cpus_per_worker:g} CPUs{' and a GPU' if gpu else ''}"
        raise ConfigError(
            [
                f"scaling.workers={minimum}: each worker needs {need}, but the cluster has capacity for only "
                f"{capacity}; lower scaling.workers or scaling.cpus_per_worker, or add nodes"
            ]
        )
    return min(maximum, capacity)
