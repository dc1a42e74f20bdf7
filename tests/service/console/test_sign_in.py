"""Tests for signing in to and out of the console: sessions, sign-in links and cookies, and when they expire."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, update
from sqlalchemy.orm import Session

from service.auth.sessions import BrowserSessions
from service.db.models import ApiKey, BrowserSession
from tests.service.console.conftest import new_app
from tests.support.browser.console_client import ConsoleClient
from tests.support.service.apps import key_to


def test_a_page_without_a_session_redirects_to_sign_in_and_back(anonymous: ConsoleClient, database: Engine) -> None:
    response = anonymous.get("/console/jobs?state=failed", follow_redirects=False)
    assert response.headers["location"] == "/console/sign-in?next=%2Fconsole%2Fjobs%3Fstate%3Dfailed"
    assert "<code>amd console</code> prints a link" in anonymous.get(response.headers["location"]).text
    key = key_to(database, "read")["Authorization"].removeprefix("Bearer ")
    response = anonymous.post(
        "/console/sign-in", data={"key": key, "next": "/console/jobs?state=failed"}, follow_redirects=False
    )
    assert (response.status_code, response.headers["location"]) == (303, "/console/jobs?state=failed")


@pytest.mark.parametrize(
    "target", ["https://evil.example/", "//evil.example", "/console//evil.example", "/\\evil", "/v1/jobs", ""]
)
def test_signing_in_redirects_only_to_console_pages(anonymous: ConsoleClient, database: Engine, target: str) -> None:
    key = key_to(database, "read")["Authorization"].removeprefix("Bearer ")
    response = anonymous.post("/console/sign-in", data={"key": key, "next": target}, follow_redirects=False)
    assert response.headers["location"] == "/console"


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_the_cookie_is_http_only_and_requires_tls_on_https(app: Any, database: Engine, scheme: str) -> None:
    client = ConsoleClient(app, base_url=f"{scheme}://testserver")
    response = client.post(
        "/console/sign-in",
        data={"key": key_to(database, "read")["Authorization"].removeprefix("Bearer ")},
        follow_redirects=False,
    )
    cookie = response.headers["set-cookie"].lower()
    assert "httponly" in cookie
    assert "samesite=lax" in cookie
    assert "path=/;" in cookie
    assert ("secure" in cookie, cookie.startswith("__host-")) == (scheme == "https",) * 2


@pytest.mark.parametrize(
    ("key", "problem"),
    [
        ("", ">This is not an API key"),
        ("eyJhbGciOi.token.x", ">This is not an API key"),
        ("amd_0000000000000000_" + "x" * 43, "does not exist, has expired or was revoked"),
    ],
)
def test_an_invalid_key_is_explained_and_starts_no_session(anonymous: ConsoleClient, key: str, problem: str) -> None:
    response = anonymous.post("/console/sign-in", data={"key": key})
    assert response.status_code == 422
    assert problem in response.text
    assert not anonymous.cookies


def test_a_key_with_only_the_infer_scope_is_rejected(anonymous: ConsoleClient, database: Engine) -> None:
    response = anonymous.sign_in(key_to(database, "infer")["Authorization"])
    assert "requires the scope &#39;read&#39;" in response.text


def test_invalid_keys_are_rate_limited_per_address(database: Engine, folder: Path) -> None:
    client = ConsoleClient(new_app(database, folder, failure_limit="2/minute"))
    statuses = [client.sign_in("amd_0000000000000000_" + "x" * 43).status_code for _ in range(3)]
    assert statuses == [422, 422, 429]


def test_only_a_small_sign_in_body_is_accepted_without_a_session(anonymous: ConsoleClient) -> None:
    assert anonymous.post("/console/jobs/x/cancel", data={"a": "b"}, follow_redirects=False).status_code == 401
    assert anonymous.post("/console/sign-in", data={"key": "x" * 5000}).status_code == 401


def test_the_browser_cannot_choose_its_session(anonymous: ConsoleClient, database: Engine) -> None:
    """Check for session fixation: signing in replaces a cookie that an attacker planted."""
    planted = "p" * 43
    response = anonymous.post(
        "/console/sign-in",
        data={"key": key_to(database, "read")["Authorization"].removeprefix("Bearer ")},
        headers={"Cookie": f"amd_session_80={planted}"},
        follow_redirects=False,
    )
    assert planted not in response.headers["set-cookie"]
    stolen = ConsoleClient(anonymous.app, cookies={"amd_session_80": planted})
    assert stolen.get("/console/jobs", follow_redirects=False).status_code == 303


def test_signing_in_again_ends_the_previous_session(console: ConsoleClient, database: Engine) -> None:
    before = console.session
    console.sign_in(key_to(database, "read")["Authorization"])
    assert console.session != before
    other = ConsoleClient(console.app, cookies={"amd_session_80": before})
    assert other.get("/console/jobs", follow_redirects=False).status_code == 303


def test_signing_out_ends_the_session_for_every_copy_of_its_cookie(console: ConsoleClient) -> None:
    session = console.session
    assert console.submit("/console/sign-out").headers["location"] == "/console/sign-in"
    other = ConsoleClient(console.app, cookies={"amd_session_80": session})
    assert other.get("/console/jobs", follow_redirects=False).status_code == 303


@pytest.mark.parametrize("field", ["revoked_at", "expires_at"])
def test_a_session_ends_when_its_key_expires_or_is_revoked(
    console: ConsoleClient, database: Engine, field: str
) -> None:
    assert console.get("/console/jobs", follow_redirects=False).status_code == 200
    with Session(database) as session, session.begin():
        session.execute(update(ApiKey).values({field: time.time() - 1}))
    assert console.get("/console/jobs", follow_redirects=False).status_code == 303


def test_a_session_ends_after_its_lifetime(console: ConsoleClient, database: Engine) -> None:
    with Session(database) as session, session.begin():
        session.execute(update(BrowserSession).values(expires_at=time.time() - 1))
    response = console.get(
        "/console/jobs", headers={"HX-Request": "true", "HX-Current-URL": "http://h/console/jobs?q=a"}
    )
    assert response.headers["hx-redirect"] == "/console/sign-in?next=%2Fconsole%2Fjobs%3Fq%3Da"


def test_only_session_hashes_are_stored(console: ConsoleClient, database: Engine) -> None:
    with Session(database) as session:
        rows = session.query(BrowserSession).all()
        assert rows
        assert not any(console.session in (row.digest, row.key_id) for row in rows)


def test_the_cookie_is_valid_only_in_the_console(console: ConsoleClient) -> None:
    assert console.get("/v1/jobs").status_code == 401
    assert console.get("/console/jobs", headers={"Authorization": "Bearer amd_x"}).status_code == 200


def test_a_key_in_the_header_gives_no_access_to_the_console(anonymous: ConsoleClient, database: Engine) -> None:
    headers = key_to(database, "admin")
    assert anonymous.get("/console/jobs", headers=headers, follow_redirects=False).status_code == 303


# Links


def link(anonymous: ConsoleClient, engine: Engine, *scopes: str) -> str:
    response = anonymous.post("/v1/console-links", headers=key_to(engine, *scopes))
    assert response.status_code == 201
    return str(response.json()["path"])


def test_a_sign_in_link_can_be_used_only_once(anonymous: ConsoleClient, database: Engine) -> None:
    path = link(anonymous, database, "read")
    assert anonymous.get(path).url.path == "/console/jobs"
    second = ConsoleClient(anonymous.app).get(path)
    assert second.status_code == 422
    assert "already used" in second.text


def test_a_sign_in_link_expires(
    app: Any, anonymous: ConsoleClient, database: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = link(anonymous, database, "read")
    later = BrowserSessions(database, app.state.authenticator, lambda: time.time() + 601)
    monkeypatch.setattr(app.state, "sessions", later)
    assert "has expired" in anonymous.get(path).text


def test_links_and_sessions_are_not_interchangeable(console: ConsoleClient, database: Engine) -> None:
    token = link(console, database, "read").partition("token=")[2]
    other = ConsoleClient(console.app, cookies={"amd_session_80": token})
    assert other.get("/console/jobs", follow_redirects=False).status_code == 303
    assert ConsoleClient(console.app).get(f"/console/link?token={console.session}").status_code == 422
    assert console.get("/console/jobs", follow_redirects=False).status_code == 200


def test_a_link_grants_the_scopes_of_its_key(anonymous: ConsoleClient, database: Engine) -> None:
    anonymous.get(link(anonymous, database, "read"))
    assert "New job" not in anonymous.get("/console/jobs").text


def test_a_key_with_only_the_infer_scope_cannot_create_a_link(anonymous: ConsoleClient, database: Engine) -> None:
    assert anonymous.post("/v1/console-links", headers=key_to(database, "infer")).status_code == 403


def test_the_me_route_describes_the_caller(anonymous: ConsoleClient, database: Engine) -> None:
    found = anonymous.get("/v1/me", headers=key_to(database, "submit", project="video")).json()
    assert (found["project"], found["scopes"], found["expires_at"]) == ("video", ["infer", "read", "submit"], None)
