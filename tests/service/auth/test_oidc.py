"""Tests for OIDC bearer tokens, valid and forged, from an issuer that serves real keys on loopback."""

from __future__ import annotations

import base64
import hmac
import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from joserfc.jwk import ECKey, KeySet, OctKey, OKPKey, RSAKey
from sqlalchemy import Engine

from service.auth.api_keys import router
from service.auth.authentication import Authenticator, Principal
from service.auth.oidc import MAX_KEY_AGE_S, REFRESH_S, Issuer
from service.settings import Settings
from service.web.errors import IssuerUnavailable, Unauthenticated
from tests.support.service.apps import client_of
from tests.support.service.oidc_provider import AUDIENCE, Provider, running_provider
from tests.support.service.receivers import Reply


@pytest.fixture
def provider() -> Iterator[Provider]:
    with running_provider() as running:
        yield running


def settings(provider: Provider, **more: Any) -> Settings:
    return Settings(oidc_issuer=provider.url, oidc_audience=AUDIENCE, **more)


def test_a_token_grants_the_project_and_scopes_in_its_claims(sqlite_engine: Engine, provider: Provider) -> None:
    authenticator = Authenticator(sqlite_engine, settings(provider))
    principal = authenticator.authenticate(f"Bearer {provider.token()}")
    assert principal == Principal("oidc:someone", "video", frozenset({"submit"}), principal.expires_at)
    assert principal.expires_at is not None
    assert principal.allowed("read")
    assert not principal.allowed("admin")


@pytest.mark.parametrize(
    ("claims", "scopes"),
    [
        ({"amd_scopes": "read submit"}, {"read", "submit"}),
        ({"amd_scopes": "infer"}, {"infer"}),
        ({"amd_scopes": ["admin", "other"]}, {"admin"}),
        ({"amd_scopes": None, "scope": "openid profile read"}, {"read"}),
        ({"amd_scopes": [], "scope": "admin"}, set()),
        ({"amd_scopes": "read", "scope": "admin"}, {"read"}),
        ({"amd_scopes": None}, set()),
        ({"amd_scopes": "administrator"}, set()),
        ({"amd_scopes": [1, None]}, set()),
    ],
)
def test_scopes_are_read_from_amd_scopes_with_scope_as_the_fallback(
    sqlite_engine: Engine, provider: Provider, claims: dict[str, Any], scopes: set[str]
) -> None:
    authenticator = Authenticator(sqlite_engine, settings(provider))
    assert authenticator.authenticate(f"Bearer {provider.token(**claims)}").scopes == scopes


def test_access_to_all_projects_must_be_explicit(sqlite_engine: Engine, provider: Provider) -> None:
    authenticator = Authenticator(sqlite_engine, settings(provider))
    assert authenticator.authenticate(f"Bearer {provider.token(amd_project='*')}").project is None
    for project in (None, "", "Not A Project", "a\n", ["video"], 7, {}):
        with pytest.raises(Unauthenticated):
            authenticator.authenticate(f"Bearer {provider.token(amd_project=project)}")


@pytest.mark.parametrize(
    "claims",
    [
        {"iss": "https://other.example.com"},
        {"iss": None},
        {"aud": "another service"},
        {"aud": ["another", "third"]},
        {"aud": None},
        {"exp": 1},
        {"exp": None},
        {"exp": "tomorrow"},
        {"nbf": 4e9},
        {"iat": 4e9},
        {"sub": None},
        {"sub": ""},
        {"sub": "x" * 91},
        {"sub": "a\nb"},
        {"sub": 7},
        {"amd_scopes": 7},
    ],
)
def test_a_token_with_invalid_claims_is_rejected(provider: Provider, claims: dict[str, Any]) -> None:
    issuer = provider.issuer()
    issuer.claims(provider.token())
    with pytest.raises(Unauthenticated):
        issuer.claims(provider.token(**claims))


def test_a_token_for_several_audiences_is_accepted_if_one_is_this_service(provider: Provider) -> None:
    assert provider.issuer().claims(provider.token(aud=["another", AUDIENCE])).subject == "someone"


def test_a_token_that_expires_while_in_use_is_rejected(provider: Provider) -> None:
    issuer, token = provider.issuer(), provider.token()
    issuer.claims(token)
    provider.clock.now += 600 + 31
    with pytest.raises(Unauthenticated, match="expired"):
        issuer.claims(token)


def part(value: Any) -> str:
    text = value if isinstance(value, bytes) else json.dumps(value).encode()
    return base64.urlsafe_b64encode(text).decode().rstrip("=")


