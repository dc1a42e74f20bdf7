"""Routes /v1/me and /v1/console-links: details of the caller, and a link that opens the web console as the caller."""

from __future__ import annotations

from datetime import datetime
from http import HTTPStatus

from fastapi import APIRouter, Request, Response

from service.auth.authentication import SCOPES, TOKEN_PREFIX, Inferrer, Reader, Scope
from service.auth.sessions import PREFIX, BrowserSessions
from service.web.errors import Refusal
from service.web.schemas import ApiModel, utc_datetime, utc_datetime_or_none


class CallerView(ApiModel):
    """The caller of the request."""

    id: str
    """ID of the API key, or `oidc:` followed by the token's subject."""
    project: str | None
    """Project that the caller is limited to; null if the caller may access all projects."""
    scopes: list[Scope]
    """Scopes of the caller, including those implied by broader scopes."""
    expires_at: datetime | None
    """Time at which the key or token expires; null if it never expires."""


class ConsoleLinkView(ApiModel):
    """A single-use link that opens the web console."""

    path: str
    """Path and query of the link, to append to the service's URL."""
    expires_at: datetime


router = APIRouter(tags=["keys"])


@router.get("/me", summary="Get the caller")
def get_caller(caller: Inferrer) -> CallerView:
    return CallerView(
        id=caller.id,
        project=caller.project,
        scopes=[scope for scope in SCOPES if caller.allowed(scope)],
        expires_at=utc_datetime_or_none(caller.expires_at),
    )


@router.post("/console-links", status_code=HTTPStatus.CREATED, summary="Create a link that opens the console")
def create_console_link(request: Request, caller: Reader, response: Response) -> ConsoleLinkView:
    """The link opens the web console with the scopes and the project of the caller's API key.

    The link can be used once and expires after ten minutes. The session ends when the key becomes invalid.
    """
    if caller.id.startswith(TOKEN_PREFIX):
        raise Refusal("not_possible", "links to the console require an API key, not a token; create a key first")
    response.headers["Cache-Control"] = "no-store"
    sessions: BrowserSessions = request.app.state.sessions
    token, expires_at = sessions.create(caller, "link")
    return ConsoleLinkView(path=f"{PREFIX}/link?token={token}", expires_at=utc_datetime(expires_at))
