"""Render the console's templates. All values are escaped; no template marks a value as safe."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import cache
from http import HTTPStatus
from pathlib import Path
from typing import Any

from fastapi import Request
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from starlette.responses import HTMLResponse, RedirectResponse, Response

from service.auth.api_keys import KeyStore
from service.auth.authentication import SCOPES, Principal
from service.auth.sessions import PREFIX, csrf_token, session_cookie
from service.console import wording
from service.web import formats

FOLDER = Path(__file__).parent
STATIC = FOLDER / "static"


def _fingerprint() -> str:
    """Return a digest of all static files. It is part of their URLs, so browsers may cache them indefinitely."""
    digest = hashlib.sha256()
    for path in sorted(STATIC.rglob("*")):
        if path.is_file():
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:12]


STATIC_PREFIX = f"{PREFIX}/static/{_fingerprint()}"


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(FOLDER / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= formats.FILTERS
    environment.globals |= {"wording": wording, "static": STATIC_PREFIX, "base": PREFIX}
    return environment


_ENVIRONMENT = _environment()


def is_fragment(request: Request) -> bool:
    """Whether htmx requests part of a page. For history navigation and boosted links, it requests whole pages."""
    return "hx-request" in request.headers and "hx-history-restore-request" not in request.headers


def render(request: Request, template: str, *, status: int = HTTPStatus.OK, **context: Any) -> HTMLResponse:
    """Return a page. Templates receive the caller's scopes, so that they show only permitted actions.

    Call it in a thread for templates that use `actor_name`, which reads the database.
    """
    caller = getattr(request.state, "caller", None)
    caller = caller if isinstance(caller, Principal) else None
    session = session_cookie(request.scope, request.headers)
    context = {
        "request": request,
        "caller": caller,
        "actor_name": _actor_names(request, caller),
        "may": {scope: caller is not None and caller.allowed(scope) for scope in SCOPES},
        "csrf": csrf_token(session) if caller is not None and session is not None else "",
        **context,
    }
    return HTMLResponse(_ENVIRONMENT.get_template(template).render(context), status)


def _actor_names(request: Request, caller: Principal | None) -> Callable[[str], str]:
    """Return a function that returns an actor's name: the key's name if the actor is an existing key, or else its ID.

    The names are read at the first call.
    """

    @cache
    def key_names() -> dict[str, str]:
        return KeyStore(request.app.state.engine).names(caller.project if caller is not None else None)

    return lambda actor: wording.actor(key_names().get(actor, actor))


def redirect(request: Request, path: str) -> Response:
    """Redirect to another page after a change; for htmx, as a full page load, so that event streams are reopened."""
    if is_fragment(request):
        return Response(status_code=HTTPStatus.NO_CONTENT, headers={"HX-Redirect": path})
    return RedirectResponse(path, HTTPStatus.SEE_OTHER)