def test_forged_signatures_are_rejected(provider: Provider) -> None:
    issuer, good = provider.issuer(), provider.token()
    header, payload, signature = good.split(".")
    claims = json.loads(base64.urlsafe_b64decode(payload + "=="))
    widened = part({**claims, "amd_project": "*", "amd_scopes": ["admin"]})
    shared = f"{part({'alg': 'HS256', 'kid': 'first'})}.{payload}"
    by_public_key = hmac.digest(provider.key.as_pem(private=False), shared.encode(), "sha256")
    unpublished = RSAKey.generate_key(2048, {"kid": "first"})
    forged = {
        "unsigned": f"{part({'alg': 'none', 'kid': 'first'})}.{payload}.",
        "unsigned, in capitals": f"{part({'alg': 'NONE', 'kid': 'first'})}.{payload}.",
        "unsigned with a signature": f"{part({'alg': 'none', 'kid': 'first'})}.{payload}.{signature}",
        "no algorithm": f"{part({'kid': 'first'})}.{payload}.{signature}",
        "HMAC with the public key": f"{shared}.{part(by_public_key)}",
        "an unpublished key with a known id": provider.token(key=unpublished),
        "a key inside the token": provider.token(
            key=unpublished,
            header={"kid": None, "jwk": unpublished.as_dict(private=False), "jku": "http://127.0.0.1:1/"},
        ),
        "other claims under a good signature": f"{header}.{widened}.{signature}",
        "no signature": f"{header}.{payload}.",
        "truncated": good[:-20],
        "the id of another key": provider.token(header={"kid": "second"}),
        "a key id that is not text": f"{part({'alg': 'RS256', 'kid': ['first']})}.{payload}.{signature}",
        "an unknown critical header": provider.token(header={"crit": ["b64"], "b64": False}),
    }
    issuer.claims(good)
    for name, token in forged.items():
        with pytest.raises(Unauthenticated):
            issuer.claims(token)
        assert name


@pytest.mark.parametrize(
    ("algorithm", "key"),
    [
        ("PS256", RSAKey.generate_key(2048, {"kid": "k"})),
        ("ES256", ECKey.generate_key("P-256", {"kid": "k"})),
        ("Ed25519", OKPKey.generate_key("Ed25519", {"kid": "k"})),
    ],
)
def test_other_key_types_are_accepted(provider: Provider, algorithm: str, key: Any) -> None:
    provider.published = [provider.key, key]
    assert provider.issuer().claims(provider.token(key=key, header={"alg": algorithm})).subject == "someone"


def test_tokens_signed_with_encryption_keys_or_shared_secrets_are_rejected(provider: Provider) -> None:
    secret = OctKey.generate_key(256, {"kid": "shared"})
    encrypting = RSAKey.generate_key(2048, {"kid": "enc", "use": "enc"})
    plain = RSAKey.import_key({**encrypting.as_dict(private=True), "use": "sig"})
    keys = KeySet([provider.key, secret, encrypting]).as_dict(private=True)
    provider.replies["/keys"] = Reply(200, body=json.dumps(keys).encode())
    issuer = provider.issuer()
    issuer.claims(provider.token())
    for token in (provider.token(key=secret, header={"alg": "HS256"}), provider.token(key=plain)):
        with pytest.raises(Unauthenticated):
            issuer.claims(token)


def test_keys_are_cached_and_fetched_again_when_a_token_is_signed_with_a_new_key(provider: Provider) -> None:
    issuer = provider.issuer()
    for _ in range(5):
        issuer.claims(provider.token())
    assert provider.fetches == 1
    provider.key = RSAKey.generate_key(2048, {"kid": "second"})
    provider.published.append(provider.key)
    provider.clock.now += REFRESH_S
    issuer.claims(provider.token())
    assert provider.fetches == 2


def test_unknown_keys_trigger_at_most_one_fetch_a_minute(provider: Provider) -> None:
    issuer = provider.issuer()
    issuer.claims(provider.token())
    for step in range(10):
        provider.clock.now += REFRESH_S / 5
        with pytest.raises(Unauthenticated):
            issuer.claims(provider.token(header={"kid": f"unknown {step}"}))
    assert provider.fetches == 1 + 2
    issuer.claims(provider.token())


def test_a_withdrawn_key_is_valid_for_at_most_an_hour(provider: Provider) -> None:
    issuer, old = provider.issuer(), provider.key
    issuer.claims(provider.token())
    provider.published = [RSAKey.generate_key(2048, {"kid": "second"})]
    provider.clock.now += MAX_KEY_AGE_S + 1
    with pytest.raises(Unauthenticated):
        issuer.claims(provider.token(key=old))


