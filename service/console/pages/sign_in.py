"""Sign in with an API key, a single-use link or an OIDC issuer, and sign out. Every sign-in creates a new session."""

from __future__ import annotations

from http import HTTPStatus
from typing import Annotated

from fastapi import APIRouter, Query, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import RedirectResponse, Response

from service.auth.authentication import Authenticator, Principal, principal_of_claims
from service.auth.code_flow import CodeFlow, new_attempt
from service.auth.sessions import PREFIX, SESSION_S, SIGN_IN_PATH, BrowserSessions, cookie_name, session_cookie
from service.console import sign_in_attempts
from service.console.rendering import render
from service.console.security import ConsoleRoute
from service.console.sign_in_attempts import PendingSignIn
from service.web.bounded_calls import BoundedCalls
from service.web.errors import ERROR_RESPONSES, Forbidden, IssuerUnavailable, NotFound, ServiceError, Unauthenticated

router = APIRouter(prefix=PREFIX, route_class=ConsoleRoute)

Next = Annotated[str, Query(max_length=2000)]


@router.get("/sign-in")
def sign_in_page(request: Request, next: Next = "") -> Response:
    if isinstance(request.state.caller, Principal):
        return RedirectResponse(_safe(next), HTTPStatus.SEE_OTHER)
    return _sign_in_page(request, _safe(next))


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
        return _failed(request, error, target)
    return await run_in_threadpool(_open_session, request, caller, target)


def _open_session(request: Request, caller: Principal, target: str) -> Response:
    sessions: BrowserSessions = request.app.state.sessions
    return _signed_in(request, sessions.create(caller, "session")[0], target)


@router.get("/sign-in/oidc")
async def start_oidc_sign_in(request: Request, next: Next = "") -> Response:
    """Redirect to the OIDC issuer.

    The sign-in page links here instead of submitting a form, because the CSP's form-action also applies to redirects.
    """
    flow, target = _code_flow(request), _safe(next)
    if isinstance(request.state.caller, Principal):
        return RedirectResponse(target, HTTPStatus.SEE_OTHER)
    attempt = new_attempt()
    try:
        url = await _issuer_calls(request).run(flow.authorization_url, attempt, _redirect_url(request))
    except IssuerUnavailable as error:
        return _failed(request, error, target)
    response = RedirectResponse(url, HTTPStatus.SEE_OTHER)
    sign_in_attempts.store(request, response, PendingSignIn(attempt, target))
    return response


@router.get("/sign-in/callback")
async def finish_oidc_sign_in(
    request: Request, state: str = "", code: str = "", error: str = "", error_description: str = ""
) -> Response:
    """Open a session for the user whom the OIDC issuer has redirected back. `error`: why the issuer refused."""
    flow = _code_flow(request)
    pending = sign_in_attempts.find(request, state)
    if pending is None:
        if isinstance(request.state.caller, Principal):  # the page was reloaded, for example
            return RedirectResponse(PREFIX, HTTPStatus.SEE_OTHER)
        message = "this sign-in was started in another browser, has expired or was already completed; sign in again"
        return _failed(request, Unauthenticated(message), PREFIX)
    target = _safe(pending.target)
    try:
        if error or not code:
            reason = _plain(error_description or error or "it sent no code")
            raise Forbidden(f"the identity provider did not sign you in: {reason}")
        claims = await _issuer_calls(request).run(flow.claims, pending.attempt, code, _redirect_url(request))
        caller = principal_of_claims(claims)
        if not caller.allowed("read"):
            scopes = ", ".join(sorted(caller.scopes)) or "none"
            raise Forbidden(f"the console requires the scope 'read'; your account has: {scopes}")
    except (Unauthenticated, Forbidden, IssuerUnavailable) as problem:
        response = _failed(request, problem, target)
    else:
        response = await run_in_threadpool(_open_session, request, caller, target)
    sign_in_attempts.remove(request, response, pending)
    return response


def _code_flow(request: Request) -> CodeFlow:
    flow: CodeFlow | None = request.app.state.code_flow
    if flow is None:
        raise NotFound("there is no such page")
    return flow


def _issuer_calls(request: Request) -> BoundedCalls:
    calls: BoundedCalls = request.app.state.issuer_calls
    return calls


def _redirect_url(request: Request) -> str:
    """Return the URL to which the issuer redirects the browser: at the address under which it reached the service."""
    return f"{request.url.scheme}://{request.url.netloc}{SIGN_IN_PATH}/callback"


def _plain(text: str) -> str:
    """Return the issuer's text without control characters, and shortened."""
    return "".join(character for character in text if character.isprintable())[:300]


@router.get("/link")
def open_link(request: Request, token: Annotated[str, Query(max_length=100)]) -> Response:
    """Open a session with a single-use link."""
    sessions: BrowserSessions = request.app.state.sessions
    try:
        session = sessions.redeem(token)
    except Unauthenticated as error:
        if isinstance(request.state.caller, Principal):
            return RedirectResponse(PREFIX, HTTPStatus.SEE_OTHER)
        return _sign_in_page(request, PREFIX, error)
    return _signed_in(request, session, PREFIX)


@router.post("/sign-out")
def sign_out(request: Request) -> Response:
    _end_presented_session(request)
    response = RedirectResponse(SIGN_IN_PATH, HTTPStatus.SEE_OTHER)
    response.delete_cookie(cookie_name(request.scope), path="/", secure=_is_secure(request), httponly=True)
    return response


def _failed(request: Request, error: ServiceError, target: str) -> Response:
    """Return the sign-in page with the error. Raises TooMany if too many sign-ins from this address have failed."""
    authenticator: Authenticator = request.app.state.authenticator
    rejection = authenticator.rejection(error, request.scope["client"])
    if rejection is not error:
        raise rejection from None
    return _sign_in_page(request, target, error)


def _sign_in_page(request: Request, target: str, error: ServiceError | None = None) -> Response:
    status = HTTPStatus.OK if error is None else HTTPStatus.UNPROCESSABLE_ENTITY
    if isinstance(error, IssuerUnavailable):
        status = ERROR_RESPONSES[error.code].status
    return render(
        request,
        "sign_in.html",
        status=status,
        next=target,
        problem="" if error is None else error.message,
        oidc=request.app.state.code_flow is not None,
    )


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
