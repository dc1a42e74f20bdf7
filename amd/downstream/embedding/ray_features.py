"""Features by several Ray actors: each embeds a span of records, whichever is next. The one Ray edge of this package.

An actor is handed the records it is to read, so it lists no data; features come back through Ray's object store, some
ten MiB at a time. Knows nothing of caches, probes or files.
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

LOOK_S = 0.5  # between two looks at whether to stop


class SpanWorker:
    """What runs in an actor: an encoder on its device."""

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
    say: Callable[[str], None],
    stop: threading.Event | None = None,
) -> Iterator[tuple[Callable[[DataConfig, Manifest, Iterable[range]], Iterator[Part]], Precision]]:
    """What embeds spans of records on the cluster, and in which precision. Actors live as long as the context.

    Once `stop` is set no more parts come, and what actors are at is given up.
    Raises ConfigError where the cluster has no room for the fewest workers.
    """
    with cluster(scaling, say):
        import ray
        from ray.util import ActorPool

        gpu = uses_gpu(scaling)
        count = _count(scaling, gpu)
        device = torch.device("cuda" if gpu else "cpu")
        own = scaling.model_copy(update={"device": device.type})
        environment = {name: os.environ[name] for name in FORWARDED if name in os.environ}
        options: dict[str, Any] = {
            "num_cpus": scaling.cpus_per_worker,
            "num_gpus": int(gpu),
            "max_restarts": scaling.retries.infrastructure,
            "max_task_retries": scaling.retries.infrastructure,
            "runtime_env": {"env_vars": environment},
        }
        actors = [ray.remote(SpanWorker).options(**options).remote(url, pooling, own) for _ in range(count)]

        def embed(data: DataConfig, manifest: Manifest, spans: Iterable[range]) -> Iterator[Part]:
            def hand_out(actor: Any, span: range) -> Any:
                return actor.embed.remote(data, [manifest[number] for number in span], span.start)

            pool = ActorPool(actors)
            for span in spans:
                pool.submit(hand_out, span)
            try:
                while pool.has_next() and not (stop is not None and stop.is_set()):
                    with suppress(TimeoutError):
                        yield pool.get_next_unordered(timeout=None if stop is None else LOOK_S)
            except ray.exceptions.RayTaskError as error:
                raise error.cause from None  # as if it had happened here

        try:
            yield embed, choose_precision(scaling.precision, device)
        finally:
            for actor in actors:
                ray.kill(actor)


def _count(scaling: ScalingConfig, gpu: bool) -> int:
    """As many workers as the cluster has room for, in the range that is asked for."""
    import ray

    least, most = scaling.workers
    resources = ray.cluster_resources()
    room = int(resources.get("CPU", 0) // scaling.cpus_per_worker)
    if gpu:
        room = min(room, int(resources.get("GPU", 0)))
    if room < least:
        raise ConfigError(
            [
                f"scaling.workers={least} need {scaling.cpus_per_worker:g} CPUs{' and a GPU' if gpu else ''} each; the "
                f"cluster has room for {room}; lower scaling.workers or scaling.cpus_per_worker, or add nodes"
            ]
        )
    return min(most, room)
