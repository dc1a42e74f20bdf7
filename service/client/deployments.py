"""Deployments, and requests to encoders, as a client asks for them."""

from __future__ import annotations

import base64
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx

from service.client.methods import Awaiting, Blocking, given, one, one_later, view
from service.client.transport import Call, Emit, NoAnswer, Patience, Script, Sleep, Steps, exchange, nothing, once
from service.serving.schemas import (
    ClassificationView,
    DeploymentList,
    DeploymentRequest,
    DeploymentView,
    DriftView,
    EmbeddingView,
    ReconstructionView,
)

LOOK_S = 0.5


def _path(name: str, rest: str = "") -> str:
    return f"/v1/deployments/{quote(name, safe='')}{rest}"


def deployment_put(name: str, request: DeploymentRequest) -> Script[DeploymentView]:
    """Have an encoder answer requests, or change how; it answers once its state is `healthy`."""
    body = request.model_dump(mode="json", exclude_unset=True)
    return once(Call("PUT", _path(name), view(DeploymentView), body=body))


def deployment_get(name: str) -> Script[DeploymentView]:
    return once(_get(name))


def _get(name: str) -> Call[DeploymentView]:
    return Call("GET", _path(name), view(DeploymentView))


def deployment_list(project: str | None = None) -> Script[list[DeploymentView]]:
    whole: Callable[[httpx.Response], DeploymentList] = view(DeploymentList)
    return once(Call("GET", "/v1/deployments", lambda answer: whole(answer).items, given(project=project)))


def deployment_delete(name: str) -> Script[None]:
    """Requests under way are answered; the encoder stays."""
    return once(Call("DELETE", _path(name), nothing))


def deployment_drift(name: str) -> Script[DriftView]:
    """How far the candidate's vectors lie from the encoder's."""
    return once(Call("GET", _path(name, "/drift"), view(DriftView)))


def deployment_wait(name: str, timeout_s: float | None = None) -> Script[DeploymentView]:
    """Once it answers requests or has failed. Raises NoAnswer past the time-out."""

    def steps(patience: Patience) -> Steps[None]:
        until = time.monotonic() + (float("inf") if timeout_s is None else timeout_s)
        while True:
            found = yield from exchange(_get(name), patience)
            if found.state in ("healthy", "failed"):
                yield Emit(found)
                return
            if time.monotonic() > until:
                raise NoAnswer(f"{name} is still {found.state} after {timeout_s:g} s: {found.message or 'no reason'}")
            yield Sleep(LOOK_S)

    return Script(steps)


def embeddings(encoder: str, files: Sequence[str | Path | bytes], **options: Any) -> Script[list[EmbeddingView]]:
    """Vectors of images and videos by a deployed encoder: its id, alias or deployment.

    `files`: paths of this machine and bytes are sent, texts with a scheme (`s3://…`) are read by the service.
    `options`: of the request, such as normalize=True.
    """
    return _asked(encoder, "embeddings", files, options, EmbeddingView)


def classifications(
    encoder: str, files: Sequence[str | Path | bytes], **options: Any
) -> Script[list[ClassificationView]]:
    """The likeliest labels, by a deployed encoder that was fine-tuned. `options`: such as top_k=3."""
    return _asked(encoder, "classifications", files, options, ClassificationView)


def reconstructions(
    encoder: str, files: Sequence[str | Path | bytes], **options: Any
) -> Script[list[ReconstructionView]]:
    """What is rebuilt of masked files, by a deployed encoder with its decoder. `options`: mask_ratio and seed."""
    return _asked(encoder, "reconstructions", files, options, ReconstructionView)


def _asked(
    encoder: str, task: str, files: Sequence[str | Path | bytes], options: dict[str, Any], kind: type[Any]
) -> Script[Any]:
    def read(answer: httpx.Response) -> list[Any]:
        found = answer.json()
        items = [{"encoder": found["encoder"], **item} for item in found["data"]]
        return [kind.model_validate({name: item[name] for name in kind.model_fields if name in item}) for item in items]

    body = {"input": [input_of(file) for file in files], **options}
    path = f"/v1/encoders/{quote(encoder, safe='')}/{task}"
    return once(Call("POST", path, read, body=body, changes=False))


def input_of(file: str | Path | bytes) -> dict[str, str]:
    """A file of this machine, its bytes, or a text with a scheme, as a request has it."""
    if isinstance(file, str) and "://" in file:
        return {"uri": file}
    content = file if isinstance(file, bytes) else Path(file).read_bytes()
    return {"base64": base64.b64encode(content).decode()}


class Deployments(Blocking):
    put = one(deployment_put)
    get = one(deployment_get)
    list = one(deployment_list)
    delete = one(deployment_delete)
    drift = one(deployment_drift)
    wait = one(deployment_wait)


class AsyncDeployments(Awaiting):
    put = one_later(deployment_put)
    get = one_later(deployment_get)
    list = one_later(deployment_list)
    delete = one_later(deployment_delete)
    drift = one_later(deployment_drift)
    wait = one_later(deployment_wait)
