"""Tests for API keys over HTTP and for the first admin key, on SQLite and PostgreSQL."""

from __future__ import annotations

import json
import os
import stat
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from sqlalchemy import Engine
from sqlalchemy.orm import Session

from service.auth import api_keys
from service.auth.api_keys import KeyStore, ensure_admin_key, router
from service.auth.authentication import Authenticator, Principal, new_secret, read_secret
from service.db.engine import open_engine
from service.db.models import ApiKey
from service.settings import Settings
from service.web.errors import IllegalAction
from tests.support.service.apps import client_of, key_to


def count(engine: Engine) -> int:
    with Session(engine) as session:
        return session.query(ApiKey).count()


def principal_of(engine: Engine, path: Path) -> Principal:
    return Authenticator(engine, Settings()).authenticate(f"Bearer {path.read_text().strip()}")


def test_a_created_key_has_the_requested_scopes_and_is_shown_once(engine: Engine) -> None:
    client = client_of(engine, router)
    root = key_to(engine, "admin")
    expires = datetime.now(UTC) + timedelta(days=30)
    body = {"name": "CI", "scopes": ["submit"], "project": "video", "expires_at": expires.isoformat()}
    response = client.post("/v1/keys", json=body, headers=root)
    assert response.status_code == 201
    assert response.headers["Cache-Control"] == "no-store"
    created = response.json()
    principal = Authenticator(engine, Settings()).authenticate(f"Bearer {created['key']}")
    assert principal == Principal(created["id"], "video", frozenset({"submit"}), expires.timestamp())
    assert datetime.fromisoformat(created["expires_at"]) == expires
    listed = client.get("/v1/keys", headers=root)
    assert {item["name"] for item in listed.json()["items"]} == {"CI", "test key"}
    assert created["key"].split("_", 2)[2] not in listed.text


def test_a_project_admin_manages_only_the_keys_of_that_project(engine: Engine) -> None:
    client = client_of(engine, router)
    key_to(engine, "admin")
    ours, theirs = key_to(engine, "admin", project="ours"), key_to(engine, "read", project="theirs")
    created = client.post("/v1/keys", json={"name": "a", "scopes": ["admin"]}, headers=ours)
    assert created.status_code == 201
    assert created.json()["project"] == "ours"  # null means the caller's project, not all projects
    other = client.post("/v1/keys", json={"name": "a", "scopes": ["read"], "project": "theirs"}, headers=ours)
    assert other.status_code == 403
    listed = client.get("/v1/keys", headers=ours).json()["items"]
    assert {item["project"] for item in listed} == {"ours"}
    their_id = theirs["Authorization"].split("_")[1]
    assert client.delete(f"/v1/keys/{their_id}", headers=ours).status_code == 404
    assert client.delete(f"/v1/keys/{created.json()['id']}", headers=ours).status_code == 204


@pytest.mark.parametrize("scope", ["read", "submit"])
def test_only_admins_manage_keys(engine: Engine, scope: str) -> None:
    client = client_of(engine, router)
    header = key_to(engine, scope)
    assert client.get("/v1/keys", headers=header).status_code == 403
    assert client.post("/v1/keys", json={"name": "a", "scopes": ["read"]}, headers=header).status_code == 403
    assert client.delete("/v1/keys/abc", headers=header).status_code == 403
    assert count(engine) == 1


def test_a_revoked_key_is_rejected_immediately_and_stays_listed(engine: Engine) -> None:
    client = client_of(engine, router)
    root, other = key_to(engine, "admin"), key_to(engine, "admin")
    other_id = other["Authorization"].split("_")[1]
    assert client.get("/v1/keys", headers=other).status_code == 200
    for _ in range(2):  # revoking again is a no-op
        assert client.delete(f"/v1/keys/{other_id}", headers=root).status_code == 204
    assert client.get("/v1/keys", headers=other).status_code == 401
    listed = {item["id"]: item for item in client.get("/v1/keys", headers=root).json()["items"]}
    assert listed[other_id]["revoked_at"] is not None


def test_the_last_global_admin_key_cannot_be_revoked(engine: Engine) -> None:
    client = client_of(engine, router)
    root = key_to(engine, "admin")
    root_id = root["Authorization"].split("_")[1]
    key_to(engine, "admin", project="one")  # limited to one project
    key_to(engine, "submit")  # not an admin
    key_to(engine, "admin", expires_at=time.time() - 1)
    key_to(engine, "admin", revoked_at=time.time() - 1)
    response = client.delete(f"/v1/keys/{root_id}", headers=root)
    assert response.status_code == 409
    assert client.get("/v1/keys", headers=root).status_code == 200
    key_to(engine, "admin")
    assert client.delete(f"/v1/keys/{root_id}", headers=root).status_code == 204


