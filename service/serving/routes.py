"""Routes for deployments, inference under /v1/encoders/{encoder}, and the OpenAI-compatible endpoints."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, Path, Request, Response
from fastapi.responses import JSONResponse
from starlette.concurrency import run_in_threadpool

from service.auth.authentication import Inferrer, Principal, Reader, Submitter
from service.db.models import Deployment
from service.jobs.routes import Config, Locations, project_of
from service.registry.routes import EncodersDep
from service.registry.store import EncoderStore
from service.serving.deployments import DeploymentStore, etag_of, new_deployment
from service.serving.gateway import EncoderReply, Gateway
from service.serving.protocol import ARROW, CANDIDATE, MAIN, PNG
from service.serving.requests import (
    DEADLINE_S,
    FORM,
    EncodeRequest,
    RequestOptions,
    parse_inputs,
    read_request,
)
from service.serving.reservations import check_fits, check_quotas
from service.serving.responses import NUMPY, check_array, negotiate_media_type, render_reply, to_base64
from service.serving.schemas import (
    DeploymentList,
    DeploymentRequest,
    DeploymentView,
    DriftView,
    OpenAIEmbeddings,
    ServingSettings,
)
from service.settings import Settings
from service.web.binary import BINARY
from service.web.bounded_calls import BoundedCalls
from service.web.errors import ClusterUnavailable, Refusal
from service.web.parameters import ProjectFilter
from service.web.request_bodies import LargeJsonRoute, run_by_size
from service.web.schemas import ApiModel, utc_datetime

DeploymentName = Annotated[
    str,
    Path(
        pattern=r"^[a-z0-9][a-z0-9-]{0,62}$",
        description="Deployment name: lower-case letters, digits and dashes.",
    ),
]
EncoderName = Annotated[str, Path(min_length=1, max_length=200, description="Encoder ID, alias or deployment name.")]
IfMatch = Annotated[str | None, Header(max_length=1000, description="ETag of the settings to change.")]


async def _deployments(request: Request) -> DeploymentStore:
    store: DeploymentStore = request.app.state.deployments
    return store


async def _gateway(request: Request) -> Gateway:
    gateway: Gateway = request.app.state.gateway
    return gateway


DeploymentsDep = Annotated[DeploymentStore, Depends(_deployments)]
GatewayDep = Annotated[Gateway, Depends(_gateway)]

deployments = APIRouter(prefix="/deployments", tags=["deployments"])


@deployments.put("/{name}", status_code=202, summary="Create or update a deployment")
def put_deployment(
    name: DeploymentName,
    body: DeploymentRequest,
    caller: Submitter,
    store: DeploymentsDep,
    encoders: EncodersDep,
    settings: Config,
    request: Request,
    response: Response,
    if_match: IfMatch = None,
) -> DeploymentView:
    """The deployment serves requests once its `state` is `healthy`. No request fails while its encoder is replaced.

    The minimum number of replicas always reserves its `cpus` and `gpus`; if these do not fit in the cluster, the
    response is 409 `infeasible_resources` with the amounts. If the project's quotas do not permit the replicas, it is
    409 `quota_exceeded`.

    With `If-Match`, the deployment is updated only if its settings still have this ETag; otherwise the response is 412.
    """
    project = project_of(caller, body.project)
    resolved = resolve_encoders(body, project, encoders)
    desired = desired_deployment(name, project, caller.id, body)
    check_capacity(desired, store, settings, request)
    stored, created = store.put(desired, if_match, check_quotas, resolved)
    if created:
        response.headers["Location"] = f"/v1/deployments/{name}"
    response.headers["ETag"] = etag_of(stored)
    return deployment_view(stored)


@deployments.get("", summary="List deployments")
def list_deployments(caller: Reader, store: DeploymentsDep, project: ProjectFilter = None) -> DeploymentList:
    return DeploymentList(items=[deployment_view(one) for one in store.all(caller.own_project(project))])


@deployments.get("/{name}", summary="Get a deployment and its state")
def get_deployment(name: DeploymentName, caller: Reader, store: DeploymentsDep, response: Response) -> DeploymentView:
    """The `ETag` identifies the settings and can be sent as `If-Match`; it does not depend on the `state`."""
    found = store.get(name, caller.project)
    response.headers["ETag"] = etag_of(found)
    return deployment_view(found)


@deployments.get("/{name}/drift", summary="Compare the candidate's embeddings with the encoder's")
async def get_drift(name: DeploymentName, caller: Reader, store: DeploymentsDep, gateway: GatewayDep) -> DriftView:
    """Drift is measured on requests served by the candidate, up to 512 items, on a single replica."""
    deployment = await run_in_threadpool(store.get, name, caller.project)
    if deployment.candidate is None:
        raise Refusal("not_possible", f"{name} has no candidate to compare with")
    state = await gateway.replica_state(deployment)
    if state["drift"] is None:
        raise Refusal(
            "not_possible", f"{name}: the candidate is not loaded{_load_error_suffix(state['trouble'].get(CANDIDATE))}"
        )
    return DriftView(**state["drift"])


@deployments.delete("/{name}", status_code=204, summary="Delete a deployment")
def delete_deployment(name: DeploymentName, caller: Submitter, store: DeploymentsDep, if_match: IfMatch = None) -> None:
    """Requests in flight complete; the encoder is kept. `If-Match` has the same effect as on an update."""
    store.delete(name, caller.project, caller.id, if_match)


def resolve_encoders(body: DeploymentRequest, project: str, encoders: EncoderStore) -> dict[str, str]:
    """Return the IDs of the requested encoders by slot. Raises NotFound."""
    names = {MAIN: body.encoder, CANDIDATE: body.candidate}
    return {slot: encoders.resolve(name, project).id for slot, name in names.items() if name is not None}


def desired_deployment(name: str, project: str, actor: str, body: DeploymentRequest) -> Deployment:
    """Return the deployment that a request describes."""
    settings = ServingSettings.model_validate(body.model_dump(include=set(ServingSettings.model_fields)))
    return new_deployment(
        name, project, actor, encoder=body.encoder, candidate=body.candidate, share=body.share, settings=settings
    )


def check_capacity(desired: Deployment, store: DeploymentStore, settings: Settings, request: Request) -> None:
    """Raise InfeasibleDeployment if a deployment does not fit in the cluster."""
    serving = ServingSettings.model_validate(desired.settings)
    if (serving.cpus or serving.gpus) and not settings.autoscaling:
        calls: BoundedCalls = request.app.state.ray_calls
        with suppress(ClusterUnavailable):  # in that case, store it; it waits for the cluster
            check_fits(desired, store.all(), calls.run_from_thread(request.app.state.cluster.capacity))


def _load_error_suffix(error: str | None) -> str:
    return f": {error}" if error else " yet"


def deployment_view(one: Deployment) -> DeploymentView:
    return DeploymentView(
        name=one.name,
        project=one.project,
        encoder=one.encoder,
        candidate=one.candidate,
        share=one.share,
        settings=ServingSettings.model_validate(one.settings),
        serving=one.serving,
        state=one.state,
        message=one.message,
        running=one.replicas,
        created_by=one.created_by,
        created_at=utc_datetime(one.created_at),
        changed_at=utc_datetime(one.changed_at),
        etag=etag_of(one),
    )


# Inference


def body_schema(kind: type[ApiModel]) -> dict[str, Any]:
    """Return the JSON schema of a body that the handler parses itself.

    Omits the schemas to which it refers, because other routes add them.
    """
    schema = kind.model_json_schema(ref_template="#/components/schemas/{model}")
    return {key: value for key, value in schema.items() if key != "$defs"}


_FILES = {
    "type": "object",
    "properties": {"file": {"type": "array", "items": {"type": "string", "format": "binary"}}},
    "required": ["file"],
}
REQUEST_BODIES: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "image/*": BINARY,
            "video/*": BINARY,
            "application/octet-stream": BINARY,
            FORM: {"schema": _FILES},
            "application/json": {"schema": body_schema(EncodeRequest)},
        },
    }
}

Accept = Annotated[str | None, Header(description="Media type of the response. Default: JSON.")]

inference = APIRouter(prefix="/encoders", tags=["requests"])


def _check_inputs(caller: Principal, items: Sequence[Mapping[str, Any]]) -> None:
    """Raise Forbidden if a caller without the scope `read` sends a URI: results may reveal the file's content."""
    if any("uri" in item for item in items):
        caller.require("read")


