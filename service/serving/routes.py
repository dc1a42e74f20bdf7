"""/v1/deployments, /v1/encoders/{name}/embeddings and its kin, and OpenAI's form of them."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, Path, Query, Request, Response
from fastapi.responses import JSONResponse

from service.auth.authentication import Inferrer, Principal, Reader, Submitter
from service.db.models import Deployment
from service.jobs.routes import Uris, project_of
from service.jobs.schemas import Wire
from service.registry.routes import BINARY, Encoders
from service.serving.deployments import DeploymentStore, new_deployment
from service.serving.gateway import Gateway
from service.serving.protocol import ARROW, CANDIDATE, MAIN, PNG
from service.serving.requests import (
    DEADLINE_S,
    FORM,
    EncodeRequest,
    Options,
    item_of,
    read_request,
)
from service.serving.responses import NUMPY, in_base64, rendered, wanted_form
from service.serving.schemas import (
    DeploymentList,
    DeploymentRequest,
    DeploymentView,
    DriftView,
    OpenAIEmbeddings,
    ServingSettings,
)
from service.web.errors import NotPossible

Name = Annotated[str, Path(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")]
EncoderName = Annotated[str, Path(min_length=1, max_length=200)]


def _deployments(request: Request) -> DeploymentStore:
    store: DeploymentStore = request.app.state.deployments
    return store


def _gateway(request: Request) -> Gateway:
    gateway: Gateway = request.app.state.gateway
    return gateway


Deployments = Annotated[DeploymentStore, Depends(_deployments)]
Ways = Annotated[Gateway, Depends(_gateway)]

deployments = APIRouter(prefix="/deployments", tags=["deployments"])


@deployments.put("/{name}", status_code=202, summary="Have an encoder answer requests, or change how")
def put_deployment(
    name: Name, body: DeploymentRequest, caller: Submitter, store: Deployments, encoders: Encoders, response: Response
) -> DeploymentView:
    """It answers once its `state` is `healthy`. Another encoder takes over without a failed request."""
    project = project_of(caller, body.project)
    for wanted in filter(None, (body.encoder, body.candidate)):
        encoders.resolve(wanted, project)
    settings = ServingSettings.model_validate(body.model_dump(include=set(ServingSettings.model_fields)))
    made, is_new = store.put(
        new_deployment(
            name,
            project,
            caller.id,
            encoder=body.encoder,
            candidate=body.candidate,
            share=body.share,
            settings=settings,
        )
    )
    if is_new:
        response.headers["Location"] = f"/v1/deployments/{name}"
    return _view(made)


@deployments.get("", summary="List deployments")
def list_deployments(
    caller: Reader, store: Deployments, project: Annotated[str | None, Query(max_length=63)] = None
) -> DeploymentList:
    return DeploymentList(items=[_view(one) for one in store.all(caller.own_project(project))])


@deployments.get("/{name}", summary="A deployment and how it is")
def get_deployment(name: Name, caller: Reader, store: Deployments) -> DeploymentView:
    return _view(store.get(name, caller.project))


@deployments.get("/{name}/drift", summary="How far the candidate's vectors lie from the encoder's")
async def get_drift(name: Name, caller: Reader, store: Deployments, ways: Ways) -> DriftView:
    """Gathered from requests that the candidate has answered, up to 512 items."""
    deployment = store.get(name, caller.project)
    if deployment.candidate is None:
        raise NotPossible(f"{name} has no candidate to compare with")
    state = await ways.state(deployment)
    if state["drift"] is None:
        raise NotPossible(f"{name}: the candidate is not loaded{_why(state['trouble'].get(CANDIDATE))}")
    return DriftView(**state["drift"])


@deployments.delete("/{name}", status_code=204, summary="Take a deployment down")
def delete_deployment(name: Name, caller: Submitter, store: Deployments) -> None:
    """Requests under way are answered; the encoder stays."""
    store.delete(name, caller.project)


def _why(trouble: str | None) -> str:
    return f": {trouble}" if trouble else " yet"


def _view(one: Deployment) -> DeploymentView:
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
        created_by=one.created_by,
        created_at=datetime.fromtimestamp(one.created_at, UTC),
        changed_at=datetime.fromtimestamp(one.changed_at, UTC),
    )


# Requests to encoders


def _schema(kind: type[Wire]) -> dict[str, Any]:
    """Of a body that is read by hand; what it refers to stands in the document for other routes' sake."""
    schema = kind.model_json_schema(ref_template="#/components/schemas/{model}")
    return {key: value for key, value in schema.items() if key != "$defs"}


_FILES = {
    "type": "object",
    "properties": {"file": {"type": "array", "items": {"type": "string", "format": "binary"}}},
    "required": ["file"],
}
BODIES: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "image/*": BINARY,
            "video/*": BINARY,
            "application/octet-stream": BINARY,
            FORM: {"schema": _FILES},
            "application/json": {"schema": _schema(EncodeRequest)},
        },
    }
}

