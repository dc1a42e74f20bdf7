"""Validate bearer tokens and ID tokens from one OIDC issuer with the keys that the issuer publishes.

A bearer token must have the claims `iss`, `aud`, `exp` and `sub`, and in addition:
`amd_project`: its project, or `*` for all projects; a token without this claim is rejected.
`amd_scopes`, or OAuth's `scope` if `amd_scopes` is missing: a list or space-separated string of infer, read, submit and
admin; other scopes are ignored.
"""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import httpx
from joserfc import jwt
from joserfc.errors import JoseError
from joserfc.jwk import GuestProtocol, KeySet

from service.auth.issuer_metadata import FETCH_ERRORS, TIMEOUT_S, MetadataCache, fetch_json
from service.settings import Settings
from service.web.errors import IssuerUnavailable, Unauthenticated

logger = logging.getLogger(__name__)

# Asymmetric algorithms only: `none` has no signature, and the key of HS* would be as public as the JWKS.
ALGORITHMS = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "Ed25519", "EdDSA")
LEEWAY_S = 30
REFRESH_S = 60.0  # minimum interval between requests for the issuer's keys
MAX_KEY_AGE_S = 3600.0  # maximum age of the cached keys; a withdrawn key stays valid until they are fetched again
PROJECT_CLAIM = "amd_project"
ALL_PROJECTS = "*"
_MALFORMED = (
    JoseError,
    ValueError,
    TypeError,
    KeyError,
    AttributeError,
    RecursionError,
    OverflowError,
)  # raised by malformed tokens
_PROJECT = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
_SUBJECT = re.compile(r"[!-~]{1,90}")  # fits the database column and is printable in logs


class Claims(NamedTuple):
    """Validated token claims."""

    subject: str
    project: str | None
    """Project that the token is limited to, or None for all projects."""
    scopes: frozenset[str]
    expires_at: float
    """Time after which the token is rejected, in seconds since the epoch."""


