"""Encoder pages: list and compare encoders, show their details, lineage and aliases, and move aliases."""

from __future__ import annotations

from contextlib import suppress
from datetime import datetime
from typing import Annotated, Literal

from fastapi import APIRouter, Query, Request
from pydantic import StringConstraints
from starlette.responses import Response

from amd.artifacts.card import STRICTEST_FIRST, Score
from amd.artifacts.discovery import encoder_folder
from service.auth.authentication import Principal, Reader, Submitter
from service.auth.sessions import PREFIX
from service.console.encoder_scores import MAX_LISTED, EncoderOption, encoder_options, score_columns
from service.console.forms import FormDep, parse
from service.console.rendering import redirect, render
from service.console.security import ConsoleRoute
from service.db.models import RegisteredEncoder
from service.jobs.routes import Config
from service.registry import routes as registry_api
from service.registry import views
from service.registry.lineage import lineage, source_encoders
from service.registry.routes import AliasName, EncodersDep, VisibleEncoder
from service.registry.schemas import (
    ALIAS_PATTERN,
    MAX_COMPARED,
    AliasRequest,
    EncoderDetail,
    EncoderReference,
    Objective,
)
from service.registry.store import EncoderStore
from service.serving import routes as serving_api
from service.serving.routes import DeploymentsDep
from service.serving.schemas import DeploymentRequest
from service.web.errors import NotFound, Refusal
from service.web.schemas import DEFAULT_PROJECT, ApiModel

router = APIRouter(prefix=PREFIX, route_class=ConsoleRoute)

MAX_SCORE_COLUMNS = 3  # maximum number of benchmarks with a column of their own in the list of encoders


class AliasForm(ApiModel):
    """Form field for an alias name."""

    alias: Annotated[str, StringConstraints(pattern=ALIAS_PATTERN)]


class DeploymentForm(ApiModel):
    """Form field for a deployment name."""

    name: Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")]


@router.get("/encoders")
def list_encoders(
    request: Request,
    caller: Reader,
    encoders: EncodersDep,
    objective: Objective | Literal[""] = "",
    score: Annotated[str, Query(max_length=2000)] = "",
    cursor: Annotated[str | None, Query(max_length=400)] = None,
) -> Response:
    """List encoders, newest first, or by the score on a benchmark. `score`: name of the benchmark."""
    page = registry_api.list_encoders(caller, encoders, objective or None, cursor=cursor or None, limit=MAX_LISTED)
    columns = score_columns(page.items)
    chosen = next((one for one in columns if one.name == score), None)
    if chosen is not None:
        page.items.sort(key=chosen.rank)
    return render(
        request,
        "encoders.html",
        page=page,
        aliases=registry_api.list_aliases(caller, encoders).items,
        objective=objective,
        benchmarks=[one.name for one in columns],
        columns=[chosen] if chosen is not None else columns[:MAX_SCORE_COLUMNS],
        chosen=chosen.name if chosen is not None else "",
        most=MAX_COMPARED,
    )


@router.get("/encoders/{encoder}")
def show_encoder(
    request: Request,
    encoder: VisibleEncoder,
    caller: Reader,
    encoders: EncodersDep,
    deployments: DeploymentsDep,
    settings: Config,
) -> Response:
    detail = registry_api.get_encoder(encoder, caller, encoders, Response())
    histories = [encoders.alias(alias.project, alias.name) for alias in detail.aliases]
    listed = registry_api.list_encoders(caller, encoders, limit=MAX_LISTED).items
    serving = [one for one in deployments.all(caller.project) if encoder.id in one.serving.values()]
    return render(
        request,
        "encoder.html",
        encoder=detail,
        scores=sorted(detail.scores, key=_protocol_and_data),
        folder=encoder_folder(settings.root, encoder.id),
        lineage=lineage(detail, serving, settings.root, _visible(encoders, caller, detail, settings.root)),
        histories=[views.alias_detail(*one) for one in histories],
        others=encoder_options([one for one in listed if one.id != encoder.id]),
        serving=serving,
        project=_project(caller, encoder),
    )


