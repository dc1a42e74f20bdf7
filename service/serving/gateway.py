"""Gateway: route requests to the replicas of a deployment. Replicas are unauthenticated and reachable only through it.

Does not parse request bodies (see `requests`) or manage replicas.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import httpx
from starlette.requests import ClientDisconnect, Request

from service.db.cached_reads import CachedReads
from service.db.models import Deployment
from service.serving.deployments import DeploymentStore
from service.serving.metrics import InferenceMetrics
from service.serving.protocol import CANDIDATE, MAIN, MEDIA_TYPE, pack, refusal_in, unpack
from service.web.errors import Refusal, ServiceError
from service.web.request_bodies import reserve_reply, run_by_size

CONNECT_S = 5.0
LOOKUP_CACHE_S, LOOKUP_OUTAGE_S = 1.0, 3600.0  # cache lifetime of lookups: normally, and during a database outage
LOOKUP_THREADS = 8
RETRY_PAUSE_S = 0.2
MIN_RETRY_S = 1.0  # remaining time until the deadline, without which a request is not retried
MARGIN_S = 5.0  # added to a request's deadline for transport


class BatchReport(NamedTuple):
    """Batches that computed a reply, as reported by the replica."""

    queue_s: float
    """Longest time that a clip waited for its batch."""
    fill: float
    """Mean number of tokens in the clips' batches, as a fraction of the limit."""


class EncoderReply(NamedTuple):
    """Reply from a replica."""

    encoder: str
    """ID of the encoder that computed the reply."""
    items: list[dict[str, Any]]
    content: bytes | None
    """Encoded items, if a media type was requested."""
    size: int
    """Size of the reply in bytes."""
    batches: BatchReport | None = None
    """None if the replica predates this field."""


class Gateway:
    """Sends requests to replicas."""

    def __init__(self, deployments: DeploymentStore, url: str) -> None:
        """`url`: address of Ray Serve's HTTP proxy."""
        self._url = url.rstrip("/")
        self.metrics = InferenceMetrics()
        self._lookups = CachedReads[tuple[str, str | None], Deployment | None](
            lambda key: deployments.find_serving(*key),
            ttl_s=LOOKUP_CACHE_S,
            outage_s=LOOKUP_OUTAGE_S,
            threads=LOOKUP_THREADS,
        )
        self._client: httpx.AsyncClient | None = None

    async def close(self) -> None:
        if self._client is not None:
            await self._client.aclose()

    async def infer(
        self,
        request: Request,
        name: str,
        project: str | None,
        items: Sequence[Mapping[str, Any]],
        options: Mapping[str, Any],
        deadline_s: float,
        media_type: str | None = None,
        as_json: bool = False,
        exact: bool = False,
    ) -> EncoderReply:
        """Run items through an encoder, identified by its ID, alias or deployment name.

        `media_type`: ARROW or PNG if the replica should encode its reply.
        `as_json`: the reply will be sent as JSON, which has a smaller limit for tokens.
        `exact`: `name` is an ID, and no other encoder, such as a candidate, may serve the request.
        Raises Refusal, or ClientDisconnect if the caller disconnects, which cancels the request on the replica.
        """
        began, outcome, served_by = time.monotonic(), "failed", ""
        try:
            deployment = await self._find(name, project)
            served_by = deployment.name
            slot = _slot_of(deployment, name) if exact else _choose_slot(deployment)
            call = {"slot": slot, "items": items, "want": options, "deadline_s": deadline_s}
            call |= {"form": media_type, "json": as_json}
            size = sum(len(item.get("content", b"")) for item in items)
            body = await run_by_size(size, pack, call)
            with self.metrics.in_flight(served_by):
                response = await self.send(request, served_by, body, deadline_s)
            reply = await run_by_size(len(response.content), _parse_reply, response, served_by)
            if exact and reply.encoder != name:  # replaced since the lookup
                raise _not_deployed(name)
            outcome = "ok"
            if reply.batches is not None:
                self.metrics.observe_batches(served_by, *reply.batches)
            return reply
        except ServiceError as error:
            outcome = error.code
            raise
        except ClientDisconnect:
            outcome = "caller_gone"
            raise
        finally:
            self.metrics.observe(served_by, options["task"], outcome, time.monotonic() - began)

    async def send(self, request: Request, name: str, body: bytes, deadline_s: float) -> httpx.Response:
        """Send a body to a Serve application, identified by its path.

        Raises Refusal, or ClientDisconnect if the caller disconnects, which cancels the request on the replica.
        """
        sending = asyncio.create_task(self._send(name, body, deadline_s))
        disconnect = asyncio.create_task(_wait_for_disconnect(request))
        try:
            await asyncio.wait((sending, disconnect), return_when=asyncio.FIRST_COMPLETED)
            if not sending.done():
                raise ClientDisconnect
            response = await sending
        finally:
            sending.cancel()
            disconnect.cancel()
        reserve_reply(request, len(response.content))
        return response

    async def replica_state(self, deployment: Deployment) -> dict[str, Any]:
        """Return the state of one of the deployment's replicas. Raises Refusal if none responds."""
        return _unpack_reply(await self._exchange("GET", deployment.name, None, CONNECT_S), deployment.name)

    async def _find(self, name: str, project: str | None) -> Deployment:
        found = await self._lookups.get((name, project))
        if found is None:
            raise _not_deployed(name)
        return found

    async def _send(self, name: str, body: bytes, deadline_s: float) -> httpx.Response:
        """Send a request, retrying once if the replica fails or the connection breaks; inference is idempotent."""
        until = time.monotonic() + deadline_s
        for retries in (1, 0):
            try:
                response = await self._exchange("POST", name, body, until - time.monotonic())
            except Refusal as refusal:
                if refusal.code != "encoder_unavailable" or not retries or until - time.monotonic() <= MIN_RETRY_S:
                    raise
            else:
                if not _has_failed(response) or not retries or until - time.monotonic() <= MIN_RETRY_S:
                    return response
            await asyncio.sleep(RETRY_PAUSE_S)
        raise AssertionError("the last attempt returns or raises")

    async def _exchange(self, method: str, name: str, body: bytes | None, seconds: float) -> httpx.Response:
        if self._client is None:
            self._client = httpx.AsyncClient(limits=httpx.Limits(max_connections=1000), trust_env=False)
        timeout = httpx.Timeout(seconds + MARGIN_S, connect=CONNECT_S)
        headers = {"Content-Type": MEDIA_TYPE}
        try:
            return await self._client.request(
                method, f"{self._url}/{name}", content=body, headers=headers, timeout=timeout
            )
        except httpx.TimeoutException:
            raise Refusal("deadline_exceeded", f"{name}: no response within {seconds:g} s") from None
        except httpx.HTTPError as error:
            raise _unavailable(
                name, f"Ray Serve does not respond ({type(error).__name__}); it may be starting"
            ) from None


