"""Client calls for deployments, and for inference with deployed encoders."""

from __future__ import annotations

import base64
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx

from service.client.methods import POLL_INTERVAL_S, AsyncMethods, BlockingMethods, async_one, one, present, view
from service.client.transport import Call, Emit, NoAnswer, Patience, Script, Sleep, Steps, exchange, ignore_body, once
from service.serving.schemas import (
    ClassificationView,
    DeploymentList,
    DeploymentRequest,
    DeploymentView,
    DriftView,
    EmbeddingView,
    ReconstructionView,
)


def _path(name: str, rest: str = "") -> str:
    return f"/v1/deployments/{quote(name, safe='')}{rest}"


def deployment_put(name: str, request: DeploymentRequest) -> Script[DeploymentView]:
    """Create or update a deployment; it serves requests once its state is `healthy`."""
    body = request.model_dump(mode="json", exclude_unset=True)
    return once(Call("PUT", _path(name), view(DeploymentView), body=body))


def deployment_get(name: str) -> Script[DeploymentView]:
    return once(_get(name))


def _get(name: str) -> Call[DeploymentView]:
    return Call("GET", _path(name), view(DeploymentView))


def deployment_list(project: str | None = None) -> Script[list[DeploymentView]]:
    read: Callable[[httpx.Response], DeploymentList] = view(DeploymentList)
    return once(Call("GET", "/v1/deployments", lambda response: read(response).items, present(project=project)))


def deployment_delete(name: str) -> Script[None]:
    """Delete a deployment. Requests in progress are completed; the encoder is kept."""
    return once(Call("DELETE", _path(name), ignore_body))


def deployment_drift(name: str) -> Script[DriftView]:
    """Compare the candidate's embeddings with those of the deployed encoder."""
    return once(Call("GET", _path(name, "/drift"), view(DriftView)))


def deployment_wait(name: str, timeout_s: float | None = None) -> Script[DeploymentView]:
    """Wait until a deployment is healthy or has failed. Raises NoAnswer after the timeout."""

    def steps(patience: Patience) -> Steps[None]:
        until = time.monotonic() + (float("inf") if timeout_s is None else timeout_s)
        while True:
            found = yield from exchange(_get(name), patience)
            if found.state in ("healthy", "failed"):
                yield Emit(found)
                return
            if time.monotonic() > until:
                raise NoAnswer(
                    f"{name} is still {found.state} after {timeout_s:g} s: {found.message or 'no reason reported'}"
                )
            yield Sleep(POLL_INTERVAL_S)

    return Script(steps)


def embeddings(encoder: str, files: Sequence[str | Path | bytes], **options: Any) -> Script[list[EmbeddingView]]:
    """Embed images and videos with a deployed encoder, identified by id, alias or deployment name.

    `files`: local paths and bytes are uploaded; URIs (`s3://…`) are read by the service.
    `options`: fields of the request, such as normalize=True.
    """
    return _inference(encoder, "embeddings", files, options, EmbeddingView)


def classifications(
    encoder: str, files: Sequence[str | Path | bytes], **options: Any
) -> Script[list[ClassificationView]]:
    """Predict the most likely labels with a deployed fine-tuned encoder. `options`: fields such as top_k=3."""
    return _inference(encoder, "classifications", files, options, ClassificationView)


def reconstructions(
    encoder: str, files: Sequence[str | Path | bytes], **options: Any
) -> Script[list[ReconstructionView]]:
    """Reconstruct masked files with a deployed encoder and its decoder. `options`: mask_ratio and seed."""
    return _inference(encoder, "reconstructions", files, options, ReconstructionView)


def _inference(
    encoder: str, task: str, files: Sequence[str | Path | bytes], options: dict[str, Any], kind: type[Any]
) -> Script[Any]:
    def read(response: httpx.Response) -> list[Any]:
        found = response.json()
        items = [{"encoder": found["encoder"], **item} for item in found["data"]]
        return [kind.model_validate({name: item[name] for name in kind.model_fields if name in item}) for item in items]

    body = {"input": [input_item(file) for file in files], **options}
    path = f"/v1/encoders/{quote(encoder, safe='')}/{task}"
    return once(Call("POST", path, read, body=body, changes=False))


def input_item(file: str | Path | bytes) -> dict[str, str]:
    """Convert a local path, bytes or a URI to a request input."""
    if isinstance(file, str) and "://" in file:
        return {"uri": file}
    content = file if isinstance(file, bytes) else Path(file).read_bytes()
    return {"base64": base64.b64encode(content).decode()}


class Deployments(BlockingMethods):
    put = one(deployment_put)
    get = one(deployment_get)
    list = one(deployment_list)
    delete = one(deployment_delete)
    drift = one(deployment_drift)
    wait = one(deployment_wait)


class AsyncDeployments(AsyncMethods):
    put = async_one(deployment_put)
    get = async_one(deployment_get)
    list = async_one(deployment_list)
    delete = async_one(deployment_delete)
    drift = async_one(deployment_drift)
    wait = async_one(deployment_wait)
