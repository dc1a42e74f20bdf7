"""Ray Serve deployment of the mask lab.

Like the encoder replicas, it is not authenticated: it must be reachable only by the control plane.
"""

from __future__ import annotations

from typing import Any

from ray import serve
from starlette.requests import Request
from starlette.responses import Response

from service.inference.replica import bind_to_node_address, refuse
from service.serving.protocol import MEDIA_TYPE, pack, unpack
from service.web.errors import Refusal


@serve.deployment
class LabReplica:
    """The mask lab's replica, which needs no deployed encoder."""

    def __init__(self, limits: dict[str, Any]) -> None:
        """`limits`: fields of RequestLimits."""
        from service.inference.lab import LabEngine  # imports torch, which only replicas have
        from service.inference.options import RequestLimits

        bind_to_node_address()
        self._engine = LabEngine(RequestLimits.model_validate(limits))

    async def __call__(self, request: Request) -> Response:
        try:
            call = unpack(await request.body())
        except ValueError as error:
            return refuse(Refusal("lab_unavailable", str(error)))
        try:
            return Response(pack(await self._engine.view(call)), media_type=MEDIA_TYPE)
        except Refusal as refusal:
            return refuse(refusal)


def lab(settings: dict[str, Any]) -> serve.Application:
    """Build the application. Serve imports this function as `service.serve:lab`."""
    return LabReplica.bind(settings["limits"])  # type: ignore[attr-defined]
