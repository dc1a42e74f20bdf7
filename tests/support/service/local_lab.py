"""A mask lab that runs in this process instead of in a Ray Serve replica."""

from __future__ import annotations

from typing import Any

import httpx

from service.inference.lab import LabEngine
from service.lab.gateway import NAME, LabGateway
from service.serving.protocol import pack, pack_refusal, unpack
from service.web.errors import Refusal
from tests.support.service.engines import NO_TIME_LIMIT
from tests.support.service.fake_serve import FakeServe


class LocalLab:
    """An app's mask lab. It responds as soon as its Serve application is declared."""

    def __init__(self, app: Any) -> None:
        self.serve, self.engine = FakeServe(), LabEngine(NO_TIME_LIMIT)
        self.status = 404  # returned for an application that is not running
        self.is_running = True  # whether the application runs once it is declared
        gateway = app.state.gateway
        gateway._exchange = self._exchange
        app.state.lab = LabGateway(gateway, self.serve)

    async def _exchange(self, method: str, name: str, body: bytes, seconds: float) -> httpx.Response:
        if name != "_lab" or NAME not in self.serve.apps or not self.is_running:
            return httpx.Response(self.status, content=b"Path '/_lab' not found.")
        try:
            return httpx.Response(200, content=pack(await self.engine.view(unpack(body))))
        except Refusal as refusal:
            return httpx.Response(422, content=pack_refusal(refusal))
