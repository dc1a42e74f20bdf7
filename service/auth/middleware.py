"""ASGI middleware that identifies each request's caller from its headers and applies the caller's limits.

FastAPI reads a body before it resolves a route's dependencies, so authenticating only in a dependency would let anyone
exhaust memory. Scopes are checked by the dependencies in `authentication`.
"""

from __future__ import annotations

import re
from contextlib import ExitStack

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from service.auth.authentication import Authenticator, Principal
from service.auth.concurrency import ConcurrencyLimit
from service.auth.sessions import BrowserSessions, is_browser_path, is_sign_in, session_cookie
from service.logs import add_log_fields
from service.settings import Settings
from service.web.request_bodies import has_body, reject_unread

PROBES = ("/livez", "/readyz")
"""Paths without limits: an orchestrator would restart a service that rejects its probes."""


class AuthenticationMiddleware:
    """Rejects requests that exceed the caller's limits, and requests that have a body but no valid key.

    A request with neither a body nor a valid key is passed on, since its route may be public.
    """

    def __init__(
        self,
        app: ASGIApp,
        authenticator: Authenticator,
        settings: Settings,
        inference: re.Pattern[str],
        sessions: BrowserSessions | None = None,
    ) -> None:
        """`inference`: matches the paths of encoder requests, which have a separate rate limit.

        `sessions`: identifies console callers by their cookie; console paths accept no other credentials.
        """
        self.app, self._authenticator, self._inference = app, authenticator, inference
        self._sessions = sessions
        self._keys = ConcurrencyLimit(settings.concurrency_limit)
        self._anonymous = ConcurrencyLimit(settings.anonymous_concurrency_limit)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope) if scope["type"] == "http" else Headers()
        if scope["type"] != "http" or (scope["path"] in PROBES and not has_body(headers)):
            await self.app(scope, receive, send)
            return
        with ExitStack() as slots:
            try:
                await self._admit(scope, headers, slots)
            except Exception as error:
                await reject_unread(error, scope, receive, send)
                return
            await self.app(scope, receive, send)

    async def _admit(self, scope: Scope, headers: Headers, slots: ExitStack) -> None:
        """Acquire a concurrency slot and record the caller on the request. Raises an error to reject the request."""
        state = scope.setdefault("state", {})
        if self._sessions is not None and is_browser_path(scope["path"]):
            caller = await self._sessions.identify(session_cookie(scope, headers))
        else:
            caller = await self._authenticator.identify(headers.get("authorization"))
        state["caller"] = caller
        if isinstance(caller, Principal):
            add_log_fields(key=caller.id, project=caller.project)
            slots.enter_context(self._keys.slot(caller.id, "requests with this key"))
            self._authenticator.count(caller, state, self._inference.fullmatch(scope["path"]) is not None)
            return
        slots.enter_context(self._anonymous.slot("anonymous", "requests without a valid key"))
        if has_body(headers) and not is_sign_in(scope, headers):
            raise self._authenticator.rejection(caller, scope["client"])
