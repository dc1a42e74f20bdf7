"""/v1/encoders: parse, call one function of the room, answer with a view."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, Path, Query, Request, Response

from amd.artifacts.discovery import CARD, WEIGHTS, encoder_folder
from amd.storage import files, join, remove
from service.auth.authentication import Principal, Reader, Submitter
from service.db.models import Alias, Encoder
from service.jobs.routes import Config, Jobs, Uris, project_of, submit
from service.jobs.schemas import JobRequest, JobView
from service.registry import download, views
from service.registry.schemas import (
    ALIAS,
    ENCODER,
    RESERVED,
    AliasDetail,
    AliasList,
    AliasRequest,
    AliasView,
    CompareView,
    EncoderDetail,
    EncoderPage,
    ImportRequest,
    Objective,
)
from service.registry.store import EncoderFilter, EncoderStore
from service.web.errors import IllegalAction, NotFound
from service.web.middleware import tagged

router = APIRouter(prefix="/encoders", tags=["encoders"])

BINARY = {"schema": {"type": "string", "format": "binary"}}


def _store(request: Request) -> EncoderStore:
    store: EncoderStore = request.app.state.encoders
    return store


Encoders = Annotated[EncoderStore, Depends(_store)]
EncoderName = Annotated[str, Path(pattern=ENCODER, description="An id, or an alias.")]
EncoderId = Annotated[str, Path(pattern=ENCODER, description="An id; an alias is not followed.")]
AliasName = Annotated[str, Path(pattern=ALIAS)]
Project = Annotated[
    str | None,
    Query(max_length=63, description="For a key of all projects: of which one; aliases are `default`'s otherwise."),
]
IfNoneMatch = Annotated[str | None, Header()]
UNCHANGED: dict[int | str, dict[str, Any]] = {304: {"description": "As `If-None-Match` has it."}}


def _named(encoder: EncoderName, encoders: Encoders, caller: Reader, project: Project = None) -> Encoder:
    """The encoder that a path names, where the caller may see it."""
    return encoders.resolve(encoder, caller.own_project(project))


Visible = Annotated[Encoder, Depends(_named)]


def _aliases(encoders: EncoderStore, caller: Principal, *rows: Encoder) -> list[Alias]:
    return list(encoders.aliases_of({row.id for row in rows}, caller.project))


@router.get("", summary="List encoders, newest first")
def list_encoders(
    caller: Reader,
    encoders: Encoders,
    objective: Objective | None = None,
    size: Annotated[str | None, Query(max_length=40, description="S, B, L, H, …")] = None,
    alias: Annotated[str | None, Query(pattern=ALIAS)] = None,
    job: Annotated[str | None, Query(pattern=ENCODER, max_length=100)] = None,
    project: Project = None,
    cursor: Annotated[str | None, Query(max_length=400)] = None,
    limit: Annotated[int, Query(ge=1, le=200)] = 50,
) -> EncoderPage:
    """Yours, and those that belong to no project."""
    where = EncoderFilter(caller.own_project(project), objective, size, alias, job)
    page = encoders.list(where, cursor, limit)
    items = views.encoder_views(page.encoders, _aliases(encoders, caller, *page.encoders))
    return EncoderPage(items=items, next_cursor=page.next_cursor)


@router.post("", status_code=202, summary="Publish weights from outside as an encoder")
def import_encoder(
    body: ImportRequest,
    caller: Submitter,
    jobs: Jobs,
    settings: Config,
    policy: Uris,
    response: Response,
    idempotency_key: Annotated[str | None, Header(min_length=1, max_length=255)] = None,
) -> JobView:
    """A job of kind `import` does it: the encoder is listed once that has succeeded, under the job's `encoder`.

    With an `Idempotency-Key`, the same request again answers with the same job.
    """
    config = body.model_dump(mode="json", exclude={"project", "labels"}, exclude_none=True)
    request = JobRequest(kind="import", config=config, project=body.project, labels=body.labels, name=body.id)
    return submit(request, caller, jobs, settings, policy, response, idempotency_key)


@router.get("/aliases", summary="List aliases by name")
def list_aliases(caller: Reader, encoders: Encoders, project: Project = None) -> AliasList:
    return AliasList(items=[views.alias_view(alias) for alias in encoders.aliases(caller.own_project(project))])


@router.get("/aliases/{alias}", summary="An alias, and where it has pointed", responses=UNCHANGED)
def get_alias(
    alias: AliasName,
    caller: Reader,
    encoders: Encoders,
    response: Response,
    project: Project = None,
    if_none_match: IfNoneMatch = None,
) -> AliasDetail:
    view = views.alias_detail(*encoders.alias(project_of(caller, project), alias))
    return tagged(view, response, if_none_match)


@router.put("/aliases/{alias}", summary="Point an alias to an encoder")
def move_alias(alias: AliasName, body: AliasRequest, caller: Submitter, encoders: Encoders) -> AliasView:
    """At once and whole: whoever asks for the alias gets one encoder or the other. With `expected`, of two that move it
    at the same time one is told `alias_moved`."""
    if alias == RESERVED:
        raise IllegalAction(f"{alias} is a path of this interface; an alias needs another name", allowed_actions=[])
    expected = (body.expected,) if "expected" in body.model_fields_set else ()
    moved = encoders.move(project_of(caller, body.project), alias, body.encoder, caller.id, expected)
    return views.alias_view(moved)


@router.delete("/aliases/{alias}", status_code=204, summary="Take an alias away")
def delete_alias(alias: AliasName, caller: Submitter, encoders: Encoders, project: Project = None) -> None:
    """Its history stays, and goes on if it is made again."""
    encoders.drop(project_of(caller, project), alias, caller.id)


@router.get("/{encoder}", summary="An encoder whole", responses=UNCHANGED)
def get_encoder(
    encoder: Visible, caller: Reader, encoders: Encoders, response: Response, if_none_match: IfNoneMatch = None
) -> EncoderDetail:
    view = views.encoder_detail(encoder, _aliases(encoders, caller, encoder))
    return tagged(view, response, if_none_match)


@router.delete("/{encoder}", status_code=204, summary="Delete an encoder that nothing uses")
def delete_encoder(encoder: EncoderId, caller: Submitter, encoders: Encoders, settings: Config) -> None:
    """With its weights, for good. Refused while an alias, a deployment or a job that has not ended needs it."""
    encoders.forget(encoder, caller.project, settings.root)
    url = encoder_folder(settings.root, encoder)
    remove(join(url, CARD))  # first: without it nothing is published
    remove(url)


@router.get(
    "/{encoder}/download",
    summary="An encoder's files",
    response_class=Response,
    responses={200: {"content": {download.BINARY: BINARY, download.TAR: BINARY}}, **UNCHANGED},
)
def download_encoder(
    encoder: Visible,
    settings: Config,
    file: Annotated[
        str | None,
        Query(pattern=ENCODER, description=f"{WEIGHTS}, {CARD}, …: one of them; without it all, as a tar."),
    ] = None,
    if_none_match: IfNoneMatch = None,
) -> Response:
    """Streamed from the storage root, with length and `ETag`; single files of a disk also by `Range`."""
    url = encoder_folder(settings.root, encoder.id)
    found = files(url)
    if file is None and found:
        return download.whole(url, encoder.id, found, if_none_match)
    if file is None or file not in found:
        raise NotFound(f"{encoder.id} has no file {file or CARD!r}; it has {', '.join(sorted(found)) or 'none'}")
    return download.one_file(url, file, found[file], if_none_match)


@router.get("/{encoder}/compare/{other}", summary="Two encoders side by side")
def compare_encoders(
    encoder: Visible,
    other: EncoderName,
    caller: Reader,
    encoders: Encoders,
    project: Project = None,
) -> CompareView:
    """Their figures, their scores by protocol and data set, and what differs in how they were made."""
    second = encoders.resolve(other, caller.own_project(project))
    return views.compare_view(encoder, second, _aliases(encoders, caller, encoder, second))
