"""Routes under /v1/encoders: list, import, download, compare and delete encoders, and manage aliases."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Path, Query, Request, Response

from amd.artifacts.discovery import CARD, WEIGHTS, encoder_folder
from amd.storage import files
from service.auth.authentication import Reader, Submitter
from service.db.models import RegisteredEncoder
from service.jobs.routes import Config, Jobs, Locations, StorageCalls, project_of, submit
from service.jobs.schemas import JobRequest, JobView
from service.registry import comparison, views
from service.registry.schemas import (
    ALIAS_PATTERN,
    ENCODER_PATTERN,
    MAX_COMPARED,
    RESERVED_ALIAS,
    AliasDetail,
    AliasList,
    AliasRequest,
    AliasView,
    CompareView,
    EncoderComparison,
    EncoderDetail,
    EncoderPage,
    EncoderReference,
    ImportRequest,
    Objective,
)
from service.registry.store import EncoderFilter, EncoderStore
from service.web import downloads
from service.web.binary import BINARY
from service.web.errors import IllegalAction, NotFound
from service.web.middleware import tagged
from service.web.parameters import CURSOR, NOT_MODIFIED, IdempotencyKey, IfNoneMatch, PageSize

router = APIRouter(prefix="/encoders", tags=["encoders"])


async def _store(request: Request) -> EncoderStore:
    store: EncoderStore = request.app.state.encoders
    return store


EncodersDep = Annotated[EncoderStore, Depends(_store)]
EncoderName = Annotated[str, Path(pattern=ENCODER_PATTERN, description="Encoder ID or alias.")]
EncoderId = Annotated[str, Path(pattern=ENCODER_PATTERN, description="Encoder ID; aliases are not resolved.")]
OtherEncoders = Annotated[
    list[EncoderReference],
    Query(
        min_length=1,
        max_length=MAX_COMPARED - 1,
        description="Encoder ID or alias to compare with; repeat the parameter for several encoders.",
    ),
]
AliasName = Annotated[str, Path(pattern=ALIAS_PATTERN, description="Alias name.")]
ProjectQuery = Annotated[
    str | None,
    Query(
        max_length=63,
        description="Project to use; only for keys that cover all projects. "
        "Default: encoders in every project, and aliases in `default`.",
    ),
]


def _resolve_encoder(
    encoder: EncoderName, encoders: EncodersDep, caller: Reader, project: ProjectQuery = None
) -> RegisteredEncoder:
    """Return the encoder named in the path. Raises NotFound if the caller cannot see it."""
    return encoders.resolve(encoder, caller.own_project(project))


VisibleEncoder = Annotated[RegisteredEncoder, Depends(_resolve_encoder)]


@router.get("", summary="List encoders, newest first")
def list_encoders(
    caller: Reader,
    encoders: EncodersDep,
    objective: Annotated[
        Objective | None, Query(description="Objective that the encoder was trained with. Default: all objectives.")
    ] = None,
    size: Annotated[str | None, Query(max_length=40, description="Named size: S, B, L, H, …")] = None,
    alias: Annotated[str | None, Query(pattern=ALIAS_PATTERN, description="Alias of the encoder.")] = None,
    job: Annotated[
        str | None,
        Query(pattern=ENCODER_PATTERN, max_length=100, description="ID of the job that published the encoder."),
    ] = None,
    project: ProjectQuery = None,
    cursor: Annotated[str | None, Query(max_length=400, description=CURSOR)] = None,
    limit: PageSize = 50,
) -> EncoderPage:
    """List the encoders in your project."""
    where = EncoderFilter(caller.own_project(project), objective, size, alias, job)
    page = encoders.list(where, cursor, limit)
    items = views.encoder_views(page.encoders, encoders.names_of(page.encoders, caller.project))
    return EncoderPage(items=items, next_cursor=page.next_cursor)


@router.post("", status_code=202, summary="Import external weights as an encoder")
def import_encoder(
    body: ImportRequest,
    caller: Submitter,
    jobs: Jobs,
    settings: Config,
    policy: Locations,
    response: Response,
    idempotency_key: IdempotencyKey = None,
) -> JobView:
    """Start a job of kind `import`. When it succeeds, the encoder is listed under the ID in its `encoder` field.

    Repeating a request with the same `Idempotency-Key` returns the same job.
    """
    config = body.model_dump(mode="json", exclude={"project", "labels"}, exclude_none=True)
    request = JobRequest(kind="import", config=config, project=body.project, labels=body.labels, name=body.id)
    return submit(request, caller, jobs, settings, policy, response, idempotency_key)


@router.get("/aliases", summary="List aliases by name")
def list_aliases(caller: Reader, encoders: EncodersDep, project: ProjectQuery = None) -> AliasList:
    return AliasList(items=[views.alias_view(alias) for alias in encoders.aliases(caller.own_project(project))])


@router.get("/aliases/{alias}", summary="Get an alias and its history", responses=NOT_MODIFIED)
def get_alias(
    alias: AliasName,
    caller: Reader,
    encoders: EncodersDep,
    response: Response,
    project: ProjectQuery = None,
    if_none_match: IfNoneMatch = None,
) -> AliasDetail:
    view = views.alias_detail(*encoders.alias(project_of(caller, project), alias))
    return tagged(view, response, if_none_match)


@router.put("/aliases/{alias}", summary="Point an alias to an encoder")
def move_alias(alias: AliasName, body: AliasRequest, caller: Submitter, encoders: EncodersDep) -> AliasView:
    """Move the alias atomically: every request resolves to either the old or the new encoder.

    If two concurrent moves specify the same `expected`, one of them fails with `alias_moved`.
    """
    if alias == RESERVED_ALIAS:
        raise IllegalAction(f"alias {alias!r} is a reserved path; choose another name", allowed_actions=[])
    expected = (body.expected,) if "expected" in body.model_fields_set else ()
    moved = encoders.move_alias(project_of(caller, body.project), alias, body.encoder, caller.id, expected)
    return views.alias_view(moved)


@router.delete("/aliases/{alias}", status_code=204, summary="Delete an alias")
def delete_alias(alias: AliasName, caller: Submitter, encoders: EncodersDep, project: ProjectQuery = None) -> None:
    """Delete the alias but keep its history, which continues if the alias is created again."""
    encoders.delete_alias(project_of(caller, project), alias, caller.id)


@router.get("/{encoder}", summary="Get an encoder", responses=NOT_MODIFIED)
def get_encoder(
    encoder: VisibleEncoder,
    caller: Reader,
    encoders: EncodersDep,
    response: Response,
    if_none_match: IfNoneMatch = None,
) -> EncoderDetail:
    view = views.encoder_detail(encoder, encoders.names_of([encoder], caller.project))
    return tagged(view, response, if_none_match)


@router.delete("/{encoder}", status_code=204, summary="Delete an unused encoder")
def delete_encoder(encoder: EncoderId, caller: Submitter, encoders: EncodersDep, settings: Config) -> None:
    """Delete the encoder permanently; its files are removed shortly afterwards.

    Fails while an alias, a deployment or an active job uses it.
    """
    encoders.delete_encoder(encoder, caller.project, settings.root, caller.id)


@router.get(
    "/{encoder}/download",
    summary="Download an encoder",
    response_class=Response,
    responses={200: {"content": {downloads.BINARY: BINARY, downloads.TAR: BINARY}}, **NOT_MODIFIED},
)
async def download_encoder(
    encoder: VisibleEncoder,
    settings: Config,
    storage: StorageCalls,
    file: Annotated[
        str | None,
        Query(
            pattern=ENCODER_PATTERN,
            description=f"Name of a single file, such as {WEIGHTS} or {CARD}. Default: all files as a tar.",
        ),
    ] = None,
    if_none_match: IfNoneMatch = None,
) -> Response:
    """Stream the files with `Content-Length` and `ETag`. Single files on a local disk support `Range`."""
    url = encoder_folder(settings.root, encoder.id)
    found = await storage.run(files, url)
    if file is None and found:
        return downloads.archive_response(storage, url, encoder.id, found, if_none_match)
    if file is None or file not in found:
        raise NotFound(f"{encoder.id} has no file {file or CARD!r}; it has {', '.join(sorted(found)) or 'none'}")
    return await downloads.file_response(storage, url, file, found[file], if_none_match)


@router.get("/{encoder}/compare/{other}", summary="Compare two encoders")
def compare_encoders(
    encoder: VisibleEncoder,
    other: EncoderName,
    caller: Reader,
    encoders: EncodersDep,
    project: ProjectQuery = None,
) -> CompareView:
    """Compare two encoders: size and compute (`figures`), scores by protocol and data set, and configurations."""
    second = encoders.resolve(other, caller.own_project(project))
    return comparison.compare_pair(encoder, second, encoders.names_of([encoder, second], caller.project))


@router.get("/{encoder}/compare", summary="Compare several encoders")
def compare_several_encoders(
    encoder: VisibleEncoder,
    other: OtherEncoders,
    caller: Reader,
    encoders: EncodersDep,
    project: ProjectQuery = None,
) -> EncoderComparison:
    """Compare an encoder with up to five others: size and compute, scores with the best of each, and configurations."""
    rows = [encoder, *(encoders.resolve(name, caller.own_project(project)) for name in other)]
    return comparison.compare(rows, encoders.names_of(rows, caller.project))
