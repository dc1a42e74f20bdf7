"""Typed Python clients for the REST API: `Client`, and `AsyncClient` with the same methods to await.

    with Client.from_environment() as amd:
        job = amd.jobs.submit(JobRequest(kind="train", preset="demo-image-amd"))
        print(*amd.jobs.logs(job.id, follow=True), sep="")

Each call is defined once, as a script (see `service.client.transport`) that states what to send and how to read the
response. Does not import torch or Ray.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import httpx

from service.client.deployments import AsyncDeployments, Deployments, classifications, embeddings, reconstructions
from service.client.encoders import Aliases, AsyncAliases, AsyncEncoders, Encoders
from service.client.jobs import AsyncJobs, Jobs
from service.client.keys import AsyncKeys, Keys
from service.client.methods import AsyncMethods, BlockingMethods, async_one, one, view
from service.client.transport import (
    ApiError,
    Call,
    Effect,
    Emit,
    NoAnswer,
    Open,
    Patience,
    Read,
    Script,
    Send,
    Sleep,
    Steps,
    once,
)
from service.client.webhooks import AsyncWebhooks, Webhooks
from service.jobs.kinds import JobKind
from service.jobs.schemas import JobRequest, ValidateView
from service.registry.schemas import ImportRequest
from service.serving.schemas import DeploymentRequest

__all__ = [
    "ApiError",
    "AsyncClient",
    "Client",
    "DeploymentRequest",
    "ImportRequest",
    "JobRequest",
    "NoAnswer",
    "Patience",
]

TIMEOUT = httpx.Timeout(30.0, connect=5.0)
STREAM_TIMEOUT = httpx.Timeout(60.0, connect=5.0)  # longer than the interval of the server's heartbeats


def preset_list() -> Script[list[dict[str, Any]]]:
    return once(Call("GET", "/v1/presets", view(list[dict[str, Any]])))


def preset_get(name: str) -> Script[dict[str, Any]]:
    return once(Call("GET", f"/v1/presets/{quote(name, safe='')}", view(dict[str, Any])))


def schema(kind: JobKind) -> Script[dict[str, Any]]:
    """Get the JSON schema of the config of a job kind."""
    return once(Call("GET", f"/v1/schemas/{kind}", view(dict[str, Any])))


def validate(request: JobRequest) -> Script[ValidateView]:
    """Resolve a request and estimate its cost, without running it."""
    body = request.model_dump(mode="json", exclude_unset=True)
    return once(Call("POST", "/v1/validate", view(ValidateView), body=body, changes=False))


def health() -> Script[dict[str, Any]]:
    """Get the readiness of each part of the service. Does not raise if a part is not ready."""
    return once(Call("GET", "/readyz", view(dict[str, Any]), accepted=(503,)))


class Client(BlockingMethods):
    """Blocking client. Raises ApiError for an error response, and NoAnswer if the service cannot be reached."""

    def __init__(
        self,
        url: str,
        key: str | None = None,
        *,
        patience: Patience | None = None,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        super().__init__(self._execute_script)
        self._http = httpx.Client(base_url=url, headers=_headers(key), timeout=TIMEOUT, transport=transport)
        self._patience = patience or Patience()
        self.jobs = Jobs(self._run)
        self.keys = Keys(self._run)
        self.encoders = Encoders(self._run)
        self.aliases = Aliases(self._run)
        self.deployments = Deployments(self._run)
        self.webhooks = Webhooks(self._run)

    presets = one(preset_list)
    preset = one(preset_get)
    schema = one(schema)
    validate = one(validate)
    health = one(health)
    embeddings = one(embeddings)
    classifications = one(classifications)
    reconstructions = one(reconstructions)

    @classmethod
    def from_environment(cls, **options: Any) -> Client:
        """Connect to AMD_URL with AMD_KEY or AMD_KEY_FILE, or to the local stack of `amd up`. Raises NoAnswer."""
        return cls(*find_service(), **options)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def _execute_script(self, script: Script[Any]) -> Iterator[Any]:
        steps, opened = script.steps(self._patience), contextlib.ExitStack()
        outcome: Any = None
        with opened:
            while (effect := _next_effect(steps, outcome)) is not None:
                outcome = None
                try:
                    match effect:
                        case Emit(item):
                            yield item
                        case Sleep(seconds):
                            time.sleep(seconds)
                        case Send(call):
                            outcome = self._http.send(_request(self._http, call))
                        case Open(call):
                            opened.close()
                            outcome = self._http.send(_request(self._http, call, STREAM_TIMEOUT), stream=True)
                            opened.callback(outcome.close)
                            chunks = outcome.iter_bytes()
                            if outcome.is_error:
                                outcome.read()
                        case Read():
                            outcome = next(chunks, None)
                except httpx.TransportError as error:
                    outcome = error


class AsyncClient(AsyncMethods):
    """Client for asyncio: methods are awaited; listings are asynchronous iterators."""

    def __init__(
        self,
        url: str,
        key: str | None = None,
        *,
        patience: Patience | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        super().__init__(self._execute_script)
        self._http = httpx.AsyncClient(base_url=url, headers=_headers(key), timeout=TIMEOUT, transport=transport)
        self._patience = patience or Patience()
        self.jobs = AsyncJobs(self._run)
        self.keys = AsyncKeys(self._run)
        self.encoders = AsyncEncoders(self._run)
        self.aliases = AsyncAliases(self._run)
        self.deployments = AsyncDeployments(self._run)
        self.webhooks = AsyncWebhooks(self._run)

    presets = async_one(preset_list)
    preset = async_one(preset_get)
    schema = async_one(schema)
    validate = async_one(validate)
    health = async_one(health)
    embeddings = async_one(embeddings)
    classifications = async_one(classifications)
    reconstructions = async_one(reconstructions)

    @classmethod
    def from_environment(cls, **options: Any) -> AsyncClient:
        """Connect in the same way as `Client.from_environment`. Raises NoAnswer."""
        return cls(*find_service(), **options)

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()

    async def close(self) -> None:
        await self._http.aclose()

    async def _execute_script(self, script: Script[Any]) -> AsyncIterator[Any]:
        steps, opened = script.steps(self._patience), contextlib.AsyncExitStack()
        outcome: Any = None
        async with opened:
            while (effect := _next_effect(steps, outcome)) is not None:
                outcome = None
                try:
                    match effect:
                        case Emit(item):
                            yield item
                        case Sleep(seconds):
                            await asyncio.sleep(seconds)
                        case Send(call):
                            outcome = await self._http.send(_request(self._http, call))
                        case Open(call):
                            await opened.aclose()
                            outcome = await self._http.send(_request(self._http, call, STREAM_TIMEOUT), stream=True)
                            opened.push_async_callback(outcome.aclose)
                            chunks = outcome.aiter_bytes()
                            if outcome.is_error:
                                await outcome.aread()
                        case Read():
                            outcome = await anext(chunks, None)
                except httpx.TransportError as error:
                    outcome = error


def _next_effect(steps: Steps[None], outcome: Any) -> Effect | None:
    """Pass an outcome to a script; return its next effect, or None when it has finished."""
    try:
        return steps.throw(outcome) if isinstance(outcome, httpx.TransportError) else steps.send(outcome)
    except StopIteration:
        return None


def _request(
    http: httpx.Client | httpx.AsyncClient, call: Call[Any], timeout: httpx.Timeout = TIMEOUT
) -> httpx.Request:
    return http.build_request(
        call.method, call.path, params=call.query, json=call.body, headers=call.headers, timeout=timeout
    )


def _headers(key: str | None) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"} if key else {}


# Service discovery


class ServiceAddress(NamedTuple):
    url: str
    key: str | None


def find_service() -> ServiceAddress:
    """Locate the service from the environment, falling back to the local stack.

    Raises NoAnswer, with instructions, if there is none.
    """
    url, key, key_file = (os.environ.get(name) or None for name in ("AMD_URL", "AMD_KEY", "AMD_KEY_FILE"))
    if url is None:
        from service.stack import find_stack

        stack = find_stack()
        if stack is None:
            raise NoAnswer("no service found: start one with `amd up`, or set AMD_URL and AMD_KEY")
        url, key_file = stack.url, key_file or str(stack.key_file)
    if key is None and key_file is not None:
        try:
            key = Path(key_file).expanduser().read_text().strip()
        except OSError as error:
            raise NoAnswer(f"AMD_KEY_FILE={key_file}: cannot be read ({error.strerror})") from None
    return ServiceAddress(url, key)
