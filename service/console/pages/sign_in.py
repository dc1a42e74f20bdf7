"""Sign in with an API key or a single-use link, and sign out. Every sign-in creates a new session."""

from __future__ import annotations

from http import HTTPStatus
from typing import Annotated

from fastapi import APIRouter, Query, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import RedirectResponse, Response

from service.auth.authentication import Authenticator, Principal
from service.auth.sessions import PREFIX, SESSION_S, SIGN_IN_PATH, BrowserSessions, cookie_name, session_cookie
from service.console.rendering import render
from service.console.security import ConsoleRoute
from service.web.errors import Forbidden, Unauthenticated

router = APIRouter(prefix=PREFIX, route_class=ConsoleRoute)

Next = Annotated[str, Query(max_length=2000)]


@router.get("/sign-in")
def sign_in_page(request: Request, next: Next = "") -> Response:
    if isinstance(request.state.caller, Principal):
        return RedirectResponse(_safe(next), HTTPStatus.SEE_OTHER)
    return render(request, "sign_in.html", next=_safe(next), problem="")


@router.post("/sign-in")
async def sign_in(request: Request) -> Response:
    form = await request.form()
    key, target = str(form.get("key", "")).strip(), _safe(str(form.get("next", "")))
    authenticator: Authenticator = request.app.state.authenticator
    try:
        if not key.startswith("amd_"):
            raise Unauthenticated("this is not an API key: keys start with amd_")
        caller = await run_in_threadpool(authenticator.authenticate, f"Bearer {key}")
        caller.require("read")
    except (Unauthenticated, Forbidden) as error:
        rejection = authenticator.rejection(error, request.scope["client"])
        if rejection is not error:
            raise rejection from None
        status = HTTPStatus.UNPROCESSABLE_ENTITY
        return render(request, "sign_in.html", status=status, next=target, problem=error.message)
    return await run_in_threadpool(_open_session, request, caller, target)


def _open_session(request: Request, caller: Principal, target: str) -> Response:
    sessions: BrowserSessions = request.app.state.sessions
    return _signed_in(request, sessions.create(caller.id, "session")[0], target)


@router.get("/link")
def open_link(request: Request, token: Annotated[str, Query(max_length=100)]) -> Response:
    """Open a session with a single-use link."""
    sessions: BrowserSessions = request.app.state.sessions
    try:
        session = sessions.redeem(token)
    except Unauthenticated as error:
        if isinstance(request.state.caller, Principal):
            return RedirectResponse(PREFIX, HTTPStatus.SEE_OTHER)
        status = HTTPStatus.UNPROCESSABLE_ENTITY
        return render(request, "sign_in.html", status=status, next=PREFIX, problem=error.message)
    return _signed_in(request, session, PREFIX)


@router.post("/sign-out")
def sign_out(request: Request) -> Response:
    _end_presented_session(request)
    response = RedirectResponse(SIGN_IN_PATH, HTTPStatus.SEE_OTHER)
    response.delete_cookie(cookie_name(request.scope), path="/", secure=_is_secure(request), httponly=True)
    return response


def _signed_in(request: Request, session: str, target: str) -> Response:
    _end_presented_session(request)
    response = RedirectResponse(target, HTTPStatus.SEE_OTHER)
    response.set_cookie(
        cookie_name(request.scope),
        session,
        max_age=int(SESSION_S),
        path="/",
        secure=_is_secure(request),
        httponly=True,
        samesite="lax",
    )
    return response


def _end_presented_session(request: Request) -> None:
    """End the browser's existing session, so that a browser never has two open sessions."""
    presented = session_cookie(request.scope, request.headers)
    if presented is not None:
        sessions: BrowserSessions = request.app.state.sessions
        sessions.end(presented)


def _is_secure(request: Request) -> bool:
    return request.url.scheme == "https"


def _safe(target: str) -> str:
    """Return `target` if it is a safe console path, else the start page: links must not redirect to other sites."""
    inside = target.startswith(f"{PREFIX}/") or target == PREFIX
    return target if inside and "\\" not in target and target.isprintable() and "//" not in target else PREFIX