inference = APIRouter(prefix="/encoders", tags=["requests"])


async def _answered(
    request: Request, name: str, caller: Principal, ways: Gateway, policy: Any, task: str, form: str | None
) -> Response:
    asked = await read_request(request, policy)
    if form == PNG and len(asked.items) > 1:
        raise NotPossible(f"Accept: {PNG} gives the page of one item, not of {len(asked.items)}; ask for JSON")
    options = asked.options
    want = options.want(task)
    written = form if form in (ARROW, PNG) else None  # by the replica
    reply = await ways.ask(request, name, caller.project, asked.items, want, options.deadline_s, form=written)
    return rendered(reply, asked, form)


@inference.post(
    "/{encoder}/embeddings",
    summary="Vectors of images and videos",
    openapi_extra=BODIES,
    responses={200: {"content": {"application/json": {}, NUMPY: BINARY, ARROW: BINARY}}},
)
async def embeddings(
    request: Request,
    encoder: EncoderName,
    caller: Inferrer,
    ways: Ways,
    policy: Uris,
    accept: Annotated[str | None, Header()] = None,
) -> Response:
    """`encoder`: an id, an alias, or a deployment's name. A file as the body, a form of files, or JSON."""
    form = wanted_form(accept, (ARROW, NUMPY))
    return await _answered(request, encoder, caller, ways, policy, "embedding", form)


@inference.post("/{encoder}/classifications", summary="Labels of images and videos", openapi_extra=BODIES)
async def classifications(
    request: Request, encoder: EncoderName, caller: Inferrer, ways: Ways, policy: Uris
) -> Response:
    """Where the encoder was fine-tuned: the `top_k` likeliest labels with their probabilities."""
    return await _answered(request, encoder, caller, ways, policy, "classification", None)


@inference.post(
    "/{encoder}/reconstructions",
    summary="What is rebuilt of masked files",
    openapi_extra=BODIES,
    responses={200: {"content": {"application/json": {}, PNG: BINARY}}},
)
async def reconstructions(
    request: Request,
    encoder: EncoderName,
    caller: Inferrer,
    ways: Ways,
    policy: Uris,
    accept: Annotated[str | None, Header()] = None,
) -> Response:
    """Where the encoder was published with its decoder: the clip, what the encoder saw of it and what was rebuilt.

    `mask_ratio` and `seed` say what is hidden: the same of every item. Pictures are PNGs as `data:` URLs, a video's
    frames from left to right; with `Accept: image/png` one item is answered by a page of them. Where targets were
    normalised per token, the clip's own mean and spread of each token are put back, as MAE's demonstration does.
    """
    form = wanted_form(accept, (PNG,))
    return await _answered(request, encoder, caller, ways, policy, "reconstruction", form)


# OpenAI's form: https://platform.openai.com/docs/api-reference/embeddings

openai = APIRouter(prefix="/openai/v1", tags=["openai"])


@openai.post("/embeddings", summary="Vectors, as OpenAI's clients ask for them")
async def openai_embeddings(
    request: Request, body: OpenAIEmbeddings, caller: Inferrer, ways: Ways, policy: Uris
) -> Response:
    inputs = body.input if isinstance(body.input, list) else [body.input]
    items = [item_of(value, f"input.{number}", policy) for number, value in enumerate(inputs)]
    want = Options().want("embedding")
    reply = await ways.ask(request, body.model, caller.project, items, want, DEADLINE_S)
    vectors = [item["embedding"] for item in reply.items]
    if body.dimensions not in (None, len(vectors[0])):
        raise NotPossible(f"dimensions={body.dimensions}: this encoder gives {len(vectors[0])}; leave it out")
    shown = [in_base64(vector) if body.encoding_format == "base64" else vector.tolist() for vector in vectors]
    data = [{"object": "embedding", "index": index, "embedding": vector} for index, vector in enumerate(shown)]
    usage = {"prompt_tokens": 0, "total_tokens": 0}
    return JSONResponse({"object": "list", "data": data, "model": reply.encoder, "usage": usage})


@openai.get("/models", summary="What can be asked, as OpenAI's clients list it")
def openai_models(caller: Reader, store: Deployments) -> dict[str, Any]:
    served = [one for one in store.all(caller.project) if one.state == "healthy"]
    names = {one.encoder: one for one in served} | {one.serving[MAIN]: one for one in served if MAIN in one.serving}
    data = [
        {"id": name, "object": "model", "created": int(one.created_at), "owned_by": one.project}
        for name, one in sorted(names.items())
    ]
    return {"object": "list", "data": data}


FILES = re.compile(
    r"/v1/encoders/[^/]+/(embeddings|classifications|reconstructions)|/openai/v1/embeddings|/v1/jobs/[^/]+/neighbours"
)
"""Paths that take files."""
