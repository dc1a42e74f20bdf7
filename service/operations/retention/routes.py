"""Route /v1/gc: show the retention policy and past collections, and remove or report what a policy no longer keeps."""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Iterable
from datetime import datetime
from functools import partial

from fastapi import APIRouter, Request
from pydantic import Field

from amd.storage import StorageError
from service.auth.authentication import Admin
from service.operations.retention.collection import CollectionResult, collect
from service.operations.retention.history import last_collections
from service.operations.retention.plan import Removal
from service.operations.retention.policy import RemovalKind, RetentionPolicy, policy_of
from service.web.errors import StorageUnavailable
from service.web.parameters import PageSize
from service.web.schemas import ApiModel, utc_datetime

router = APIRouter(tags=["operations"])

LISTED = 100


class GcRequest(ApiModel):
    """Request to collect garbage."""

    dry_run: bool = Field(False, strict=True)
    """Whether to report what would be removed without removing it."""
    policy: RetentionPolicy | None = None
    """Policy for this collection only; null: the policy defined by the `AMD_RETAIN_*` settings."""


class RemovedKind(ApiModel):
    """Totals for one kind of data."""

    kind: RemovalKind
    items: int
    """Number of affected jobs, runs or encoders."""
    files: int
    bytes: int
    """Total size of the files."""
    rows: int
    """Number of database rows. A job's row is kept as its history until `history_days` have passed."""


class RemovedItem(ApiModel):
    """One removal."""

    kind: RemovalKind
    id: str
    """ID of the job, run or encoder; empty for rows that belong to none."""
    files: int
    bytes: int
    rows: int


class GcReport(ApiModel):
    """What a garbage collection removed or, as a dry run, would remove."""

    dry_run: bool
    policy: RetentionPolicy
    """Policy that was applied."""
    bytes: int
    """Total size of the files."""
    files: int
    rows: int
    skipped: int
    """Number of items that were kept after all, because a job or process now uses them or they cannot be removed."""
    kinds: list[RemovedKind]
    """Totals by kind; kinds with nothing to remove are omitted."""
    items: list[RemovedItem] = Field(max_length=LISTED)
    """The largest removals, at most 100."""


class CollectionView(ApiModel):
    """A completed garbage collection."""

    started_at: datetime
    ended_at: datetime
    actor: str
    """ID of the API key, or `oidc:` followed by the token's subject; `service` for a periodic collection."""
    items: int
    """Number of removals."""
    skipped: int
    """Number of items that were kept after all, because a job or process used them or they could not be removed."""
    files: int
    bytes: int
    """Total size of the removed files."""
    rows: int
    """Number of rows removed from the database."""


class RetentionView(ApiModel):
    """The service's retention policy and its latest garbage collections."""

    policy: RetentionPolicy
    """Policy defined by the `AMD_RETAIN_*` settings. It is applied every hour if it limits user data."""
    collections: list[CollectionView]
    """Collections of the last 30 days, newest first. Dry runs are not listed."""


def report_of(result: CollectionResult, policy: RetentionPolicy, *, dry_run: bool) -> GcReport:
    """Summarise a collection."""
    by_kind: dict[RemovalKind, list[Removal]] = {}
    for removal in result.removals:
        by_kind.setdefault(removal.kind, []).append(removal)
    return GcReport(
        dry_run=dry_run,
        policy=policy,
        skipped=result.skipped,
        kinds=[
            RemovedKind(kind=kind, items=sum(bool(each.id) for each in removals), **_totals(removals))
            for kind, removals in by_kind.items()
        ],
        items=[
            RemovedItem(kind=each.kind, id=each.id, **_totals([each]))
            for each in heapq.nlargest(LISTED, result.removals, key=lambda removal: removal.size)
        ],
        **_totals(result.removals),
    )


def _totals(removals: Iterable[Removal]) -> dict[str, int]:
    removals = list(removals)
    return {
        "files": sum(len(removal.paths) for removal in removals),
        "bytes": sum(removal.size for removal in removals),
        "rows": sum(removal.rows for removal in removals),
    }


@router.get("/gc", summary="Get the retention policy and the latest garbage collections")
def get_retention(request: Request, caller: Admin, limit: PageSize = 20) -> RetentionView:
    """Requires a key for all projects."""
    caller.require_all_projects()
    found = last_collections(request.app.state.engine, limit)
    names = CollectionView.model_fields.keys() - {"started_at", "ended_at"}
    collections = [
        CollectionView(
            started_at=utc_datetime(each.started_at),
            ended_at=utc_datetime(each.ended_at),
            **{name: getattr(each, name) for name in names},
        )
        for each in found
    ]
    return RetentionView(policy=policy_of(request.app.state.settings), collections=collections)


@router.post("/gc", summary="Collect garbage")
async def collect_garbage(request: Request, caller: Admin, body: GcRequest) -> GcReport:
    """Remove what the retention policy no longer keeps, and report its exact size.

    Anything that an encoder's card, an alias, a deployment or an unfinished job refers to is kept. Requires a key for
    all projects. With `dry_run`, nothing is removed.
    """
    caller.require_all_projects()
    state = request.app.state
    policy = body.policy or policy_of(state.settings)
    work = partial(collect, state.settings.root, policy, state.jobs, dry_run=body.dry_run, actor=caller.id)
    try:
        # A separate pool: a collection takes a long time and must not occupy the threads that serve other requests.
        result = await asyncio.get_running_loop().run_in_executor(state.collections, work)
    except StorageError as error:
        raise StorageUnavailable(str(error)) from None
    return report_of(result, policy, dry_run=body.dry_run)
