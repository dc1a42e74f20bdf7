"""Tests for signing in to the console through an OIDC issuer on loopback, which checks PKCE and the client's secret."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import Engine, select
from sqlalchemy.orm import Session

from service.console.sign_in_attempts import MAX_ATTEMPTS
from service.db.models import AuditEntry
from tests.service.console.conftest import NewBrowser
from tests.support.browser.console_client import ConsoleClient
from tests.support.browser.oidc_sign_in import CALLBACK, START, assert_failed, is_signed_in, sign_in, start
from tests.support.service.apps import key_to
from tests.support.service.oidc_provider import (
    AUDIENCE,
    CLIENT_ID,
    CLIENT_SECRET,
    Provider,
    query_of,
    redirect_back,
)


def test_a_user_signs_in_with_the_project_and_scopes_of_the_id_token(
    browser: ConsoleClient, database: Engine, provider: Provider
) -> None:
    provider.id_claims = {"sub": "ann@example.com", "amd_scopes": "submit"}
    response = sign_in(browser, "/console/jobs?state=failed")
    assert (response.status_code, response.headers["location"]) == (303, "/console/jobs?state=failed")
    page = browser.get("/console/jobs").text
    assert "Signed in as oidc:ann@example.com" in page
    assert "New job" in page
    caller = browser.app.state.sessions.authenticate(browser.session)
    assert caller[:3] == ("oidc:ann@example.com", "video", {"submit"})
    with Session(database) as session:
        entry = session.scalars(select(AuditEntry).where(AuditEntry.actor == "oidc:ann@example.com")).one()
    assert (entry.action, entry.target, entry.project) == ("console.session", "oidc:ann@example.com", "video")


def test_a_user_of_all_projects_with_only_the_read_scope_sees_everything_and_changes_nothing(
    browser: ConsoleClient, provider: Provider
) -> None:
    provider.id_claims = {"amd_project": "*", "amd_scopes": ["read"]}
    sign_in(browser)
    page = browser.get("/console/jobs").text
    assert "all projects" in page
    assert "New job" not in page
    assert browser.submit("/console/new", kind="train", preset="demo-image-amd").status_code == 403


def test_the_client_authenticates_in_the_way_that_the_issuer_supports(
    new_browser: NewBrowser, provider: Provider, tmp_path: Path
) -> None:
    assert sign_in(new_browser()).headers["location"] == "/console"
    assert "authorization" in provider.requests("/token")[-1].headers
    provider.metadata["token_endpoint_auth_methods_supported"] = ["client_secret_post", "private_key_jwt"]
    (tmp_path / "secret").write_text(f"{CLIENT_SECRET}\n")
    with_file = {"oidc_client_secret": None, "oidc_client_secret_file": tmp_path / "secret"}
    assert sign_in(new_browser(**with_file)).headers["location"] == "/console"
    assert "authorization" not in provider.requests("/token")[-1].headers
    provider.secret = None
    assert sign_in(new_browser(oidc_client_secret=None)).headers["location"] == "/console"
    assert b"secret" not in provider.requests("/token")[-1].body


def test_the_claims_of_the_access_token_are_used_if_the_id_token_has_no_project(
    browser: ConsoleClient, provider: Provider
) -> None:
    provider.id_claims = {"sub": "pairwise", "amd_project": None, "amd_scopes": None}
    provider.access_token = provider.token(sub="ann", amd_project="audio", amd_scopes="read")
    sign_in(browser)
    caller = browser.app.state.sessions.authenticate(browser.session)
    assert caller[:3] == ("oidc:ann", "audio", {"read"})


@pytest.mark.parametrize(
    "access_token", [None, {"aud": "another service"}, {"exp": 1}, {"amd_project": None}, {"iss": "https://a.example"}]
)
def test_without_a_project_in_either_token_the_user_is_rejected(
    browser: ConsoleClient, provider: Provider, access_token: dict[str, Any] | None
) -> None:
    provider.id_claims = {"amd_project": None}
    provider.access_token = None if access_token is None else provider.token(**access_token)
    assert_failed(browser, sign_in(browser), "the identity provider sent no valid claim amd_project")


@pytest.mark.parametrize(
    "claims",
    [
        {"nonce": "of another attempt"},
        {"nonce": None},
        {"aud": AUDIENCE},
        {"aud": "another client"},
        {"aud": None},
        {"aud": [CLIENT_ID, "another client"], "azp": "another client"},
        {"iss": "https://another.example.com"},
        {"exp": 1},
        {"exp": None},
        {"sub": None},
        {"sub": "a\nb"},
        {"amd_project": "Not A Project"},
        {"amd_project": ["video"]},
    ],
)
def test_an_invalid_id_token_starts_no_session(
    browser: ConsoleClient, provider: Provider, claims: dict[str, Any]
) -> None:
    provider.id_claims = claims
    assert_failed(browser, sign_in(browser), "invalid token")


def test_an_unsigned_id_token_starts_no_session(browser: ConsoleClient, provider: Provider) -> None:
    def unsigned(name: str, **claims: Any) -> str:
        return f"{'.'.join(issue(**claims).split('.')[:2])}."

    issue = provider.token
    provider.token = lambda **claims: unsigned("none", **claims)  # type: ignore[method-assign]
    assert_failed(browser, sign_in(browser), "invalid token")


@pytest.mark.parametrize("scopes", [None, "infer", [], "administrator"])
def test_a_user_without_the_read_scope_is_rejected(browser: ConsoleClient, provider: Provider, scopes: Any) -> None:
    provider.id_claims = {"amd_scopes": scopes}
    assert_failed(browser, sign_in(browser), "the console requires the scope 'read'; your account has: ")


# Attempts


@pytest.mark.parametrize("query", ["", "?code=x", "?state=x&code=y", f"?state={'x' * 43}&code=y", "?state=%00;a=b"])
def test_a_redirect_without_a_known_state_is_rejected(browser: ConsoleClient, provider: Provider, query: str) -> None:
    start(browser)
    response = browser.get(CALLBACK + query, follow_redirects=False)
    assert_failed(browser, response, "started in another browser, has expired or was already completed")
    assert not provider.requests("/token")


def test_a_state_that_cannot_be_part_of_a_cookie_name_is_rejected(browser: ConsoleClient) -> None:
    forged = {"Cookie": "amd_sign_in_80_a(b=1.2.3"}
    response = browser.get(CALLBACK, params={"state": "a(b", "code": "x"}, headers=forged, follow_redirects=False)
    assert_failed(browser, response, "started in another browser")


def test_nobody_can_sign_another_browser_in(browser: ConsoleClient, new_browser: NewBrowser) -> None:
    """Check for login CSRF: a victim opens the redirect that an attacker's sign-in produced."""
    victim, redirect = new_browser(browser.app), redirect_back(start(browser))
    start(victim)
    assert_failed(victim, victim.get(redirect, follow_redirects=False), "started in another browser")
    assert browser.get(redirect, follow_redirects=False).status_code == 303


