"""Console security: response headers, CSRF protection, and error pages.

The content security policy allows only files served by this service: no inline code, no `eval` and no other hosts.
"""

from __future__ import annotations

import hmac
from collections.abc import Callable, Coroutine
from http import HTTPStatus
from typing import Any
from urllib.parse import quote, urlsplit

from fastapi import Request
from fastapi.routing import APIRoute
from starlette.datastructures import MutableHeaders
from starlette.responses import RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.auth.authentication import Principal
from service.auth.sessions import PREFIX, SIGN_IN_PATH, csrf_token, is_browser_path, session_cookie
from service.console.rendering import is_fragment, render
from service.web.error_handlers import error_response
from service.web.errors import Forbidden, Problem, Unauthenticated
from service.web.request_bodies import FORM

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; font-src 'self'; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=()",
}
CSRF_HEADER, CSRF_FIELD = "x-csrf-token", "csrf"
SAFE_METHODS = frozenset({"GET", "HEAD"})


class BrowserHeaders:
    """ASGI middleware that adds the security headers to all responses under /console, including errors."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not is_browser_path(scope["path"]):
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)  # a response may have a stricter policy
                if scope["scheme"] == "https":
                    headers["Strict-Transport-Security"] = "max-age=31536000"
                headers.setdefault("Cache-Control", "no-store")
            await send(message)

        await self._app(scope, receive, send_with_headers)


class ConsoleRoute(APIRoute):
    """A console route that rejects cross-site changes and renders errors as pages or, for htmx, as fragments."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def guarded(request: Request) -> Response:
            try:
                if request.method not in SAFE_METHODS:
                    await check_same_site(request)
                return await handle(request)
            except Exception as error:
                return problem_page(request, error)

        return guarded


async def check_same_site(request: Request) -> None:
    """Raise Forbidden for a request from another site or without the CSRF token; Unauthenticated without a session."""
    site = request.headers.get("sec-fetch-site")
    origin = request.headers.get("origin")
    if site not in (None, "same-origin", "none") or (
        origin is not None and urlsplit(origin).netloc != request.headers.get("host")
    ):
        raise Forbidden("this request comes from another site; open the console and try again")
    if request.url.path == SIGN_IN_PATH:
        return  # there is no session yet
    session = session_cookie(request.scope, request.headers)
    if not isinstance(request.state.caller, Principal) or session is None:
        raise Unauthenticated("sign in first: there is no session, or it has ended")
    given = request.headers.get(CSRF_HEADER)
    if given is None and request.headers.get("content-type", "").partition(";")[0] == FORM:
        given = str((await request.form()).get(CSRF_FIELD, ""))
    if not hmac.compare_digest((given or "").encode(), csrf_token(session).encode()):
        raise Forbidden("the page is out of date; reload it and try again")


def problem_page(request: Request, error: Exception) -> Response:
    """Return the page for an error, or the sign-in page if the session has ended."""
    if isinstance(error, Unauthenticated) and request.url.path != SIGN_IN_PATH:
        return _to_sign_in(request)
    response = error_response(request, error)
    if not response.body:
        return response
    problem = Problem.model_validate_json(bytes(response.body))
    template = "fragments/problem.html" if is_fragment(request) else "problem.html"
    page = render(request, template, status=response.status_code, problem=problem)
    if "retry-after" in response.headers:
        page.headers["Retry-After"] = response.headers["retry-after"]
    return page


def _to_sign_in(request: Request) -> Response:
    target = request.headers.get("hx-current-url", "") if is_fragment(request) else str(request.url)
    path = urlsplit(target).path
    query = urlsplit(target).query
    wanted = f"{path}?{query}" if query else path
    suffix = f"?next={quote(wanted, safe='')}" if path.startswith(PREFIX) and path != PREFIX else ""
    if is_fragment(request):
        return Response(status_code=HTTPStatus.NO_CONTENT, headers={"HX-Redirect": SIGN_IN_PATH + suffix})
    return RedirectResponse(SIGN_IN_PATH + suffix, HTTPStatus.SEE_OTHER)