def test_cached_keys_are_accepted_during_an_issuer_outage_and_unknown_keys_cause_a_retryable_error(
    provider: Provider,
) -> None:
    provider.unavailable = True
    issuer = provider.issuer()
    with pytest.raises(IssuerUnavailable) as error:
        issuer.claims(provider.token())
    assert 0 < error.value.extra["retry_after"] <= REFRESH_S
    provider.unavailable = False
    provider.clock.now += REFRESH_S
    issuer.claims(provider.token())
    provider.unavailable = True
    provider.clock.now += MAX_KEY_AGE_S + 1
    assert issuer.claims(provider.token()).subject == "someone"


def test_an_issuer_whose_metadata_is_for_a_different_issuer_is_rejected(provider: Provider) -> None:
    issuer = Issuer(provider.url + "/", AUDIENCE, clock=provider.clock)
    with pytest.raises(IssuerUnavailable):
        issuer.claims(provider.token())


def test_tokens_without_a_key_id_are_accepted_only_if_the_issuer_has_a_single_key(provider: Provider) -> None:
    provider.key = RSAKey.generate_key(2048)
    provider.published = [provider.key]
    assert provider.issuer().claims(provider.token(header={"kid": None})).subject == "someone"
    provider.published = [provider.key, RSAKey.generate_key(2048)]
    with pytest.raises(Unauthenticated):
        provider.issuer().claims(provider.token(header={"kid": None}))


@given(st.one_of(st.text(), st.lists(st.binary().map(part), min_size=3, max_size=3).map(".".join)))
def test_malformed_tokens_never_cause_an_internal_error(text: str) -> None:
    issuer = Issuer("http://127.0.0.1:1", AUDIENCE)
    with pytest.raises((Unauthenticated, IssuerUnavailable)):
        issuer.claims(text)


PLAIN = st.none() | st.booleans() | st.integers() | st.text()


@given(st.recursive(PLAIN, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)))
def test_malformed_token_headers_never_cause_an_internal_error(value: Any) -> None:
    issuer = Issuer("http://127.0.0.1:1", AUDIENCE)
    for header in (value, {"alg": value}, {"alg": "RS256", "kid": value}, {"alg": "RS256", "crit": value}):
        with pytest.raises((Unauthenticated, IssuerUnavailable)):
            issuer.claims(f"{part(header)}.{part({})}.{part(b'x')}")


@pytest.mark.parametrize(
    "text", [b"[" * 40_000, b'{"a":' * 10_000, b"9" * 5_000, b'{"alg":"RS256","kid":' + b"9" * 5_000]
)
def test_a_token_crafted_to_break_parsers_is_rejected(text: bytes) -> None:
    with pytest.raises((Unauthenticated, IssuerUnavailable)):
        Issuer("http://127.0.0.1:1", AUDIENCE).claims(f"{part(text)}.{part({})}.{part(b'x')}")


def test_an_issuer_without_an_audience_is_rejected_at_startup(sqlite_engine: Engine) -> None:
    with pytest.raises(ValueError, match="AMD_OIDC_AUDIENCE"):
        Authenticator(sqlite_engine, Settings(oidc_issuer="https://issuer.example.com"))


def test_tokens_are_rejected_if_no_issuer_is_configured(sqlite_engine: Engine, provider: Provider) -> None:
    with pytest.raises(Unauthenticated):
        Authenticator(sqlite_engine, Settings()).authenticate(f"Bearer {provider.token()}")
    assert provider.fetches == 0


def test_tokens_are_accepted_over_http_and_an_issuer_outage_is_reported(
    sqlite_engine: Engine, provider: Provider
) -> None:
    client = client_of(sqlite_engine, router, settings=settings(provider))
    provider.unavailable = True
    header = {"Authorization": f"Bearer {provider.token(amd_scopes='admin')}"}
    rejected = client.get("/v1/keys", headers=header)
    assert (rejected.status_code, rejected.json()["code"]) == (503, "issuer_unavailable")
    provider.unavailable = False
    client = client_of(sqlite_engine, router, settings=settings(provider, rate_limit="2/minute"))
    created = client.post("/v1/keys", json={"name": "a", "scopes": ["read"]}, headers=header)
    assert (created.json()["project"], created.json()["created_by"]) == ("video", "oidc:someone")
    assert client.get("/v1/keys", headers=header).status_code == 200
    assert client.get("/v1/keys", headers=header).status_code == 429
