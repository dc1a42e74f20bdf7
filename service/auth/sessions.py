"""Web console sessions: cookies that represent an API key or an OIDC user, and single-use links that open a session.

Only hashes of cookies and links are stored. A session has the scopes and the project of its key, and ends when the key
becomes invalid; the session of an OIDC user has those of the user's token, and ends when the token expires. Cookies
are accepted only under `/console`, so that other sites cannot call the REST API with them.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time
from collections.abc import Callable
from http.cookies import CookieError, SimpleCookie
from typing import Literal

from anyio import CapacityLimiter, to_thread
from sqlalchemy import CursorResult, Engine, delete
from sqlalchemy.orm import Session
from starlette.datastructures import Headers
from starlette.types import Scope

from service.auth.authentication import AUTHENTICATION_THREADS, TOKEN_PREFIX, Authenticator, Principal, read_scopes
from service.db.audit import record_change
from service.db.models import ApiKey, BrowserSession
from service.web.errors import Unauthenticated

PREFIX = "/console"
SIGN_IN_PATH = f"{PREFIX}/sign-in"
SESSION_S = 7 * 86400.0
LINK_S = 600.0
MAX_SIGN_IN_BYTES = 4096  # maximum size of a request body from an unknown sender
TOKEN_LENGTH = 43  # length of 32 random bytes in base64

SessionKind = Literal["session", "link"]


def is_browser_path(path: str) -> bool:
    return path == PREFIX or path.startswith(f"{PREFIX}/")


def is_sign_in(scope: Scope, headers: Headers) -> bool:
    """Whether the request is a sign-in request with a small body. Callers without a session may send such requests."""
    length = headers.get("content-length", "")
    small = length.isdecimal() and int(length) <= MAX_SIGN_IN_BYTES and "transfer-encoding" not in headers
    return bool(scope["path"] == SIGN_IN_PATH and scope["method"] == "POST" and small)


def cookie_name(scope: Scope, purpose: str = "session") -> str:
    """Return the name of the session cookie, or of the console's cookie for another purpose.

    Behind TLS, the prefix `__Host-` makes browsers accept the cookie only from this host and over TLS. Otherwise the
    name contains the port, because browsers send a cookie to all ports of a host.
    """
    if scope["scheme"] == "https":
        return f"__Host-amd_{purpose}"
    return f"amd_{purpose}_{(scope.get('server') or ('', 0))[1] or 0}"


def session_cookie(scope: Scope, headers: Headers) -> str | None:
    """Return the session token that the browser sent, if any."""
    cookies = SimpleCookie()
    try:
        cookies.load(headers.get("cookie", ""))
    except CookieError:
        return None
    found = cookies.get(cookie_name(scope))
    return found.value if found is not None and len(found.value) == TOKEN_LENGTH else None


def csrf_token(session: str) -> str:
    """Return the CSRF token that a session's forms and scripts must send; other sites cannot know it."""
    return hmac.new(session.encode(), b"csrf", hashlib.sha256).hexdigest()


class BrowserSessions:
    """Console sessions and single-use links in the database."""

    def __init__(self, engine: Engine, authenticator: Authenticator, clock: Callable[[], float] = time.time) -> None:
        self._engine, self._authenticator, self._clock = engine, authenticator, clock
        self._reading = engine.execution_options(reads_only=True)
        self._threads = CapacityLimiter(AUTHENTICATION_THREADS)

    async def identify(self, token: str | None) -> Principal | Exception:
        """Identify a session's caller without blocking the event loop. Returns the error on failure."""
        try:
            if not token:
                return self.authenticate(token)
            return await to_thread.run_sync(self.authenticate, token, limiter=self._threads)
        except Exception as error:
            return error

    def authenticate(self, token: str | None) -> Principal:
        """Return a session's caller. Raises Unauthenticated if the session or its key is no longer valid; blocks."""
        if token:
            with Session(self._reading, expire_on_commit=False) as session:
                row = session.get(BrowserSession, _digest(token))
                key = session.get(ApiKey, row.key_id) if row is not None and row.key_id is not None else None
            if row is not None and row.kind == "session" and self._clock() < row.expires_at:
                if key is not None:
                    return self._authenticator.principal_of(key)
                if row.caller_id is not None and self._authenticator.issuer is not None:
                    return Principal(row.caller_id, row.project, read_scopes(row.scopes), row.expires_at)
        raise Unauthenticated("sign in first: there is no session, or it has ended")

    def create(self, caller: Principal, kind: SessionKind) -> tuple[str, float]:
        """Create a session or a link for a caller. Returns its token and expiry time.

        The session of an OIDC user ends when the user's token expires. Links can be created only for API keys.
        """
        token, now = secrets.token_urlsafe(32), self._clock()
        expires_at = now + (SESSION_S if kind == "session" else LINK_S)
        row = BrowserSession(digest=_digest(token), kind=kind, created_at=now, expires_at=expires_at)
        if caller.id.startswith(TOKEN_PREFIX):
            assert kind == "session"
            assert caller.expires_at is not None
            row.caller_id, row.project, row.scopes = caller.id, caller.project, sorted(caller.scopes)
            row.expires_at = min(expires_at, caller.expires_at)
        else:
            row.key_id = caller.id
        with Session(self._engine, expire_on_commit=False) as session, session.begin():
            session.execute(delete(BrowserSession).where(BrowserSession.expires_at < now))
            session.add(row)
            record_change(session, caller.id, f"console.{kind}", caller.id, caller.project, "created")
        return token, row.expires_at

    def redeem(self, link: str) -> str:
        """Consume a link and return the token of a new session.

        Raises Unauthenticated if the link was used or has expired, or if its key has become invalid.
        """
        now = self._clock()
        with Session(self._engine, expire_on_commit=False) as session, session.begin():
            row = session.get(BrowserSession, _digest(link))
            key = session.get(ApiKey, row.key_id) if row is not None and row.key_id is not None else None
            used = delete(BrowserSession).where(BrowserSession.digest == _digest(link), BrowserSession.kind == "link")
            result = session.execute(used)
            assert isinstance(result, CursorResult)
        if row is None or key is None or result.rowcount != 1 or now >= row.expires_at:
            raise Unauthenticated("this link was already used or has expired; run `amd console` to create a new one")
        return self.create(self._authenticator.principal_of(key), "session")[0]

    def end(self, token: str) -> None:
        """End a session. No-op if it does not exist."""
        with Session(self._engine) as session, session.begin():
            session.execute(delete(BrowserSession).where(BrowserSession.digest == _digest(token)))


def _digest(token: str) -> str:
    # A fast hash suffices, as for API keys: 256 random bits cannot be guessed.
    return hashlib.sha256(token.encode()).hexdigest()
