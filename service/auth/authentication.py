"""Authentication and authorization of requests, by API key or by bearer token from a configured OIDC issuer.

Every credential arrives as `Authorization: Bearer …`. Keys are cached, so that callers can be identified while the
database is not responding; a revoked key stays valid for at most AMD_KEY_CACHE_S. `middleware` identifies the caller
before a body is read; routes declare the scope they need with Inferrer, Reader, Submitter or Admin. Keys are created in
`api_keys`.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import time
from collections.abc import Callable, Collection, MutableMapping
from typing import Annotated, Any, Literal, NamedTuple, get_args

from anyio import CapacityLimiter, to_thread
from fastapi import Depends, Request, Security
from fastapi.security import HTTPBearer
from sqlalchemy import Engine, or_, select, update
from sqlalchemy.orm import Session

from service.auth.oidc import Claims, Issuer
from service.auth.rate_limits import RateLimit
from service.db.batches import in_batches
from service.db.cached_reads import CachedReads
from service.db.models import ApiKey
from service.settings import Settings
from service.web.errors import Forbidden, Unauthenticated

Scope = Literal["infer", "read", "submit", "admin"]
SCOPES: tuple[Scope, ...] = get_args(Scope)  # each scope includes those before it

AUTHENTICATION_THREADS = 16  # separate from the threads that run handlers, so that invalid keys cannot occupy those
TOKEN_THREADS = 4  # for token validation, which is CPU-bound and rarely fetches the issuer's keys
TOKEN_PREFIX = "oidc:"  # of the caller ID, for callers with a token
USED_EVERY_S = 60.0  # accuracy of `used_at`: avoids a write per request
_KEY = re.compile(r"amd_([a-z0-9]{1,32})_([A-Za-z0-9_-]{43})")


class Principal(NamedTuple):
    """The authenticated caller."""

    id: str
    """ID of the API key, or `oidc:` followed by the token's subject."""
    project: str | None
    """Project that the caller is limited to, or None for all projects."""
    scopes: frozenset[Scope]
    expires_at: float | None = None
    """Time at which the key or token expires; None if it never expires."""

    def allowed(self, scope: Scope) -> bool:
        """Whether one of the caller's scopes includes the given scope."""
        return any(scope in SCOPES[: SCOPES.index(own) + 1] for own in self.scopes)

    def require(self, scope: Scope) -> None:
        """Raise Forbidden unless one of the caller's scopes includes the given scope."""
        if not self.allowed(scope):
            own = ", ".join(sorted(self.scopes)) or "none"
            raise Forbidden(f"this requires the scope {scope!r}; your key has: {own}", needed_scope=scope)

    def require_all_projects(self) -> None:
        """Raise Forbidden if the caller is limited to one project."""
        if self.project is not None:
            raise Forbidden(f"this requires a key for all projects; yours is for the project {self.project!r}")

    def own_project(self, requested: str | None) -> str | None:
        """Return the project for a request, or None for all projects. Raises Forbidden if the key does not cover it."""
        if self.project is not None and requested not in (None, self.project):
            raise Forbidden(f"your key is for the project {self.project!r}, not for {requested!r}")
        return requested if self.project is None else self.project


class Secret(NamedTuple):
    """An API key in plain text, `amd_<id>_<secret>`. The database stores only the ID and a hash of the secret."""

    id: str
    secret: str

    def __str__(self) -> str:
        return f"amd_{self.id}_{self.secret}"

    def __repr__(self) -> str:
        return f"Secret(id={self.id!r})"  # keeps the secret out of logs

    @property
    def digest(self) -> str:
        # A fast hash suffices: slow hashes protect guessable passwords, and 256 random bits cannot be guessed.
        return hashlib.sha256(self.secret.encode()).hexdigest()


def new_secret() -> Secret:
    return Secret(secrets.token_hex(8), secrets.token_urlsafe(32))


def read_secret(text: str) -> Secret | None:
    """Parse an API key. Returns None if the text is not an API key."""
    found = _KEY.fullmatch(text)
    return Secret(*found.groups()) if found else None


def is_live(key: ApiKey, now: float) -> bool:
    """Whether a key is neither revoked nor expired."""
    return key.revoked_at is None and (key.expires_at is None or now < key.expires_at)


