"""Compute features in Ray actors that each embed the next span of records. The only module here that imports Ray.

Actors receive the records to read and never list data themselves; features are returned through Ray's object store,
about ten MiB at a time.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch

from amd.artifacts.weights import load_encoder
from amd.config import ConfigError, DataConfig, Precision, ScalingConfig
from amd.data.dataset.manifest import Manifest
from amd.data.dataset.record import Record
from amd.device import choose_precision
from amd.downstream.embedding.cache import Part
from amd.downstream.embedding.features import Embedder, FeaturePooling, embed_records
from amd.training.ray.ray_train import FORWARDED, cluster, uses_gpu

POLL_INTERVAL_S = 0.5  # between checks of the stop event


class SpanWorker:
    """Ray actor that embeds spans with an encoder on its device."""

    def __init__(self, url: str, pooling: FeaturePooling, scaling: ScalingConfig) -> None:
        torch.set_num_threads(scaling.threads_per_worker or max(1, int(scaling.cpus_per_worker)))
        encoder, card = load_encoder(url)
        self._embedder = Embedder(encoder, card.clip, pooling, scaling)

    def embed(self, data: DataConfig, records: list[Record], start: int) -> Part:
        return embed_records(self._embedder, data, records, start)


@contextmanager
def workers(
    scaling: ScalingConfig,
    url: str,
    pooling: FeaturePooling,
    log: Callable[[str], None],
    stop: threading.Event | None = None,
) -> Iterator[tuple[Callable[[DataConfig, Manifest, Iterable[range]], Iterator[Part]], Precision]]:
    """Start actors and yield a function that embeds spans of records, and its precision.

    Actors live until the context exits.

    Once `stop` is set, work in progress is discarded and no more parts are returned.
    Raises ConfigError if the cluster cannot fit the minimum number of workers.
    """
    with cluster(scaling, log):
        import ray
        from ray.util import ActorPool

        gpu = uses_gpu(scaling)
        count = _count(scaling, gpu)
        device = torch.device("cuda" if gpu else "cpu")
        actor_scaling = scaling.model_copy(update={"device": device.type})
        environment = {name: os.environ[name] for name in FORWARDED if name in os.environ}
        options: dict[str, Any] = {
            "num_cpus": scaling.cpus_per_worker,
            "num_gpus": int(gpu),
            "max_restarts": scaling.retries.infrastructure,
            "max_task_retries": scaling.retries.infrastructure,
            "runtime_env": {"env_vars": environment},
        }
        actors = [ray.remote(SpanWorker).options(**options).remote(url, pooling, actor_scaling) for _ in range(count)]

        def embed(data: DataConfig, manifest: Manifest, spans: Iterable[range]) -> Iterator[Part]:
            def submit(actor: Any, span: range) -> Any:
                return actor.embed.remote(data, [manifest[number] for number in span], span.start)

            pool = ActorPool(actors)
            for span in spans:
                pool.submit(submit, span)
            try:
                while pool.has_next() and not (stop is not None and stop.is_set()):
                    with suppress(TimeoutError):
                        yield pool.get_next_unordered(timeout=None if stop is None else POLL_INTERVAL_S)
            except ray.exceptions.RayTaskError as error:
                raise error.cause from None  # re-raise as if it had been raised in this process

        try:
            yield embed, choose_precision(scaling.precision, device)
        finally:
            for actor in actors:
                ray.kill(actor)


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