@router.get("/compare")
def compare_encoders(
    request: Request,
    caller: Reader,
    encoders: EncodersDep,
    encoder: Annotated[list[EncoderReference] | None, Query(max_length=MAX_LISTED)] = None,
) -> Response:
    """Show encoders side by side. `encoder`: IDs or aliases; the others are compared with the first."""
    names = list(dict.fromkeys(encoder or []))
    if not 2 <= len(names) <= MAX_COMPARED:
        raise Refusal("not_possible", f"{len(names)} encoders are selected; select 2 to {MAX_COMPARED} to compare them")
    first = encoders.resolve(names[0], caller.own_project(None))
    found = registry_api.compare_several_encoders(first, names[1:], caller, encoders)
    others: list[EncoderOption] = []
    if len(names) < MAX_COMPARED:
        listed = registry_api.list_encoders(caller, encoders, limit=MAX_LISTED).items
        compared = {one.id for one in found.encoders}
        others = encoder_options([one for one in listed if one.id not in compared])
    return render(request, "compare.html", found=found, others=others)


@router.post("/encoders/{encoder}/alias")
def set_alias(
    request: Request, encoder: VisibleEncoder, caller: Submitter, encoders: EncodersDep, form: FormDep
) -> Response:
    """Point an alias to the encoder. `expected`: target shown on the page, used to detect concurrent moves."""
    project = _project(caller, encoder)
    name = form.text("alias")
    current = next((one.encoder_id for one in encoders.aliases(project) if one.name == name), None)
    expected = form.text("expected") or current
    body = parse(AliasRequest, {"encoder": encoder.id, "expected": expected, "project": project})
    registry_api.move_alias(parse(AliasForm, {"alias": name}).alias, body, caller, encoders)
    return redirect(request, f"{PREFIX}/encoders/{encoder.id}")


@router.post("/aliases/{alias}/roll-back")
def roll_back_alias(
    request: Request, alias: AliasName, caller: Submitter, encoders: EncodersDep, form: FormDep
) -> Response:
    """Point an alias to the encoder that it pointed to before."""
    project = caller.own_project(form.text("project") or None) or DEFAULT_PROJECT
    detail = views.alias_detail(*encoders.alias(project, alias))
    before = next((move.before for move in reversed(detail.history) if move.before and move.after), None)
    if before is None:
        raise NotFound(f"the alias {alias} has never pointed to another encoder")
    body = AliasRequest(encoder=before, expected=form.text("expected") or detail.encoder, project=project)
    registry_api.move_alias(alias, body, caller, encoders)
    return redirect(request, f"{PREFIX}/encoders/{before}")


@router.post("/encoders/{encoder}/deploy")
def deploy(
    request: Request,
    encoder: VisibleEncoder,
    caller: Submitter,
    encoders: EncodersDep,
    store: DeploymentsDep,
    form: FormDep,
) -> Response:
    name = form.text("name")
    values = {"encoder": form.text("as") or encoder.id, "project": _project(caller, encoder)}
    values |= {field: form.text(field) for field in ("cpus", "gpus") if form.text(field)}
    body = parse(DeploymentRequest, values)
    settings, valid = request.app.state.settings, parse(DeploymentForm, {"name": name}).name
    serving_api.put_deployment(valid, body, caller, store, encoders, settings, request, Response())
    return redirect(request, f"{PREFIX}/deployments/{name}")


@router.post("/encoders/{encoder}/delete")
def delete_encoder(
    request: Request, encoder: VisibleEncoder, caller: Submitter, encoders: EncodersDep, settings: Config
) -> Response:
    registry_api.delete_encoder(encoder.id, caller, encoders, settings)
    return redirect(request, f"{PREFIX}/encoders")


def _visible(encoders: EncoderStore, caller: Principal, encoder: EncoderDetail, root: str) -> set[str]:
    """Return which of the encoders that an encoder was derived from exist and are visible to the caller."""
    found = set()
    for encoder_id in source_encoders(encoder, root).values():
        with suppress(NotFound):
            found.add(encoders.get(encoder_id, caller.project).id)
    return found


def _protocol_and_data(score: Score) -> tuple[int, str, str, datetime]:
    return STRICTEST_FIRST.index(score.protocol), score.data, score.views or "", score.created


def _project(caller: Principal, encoder: RegisteredEncoder) -> str:
    """Return the project of an encoder's aliases and deployments.

    Raises Forbidden if the caller's key does not cover it.
    """
    return caller.own_project(encoder.project) or DEFAULT_PROJECT
