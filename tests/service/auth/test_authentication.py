"""Tests for authentication by API key: invalid keys, scopes and rate limits, on SQLite and PostgreSQL."""

from __future__ import annotations

import time
from typing import get_args

import pytest
from fastapi import APIRouter
from fastapi.responses import StreamingResponse
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import Engine, create_engine, event
from sqlalchemy.orm import Session

from service.auth.authentication import (
    Admin,
    Authenticator,
    Inferrer,
    Principal,
    Reader,
    Scope,
    Submitter,
    new_secret,
    read_secret,
)
from service.db.models import ApiKey
from service.settings import Settings
from service.web.errors import Unauthenticated
from tests.support.service.apps import client_of, key_to
from tests.support.service.webhooks import SettableClock

router = APIRouter()


@router.get("/infer")
def infer(caller: Inferrer) -> str:
    return caller.id


@router.get("/read")
def read(caller: Reader) -> str:
    return caller.id


@router.get("/submit")
def submit(caller: Submitter) -> str:
    return caller.id


@router.get("/admin")
def admin(caller: Admin) -> str:
    return caller.id


@router.get("/stream")
async def stream(caller: Reader) -> StreamingResponse:
    return StreamingResponse(iter(["a", "b"]))


def test_a_scope_includes_lesser_scopes_and_a_rejection_reports_the_missing_scope(
    engine: Engine,
) -> None:
    client = client_of(engine, router)
    order = get_args(Scope)
    for own in order:
        header = key_to(engine, own)
        for needed in order:
            response = client.get(f"/v1/{needed}", headers=header)
            if order.index(needed) <= order.index(own):
                assert response.status_code == 200, (own, needed)
            else:
                assert response.status_code == 403, (own, needed)
                assert response.json()["needed_scope"] == needed
                assert repr(needed) in response.json()["detail"]


def test_a_key_without_scopes_grants_nothing(engine: Engine) -> None:
    client = client_of(engine, router)
    assert client.get("/v1/read", headers=key_to(engine)).status_code == 403


def test_expired_wrong_and_missing_keys_are_rejected_identically(engine: Engine) -> None:
    client = client_of(engine, router)
    good = key_to(engine, "admin")["Authorization"]
    unknown = new_secret()
    known = read_secret(good.removeprefix("Bearer "))
    assert known is not None
    wrong = {
        "expired": key_to(engine, "admin", expires_at=time.time() - 1)["Authorization"],
        "revoked": key_to(engine, "admin", revoked_at=time.time() - 1)["Authorization"],
        "never created": f"Bearer {unknown}",
        "the secret of another key": f"Bearer {known._replace(secret=unknown.secret)}",
        "the id of another key": f"Bearer {unknown._replace(secret=known.secret)}",
        "only a digest": f"Bearer amd_{known.id}_{known.digest}",
    }
    details = set()
    for name, header in wrong.items():
        response = client.get("/v1/read", headers={"Authorization": header})
        assert response.status_code == 401, name
        assert response.headers["WWW-Authenticate"] == "Bearer"
        assert response.headers["Content-Type"] == "application/problem+json"
        details.add(response.json()["detail"])
    assert len(details) == 1  # responses do not disclose which IDs exist
    assert client.get("/v1/read", headers={"Authorization": good}).status_code == 200


@pytest.mark.parametrize("header", ["", "Bearer", "Bearer ", "Basic YTpi", "amd_a_b", "Bearer a b", "Bearer amd_"])
def test_malformed_headers_are_rejected(engine: Engine, header: str) -> None:
    response = client_of(engine, router).get("/v1/read", headers={"Authorization": header})
    assert response.status_code == 401


def test_a_key_that_is_not_in_the_authorization_header_is_ignored(engine: Engine) -> None:
    client = client_of(engine, router)
    key = key_to(engine, "admin")["Authorization"].removeprefix("Bearer ")
    assert client.get("/v1/read", headers={"X-API-Key": key}).status_code == 401
    assert client.get("/v1/read", params={"api_key": key}).status_code == 401
    assert client.get("/v1/read", cookies={"Authorization": f"Bearer {key}"}).status_code == 401


def test_a_key_that_expires_while_in_use_is_rejected(engine: Engine, clock: SettableClock) -> None:
    authenticator = Authenticator(engine, Settings(), clock)
    now = clock.now
    header = key_to(engine, "read", expires_at=now + 100)["Authorization"]
    clock.now = now + 99
    assert authenticator.authenticate(header).scopes == {"read"}
    clock.now = now + 100
    with pytest.raises(Unauthenticated):
        authenticator.authenticate(header)