async def _infer(
    request: Request, name: str, caller: Principal, gateway: Gateway, policy: Any, task: str, media_type: str | None
) -> Response:
    parsed = await read_request(request, policy, caller.project)
    _check_inputs(caller, parsed.items)
    if media_type == NUMPY:
        check_array(parsed.options)
    if media_type == PNG and len(parsed.items) > 1:
        raise Refusal("not_possible", f"Accept: {PNG} supports one item, not {len(parsed.items)}; request JSON instead")
    options = parsed.options.for_engine(task)
    encoding = media_type if media_type in (ARROW, PNG) else None  # the replica encodes it
    deadline_s = parsed.options.deadline_s
    reply = await gateway.infer(
        request, name, caller.project, parsed.items, options, deadline_s, encoding, as_json=media_type is None
    )
    return await run_by_size(reply.size, render_reply, reply, parsed, media_type)


@inference.post(
    "/{encoder}/embeddings",
    summary="Embed images and videos",
    openapi_extra=REQUEST_BODIES,
    responses={200: {"content": {"application/json": {}, NUMPY: BINARY, ARROW: BINARY}}},
)
async def embeddings(
    request: Request,
    encoder: EncoderName,
    caller: Inferrer,
    gateway: GatewayDep,
    policy: Locations,
    accept: Accept = None,
) -> Response:
    """`encoder` is an encoder ID, an alias or a deployment name. The body is a file, a form with files, or JSON.

    Tokens and layers of more than 4 MiB are not sent as JSON, only as Arrow or NumPy.
    """
    media_type = negotiate_media_type(accept, (ARROW, NUMPY))
    return await _infer(request, encoder, caller, gateway, policy, "embedding", media_type)


