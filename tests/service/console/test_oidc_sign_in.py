"""Tests for signing in to the console through an OIDC issuer on loopback, which checks PKCE and the client's secret."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import Engine, select
from sqlalchemy.orm import Session

from service.auth.authentication import Principal
from service.auth.oidc import LEEWAY_S
from service.auth.sessions import SESSION_S, BrowserSessions
from service.console.sign_in_attempts import MAX_ATTEMPTS
from service.db.models import AuditEntry, BrowserSession
from service.web.bounded_calls import BoundedCalls
from service.web.errors import IssuerUnavailable, Unauthenticated
from tests.service.console.conftest import new_app
from tests.support.browser.console_client import ConsoleClient, text_of
from tests.support.service.apps import key_to
from tests.support.service.oidc_provider import (
    AUDIENCE,
    CLIENT_ID,
    CLIENT_SECRET,
    Provider,
    query_of,
    redirect_back,
    running_provider,
)
from tests.support.service.receivers import Reply

START, CALLBACK = "/console/sign-in/oidc", "/console/sign-in/callback"
NewBrowser = Callable[..., ConsoleClient]


@pytest.fixture
def provider() -> Iterator[Provider]:
    with running_provider() as running:
        yield running


@pytest.fixture
def new_browser(database: Engine, folder: Path, provider: Provider) -> NewBrowser:
    """Return a function that creates a browser, with a new service unless it is given another browser's."""

    def create(app: Any = None, base_url: str = "http://testserver", **settings: Any) -> ConsoleClient:
        issuer = {"oidc_issuer": provider.url, "oidc_audience": AUDIENCE, "oidc_client_id": CLIENT_ID}
        secret = {"oidc_client_secret": CLIENT_SECRET, "failure_limit": "1000/minute"}
        app = app or new_app(database, folder, **{**issuer, **secret, **settings})
        return ConsoleClient(app, base_url=base_url, raise_server_exceptions=False)

    return create


@pytest.fixture
def browser(new_browser: NewBrowser) -> ConsoleClient:
    return new_browser()


def start(browser: ConsoleClient, target: str = "") -> str:
    """Start to sign in. Returns the issuer's address to which the browser is redirected."""
    response = browser.get(START, params={"next": target}, follow_redirects=False)
    assert response.status_code == 303, response.text
    return response.headers["location"]


def sign_in(browser: ConsoleClient, target: str = "") -> httpx.Response:
    """Sign in through the issuer. Returns the response to the issuer's redirect."""
    return browser.get(redirect_back(start(browser, target)), follow_redirects=False)


def is_signed_in(browser: ConsoleClient) -> bool:
    return browser.get("/console/jobs", follow_redirects=False).status_code == 200


def assert_failed(browser: ConsoleClient, response: httpx.Response, problem: str, status: int = 422) -> None:
    assert response.status_code == status, response.text
    assert problem in text_of(response.text)
    assert "<h1>Sign in</h1>" in response.text
    assert not is_signed_in(browser)


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


# The issuer's errors


def test_a_refusal_by_the_issuer_is_explained(browser: ConsoleClient, provider: Provider) -> None:
    query = query_of(redirect_back(start(browser))) | {"error": "access_denied"}
    response = browser.get(CALLBACK, params=query, follow_redirects=False)
    assert_failed(browser, response, "the identity provider did not sign you in: access_denied")
    assert not provider.requests("/token")


def test_a_hostile_error_description_is_escaped_and_needs_a_known_state(browser: ConsoleClient) -> None:
    hostile = "<script>alert(1)</script>\u202e\x1b[31m" + "x" * 5000
    query = {"error": "access_denied", "error_description": hostile}
    unknown = browser.get(CALLBACK, params={"state": "y" * 43, **query})
    assert "alert(1)" not in unknown.text
    response = browser.get(CALLBACK, params={"state": query_of(start(browser))["state"], **query})
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in response.text
    assert "<script>alert" not in response.text
    assert not {"\u202e", "\x1b"} & set(response.text)
    assert len(response.text) < 5000


@pytest.mark.parametrize("path", ["/.well-known/openid-configuration", "/token", "/keys"])
@pytest.mark.parametrize(
    "reply",
    [
        Reply(503),
        Reply(200, body=b"<html>"),
        Reply(200, body=b"[]"),
        Reply(200, body=b"{}"),
        Reply(200, body=b"7"),
        Reply(200, body=b"[" * 100_000),
        Reply(200, body=b'"' + b"x" * 2**20 + b'"'),
        Reply(302, {"location": "https://evil.example/"}),
        Reply(401, body=b"[]"),
    ],
)
def test_an_issuer_that_does_not_answer_properly_is_reported(
    browser: ConsoleClient, provider: Provider, path: str, reply: Reply
) -> None:
    provider.replies[path] = reply
    response = browser.get(START, follow_redirects=False)
    if path == "/.well-known/openid-configuration":
        assert_failed(browser, response, "does not respond as expected", 503)
        return
    response = sign_in(browser)
    problem = "the identity provider does not respond as expected" if path == "/token" else "keys are unavailable"
    assert_failed(browser, response, problem, 503)
    assert "Traceback" not in response.text


def test_an_issuer_that_cannot_be_reached_is_reported(new_browser: NewBrowser) -> None:
    browser = new_browser(oidc_issuer="http://127.0.0.1:1")
    response = browser.get(START, follow_redirects=False)
    assert_failed(browser, response, "the identity provider does not respond as expected; try again later", 503)


