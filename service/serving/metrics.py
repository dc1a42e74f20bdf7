"""Prometheus metrics for requests to encoders, by deployment.

Each control plane counts the requests that it sends. Values that only a replica knows, such as how full its batches
are, are part of its reply. A sum over control planes therefore counts each request once, regardless of the number of
replicas.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, Gauge, Histogram

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
FRACTIONS = tuple(tenth / 10 for tenth in range(1, 11))


class InferenceMetrics:
    """Metrics for the requests that this control plane sends to deployments."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._seconds = Histogram(
            "amd_inference_seconds",
            "Request duration, by deployment, task and outcome. Deployment: empty if none serves the encoder.",
            ["deployment", "task", "outcome"],
            registry=self.registry,
            buckets=SECONDS,
        )
        self._in_flight = Gauge(
            "amd_inference_in_flight",
            "Requests waiting for a reply, by deployment.",
            ["deployment"],
            registry=self.registry,
        )
        self._queue_seconds = Histogram(
            "amd_inference_queue_seconds",
            "Longest time that a clip of a request waited for its batch, by deployment.",
            ["deployment"],
            registry=self.registry,
            buckets=SECONDS,
        )
        self._batch_fill = Histogram(
            "amd_inference_batch_fill",
            "Tokens in the batches that computed a request, as a fraction of max_batch_tokens, by deployment.",
            ["deployment"],
            registry=self.registry,
            buckets=FRACTIONS,
        )

    def observe(self, deployment: str, task: str, outcome: str, seconds: float) -> None:
        """Count a request. `outcome`: ok, failed, caller_gone, or the code of an error."""
        self._seconds.labels(deployment, task, outcome).observe(seconds)

    def observe_batches(self, deployment: str, queue_s: float, batch_fill: float) -> None:
        """Record what a replica has reported about the batches that computed a request."""
        self._queue_seconds.labels(deployment).observe(queue_s)
        self._batch_fill.labels(deployment).observe(batch_fill)

    @contextmanager
    def in_flight(self, deployment: str) -> Iterator[None]:
        """Count a request as waiting for a reply while the context is active."""
        with self._in_flight.labels(deployment).track_inprogress():
            yield