@inference.post("/{encoder}/classifications", summary="Classify images and videos", openapi_extra=REQUEST_BODIES)
async def classifications(
    request: Request, encoder: EncoderName, caller: Inferrer, gateway: GatewayDep, policy: Locations
) -> Response:
    """Return the `top_k` most likely labels with their probabilities. Requires a fine-tuned encoder."""
    return await _infer(request, encoder, caller, gateway, policy, "classification", None)


@inference.post(
    "/{encoder}/reconstructions",
    summary="Mask and reconstruct images and videos",
    openapi_extra=REQUEST_BODIES,
    responses={200: {"content": {"application/json": {}, PNG: BINARY}}},
)
async def reconstructions(
    request: Request,
    encoder: EncoderName,
    caller: Inferrer,
    gateway: GatewayDep,
    policy: Locations,
    accept: Accept = None,
) -> Response:
    """Return the clip, its visible tokens and the reconstruction. Requires an encoder published with its decoder.

    `mask_ratio` and `seed` determine the hidden tokens, which are the same for every item. Images are PNGs as `data:`
    URLs, with video frames tiled from left to right; `Accept: image/png` returns one overview image of a single item.
    If the decoder predicts normalised targets, each token's own mean and standard deviation are restored, as in MAE's
    demo.
    """
    media_type = negotiate_media_type(accept, (PNG,))
    return await _infer(request, encoder, caller, gateway, policy, "reconstruction", media_type)


# OpenAI-compatible endpoints: https://platform.openai.com/docs/api-reference/embeddings

openai = APIRouter(prefix="/openai/v1", tags=["openai"], route_class=LargeJsonRoute)


@openai.post("/embeddings", summary="Embed images and videos (OpenAI-compatible)")
async def openai_embeddings(
    request: Request, body: OpenAIEmbeddings, caller: Inferrer, gateway: GatewayDep, policy: Locations
) -> Response:
    items = await parse_inputs(body.input, policy, caller.project)
    _check_inputs(caller, items)
    options = RequestOptions().for_engine("embedding")
    reply = await gateway.infer(request, body.model, caller.project, items, options, DEADLINE_S)
    return await run_by_size(reply.size, _openai_response, reply, body)


def _openai_response(reply: EncoderReply, body: OpenAIEmbeddings) -> Response:
    vectors = [item["embedding"] for item in reply.items]
    if body.dimensions not in (None, len(vectors[0])):
        raise Refusal(
            "not_possible", f"dimensions={body.dimensions}: this encoder returns {len(vectors[0])}; omit `dimensions`"
        )
    shown = [to_base64(vector) if body.encoding_format == "base64" else vector.tolist() for vector in vectors]
    data = [{"object": "embedding", "index": index, "embedding": vector} for index, vector in enumerate(shown)]
    usage = {"prompt_tokens": 0, "total_tokens": 0}
    return JSONResponse({"object": "list", "data": data, "model": reply.encoder, "usage": usage})


@openai.get("/models", summary="List served encoders (OpenAI-compatible)")
def openai_models(caller: Inferrer, store: DeploymentsDep) -> dict[str, Any]:
    served = [one for one in store.all(caller.project) if one.state == "healthy"]
    names = {one.encoder: one for one in served} | {one.serving[MAIN]: one for one in served if MAIN in one.serving}
    data = [
        {"id": name, "object": "model", "created": int(one.created_at), "owned_by": one.project}
        for name, one in sorted(names.items())
    ]
    return {"object": "list", "data": data}


INFERENCE_PATHS = re.compile(
    r"/v1/encoders/[^/]+/(embeddings|classifications|reconstructions)|/openai/v1/embeddings|/v1/jobs/[^/]+/neighbours"
    r"|/v1/lab/masks"
)
"""Paths of requests to encoders, which have a rate limit of their own and accept files, with a larger body limit."""
