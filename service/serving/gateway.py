"""The way from a request to the replicas that answer it, and back. Replicas ask for no key: this is the only way in.

Knows nothing of the forms that a request comes in (`requests`) nor of what runs the replicas.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import httpx
from prometheus_client import CollectorRegistry, Histogram
from starlette.requests import Request

from service.db.models import Deployment
from service.serving.deployments import DeploymentStore
from service.serving.protocol import CANDIDATE, MAIN, MEDIA_TYPE, pack, unpack
from service.web.errors import (
    DeadlinePassed,
    EncoderUnavailable,
    ItemInvalid,
    NotDeployed,
    NotPossible,
    Overloaded,
    ServiceError,
    code_of,
)

CONNECT_S = 5.0
KNOWN_S = 1.0  # how long the database's answer is taken for true
MARGIN_S = 5.0  # beyond a request's own deadline, for the way there and back


class Reply(NamedTuple):
    encoder: str
    items: list[dict[str, Any]]
    content: bytes | None
    """Instead of items, where a form was asked for."""


class Gateway:
    def __init__(self, deployments: DeploymentStore, url: str) -> None:
        """`url`: of Ray Serve's port."""
        self._deployments, self._url = deployments, url.rstrip("/")
        self.registry = CollectorRegistry()
        self._seconds = Histogram(
            "amd_inference_seconds", "Requests to encoders, by task and outcome.", ["task", "outcome"],
            registry=self.registry, buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60),
        )  # fmt: skip
        self._known: dict[tuple[str, str | None], tuple[float, Deployment | None]] = {}
        self._client: httpx.AsyncClient | None = None

    async def close(self) -> None:
        if self._client is not None:
            await self._client.aclose()

    async def ask(
        self,
        request: Request,
        name: str,
        project: str | None,
        items: Sequence[Mapping[str, Any]],
        want: Mapping[str, Any],
        deadline_s: float,
        form: str | None = None,
        exact: bool = False,
    ) -> Reply:
        """Have items answered by the encoder of that id, alias or deployment.

        `form`: a media type that replicas write, ARROW or PNG.
        `exact`: the name is an id, and no other encoder may answer, such as a candidate.
        Raises NotDeployed, ItemInvalid, NotPossible, Overloaded, DeadlinePassed, EncoderUnavailable; CancelledError
        where the caller has gone, and the replica then hears of it.
        """
        began, outcome = time.monotonic(), "failed"
        try:
            deployment = await self._find(name, project)
            slot = _slot_of(deployment, name) if exact else _any_slot(deployment)
            reply = await self._ask(request, deployment, slot, items, want, deadline_s, form)
            if exact and reply.encoder != name:  # another has taken over meanwhile
                raise _not_deployed(name)
            outcome = "ok"
            return reply
        except ServiceError as error:
            outcome = code_of(error)
            raise
        except asyncio.CancelledError:
            outcome = "caller_gone"
            raise
        finally:
            self._seconds.labels(want["task"], outcome).observe(time.monotonic() - began)

    async def _ask(
        self,
        request: Request,
        deployment: Deployment,
        slot: str,
        items: Sequence[Mapping[str, Any]],
        want: Mapping[str, Any],
        deadline_s: float,
        form: str | None,
    ) -> Reply:
        call = {"slot": slot, "items": items, "want": want, "deadline_s": deadline_s, "form": form}
        asking = asyncio.create_task(self._send(deployment.name, pack(call), deadline_s))
        gone = asyncio.create_task(_gone(request))
        try:
            await asyncio.wait((asking, gone), return_when=asyncio.FIRST_COMPLETED)
            if not asking.done():
                raise asyncio.CancelledError
            answer = await asking
        finally:
            asking.cancel()
            gone.cancel()
        return _reply(answer, deployment.name)

    async def state(self, deployment: Deployment) -> dict[str, Any]:
        """What one of its replicas says of itself. Raises EncoderUnavailable."""
        return _message(await self._exchange("GET", deployment.name, None, CONNECT_S), deployment.name)

    async def _find(self, name: str, project: str | None) -> Deployment:
        known = self._known.get((name, project))
        if known is None or time.monotonic() - known[0] > KNOWN_S:
            if len(self._known) > 10_000:
                self._known.clear()
            known = time.monotonic(), await asyncio.to_thread(self._deployments.serving, name, project)
            self._known[(name, project)] = known
        if known[1] is None:
            raise _not_deployed(name)
        return known[1]

    async def _send(self, name: str, body: bytes, deadline_s: float) -> httpx.Response:
        """Once more where a replica went away under it: the same items give the same vectors."""
        until = time.monotonic() + deadline_s
        answer = await self._exchange("POST", name, body, deadline_s)
        if answer.status_code in (500, 503) and until - time.monotonic() > 1.0:
            await asyncio.sleep(0.2)
            answer = await self._exchange("POST", name, body, until - time.monotonic())
        return answer

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
            raise DeadlinePassed(f"{name}: no answer within {seconds:g} s") from None
        except httpx.HTTPError as error:
            raise EncoderUnavailable(f"{name}: Ray Serve does not answer ({type(error).__name__})") from None


def _any_slot(deployment: Deployment) -> str:
    return CANDIDATE if CANDIDATE in deployment.serving and random.random() < deployment.share else MAIN


def _slot_of(deployment: Deployment, encoder: str) -> str:
    """Raises NotDeployed where another encoder has taken over."""
    for slot, served in deployment.serving.items():
        if served == encoder:
            return slot
    raise _not_deployed(encoder)


def _not_deployed(name: str) -> NotDeployed:
    return NotDeployed(f"no deployment serves {name!r}; deploy it: PUT /v1/deployments/{{name}}")


async def _gone(request: Request) -> None:
    """Until the caller has closed its connection; the body has been read before."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _message(answer: httpx.Response, name: str) -> dict[str, Any]:
    try:
        return unpack(answer.content)
    except ValueError:  # of Serve itself: no replica, or one that died
        raise EncoderUnavailable(f"{name}: no replica answered (Ray Serve says {answer.status_code})") from None


def _reply(answer: httpx.Response, name: str) -> Reply:
    found = _message(answer, name)
    kind, message = found.get("error"), found.get("message", "")
    if kind is None:
        return Reply(found["encoder"], found.get("items", []), found.get("content"))
    if kind == "item_refused":
        raise ItemInvalid(f"input {found['index']}: {message}", index=found["index"])
    if kind == "not_possible":
        raise NotPossible(message)
    if kind == "queue_full":
        raise Overloaded(message, retry_after=found["retry_after_s"])
    if kind == "deadline_exceeded":
        raise DeadlinePassed(message)
    raise EncoderUnavailable(f"{name}: {message}")
