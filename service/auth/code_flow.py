"""Sign in to the web console through an OIDC issuer: the authorization code flow with PKCE (RFC 7636, method S256).

The issuer's tokens are validated once and are not stored, and refresh tokens are not requested: the session ends when
the validated token expires. Does not depend on HTTP requests or cookies; `service.console` handles those.
"""

from __future__ import annotations

import base64
import hashlib
import logging
import secrets
from collections.abc import Mapping
from http import HTTPStatus
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote_plus

import httpx
from pydantic import SecretStr

from service.auth.issuer_metadata import FETCH_ERRORS, TIMEOUT_S, fetch_json
from service.auth.oidc import Claims, Issuer
from service.settings import Settings
from service.web.errors import IssuerUnavailable, Unauthenticated

logger = logging.getLogger(__name__)

_TOKEN_ERRORS = (HTTPStatus.BAD_REQUEST, HTTPStatus.UNAUTHORIZED)  # their bodies contain an error code


class SignInAttempt(NamedTuple):
    """Random values of one attempt to sign in, which the browser stores until the issuer redirects it back."""

    state: str
    """Value that the issuer returns with the code; it proves that this browser started the attempt."""
    nonce: str
    """Value that the ID token must contain; it proves that the token was issued for this attempt."""
    verifier: str
    """PKCE code verifier; without it, an intercepted code is worthless."""

    @property
    def challenge(self) -> str:
        """PKCE code challenge."""
        return base64.urlsafe_b64encode(hashlib.sha256(self.verifier.encode()).digest()).decode().rstrip("=")


def new_attempt() -> SignInAttempt:
    return SignInAttempt(*(secrets.token_urlsafe(32) for _ in SignInAttempt._fields))


class CodeFlow:
    """Signs users in through an issuer. Methods block while they send requests to it."""

    def __init__(self, issuer: Issuer, client_id: str, secret: SecretStr | None = None, scopes: str = "openid") -> None:
        self._issuer, self._client_id, self._secret, self._scopes = issuer, client_id, secret, scopes

    @classmethod
    def of(cls, settings: Settings, issuer: Issuer | None) -> CodeFlow | None:
        """Return the configured flow, if any. Raises ValueError if the settings contradict each other."""
        secret = _client_secret(settings)
        if settings.oidc_client_id is None:
            if secret is not None:
                raise ValueError("a client secret requires AMD_OIDC_CLIENT_ID; set it, or remove the secret")
            return None
        if issuer is None:
            raise ValueError("AMD_OIDC_CLIENT_ID requires AMD_OIDC_ISSUER, through which users sign in")
        if "openid" not in settings.oidc_scopes.split():
            message = "must contain openid: otherwise the issuer returns no ID token"
            raise ValueError(f"AMD_OIDC_SCOPES={settings.oidc_scopes} {message}")
        return cls(issuer, settings.oidc_client_id, secret, settings.oidc_scopes)

    def authorization_url(self, attempt: SignInAttempt, redirect_url: str) -> str:
        """Return the URL at which the user signs in. Raises IssuerUnavailable."""
        try:
            with httpx.Client(timeout=TIMEOUT_S) as client:
                endpoint = httpx.URL(self._issuer.metadata.get(client).endpoint("authorization_endpoint"))
        except FETCH_ERRORS as error:
            raise self._unavailable(error) from None
        query = {
            "response_type": "code",
            "client_id": self._client_id,
            "redirect_uri": redirect_url,
            "scope": self._scopes,
            "state": attempt.state,
            "nonce": attempt.nonce,
            "code_challenge": attempt.challenge,
            "code_challenge_method": "S256",
        }
        return str(endpoint.copy_merge_params(query))

    def claims(self, attempt: SignInAttempt, code: str, redirect_url: str) -> Claims:
        """Exchange a code for tokens and return the user's claims.

        Raises Unauthenticated if the code or a token is invalid, or IssuerUnavailable.
        """
        try:
            with httpx.Client(timeout=TIMEOUT_S) as client:
                status, answer = self._exchange(client, attempt, code, redirect_url)
            if status in _TOKEN_ERRORS:
                raise self._rejection(str(answer["error"]))
            id_token, access_token = str(answer["id_token"]), str(answer.get("access_token", ""))
        except FETCH_ERRORS as error:
            raise self._unavailable(error) from None
        return self._issuer.claims_of_user(id_token, access_token, self._client_id, attempt.nonce)

    def _exchange(
        self, client: httpx.Client, attempt: SignInAttempt, code: str, redirect_url: str
    ) -> tuple[int, Mapping[str, Any]]:
        """Send the code to the token endpoint. Returns the status and the JSON body with tokens or an error."""
        metadata = self._issuer.metadata.get(client)
        secret = self._secret.get_secret_value() if self._secret is not None else None
        form = {
            "grant_type": "authorization_code",
            "code": code,
            "redirect_uri": redirect_url,
            "code_verifier": attempt.verifier,
        }
        auth = None
        if secret is None:  # a public client
            form["client_id"] = self._client_id
        elif metadata.accepts_basic:
            auth = (quote_plus(self._client_id), quote_plus(secret))  # encoded as RFC 6749, section 2.3.1, requires
        else:
            form |= {"client_id": self._client_id, "client_secret": secret}
        url = metadata.endpoint("token_endpoint")
        return fetch_json(client, "POST", url, expected_errors=_TOKEN_ERRORS, data=form, auth=auth)

    def _rejection(self, problem: str) -> Unauthenticated | IssuerUnavailable:
        """Return the exception for an error code of the token endpoint."""
        if problem == "invalid_grant":
            return Unauthenticated("the identity provider no longer accepts this sign-in; sign in again")
        logger.error("the OIDC issuer rejected a token request: %r", problem[:100])
        return IssuerUnavailable(
            "the identity provider does not accept this service; ask an administrator to check the service's OIDC "
            "client ID, client secret and redirect URL"
        )

    def _unavailable(self, error: Exception) -> IssuerUnavailable:
        logger.error("cannot sign in through the OIDC issuer: %s", error)
        return IssuerUnavailable("the identity provider does not respond as expected; try again later")


def _client_secret(settings: Settings) -> SecretStr | None:
    """Return the client secret from the settings or from its file.

    Raises ValueError if both are set, or if the file cannot be read or is empty.
    """
    file = settings.oidc_client_secret_file
    if file is None:
        return settings.oidc_client_secret
    if settings.oidc_client_secret is not None:
        raise ValueError("set either AMD_OIDC_CLIENT_SECRET or AMD_OIDC_CLIENT_SECRET_FILE, not both")
    return _read_secret(file)


def _read_secret(file: Path) -> SecretStr:
    try:
        secret = file.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"AMD_OIDC_CLIENT_SECRET_FILE={file} cannot be read: {error}") from None
    if not secret:
        raise ValueError(f"AMD_OIDC_CLIENT_SECRET_FILE={file} is empty; write the client secret to it")
    return SecretStr(secret)
