"""What Ray Serve runs: replicas that answer for encoders. The one place that knows Serve's Python interface.

A replica holds the encoders of one deployment, `main` and at times `candidate`, and is told by `user_config` which
they are: so an alias moves without a new process, and each request is answered by one encoder whole. Serve's port asks
for no key: it stays on loopback or inside the cluster, and the control plane is the way in.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import logging
from typing import Any

import numpy as np
import ray
from ray import serve
from starlette.requests import Request
from starlette.responses import Response

from service.serving.drift import Drift
from service.serving.protocol import ARROW, CANDIDATE, MAIN, MEDIA_TYPE, PNG, SLOTS, pack, unpack

logger = logging.getLogger(__name__)


@serve.deployment
class Replica:
    def __init__(self, settings: dict[str, Any]) -> None:
        """`settings`: of EngineSettings."""
        from service.inference.engine import Engine, EngineSettings  # torch: needed where encoders run

        listen_on_the_nodes_address()
        self._engine = Engine(EngineSettings.model_validate(settings))
        self._urls: dict[str, str] = {}
        self._trouble: dict[str, str] = {}
        self._drift: Drift | None = None
        self._shadows: set[asyncio.Task[None]] = set()

    async def reconfigure(self, urls: dict[str, str | None]) -> None:
        """Encoders to hold, by slot. Called before the first request, and with every change.

        One that cannot be loaded leaves the one before it in its place, and is told; without any there is nothing to
        serve, and the replica does not start.
        """
        from amd.config import ConfigError

        for slot in SLOTS:
            url = urls.get(slot)
            if url == self._urls.get(slot):
                continue
            self._trouble.pop(slot, None)
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
                self._trouble[slot] = str(error)
        self._drift = Drift() if CANDIDATE in self._urls else None

    async def __call__(self, request: Request) -> Response:
        if request.method == "GET":
            drift = self._drift.report() if self._drift is not None else None
            state = {**self._engine.state(), "urls": self._urls, "trouble": self._trouble, "drift": drift}
            return Response(pack(state), media_type=MEDIA_TYPE)
        try:
            call = unpack(await request.body())
        except ValueError as error:
            return _refusal(400, "bad_message", str(error))
        return await self._answer(call)

    async def _answer(self, call: dict[str, Any]) -> Response:
        from service.inference import engine

        items = [engine.Item(item.get("content"), item.get("uri")) for item in call["items"]]
        want = engine.Want.model_validate(call["want"])
        # A candidate that is not loaded yet, not any more or not at all costs no request: the answer says who gave it.
        slot = call["slot"] if call["slot"] in self._urls else MAIN
        try:
            answer = await self._engine.answer(slot, items, want, call["deadline_s"])
        except engine.ItemRefused as error:
            return _refusal(422, "item_refused", error.reason, index=error.index)
        except engine.NotPossible as error:
            return _refusal(422, "not_possible", str(error))
        except engine.QueueFull as error:
            return _refusal(429, "queue_full", str(error), retry_after_s=error.retry_after_s)
        except engine.NotLoaded as error:
            return _refusal(409, "not_loaded", str(error))
        except engine.DeadlineExceeded as error:
            return _refusal(504, "deadline_exceeded", str(error))
        if slot == CANDIDATE and want.task == "embedding":
            self._compare(items, [item["embedding"] for item in answer.items])
        told: dict[str, Any] = {"items": answer.items}
        if call.get("form") is not None or want.task == "reconstruction":
            told = await asyncio.to_thread(written, answer.encoder, answer.items, call.get("form"))
        return Response(pack({"encoder": answer.encoder, **told}), media_type=MEDIA_TYPE)

    def _compare(self, items: list[Any], vectors: list[Any]) -> None:
        """What `main` says to the same items: after the answer, and only as much as the report needs."""
        drift = self._drift
        if drift is None or not drift.wants_more or len(self._shadows) > 1:
            return

        async def shadow() -> None:
            from service.inference import engine

            with contextlib.suppress(Exception):  # a comparison is never worth a request
                answer = await self._engine.answer(MAIN, items, engine.Want(), 30.0)
                for ours, theirs in zip(answer.items, vectors, strict=True):
                    drift.add(ours["embedding"], theirs)

        task = asyncio.create_task(shadow())
        self._shadows.add(task)
        task.add_done_callback(self._shadows.discard)


def app(settings: dict[str, Any]) -> serve.Application:
    """What Serve is told to build: `service.serve:app` with its arguments."""
    return Replica.bind(settings["engine"])  # type: ignore[attr-defined]


def listen_on_the_nodes_address() -> None:
    """Serve 2.60 has a replica listen on every interface for other replicas, and unpickles what comes there: whoever
    reached it would run code. Here it listens where those find it, on the node's own address, which is loopback on one
    machine. Called before Serve opens the port, which is once the replica is made.
    """
    from ray.serve._private import replica

    bind, address = replica.add_port_to_grpc_server, ray.util.get_node_ip_address()
    host = f"[{address}]" if ":" in address else address

    def narrow(server: Any, asked: str) -> Any:
        return bind(server, asked.replace("[::]", host))

    replica.add_port_to_grpc_server = narrow


def written(encoder: str, items: list[dict[str, Any]], form: str | None) -> dict[str, Any]:
    """The content of a form; of reconstructions without one, items with their pictures."""
    if form == ARROW:
        return {"content": to_arrow(encoder, items)}
    from service.inference.images import drawn, page  # Pillow: needed where encoders run

    return {"content": page(encoder, items[0])} if form == PNG else {"items": [drawn(item) for item in items]}


def to_arrow(encoder: str, items: list[dict[str, Any]]) -> bytes:
    """An Arrow stream with a row for each item; `encoder` stands in the schema's metadata."""
    import pyarrow as pa

    columns = {name: [_plain(item[name]) for item in items] for name in items[0]} if items else {}
    types = {"embedding": pa.list_(pa.float32())}
    arrays = {name: pa.array(values, types.get(name)) for name, values in columns.items()}
    table = pa.table(arrays).replace_schema_metadata({"encoder": encoder})
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.tolist() if value.ndim > 1 else value
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    return value


def _refusal(status: int, kind: str, message: str, **facts: Any) -> Response:
    return Response(pack({"error": kind, "message": message, **facts}), status, media_type=MEDIA_TYPE)
