"""Tests for the settings of signing in through an OIDC issuer, and for the bounds on the issuer's documents."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import ValidationError

from service.auth import issuer_metadata
from service.auth.code_flow import CodeFlow, new_attempt
from service.auth.issuer_metadata import MAX_AGE_S, MAX_BYTES, IssuerMetadata, fetch_json
from service.auth.oidc import Issuer
from service.settings import Settings
from tests.support.service.oidc_provider import CLIENT_ID, Provider, query_of, running_provider
from tests.support.service.receivers import Reply

ISSUER = "https://issuer.example.com"


@pytest.fixture
def provider() -> Iterator[Provider]:
    with running_provider() as running:
        yield running


def flow_of(**values: Any) -> CodeFlow | None:
    settings = Settings(**values)
    return CodeFlow.of(settings, Issuer.of(settings))


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"oidc_issuer": None}, "AMD_OIDC_CLIENT_ID requires AMD_OIDC_ISSUER"),
        ({"oidc_client_id": None, "oidc_client_secret": "s3cret"}, "a client secret requires AMD_OIDC_CLIENT_ID"),
        ({"oidc_scopes": "profile"}, "AMD_OIDC_SCOPES=profile must contain openid"),
        ({"oidc_client_secret": "s3cret", "oidc_client_secret_file": "secret"}, "not both"),
        ({"oidc_client_secret_file": "missing"}, "AMD_OIDC_CLIENT_SECRET_FILE=.*missing cannot be read"),
        ({"oidc_client_secret_file": "empty"}, "AMD_OIDC_CLIENT_SECRET_FILE=.*empty is empty"),
    ],
)
def test_settings_that_contradict_each_other_are_rejected(tmp_path: Path, values: dict[str, Any], problem: str) -> None:
    (tmp_path / "empty").touch()
    if file := values.get("oidc_client_secret_file"):
        values = {**values, "oidc_client_secret_file": tmp_path / file}
    complete = {"oidc_issuer": ISSUER, "oidc_audience": "amd", "oidc_client_id": "console"}
    with pytest.raises(ValueError, match=problem) as error:
        flow_of(**{**complete, **values})
    assert "s3cret" not in str(error.value)


@pytest.mark.parametrize("name", ["oidc_client_id", "oidc_client_secret"])
def test_an_empty_client_id_or_secret_is_rejected(name: str) -> None:
    with pytest.raises(ValidationError, match=name):
        Settings(**{name: ""})


def test_without_a_client_id_nobody_signs_in_through_the_issuer() -> None:
    assert flow_of(oidc_issuer=ISSUER, oidc_audience="amd") is None
    assert flow_of() is None


def test_the_client_secret_is_not_printed() -> None:
    assert "s3cret" not in repr(Settings(oidc_client_secret="s3cret"))


def test_the_authorization_url_contains_the_challenge_but_not_the_verifier(provider: Provider) -> None:
    provider.metadata["authorization_endpoint"] = f"{provider.url}/authorize?policy=sign in"
    attempt = new_attempt()
    url = CodeFlow(provider.issuer(), CLIENT_ID, scopes="openid profile").authorization_url(attempt, "http://h/back")
    digest = hashlib.sha256(attempt.verifier.encode()).digest()
    assert query_of(url) == {
        "policy": "sign in",
        "response_type": "code",
        "client_id": CLIENT_ID,
        "redirect_uri": "http://h/back",
        "scope": "openid profile",
        "state": attempt.state,
        "nonce": attempt.nonce,
        "code_challenge": base64.urlsafe_b64encode(digest).decode().rstrip("="),
        "code_challenge_method": "S256",
    }
    assert attempt.verifier not in url
    assert new_attempt().verifier != attempt.verifier


def test_metadata_is_fetched_again_after_an_hour(provider: Provider) -> None:
    metadata = provider.issuer().metadata
    with httpx.Client() as client:
        for _ in range(3):
            metadata.get(client)
        assert len(provider.requests("/.well-known/openid-configuration")) == 1
        provider.clock.now += MAX_AGE_S + 1
        metadata.get(client)
    assert len(provider.requests("/.well-known/openid-configuration")) == 2


@pytest.mark.parametrize(
    "url", ["http://issuer.example.com/token", "javascript:alert(1)", "/token", "https://", "file:///etc/passwd"]
)
def test_the_endpoints_of_an_https_issuer_must_use_https(url: str) -> None:
    with pytest.raises(ValueError, match=r"token_endpoint=.* must be an https URL"):
        IssuerMetadata(ISSUER, {"token_endpoint": url}).endpoint("token_endpoint")


def test_an_http_issuer_may_have_http_and_https_endpoints() -> None:
    for url in ("http://127.0.0.1/token", "https://issuer.example.com/token"):
        assert IssuerMetadata("http://127.0.0.1", {"token_endpoint": url}).endpoint("token_endpoint") == url
    with pytest.raises(ValueError, match="must be an https or http URL"):
        IssuerMetadata("http://127.0.0.1", {"token_endpoint": "ftp://h/"}).endpoint("token_endpoint")


def test_documents_are_bounded_in_size_and_redirects_are_not_followed(provider: Provider) -> None:
    provider.replies["/large"] = Reply(200, body=json.dumps("x" * MAX_BYTES).encode())
    provider.replies["/moved"] = Reply(302, {"location": f"{provider.url}/keys"})
    with httpx.Client() as client:
        with pytest.raises(ValueError, match=f"exceeds {MAX_BYTES} bytes"):
            fetch_json(client, "GET", f"{provider.url}/large")
        with pytest.raises(httpx.HTTPStatusError):
            fetch_json(client, "GET", f"{provider.url}/moved")


def test_a_document_that_arrives_slowly_is_abandoned(provider: Provider, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(issuer_metadata, "TIMEOUT_S", -1.0)  # the first chunk is already late
    with httpx.Client() as client, pytest.raises(ValueError, match="took more than"):
        fetch_json(client, "GET", f"{provider.url}/keys")
