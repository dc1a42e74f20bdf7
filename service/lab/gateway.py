"""Send requests to the mask lab's replica, and declare its Serve application when it is first used.

call     {"config", "step", "position", "deadline_s",
          "model": {"encoder": URL} | {"run": URL, "checkpoint", "config", "alignment"} | None,
          "item": {"content"} | {"uri"} | {"record", "data"} | None}
reply    {"token_sets", "layers": {name: PNG}, "columns", "loss", "errors",
          "alignment": {"direct", "generation"} | None}
refusal  as in `service.serving.protocol`

The application scales to zero, so it uses no resources while idle. Its name lacks the deployment prefix, so the
deployer leaves it unchanged.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from typing import Any

import httpx
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request

from service.serving.gateway import Gateway
from service.serving.protocol import pack, refusal_in, unpack
from service.serving.serve_api import ServeClient
from service.web.errors import Refusal
from service.web.request_bodies import run_by_size

logger = logging.getLogger(__name__)

NAME = "mask-lab"
PATH = "_lab"  # no deployment can have this name
IDLE_S = 600.0  # after which the replica stops
POLL_S = 0.5
FAILED = "DEPLOY_FAILED"  # state of an application in Serve
NOT_RUNNING = (404, 503)  # what Serve returns for an application that is not declared, or has no replica yet

APPLICATION: dict[str, Any] = {
    "name": NAME,
    "route_prefix": f"/{PATH}",
    "import_path": "service.serve:lab",
    "args": {"limits": {}},
    "deployments": [
        {
            "name": "LabReplica",
            "autoscaling_config": {
                "min_replicas": 0,
                "max_replicas": 1,
                "target_ongoing_requests": 8,
                "downscale_delay_s": IDLE_S,
            },
            "ray_actor_options": {"num_cpus": 0, "num_gpus": 0},
            "max_ongoing_requests": 100,
            "health_check_period_s": 5.0,
        }
    ],
}


class LabGateway:
    """Sends calls to the lab's replica."""

    def __init__(self, gateway: Gateway, serve: ServeClient) -> None:
        self._gateway, self._serve = gateway, serve

    async def view(self, request: Request, call: Mapping[str, Any], size: int) -> dict[str, Any]:
        """Draw masks. `size`: bytes of the input. Starts the lab if it is not running.

        Raises Refusal, ClusterUnavailable, or ClientDisconnect if the caller disconnects.
        """
        until = time.monotonic() + call["deadline_s"]
        body = await run_by_size(size, pack, call)
        is_declared = False
        while (left := until - time.monotonic()) > 0:
            reply = await self._send(request, body, left)
            if reply is not None:
                if (refusal := refusal_in(reply)) is not None:
                    raise refusal
                return reply
            if not is_declared:
                await run_in_threadpool(self._declare)
                is_declared = True
            await asyncio.sleep(min(POLL_S, max(until - time.monotonic(), 0)))
        raise Refusal("lab_unavailable", "the lab's replica is still starting; try again in a few seconds")

    async def _send(self, request: Request, body: bytes, seconds: float) -> dict[str, Any] | None:
        """Return the reply, or None if no replica is running."""
        try:
            response: httpx.Response = await self._gateway.send(request, PATH, body, seconds)
        except Refusal as refusal:
            if refusal.code == "encoder_unavailable":  # Serve does not respond
                return None
            raise
        try:
            return await run_by_size(len(response.content), unpack, response.content)
        except ValueError:  # a response from Serve itself
            if response.status_code in NOT_RUNNING:
                return None
            message = f"the lab's replica failed (Ray Serve returned {response.status_code}); try again"
            raise Refusal("lab_unavailable", message) from None

    def _declare(self) -> None:
        """Add the lab to the applications that Serve runs, or deploy it again if it failed to start.

        Raises ClusterUnavailable, or Refusal with Serve's message after a failed start.
        """
        running = self._serve.applications()
        lab = running.get(NAME)
        if lab is not None and lab.status != FAILED:
            return
        logger.info("starting the mask lab")
        others = [found.config for name, found in running.items() if name != NAME and found.config]
        self._serve.put([*others, APPLICATION])
        if lab is not None:
            raise Refusal("lab_unavailable", f"the lab's replica failed to start and is being restarted: {lab.message}")