def test_a_code_from_another_attempt_is_rejected(browser: ConsoleClient, new_browser: NewBrowser) -> None:
    """Check for code injection: the code was issued for another verifier."""
    stolen = query_of(redirect_back(start(new_browser(browser.app))))["code"]
    own = query_of(start(browser))["state"]
    response = browser.get(CALLBACK, params={"state": own, "code": stolen}, follow_redirects=False)
    assert_failed(browser, response, "no longer accepts this sign-in")


def test_a_redirect_can_be_used_only_once(browser: ConsoleClient, new_browser: NewBrowser) -> None:
    redirect = redirect_back(start(browser))
    cookies = dict(browser.cookies)
    browser.get(redirect, follow_redirects=False)
    assert browser.get(redirect, follow_redirects=False).headers["location"] == "/console"  # a reload does no harm
    browser.submit("/console/sign-out")
    assert_failed(browser, browser.get(redirect, follow_redirects=False), "was already completed")
    copy = new_browser(browser.app)
    copy.cookies.update(cookies)
    assert_failed(copy, copy.get(redirect, follow_redirects=False), "no longer accepts this sign-in")


def test_a_failed_attempt_cannot_be_repeated(browser: ConsoleClient, provider: Provider) -> None:
    provider.id_claims = {"nonce": "of another attempt"}
    redirect = redirect_back(start(browser))
    browser.get(redirect)
    assert_failed(browser, browser.get(redirect, follow_redirects=False), "was already completed")