class Issuer:
    """Validates the tokens of an OIDC issuer with its published keys."""

    def __init__(
        self, issuer: str, audience: str, jwks_url: str | None = None, clock: Callable[[], float] = time.time
    ) -> None:
        self._issuer, self._audience, self._jwks_url, self._clock = issuer, audience, jwks_url, clock
        self.metadata = MetadataCache(issuer, clock)
        self._lock = threading.Lock()
        self._keys: Mapping[str | None, Any] = {}
        self._requested_at = self._fetched_at = float("-inf")

    @classmethod
    def of(cls, settings: Settings) -> Issuer | None:
        """Return the configured issuer, if any. Raises ValueError if the settings lack an audience."""
        if settings.oidc_issuer is None:
            return None
        if settings.oidc_audience is None:
            raise ValueError(
                "AMD_OIDC_ISSUER requires AMD_OIDC_AUDIENCE: otherwise tokens for other services would be accepted"
            )
        return cls(settings.oidc_issuer, settings.oidc_audience, settings.oidc_jwks_url)

    def claims(self, token: str) -> Claims:
        """Validate a token and return its claims.

        Raises Unauthenticated if the token is invalid, or IssuerUnavailable if the issuer's keys are unavailable.
        """
        with _malformed_is_unauthenticated():
            return _claims(self._validated(token, self._audience))

    def claims_of_user(self, id_token: str, access_token: str, client_id: str, nonce: str) -> Claims:
        """Validate the ID token of a user who signs in, and return the user's claims.

        If the ID token has no project, the claims are those of the access token, which must then be a bearer token for
        this service: some issuers add such claims only to access tokens. Raises like `claims`.
        """
        with _malformed_is_unauthenticated():
            found = self._validated(id_token, client_id, nonce=nonce)
            if PROJECT_CLAIM in found:
                return _claims(found)
        try:
            return self.claims(access_token)
        except Unauthenticated as error:
            logger.warning("the ID token of %r has no %s; access token: %s", found["sub"], PROJECT_CLAIM, error)
            raise Unauthenticated(
                f"your account has no project: the identity provider sent no valid claim {PROJECT_CLAIM}; ask its "
                "administrator to add it to the ID token"
            ) from None

    def _validated(self, token: str, audience: str, nonce: str | None = None) -> Mapping[str, Any]:
        """Validate a token and return all its claims. Raises one of _MALFORMED, or IssuerUnavailable.

        `nonce`: required nonce of an ID token.
        """
        decoded = jwt.decode(token, self._key, algorithms=ALGORITHMS)
        of_id_tokens: dict[str, jwt.ClaimsOption] = {}
        if nonce is not None:
            of_id_tokens = {"nonce": {"essential": True, "value": nonce}, "azp": {"value": audience}}
        registry = jwt.JWTClaimsRegistry(
            now=lambda: int(self._clock()),
            leeway=LEEWAY_S,
            iss={"essential": True, "value": self._issuer},
            aud={"essential": True, "value": audience},
            exp={"essential": True},
            sub={"essential": True},
            **of_id_tokens,
        )
        registry.validate(decoded.claims)
        return decoded.claims

    def _key(self, token: GuestProtocol) -> Any:
        """Return the published key that, according to the token's header, signed the token."""
        kid = token.headers().get("kid")
        if not self._is_known(kid):
            with self._lock:  # one thread fetches, and only tokens with unknown keys wait for it
                now = self._clock()
                if not self._is_known(kid) and now >= self._requested_at + REFRESH_S:
                    self._requested_at = now
                    self._fetch(now)
        keys = self._keys
        if not keys:
            wait = self._requested_at + REFRESH_S - self._clock()
            raise IssuerUnavailable("the OIDC issuer's keys are unavailable; try again later", retry_after=wait)
        if kid is None and len(keys) == 1:
            return next(iter(keys.values()))
        if kid not in keys:
            raise ValueError("its issuer does not publish the key that signed it")
        return keys[kid]

    def _is_known(self, kid: Any) -> bool:
        """Whether the key is cached. A token may omit its key ID if the issuer has a single key."""
        keys = self._keys
        known = kid in keys or (kid is None and len(keys) == 1)
        return known and self._clock() <= self._fetched_at + MAX_KEY_AGE_S

    def _fetch(self, now: float) -> None:
        """Fetch the issuer's keys; keep the cached keys if this fails."""
        try:
            with httpx.Client(timeout=TIMEOUT_S) as client:
                url = self._jwks_url or self.metadata.get(client).endpoint("jwks_uri")
                found = KeySet.import_key_set(fetch_json(client, "GET", url)[1])
        except (*FETCH_ERRORS, JoseError) as error:
            logger.error("cannot fetch keys from the issuer %s: %s", self._issuer, error)
            return
        signing = [key for key in found.keys if key.key_type != "oct" and key.get("use", "sig") == "sig"]
        self._keys = {key.kid: key for key in signing}
        self._fetched_at = now


@contextmanager
def _malformed_is_unauthenticated() -> Iterator[None]:
    try:
        yield
    except _MALFORMED as error:
        raise Unauthenticated(f"invalid token: {error}") from None


def _claims(claims: Mapping[str, Any]) -> Claims:
    subject, project = claims["sub"], claims.get(PROJECT_CLAIM)
    if not _SUBJECT.fullmatch(subject):
        raise ValueError("its subject must consist of 1 to 90 printable ASCII characters other than spaces")
    if not isinstance(project, str) or not (project == ALL_PROJECTS or _PROJECT.fullmatch(project)):
        raise ValueError("amd_project must be the name of a project, or * for all projects")
    scopes = claims["amd_scopes"] if "amd_scopes" in claims else claims.get("scope", "")
    expires_at = float(claims["exp"]) + LEEWAY_S
    names = scopes.split() if isinstance(scopes, str) else scopes
    return Claims(subject, None if project == ALL_PROJECTS else project, frozenset(map(str, names)), expires_at)
