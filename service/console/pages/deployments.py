"""Deployment pages: view deployments, promote a candidate, roll back, and try an encoder on a file."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from fastapi import APIRouter, Request
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.responses import Response

from service.auth.authentication import Inferrer, Reader, Submitter
from service.auth.sessions import PREFIX
from service.console.encoder_scores import MAX_LISTED, EncoderOption, encoder_options
from service.console.forms import FormDep, parse
from service.console.rendering import redirect, render
from service.console.security import ConsoleRoute
from service.db.models import Alias, Deployment
from service.jobs.routes import Config, Jobs, Locations, StorageCalls
from service.registry import routes as registry_api
from service.registry.routes import EncodersDep
from service.registry.schemas import AliasRequest
from service.serving import revision_routes as revisions_api
from service.serving import routes as serving_api
from service.serving.deployments import etag_of
from service.serving.protocol import CANDIDATE, MAIN
from service.serving.requests import DEADLINE_S, RequestOptions
from service.serving.revisions import cannot_restore
from service.serving.routes import DeploymentName, DeploymentsDep, EncoderName, GatewayDep
from service.serving.schemas import (
    DeploymentRequest,
    DeploymentView,
    DriftView,
    NeighboursRequest,
    NeighbourView,
    RevisionView,
    RollbackRequest,
)
from service.similarity.routes import EmbeddingCacheDep, neighbours
from service.web.errors import NotFound, Refusal, ServiceError

router = APIRouter(prefix=PREFIX, route_class=ConsoleRoute)

BARS = 96  # maximum number of bars in a vector's chart
DECIMALS = 6  # of the values that are shown to copy
NEIGHBOURS = 8
TOP = 5


class Bar(NamedTuple):
    """One bar in a bar chart of a vector; the chart is 40 units high."""

    x: float
    y: float
    height: float


class Rollback(NamedTuple):
    """Whether a deployment can be rolled back to a revision, and what the page says about it."""

    possible: bool
    text: str
    """Question to confirm, or the reason why there is nothing to roll back."""


@router.get("/deployments")
def list_deployments(request: Request, caller: Reader, store: DeploymentsDep, encoders: EncodersDep) -> Response:
    aliases: dict[str, list[str]] = {}
    for alias in registry_api.list_aliases(caller, encoders).items:
        aliases.setdefault(alias.encoder, []).append(alias.name)
    deployments = serving_api.list_deployments(caller, store).items
    return render(request, "deployments.html", deployments=deployments, aliases=aliases)


@router.get("/deployments/{name}")
async def show_deployment(
    request: Request,
    name: DeploymentName,
    caller: Reader,
    store: DeploymentsDep,
    encoders: EncodersDep,
    gateway: GatewayDep,
) -> Response:
    found = await run_in_threadpool(serving_api.get_deployment, name, caller, store, Response())
    drift: DriftView | None = None
    problem = ""
    if found.candidate is not None:
        try:
            drift = await serving_api.get_drift(name, caller, store, gateway)
        except ServiceError as error:
            problem = error.message
    aliases = await run_in_threadpool(encoders.aliases, found.project)
    alias = next((one for one in aliases if one.name == found.encoder), None)
    target = await run_in_threadpool(_target, found, encoders)
    revisions = (await run_in_threadpool(revisions_api.list_revisions, name, caller, store)).items
    context: dict[str, Any] = {
        "deployment": found,
        "drift": drift,
        "problem": problem,
        "alias": alias,
        "target": target,
        "candidates": await run_in_threadpool(_candidates, found, caller, encoders, aliases),
        "revisions": [(one, rollback_to(one, found, aliases)) for one in revisions],
    }
    return await run_in_threadpool(render, request, "deployment.html", **context)


def _target(deployment: DeploymentView, encoders: EncodersDep) -> str:
    """Return the ID of the main encoder after the rollout, or of the one that serves if its name has been deleted."""
    try:
        return encoders.resolve(deployment.encoder, deployment.project).id
    except NotFound:
        return deployment.serving.get(MAIN, deployment.encoder)


def _candidates(
    deployment: DeploymentView, caller: Reader, encoders: EncodersDep, aliases: Sequence[Alias]
) -> list[EncoderOption]:
    """Return the aliases and encoders that the page offers as a candidate."""
    if deployment.candidate is not None:
        return []
    listed = registry_api.list_encoders(caller, encoders, project=deployment.project, limit=MAX_LISTED).items
    named = [EncoderOption(one.name, f"alias of {one.encoder_id}") for one in aliases]
    return [*named, *encoder_options(listed)]


@router.post("/deployments/{name}/candidate")
def set_candidate(
    request: Request,
    name: DeploymentName,
    caller: Submitter,
    store: DeploymentsDep,
    encoders: EncodersDep,
    form: FormDep,
) -> Response:
    """Set or change the candidate, the encoder that serves a share of the requests."""
    share = form.text("percent") or "10"
    changes = {"candidate": form.text("candidate") or None, "share": float(share) / 100 if _is_number(share) else share}
    _change(request, name, caller, store, encoders, changes)
    return redirect(request, f"{PREFIX}/deployments/{name}")


@router.post("/deployments/{name}/promote")
def promote(
    request: Request, name: DeploymentName, caller: Submitter, store: DeploymentsDep, encoders: EncodersDep
) -> Response:
    """Make the candidate the main encoder: move the alias that the deployment follows, or edit the deployment."""
    found = store.get(name, caller.project)
    if found.candidate is None:
        raise Refusal("not_possible", f"{name} has no candidate to promote")
    candidate = encoders.resolve(found.candidate, found.project).id
    alias = next((one for one in encoders.aliases(found.project) if one.name == found.encoder), None)
    changes: dict[str, Any] = {"candidate": None}
    if alias is not None:
        body = AliasRequest(encoder=candidate, expected=alias.encoder_id, project=found.project)
        registry_api.move_alias(alias.name, body, caller, encoders)
    else:
        changes["encoder"] = candidate
    _change(request, name, caller, store, encoders, changes)
    return redirect(request, f"{PREFIX}/deployments/{name}")


@router.post("/deployments/{name}/withdraw")
def withdraw(
    request: Request, name: DeploymentName, caller: Submitter, store: DeploymentsDep, encoders: EncodersDep
) -> Response:
    """Remove the candidate."""
    _change(request, name, caller, store, encoders, {"candidate": None})
    return redirect(request, f"{PREFIX}/deployments/{name}")


@router.post("/deployments/{name}/roll-back")
def roll_back(
    request: Request,
    name: DeploymentName,
    caller: Submitter,
    store: DeploymentsDep,
    encoders: EncodersDep,
    settings: Config,
    form: FormDep,
) -> Response:
    """Restore the settings of an earlier revision, unless the settings have changed since the page was loaded."""
    body, etag = parse(RollbackRequest, {"revision": form.text("revision")}), form.text("etag") or None
    revisions_api.roll_back(name, body, caller, store, encoders, settings, request, Response(), etag)
    return redirect(request, f"{PREFIX}/deployments/{name}")


def rollback_to(revision: RevisionView, current: DeploymentView, aliases: Sequence[Alias]) -> Rollback:
    """Return whether a deployment can be rolled back to a revision, given where the aliases point now."""
    if all(
        getattr(revision, field) == getattr(current, field) for field in ("encoder", "candidate", "share", "settings")
    ):
        return Rollback(False, "current settings")
    targets = {one.name: one.encoder_id for one in aliases}
    names = {MAIN: revision.encoder, CANDIDATE: revision.candidate}
    before = revision.resolved
    now = {slot: targets.get(name, before.get(slot, name)) for slot, name in names.items() if name is not None}
    if cannot_restore(now, before):
        return Rollback(False, f"{revision.encoder} is now its candidate; move the alias back first")
    question = f"Restore the settings of revision {revision.number}?"
    for slot, encoder in now.items():
        if slot in before and before[slot] != encoder:
            question += (
                f" {names[slot]} is now {encoder}; revision {revision.number} served {before[slot]}. "
                f"To serve {before[slot]}, move the alias back."
            )
    return Rollback(True, question)


@router.post("/deployments/{name}/delete")
def delete_deployment(request: Request, name: DeploymentName, caller: Submitter, store: DeploymentsDep) -> Response:
    serving_api.delete_deployment(name, caller, store)
    return redirect(request, f"{PREFIX}/deployments")


def _change(
    request: Request,
    name: str,
    caller: Submitter,
    store: DeploymentsDep,
    encoders: EncodersDep,
    changes: dict[str, Any],
) -> DeploymentView:
    found: Deployment = store.get(name, caller.project)
    values = {"encoder": found.encoder, "candidate": found.candidate, "share": found.share, "project": found.project}
    body = parse(DeploymentRequest, {**found.settings, **values, **changes})
    return serving_api.put_deployment(
        name, body, caller, store, encoders, request.app.state.settings, request, Response(), etag_of(found)
    )


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


# Trying an encoder


@router.post("/encoders/{encoder}/try")
async def try_encoder(
    request: Request,
    encoder: EncoderName,
    caller: Inferrer,
    jobs: Jobs,
    settings: Config,
    gateway: GatewayDep,
    policy: Locations,
    cache: EmbeddingCacheDep,
    storage: StorageCalls,
) -> Response:
    """Show an encoder's output for a file: the vector, the classes, and the neighbours in an embedded data set."""
    form = await request.form()
    file = form.get("file")
    content = await file.read() if isinstance(file, UploadFile) else b""
    if not isinstance(file, UploadFile) or not content:
        raise Refusal("not_possible", "choose an image or a video first")
    item = {"content": content}
    options = RequestOptions().for_engine("embedding")
    try:
        reply = await gateway.infer(request, encoder, caller.project, [item], options, DEADLINE_S, exact=False)
    except Refusal as refusal:
        if "reason" in refusal.extra:  # the file cannot be encoded
            refusal.message = f"{file.filename}: {refusal.extra['reason']}"
        raise
    vector = [float(value) for value in reply.items[0]["embedding"]]
    classes = await _classes(request, encoder, caller, gateway, item)
    job_id = str(form.get("job", "")).strip()
    near: list[NeighbourView] = []
    problem = ""
    if job_id:
        try:
            body = NeighboursRequest(vector=vector, k=NEIGHBOURS)
            near = await neighbours(request, job_id, body, caller, jobs, settings, cache, gateway, policy, storage)
        except ServiceError as error:
            problem = error.message
    return render(
        request,
        "fragments/try_result.html",
        encoder=reply.encoder,
        vector=vector,
        rounded=[round(value, DECIMALS) + 0.0 for value in vector],  # + 0.0: no negative zeros
        decimals=DECIMALS,
        bars=bars(vector),
        classes=classes,
        near=near,
        problem=problem,
        norm=math.sqrt(sum(value * value for value in vector)),
    )


async def _classes(
    request: Request, encoder: str, caller: Inferrer, gateway: GatewayDep, item: dict[str, Any]
) -> list[tuple[str, float]]:
    """Return the most likely classes with their probabilities, or an empty list if the encoder cannot classify."""
    options = RequestOptions(top_k=TOP).for_engine("classification")
    try:
        reply = await gateway.infer(request, encoder, caller.project, [item], options, DEADLINE_S)
    except Refusal:
        return []
    found = reply.items[0]
    return list(zip(map(str, found["labels"]), map(float, found["scores"]), strict=True))


def bars(vector: Sequence[float]) -> list[Bar]:
    """Return a vector's bars, averaging neighbouring values into at most BARS groups."""
    count = min(BARS, len(vector))
    groups = [vector[index * len(vector) // count : (index + 1) * len(vector) // count] for index in range(count)]
    means = [sum(group) / len(group) for group in groups]
    largest = max((abs(value) for value in means), default=0.0) or 1.0
    heights = [19 * value / largest for value in means]
    return [Bar(index, 20 - max(height, 0), max(abs(height), 0.5)) for index, height in enumerate(heights)]
