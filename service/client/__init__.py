"""Typed Python clients for the REST API: `Client`, and `AsyncClient` with the same methods for asyncio.

    with Client.from_environment() as amd:
        job = amd.jobs.submit(JobRequest(kind="train", preset="demo-image-amd"))
        print(*amd.jobs.logs(job.id, follow=True), sep="")

`_async` is written by hand; `python -m tests.support.blocking_client` derives `_sync` from it. Code that both share,
such as the retry policy, is in this folder and performs no I/O. Does not import torch or Ray.
"""

from __future__ import annotations

from service.auth.api_keys import KeyRequest
from service.client._async.client import AsyncClient
from service.client._sync.client import Client
from service.client.errors import ApiError, NoAnswer
from service.client.retries import Patience
from service.jobs.details.schemas import CloneRequest, ForkRequest
from service.jobs.schemas import JobRequest
from service.operations.retention.policy import RetentionPolicy
from service.operations.retention.routes import GcRequest
from service.projects.schemas import ProjectPolicy
from service.registry.schemas import ImportRequest
from service.serving.schemas import DeploymentRequest
from service.webhooks.routes import WebhookRequest

__all__ = [
    "ApiError",
    "AsyncClient",
    "Client",
    "CloneRequest",
    "DeploymentRequest",
    "ForkRequest",
    "GcRequest",
    "ImportRequest",
    "JobRequest",
    "KeyRequest",
    "NoAnswer",
    "Patience",
    "ProjectPolicy",
    "RetentionPolicy",
    "WebhookRequest",
]