def _choose_slot(deployment: Deployment) -> str:
    return CANDIDATE if CANDIDATE in deployment.serving and random.random() < deployment.share else MAIN


def _slot_of(deployment: Deployment, encoder: str) -> str:
    """Return the slot that serves the encoder. Raises Refusal if there is none."""
    for slot, served in deployment.serving.items():
        if served == encoder:
            return slot
    raise _not_deployed(encoder)


def _not_deployed(name: str) -> Refusal:
    remedy = "GET /v1/deployments lists them, and `amd encoders deploy` or PUT /v1/deployments/{name} creates one"
    return Refusal("encoder_not_deployed", f"no deployment serves {name!r}; {remedy}")


def _unavailable(name: str, message: str) -> Refusal:
    return Refusal("encoder_unavailable", f"{name}: {message}")


async def _wait_for_disconnect(request: Request) -> None:
    """Return once the caller closes its connection. The body must have been read already."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _has_failed(response: httpx.Response) -> bool:
    """Return whether a response reports that the replica failed, so that another replica may succeed."""
    if response.status_code not in (500, 503):
        return False
    try:
        refusal = refusal_in(unpack(response.content))
    except ValueError:  # a response from Serve itself
        return True
    return refusal is None or refusal.code == "encoder_unavailable"


def _unpack_reply(response: httpx.Response, name: str) -> dict[str, Any]:
    try:
        return unpack(response.content)
    except ValueError:  # a response from Serve itself: no replica is running, or it died
        if response.status_code == 404:
            raise _unavailable(name, "no replica is ready yet; the deployment is starting or being restarted") from None
        raise _unavailable(name, f"no replica responded (Ray Serve returned {response.status_code})") from None


def _parse_reply(response: httpx.Response, name: str) -> EncoderReply:
    reply = _unpack_reply(response, name)
    refusal = refusal_in(reply)
    if refusal is None:
        batches = BatchReport(reply["queue_s"], reply["batch_fill"]) if "batch_fill" in reply else None
        size = len(response.content)
        return EncoderReply(reply["encoder"], reply.get("items", []), reply.get("content"), size, batches)
    if refusal.code == "encoder_unavailable":
        raise _unavailable(name, refusal.message)
    raise refusal