class Authenticator:
    """Identifies callers and applies their rate limits."""

    def __init__(self, engine: Engine, settings: Settings, clock: Callable[[], float] = time.time) -> None:
        """Read the issuer and the rate limits from the settings. Raises ValueError if they are invalid."""
        self._engine, self._clock = engine, clock
        self._reading = engine.execution_options(reads_only=True)
        self.issuer = Issuer.of(settings)
        self._limits = {False: RateLimit(settings.rate_limit), True: RateLimit(settings.inference_rate_limit)}
        self._failures = RateLimit(settings.failure_limit)
        self._token_threads = CapacityLimiter(TOKEN_THREADS)
        self._keys = CachedReads(
            self._read_key,
            ttl_s=settings.key_cache_s,
            outage_s=settings.key_outage_s,
            threads=AUTHENTICATION_THREADS,
        )

    def authenticate(self, authorization_header: str | None) -> Principal:
        """Identify the caller without the cache; blocks. Raises Unauthenticated or IssuerUnavailable."""
        credentials = _credentials(authorization_header)
        if self._is_token(credentials):
            return self._principal_of_token(credentials)
        return self._unexpired(self._read_key(_parsed_key(credentials)))

    async def identify(self, authorization_header: str | None) -> Principal | Exception:
        """Identify the caller without blocking the event loop. Returns the error on failure.

        The error is one that `authenticate` raises, or a database error.
        """
        try:
            credentials = _credentials(authorization_header)
            if self._is_token(credentials):
                return await to_thread.run_sync(self._principal_of_token, credentials, limiter=self._token_threads)
            return self._unexpired(await self._keys.get(_parsed_key(credentials)))
        except Exception as error:
            return error

    def count(self, caller: Principal, state: MutableMapping[str, Any], inference: bool) -> None:
        """Count a request against the caller's rate limit, and record its status for RateLimitHeaders.

        If `inference` is true, the separate rate limit for encoder requests applies. Raises TooMany above the limit.
        """
        limit = self._limits[inference]
        within = limit.take(caller.id)
        state["rate_limit"] = limit.status(caller.id)
        if not within:
            raise limit.too_many(caller.id, "requests with this key")

    def rejection(self, error: Exception, client: tuple[str, int] | None) -> Exception:
        """Return the error for a request from an unidentified caller, and count it against the client's address."""
        if isinstance(error, Unauthenticated):
            # Only failures count against an address, so that other callers behind the same proxy are not locked out.
            address = client[0] if client else "unknown"
            if not self._failures.take(address):
                return self._failures.too_many(address, "failed authentications from this address")
        return error

    def forget_key(self, key_id: str) -> None:
        """Stop accepting a key that was revoked in this process. Must be called on the event loop."""
        self._keys.forget(lambda secret, _: secret.id == key_id)

    def _is_token(self, credentials: str) -> bool:
        return self.issuer is not None and not credentials.startswith("amd_")

    def _read_key(self, secret: Secret) -> Principal:
        with Session(self._reading, expire_on_commit=False) as session:
            key = session.get(ApiKey, secret.id)
        if key is None or not hmac.compare_digest(key.digest, secret.digest):
            raise _rejected()
        return self.principal_of(key)

    def principal_of(self, key: ApiKey) -> Principal:
        """Return the caller that a stored key represents, and record the key's use; blocks.

        Raises Unauthenticated if the key is revoked or expired.
        """
        now = self._clock()
        if not is_live(key, now):
            raise _rejected()
        if key.used_at is None or key.used_at <= now - USED_EVERY_S:
            self._note_use(key.id, now)
        return Principal(key.id, key.project, read_scopes(key.scopes), key.expires_at)

    def _unexpired(self, caller: Principal) -> Principal:
        if caller.expires_at is not None and self._clock() >= caller.expires_at:
            raise _rejected()
        return caller

    def invalid_callers(self, ids: Collection[str]) -> set[str]:
        """Return the callers whose API key is revoked or expired. Tokens cannot be revoked, so they are not checked."""
        keys = {caller for caller in ids if not caller.startswith(TOKEN_PREFIX)}
        now = self._clock()
        with Session(self._reading) as session:
            batches = (session.scalars(select(ApiKey).where(ApiKey.id.in_(batch))) for batch in in_batches(keys))
            return keys - {key.id for found in batches for key in found if is_live(key, now)}

    def _note_use(self, key_id: str, now: float) -> None:
        stale = or_(ApiKey.used_at.is_(None), ApiKey.used_at <= now - USED_EVERY_S)
        with Session(self._engine) as session, session.begin():
            session.execute(update(ApiKey).where(ApiKey.id == key_id, stale).values(used_at=now))

    def _principal_of_token(self, token: str) -> Principal:
        assert self.issuer is not None
        return principal_of_claims(self.issuer.claims(token))


def principal_of_claims(claims: Claims) -> Principal:
    """Return the caller that a validated token represents."""
    return Principal(f"{TOKEN_PREFIX}{claims.subject}", claims.project, read_scopes(claims.scopes), claims.expires_at)


def _credentials(authorization_header: str | None) -> str:
    scheme, _, credentials = (authorization_header or "").partition(" ")
    credentials = credentials.strip()
    if scheme.lower() != "bearer" or not credentials:
        raise Unauthenticated("an API key is required: Authorization: Bearer amd_…")
    return credentials


def _parsed_key(credentials: str) -> Secret:
    secret = read_secret(credentials)
    if secret is None:
        raise _rejected()
    return secret


def _rejected() -> Unauthenticated:
    # The response does not disclose which of these applies.
    return Unauthenticated("this API key does not exist, has expired or was revoked")


def read_scopes(names: Any) -> frozenset[Scope]:
    """Return the known scopes among stored or claimed names."""
    return frozenset(scope for scope in SCOPES if scope in names)


_bearer = HTTPBearer(auto_error=False, description="An API key `amd_…`, or a token from the configured OIDC issuer.")


def needs(scope: Scope) -> Any:
    """Return a route dependency that requires the given scope."""

    async def caller(request: Request, _: Annotated[object, Security(_bearer)]) -> Principal:
        principal: Principal | Exception = request.state.caller  # set by AuthenticationMiddleware
        if isinstance(principal, Exception):
            authenticator: Authenticator = request.app.state.authenticator
            raise authenticator.rejection(principal, request.client)
        principal.require(scope)
        return principal

    return Depends(caller)


Inferrer = Annotated[Principal, needs("infer")]
Reader = Annotated[Principal, needs("read")]
Submitter = Annotated[Principal, needs("submit")]
Admin = Annotated[Principal, needs("admin")]
