"""An OIDC issuer on loopback: it publishes real keys, signs tokens, and signs users in with the code flow."""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import parse_qs, parse_qsl, unquote_plus, urlencode, urlsplit

import httpx
from joserfc import jwt
from joserfc.jwk import RSAKey

from service.auth.oidc import Issuer
from tests.support.service.receivers import Received, Receiver, Reply, serving

AUDIENCE = "amd"
CLIENT_ID, CLIENT_SECRET = "amd console", "se:cret+/%"  # with characters that must be encoded


class IssuerClock:
    """A fake clock that tests can advance."""

    def __init__(self) -> None:
        self.now = time.time()

    def __call__(self) -> float:
        return self.now


@functools.cache
def first_key() -> Any:
    """Return the key of all issuers, because creating one takes a while."""
    return RSAKey.generate_key(2048, {"kid": "first", "use": "sig"})


class Provider:
    """An OIDC issuer. It signs in every user who opens its authorization endpoint.

    `id_claims`: claims of ID tokens that differ from the default; None removes a claim. `grants`: sign-ins whose code
    was not exchanged yet. `secret`: secret that clients must send; None for public clients. `replies`: replies that
    replace those of the paths below the issuer.
    """

    def __init__(self, receiver: Receiver) -> None:
        self.receiver = receiver
        self.key = first_key()
        self.published: list[Any] = [self.key]
        self.unavailable = False
        self.clock = IssuerClock()
        self.metadata: dict[str, Any] = {}
        self.id_claims: dict[str, Any] = {}
        self.access_token: str | None = None
        self.secret: str | None = CLIENT_SECRET
        self.grants: dict[str, dict[str, str]] = {}
        self.replies: dict[str, Reply | Callable[[Received], Reply]] = {}
        receiver.reply = self.reply

    @property
    def url(self) -> str:
        return self.receiver.url(path="/realm")

    @property
    def fetches(self) -> int:
        return len(self.requests("/keys"))

    def requests(self, path: str) -> list[Received]:
        """Return the requests to a path below the issuer."""
        return [request for request in self.receiver.received if urlsplit(request.path).path == f"/realm{path}"]

    def issuer(self) -> Issuer:
        return Issuer(self.url, AUDIENCE, clock=self.clock)

    def token(self, *, key: Any = None, header: dict[str, Any] | None = None, **claims: Any) -> str:
        key = key or self.key
        head = {"alg": "RS256", "kid": key.kid, **(header or {})}
        body = {
            "iss": self.url,
            "aud": AUDIENCE,
            "sub": "someone",
            "exp": int(self.clock.now) + 600,
            "amd_project": "video",
            "amd_scopes": ["submit"],
            **claims,
        }
        present = {name: value for name, value in body.items() if value is not None}
        return jwt.encode(
            {name: value for name, value in head.items() if value is not None}, present, key, [head["alg"]]
        )

    def reply(self, request: Received) -> Reply:
        if self.unavailable:
            return Reply(503)
        path = urlsplit(request.path).path.removeprefix("/realm")
        replies: dict[str, Reply | Callable[[Received], Reply]] = {
            "/.well-known/openid-configuration": _json(self._metadata()),
            "/keys": _json({"keys": [key.as_dict(private=False) for key in self.published]}),
            "/authorize": self.authorize,
            "/token": self._exchange,
            **self.replies,
        }
        found = replies[path]
        return found if isinstance(found, Reply) else found(request)

    def _metadata(self) -> dict[str, Any]:
        found = {
            "issuer": self.url,
            "jwks_uri": f"{self.url}/keys",
            "authorization_endpoint": f"{self.url}/authorize",
            "token_endpoint": f"{self.url}/token",
            **self.metadata,
        }
        return {name: value for name, value in found.items() if value is not None}

    def authorize(self, request: Received) -> Reply:
        """Sign the user in, and redirect back with a code."""
        asked = dict(parse_qsl(urlsplit(request.path).query))
        assert (asked["response_type"], asked["code_challenge_method"]) == ("code", "S256")
        code = f"code{len(self.receiver.received)}"
        self.grants[code] = asked
        query = urlencode({"code": code, "state": asked["state"]})
        return Reply(302, {"location": f"{asked['redirect_uri']}?{query}"})

    def _exchange(self, request: Received) -> Reply:
        """Exchange a code, once, for tokens. Checks the client, its secret, the redirect URL and the PKCE verifier."""
        form = dict(parse_qsl(request.body.decode()))
        client, secret = form.get("client_id"), form.get("client_secret")
        if authorization := request.headers.get("authorization", "").removeprefix("Basic "):
            client, _, secret = base64.b64decode(authorization).decode().partition(":")
            client, secret = unquote_plus(client), unquote_plus(secret)
        asked = self.grants.pop(form["code"], None)
        if asked is None:
            return _json({"error": "invalid_grant"}, 400)
        if (client, secret) != (asked["client_id"], self.secret):
            return _json({"error": "invalid_client"}, 401)
        challenge = hashlib.sha256(form["code_verifier"].encode()).digest()
        if base64.urlsafe_b64encode(challenge).decode().rstrip("=") != asked["code_challenge"]:
            return _json({"error": "invalid_grant"}, 400)
        if form["redirect_uri"] != asked["redirect_uri"] or form["grant_type"] != "authorization_code":
            return _json({"error": "invalid_grant"}, 400)
        id_token = self.token(**{"aud": asked["client_id"], "nonce": asked["nonce"], **self.id_claims})
        return _json({"id_token": id_token, "access_token": self.access_token or "opaque", "token_type": "Bearer"})


def _json(document: Any, status: int = 200) -> Reply:
    return Reply(status, {"content-type": "application/json"}, json.dumps(document).encode())


@contextmanager
def running_provider() -> Iterator[Provider]:
    with serving(Receiver()) as receiver:
        yield Provider(receiver)


def redirect_back(authorization_url: str) -> str:
    """Open the issuer's page as the user's browser does, and return the address to which the issuer redirects."""
    response = httpx.get(authorization_url)
    assert response.status_code == 302, response.text
    return response.headers["location"]


def query_of(url: str) -> dict[str, str]:
    return {name: values[0] for name, values in parse_qs(urlsplit(url).query).items()}