def test_several_tabs_can_sign_in_at_the_same_time(browser: ConsoleClient) -> None:
    redirects = [redirect_back(start(browser, f"/console/jobs?page={tab}")) for tab in range(3)]
    targets = [browser.get(redirect, follow_redirects=False).headers["location"] for redirect in reversed(redirects)]
    assert targets == [f"/console/jobs?page={tab}" for tab in (2, 1, 0)]
    assert is_signed_in(browser)


def test_a_browser_keeps_a_limited_number_of_attempts(browser: ConsoleClient) -> None:
    urls = [start(browser, "/console/jobs?q=" + "é" * 1900) for _ in range(MAX_ATTEMPTS + 2)]
    names = [name for name in browser.cookies if "sign_in" in name]
    assert len(names) == MAX_ATTEMPTS
    assert all(len(browser.cookies[name]) < 4000 for name in names)
    assert sign_in_with(browser, urls[0]).status_code == 422
    assert sign_in_with(browser, urls[-1]).headers["location"] == "/console"


def sign_in_with(browser: ConsoleClient, url: str) -> httpx.Response:
    return browser.get(redirect_back(url), follow_redirects=False)


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_the_cookies_are_http_only_and_require_tls_on_https(new_browser: NewBrowser, scheme: str) -> None:
    browser = new_browser(base_url=f"{scheme}://testserver")
    started = browser.get(START, follow_redirects=False)
    assert query_of(started.headers["location"])["redirect_uri"] == f"{scheme}://testserver{CALLBACK}"
    finished = browser.get(redirect_back(started.headers["location"]), follow_redirects=False)
    cookies = [*started.headers.get_list("set-cookie"), *finished.headers.get_list("set-cookie")]
    assert len(cookies) == 3  # the attempt; the session, and the end of the attempt
    for cookie in map(str.lower, cookies):
        assert "httponly" in cookie
        assert "samesite=lax" in cookie
        assert "path=/;" in cookie
        assert ("secure" in cookie, cookie.startswith("__host-")) == (scheme == "https",) * 2
    assert "max-age=600" in cookies[0].lower()


def test_a_planted_session_is_replaced(browser: ConsoleClient, new_browser: NewBrowser) -> None:
    """Check for session fixation."""
    planted = "p" * 43
    browser.cookies.set("amd_session_80", planted, domain="testserver.local", path="/")
    assert planted not in str(sign_in(browser).headers.get_list("set-cookie"))
    other = new_browser(browser.app)
    other.cookies.set("amd_session_80", planted)
    assert not is_signed_in(other)


def test_signing_in_ends_the_previous_session(
    browser: ConsoleClient, database: Engine, new_browser: NewBrowser
) -> None:
    redirect = redirect_back(start(browser))
    browser.sign_in(key_to(database, "read")["Authorization"])
    before = browser.session
    browser.get(redirect, follow_redirects=False)
    other = new_browser(browser.app)
    other.cookies.set("amd_session_80", before)
    assert not is_signed_in(other)


@pytest.mark.parametrize(
    "target", ["https://evil.example/", "//evil.example", "/console//evil.example", "/\\evil", "/v1/jobs", "\r\nA: b"]
)
def test_signing_in_redirects_only_to_console_pages(browser: ConsoleClient, target: str) -> None:
    assert sign_in(browser, target).headers["location"] == "/console"


def test_a_forged_target_in_the_cookie_is_not_opened(browser: ConsoleClient) -> None:
    redirect = redirect_back(start(browser))
    (name,) = [name for name in browser.cookies if "sign_in" in name]
    nonce, verifier, _ = browser.cookies[name].split(".")
    browser.cookies.clear()
    browser.cookies.set(name, f"{nonce}.{verifier}.https%3A%2F%2Fevil.example")
    assert browser.get(redirect, follow_redirects=False).headers["location"] == "/console"
