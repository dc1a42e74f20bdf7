"""Tests for signing in through an OIDC issuer that fails, and for the sessions and the sign-in page of its users."""

from __future__ import annotations

import json
import threading
import time
from typing import Any

import pytest
from sqlalchemy import Engine, select
from sqlalchemy.orm import Session

from service.auth.authentication import Principal
from service.auth.oidc import LEEWAY_S
from service.auth.sessions import SESSION_S, BrowserSessions
from service.db.models import BrowserSession
from service.web.bounded_calls import BoundedCalls
from service.web.errors import IssuerUnavailable, Unauthenticated
from tests.service.console.conftest import NewBrowser
from tests.support.browser.console_client import ConsoleClient
from tests.support.browser.oidc_sign_in import CALLBACK, START, assert_failed, is_signed_in, sign_in, start
from tests.support.service.oidc_provider import (
    Provider,
    query_of,
    redirect_back,
)
from tests.support.service.receivers import Reply


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