def test_a_sign_in_does_not_wait_for_an_issuer_that_hangs(browser: ConsoleClient, provider: Provider) -> None:
    release = threading.Event()

    def hang(_: Any) -> Reply:
        release.wait(60)
        return Reply(503)

    redirect = redirect_back(start(browser))
    provider.replies["/token"] = hang
    browser.app.state.issuer_calls = BoundedCalls("OIDC issuer", 1, 0.05, IssuerUnavailable)
    try:
        response = browser.get(redirect, follow_redirects=False)
        assert_failed(browser, response, "the OIDC issuer did not respond within 0.05 s", 503)
    finally:
        release.set()


def test_a_client_that_the_issuer_rejects_is_reported_without_its_secret(
    new_browser: NewBrowser, provider: Provider, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    browser = new_browser(oidc_client_secret="n0t-the-secret")
    assert_failed(browser, sign_in(browser), "does not accept this service", 503)
    assert "invalid_client" in caplog.text
    assert "n0t-the-secret" not in caplog.text


def test_only_failures_of_the_user_count_against_the_failure_limit(new_browser: NewBrowser, provider: Provider) -> None:
    browser = new_browser(failure_limit="2/minute")
    for _ in range(3):
        refused = {"state": query_of(start(browser))["state"], "error": "access_denied"}
        assert browser.get(CALLBACK, params=refused).status_code == 422
    provider.replies["/token"] = Reply(503)
    assert [sign_in(browser).status_code for _ in range(3)] == [503, 503, 503]
    assert [browser.get(CALLBACK).status_code for _ in range(3)] == [422, 422, 429]


# Sessions


@pytest.mark.parametrize(("lifetime_s", "expected_s"), [(300, 300 + LEEWAY_S), (90 * 86400, SESSION_S)])
def test_a_session_ends_when_the_token_expires_and_after_a_week_at_the_latest(
    browser: ConsoleClient, database: Engine, provider: Provider, lifetime_s: int, expected_s: float
) -> None:
    provider.id_claims = {"exp": int(time.time()) + lifetime_s}
    sign_in(browser)
    caller = browser.app.state.sessions.authenticate(browser.session)
    assert caller.expires_at == pytest.approx(time.time() + expected_s, abs=60)
    before, after = (
        BrowserSessions(database, browser.app.state.authenticator, lambda at=caller.expires_at + shift: at)
        for shift in (-1, 0)
    )
    assert before.authenticate(browser.session) == caller
    with pytest.raises(Unauthenticated):
        after.authenticate(browser.session)


def test_signing_out_ends_the_session_for_every_copy_of_its_cookie(
    browser: ConsoleClient, new_browser: NewBrowser
) -> None:
    sign_in(browser)
    copy = new_browser(browser.app)
    copy.cookies.set("amd_session_80", browser.session)
    assert is_signed_in(copy)
    assert browser.submit("/console/sign-out").headers["location"] == "/console/sign-in"
    assert not is_signed_in(copy)


def test_sessions_of_users_end_when_the_issuer_is_removed_from_the_settings(
    browser: ConsoleClient, app: Any, new_browser: NewBrowser
) -> None:
    sign_in(browser)
    other = new_browser(app)  # without an issuer, on the same database
    other.cookies.set("amd_session_80", browser.session)
    assert not is_signed_in(other)


def test_a_session_of_a_user_is_not_an_invalid_caller(browser: ConsoleClient) -> None:
    sign_in(browser)
    caller: Principal = browser.app.state.sessions.authenticate(browser.session)
    assert browser.app.state.authenticator.invalid_callers([caller.id]) == set()


def test_only_the_hash_of_a_session_is_stored_and_no_token(browser: ConsoleClient, database: Engine) -> None:
    sign_in(browser)
    with Session(database) as session:
        rows = session.scalars(select(BrowserSession).where(BrowserSession.key_id.is_(None))).all()
        stored = json.dumps([[str(value) for value in vars(row).values()] for row in rows])
    assert rows
    assert browser.session not in stored
    assert "eyJ" not in stored


def test_a_signed_in_user_is_not_sent_to_the_issuer(browser: ConsoleClient, provider: Provider) -> None:
    sign_in(browser)
    assert browser.get(START, follow_redirects=False).headers["location"] == "/console"


# The sign-in page


def test_the_sign_in_page_has_a_link_to_the_issuer_that_keeps_the_target(browser: ConsoleClient) -> None:
    page = browser.get("/console/sign-in?next=/console/jobs?state%3Dfailed%26q%3D%22")
    assert f'href="{START}?next=/console/jobs%3Fstate%3Dfailed%26q%3D%22">Sign in with SSO</a>' in page.text
    assert "autofocus" not in page.text  # it would skip the link
    assert "form-action 'self'" in page.headers["content-security-policy"]


def test_without_a_client_id_there_is_no_link_and_no_route(anonymous: ConsoleClient) -> None:
    page = anonymous.get("/console/sign-in").text
    assert "SSO" not in page
    assert "autofocus" in page
    assert anonymous.get(START, follow_redirects=False).status_code == 404
    assert anonymous.get(f"{CALLBACK}?state=x&code=y", follow_redirects=False).status_code == 404
