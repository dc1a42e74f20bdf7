"""Ray Serve deployment that serves encoders. The only module that uses Serve's Python API.

A replica serves the encoders of one deployment: `main` and optionally `candidate`. They are set through `user_config`,
so moving an alias does not start a new process. Each request is computed by a single encoder. Serve's port has no
authentication: it must stay on loopback or inside the cluster, behind the control plane.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import Any

import ray
from ray import serve
from starlette.requests import Request
from starlette.responses import Response

from service.serving.drift import Drift
from service.serving.protocol import ARROW, CANDIDATE, MAIN, MEDIA_TYPE, PNG, SLOTS, pack, pack_refusal, unpack
from service.web.errors import ERROR_RESPONSES, Refusal

logger = logging.getLogger(__name__)


@serve.deployment
class Replica:
    """One replica of a deployment."""

    def __init__(self, settings: dict[str, Any]) -> None:
        """`settings`: fields of EngineSettings."""
        from service.inference.engine import Engine, EngineSettings  # imports torch, which only replicas have

        bind_to_node_address()
        self._engine = Engine(EngineSettings.model_validate(settings))
        self._urls: dict[str, str] = {}
        self._load_errors: dict[str, str] = {}
        self._drift: Drift | None = None
        self._shadows: set[asyncio.Task[None]] = set()

    async def reconfigure(self, urls: dict[str, str | None]) -> None:
        """Load each slot's encoder. Serve calls this before the first request and on every change.

        If an encoder cannot be loaded, its slot keeps the previous one and the state reports the error. If `main` has
        no previous encoder, the replica fails to start.
        """
        from amd.config import ConfigError

        for slot in SLOTS:
            url = urls.get(slot)
            if url == self._urls.get(slot):
                continue
            self._load_errors.pop(slot, None)
            if url is None:
                await self._engine.unload(slot)
                del self._urls[slot]
                continue
            try:
                await self._engine.load(slot, url)
                self._urls[slot] = url
            except ConfigError as error:
                if slot == MAIN and MAIN not in self._urls:
                    raise RuntimeError(str(error)) from None
                logger.warning("%s: %s", slot, error)
                self._load_errors[slot] = str(error)
        self._drift = Drift() if CANDIDATE in self._urls else None

    async def check_health(self) -> None:
        """Raise RuntimeError if this process can no longer serve. Serve then replaces the replica."""
        if problem := self._engine.problem:
            raise RuntimeError(problem)

    async def __call__(self, request: Request) -> Response:
        if request.method == "GET":
            drift = self._drift.report() if self._drift is not None else None
            state = {**self._engine.state(), "urls": self._urls, "trouble": self._load_errors, "drift": drift}
            return Response(pack(state), media_type=MEDIA_TYPE)
        try:
            call = unpack(await request.body())
        except ValueError as error:
            return refuse(Refusal("encoder_unavailable", str(error)))
        return await self._infer(call)

    async def _infer(self, call: dict[str, Any]) -> Response:
        from service.inference import engine

        items = [engine.Item(item.get("content"), item.get("uri")) for item in call["items"]]
        options = engine.InferenceOptions.model_validate(call["want"])
        # Without a loaded candidate, `main` serves the request; the reply contains its ID.
        slot = call["slot"] if call["slot"] in self._urls else MAIN
        try:
            result = await self._engine.infer(slot, items, options, call["deadline_s"], call.get("json", False))
        except Refusal as refusal:
            return refuse(refusal)
        if slot == CANDIDATE and options.task == "embedding":
            self._measure_drift(items, [item["embedding"] for item in result.items])
        content: dict[str, Any] = {"items": result.items}
        if call.get("form") is not None or options.task == "reconstruction":
            content = await asyncio.to_thread(encode_items, result.encoder, result.items, call.get("form"))
        reply = {"encoder": result.encoder, **content, "queue_s": result.queue_s, "batch_fill": result.batch_fill}
        is_large = options.tokens != "none" or options.layers or "content" in content
        return Response(await asyncio.to_thread(pack, reply) if is_large else pack(reply), media_type=MEDIA_TYPE)

    def _measure_drift(self, items: list[Any], vectors: list[Any]) -> None:
        """Run the same items through `main` in the background, unless the drift report already has enough items."""
        drift = self._drift
        if drift is None or not drift.needs_more or len(self._shadows) > 1:
            return

        async def shadow() -> None:
            from service.inference import engine

            with contextlib.suppress(Exception):  # a failed comparison must not fail the request
                result = await self._engine.infer(MAIN, items, engine.InferenceOptions(), 30.0)
                for ours, theirs in zip(result.items, vectors, strict=True):
                    drift.add(ours["embedding"], theirs)

        task = asyncio.create_task(shadow())
        self._shadows.add(task)
        task.add_done_callback(self._shadows.discard)


def app(settings: dict[str, Any]) -> serve.Application:
    """Build the application. Serve imports this function as `service.serve:app`."""
    return Replica.bind(settings["engine"])  # type: ignore[attr-defined]


def bind_to_node_address() -> None:
    """Bind the replica's gRPC port to the node's address instead of all interfaces.

    Serve 2.60 listens on every interface for other replicas and unpickles what it receives, so anyone who can reach
    the port can execute code. Other replicas connect to the node's address, which is loopback on a single machine. Must
    run before Serve opens the port, that is, in the replica's constructor.
    """
    from ray.serve._private import replica

    bind, address = replica.add_port_to_grpc_server, ray.util.get_node_ip_address()
    host = f"[{address}]" if ":" in address else address

    def add_port(server: Any, requested: str) -> Any:
        return bind(server, requested.replace("[::]", host))

    replica.add_port_to_grpc_server = add_port


def encode_items(encoder: str, items: list[dict[str, Any]], media_type: str | None) -> dict[str, Any]:
    """Encode items as `media_type`; if it is None, replace the clips of reconstructions with PNGs."""
    if media_type == ARROW:
        from service.inference.arrow import to_arrow

        return {"content": to_arrow(encoder, items)}
    from service.inference.images import overview_png, with_pngs  # imports Pillow, which only replicas have

    if media_type == PNG:
        return {"content": overview_png(encoder, items[0])}
    return {"items": [with_pngs(item) for item in items]}


def refuse(refusal: Refusal) -> Response:
    """Convert a refusal to a replica's response."""
    return Response(pack_refusal(refusal), ERROR_RESPONSES[refusal.code].status, media_type=MEDIA_TYPE)