def test_the_last_use_of_a_key_is_recorded_at_most_once_a_minute(engine: Engine, clock: SettableClock) -> None:
    authenticator = Authenticator(engine, Settings(), clock)
    header = key_to(engine, "read")["Authorization"]
    writes: list[str] = []
    event.listen(
        engine, "before_cursor_execute", lambda *args: writes.append(args[2]) if args[2].startswith("UPDATE") else None
    )

    def used_at() -> float | None:
        with Session(engine) as session:
            return session.query(ApiKey).one().used_at

    start = clock.now
    for after, writes_so_far in ((0, 1), (30, 1), (59, 1), (61, 2), (62, 2)):
        clock.now = start + after
        authenticator.authenticate(header)
        assert len(writes) == writes_so_far
    assert used_at() == start + 61


def test_the_database_contains_no_usable_credential(engine: Engine) -> None:
    key = key_to(engine, "admin")["Authorization"].removeprefix("Bearer ")
    with Session(engine) as session:
        row = session.query(ApiKey).one()
        kept = [str(value) for name, value in vars(row).items() if not name.startswith("_")]
    secret = key.split("_", 2)[2]
    assert not any(secret in value for value in kept)


def test_a_secret_does_not_appear_in_logs() -> None:
    secret = new_secret()
    assert secret.secret not in repr(secret)
    assert secret.secret not in f"{[secret]}"


def test_secrets_are_256_random_bits_and_round_trip_as_text() -> None:
    created = {new_secret() for _ in range(200)}
    assert len(created) == 200
    for secret in created:
        assert read_secret(str(secret)) == secret
        assert len(secret.secret) * 6 >= 256


@given(st.text())
def test_malformed_authorization_headers_never_cause_an_internal_error(text: str) -> None:
    without_tables = create_engine("sqlite://")  # the database must not be queried
    authenticator = Authenticator(without_tables, Settings())
    for header in (text, f"Bearer {text}", f"Bearer amd_{text}", f"Bearer amd_a_{text}"):
        with pytest.raises(Unauthenticated):
            authenticator.authenticate(header)


def test_each_key_has_a_separate_rate_limit_that_every_response_reports(engine: Engine) -> None:
    client = client_of(engine, router, settings=Settings(rate_limit="3/minute"))
    first, second = key_to(engine, "read"), key_to(engine, "read")
    for remaining in (2, 1, 0):
        # rejected requests count, and streams have the headers too
        path = "/v1/admin" if remaining == 1 else "/v1/stream"
        response = client.get(path, headers=first)
        assert response.status_code == (403 if remaining == 1 else 200)
        assert response.headers["RateLimit-Limit"] == "3"
        assert response.headers["RateLimit-Remaining"] == str(remaining)
        assert 0 < int(response.headers["RateLimit-Reset"]) <= 60
    rejected = client.get("/v1/read", headers=first)
    assert rejected.status_code == 429
    assert rejected.json()["code"] == "rate_limited"
    assert rejected.json()["retryable"] is True
    assert 0 < int(rejected.headers["Retry-After"]) <= 60
    assert rejected.headers["RateLimit-Remaining"] == "0"
    assert client.get("/v1/read", headers=second).status_code == 200


def test_failed_authentications_are_limited_per_address_without_locking_out_valid_keys(engine: Engine) -> None:
    client = client_of(engine, router)
    statuses = [
        client.get("/v1/read", headers={"Authorization": f"Bearer {new_secret()}"}).status_code for _ in range(32)
    ]
    assert statuses == [401] * 30 + [429] * 2
    assert client.get("/v1/read", headers=key_to(engine, "read")).status_code == 200


def test_an_invalid_rate_limit_is_rejected_at_startup(engine: Engine) -> None:
    with pytest.raises(ValueError, match="many"):
        Authenticator(engine, Settings(rate_limit="many"))


@given(st.sets(st.sampled_from(get_args(Scope))))
def test_additional_scopes_never_remove_permissions(scopes: set[Scope]) -> None:
    principal = Principal("k", None, frozenset(scopes))
    wider = Principal("k", None, frozenset(scopes | {"admin"}))
    for scope in get_args(Scope):
        assert wider.allowed(scope)
        if principal.allowed(scope):
            order = get_args(Scope)
            assert all(principal.allowed(lower) for lower in order[: order.index(scope)])