def test_one_key_remains_when_admins_concurrently_revoke_each_others_keys(engine: Engine, database_url: str) -> None:
    for _ in range(5):
        ids = [key_to(engine, "admin")["Authorization"].split("_")[1] for _ in range(4)]
        replicas = [open_engine(database_url) for _ in ids]

        def revoke(replica: Engine, key_id: str) -> bool:
            try:
                KeyStore(replica).revoke(key_id, None, "test")
            except IllegalAction:
                return False
            return True

        with Session(engine) as session, session.begin():
            for key in session.query(ApiKey).where(ApiKey.id.not_in(ids)):
                session.delete(key)
        with ThreadPoolExecutor(len(ids)) as pool:
            done = list(pool.map(revoke, replicas, ids))
        assert sorted(done) == [False, True, True, True]
        for replica in replicas:
            replica.dispose()


@pytest.mark.parametrize(
    "wrong",
    [
        {"scopes": []},
        {"scopes": ["root"]},
        {"scopes": ["read"] * 5},
        {"name": ""},
        {"name": "a\u0000b"},
        {"name": "x" * 201},
        {"project": "Not a project"},
        {"expires_at": "2020-01-01T00:00:00Z"},
        {"expires_at": "2099-01-01T00:00:00"},
        {"project": "\ud800"},
        {"id": "mine"},
    ],
)
def test_an_invalid_request_creates_no_key(engine: Engine, wrong: dict[str, object]) -> None:
    client = client_of(engine, router)
    root = key_to(engine, "admin")
    body = json.dumps({"name": "a", "scopes": ["read"], **wrong})  # escaped, so that a lone surrogate is sent
    response = client.post("/v1/keys", content=body, headers={**root, "Content-Type": "application/json"})
    assert response.status_code == 422
    assert count(engine) == 1


@pytest.mark.parametrize("key_id", ["%00", "a" * 33, "A", "..%2f", "unknown"])
def test_unknown_key_ids_are_rejected(engine: Engine, key_id: str) -> None:
    response = client_of(engine, router).delete(f"/v1/keys/{key_id}", headers=key_to(engine, "admin"))
    assert response.status_code in (404, 422)


def test_the_first_admin_key_is_written_to_a_file_that_only_its_owner_can_read(engine: Engine, tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "admin-key"
    mask = os.umask(0)
    try:
        assert ensure_admin_key(engine, path)
    finally:
        os.umask(mask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    principal = principal_of(engine, path)
    assert principal.project is None
    assert principal.allowed("admin")
    text = path.read_text()
    assert not ensure_admin_key(engine, path)  # the next start
    assert path.read_text() == text
    assert count(engine) == 1


def test_the_first_key_is_created_only_if_no_valid_admin_key_exists(engine: Engine, tmp_path: Path) -> None:
    key_to(engine, "admin", project="one")
    key_to(engine, "submit")
    key_to(engine, "admin", expires_at=time.time() - 1)
    path = tmp_path / "admin-key"
    assert ensure_admin_key(engine, path)  # none of these is a valid admin key for all projects
    path.unlink()
    assert not ensure_admin_key(engine, path)
    assert not path.exists()


def test_a_crash_between_writing_the_key_file_and_the_commit_locks_nobody_out(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "admin-key"

    def crash(*_: object) -> ApiKey:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(api_keys, "_key", crash)
        with pytest.raises(KeyboardInterrupt):
            ensure_admin_key(engine, path)
    assert path.exists()
    assert count(engine) == 0
    assert ensure_admin_key(engine, path)
    assert principal_of(engine, path).allowed("admin")


def test_a_stale_key_file_is_replaced_but_an_unrelated_file_is_kept(engine: Engine, tmp_path: Path) -> None:
    path = tmp_path / "admin-key"
    path.write_text(f"{new_secret()}\n")
    assert ensure_admin_key(engine, path)
    assert principal_of(engine, path).allowed("admin")
    with Session(engine) as session, session.begin():
        session.query(ApiKey).delete()
    path.write_text("my thesis")
    with pytest.raises(FileExistsError, match="AMD_ADMIN_KEY_FILE"):
        ensure_admin_key(engine, path)
    assert path.read_text() == "my thesis"
    assert count(engine) == 0


def test_a_symlink_in_place_of_the_key_file_is_not_followed(engine: Engine, tmp_path: Path) -> None:
    target = tmp_path / "elsewhere"
    (tmp_path / "admin-key").symlink_to(target)
    with pytest.raises(FileExistsError):
        ensure_admin_key(engine, tmp_path / "admin-key")
    assert not target.exists()
    assert count(engine) == 0


@pytest.mark.parametrize("shared", [True, False], ids=["one file", "separate files"])
def test_replicas_starting_concurrently_create_one_key(database_url: str, tmp_path: Path, shared: bool) -> None:
    replicas = [open_engine(database_url) for _ in range(6)]
    paths = [tmp_path / ("admin-key" if shared else f"key-{n}") for n in range(6)]
    with ThreadPoolExecutor(6) as pool:
        created = list(pool.map(ensure_admin_key, replicas, paths))
    assert created.count(True) == 1
    assert count(replicas[0]) == 1
    path = paths[created.index(True)]
    assert read_secret(path.read_text().strip()) is not None
    assert principal_of(replicas[0], path).allowed("admin")
    for replica in replicas:
        replica.dispose()
