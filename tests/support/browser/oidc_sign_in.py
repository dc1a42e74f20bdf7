"""Sign a console client in through an OIDC issuer on loopback, step by step."""

from __future__ import annotations

import httpx

from tests.support.browser.console_client import ConsoleClient, text_of
from tests.support.service.oidc_provider import redirect_back

START, CALLBACK = "/console/sign-in/oidc", "/console/sign-in/callback"


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
    assert problem.lower() in text_of(response.text).lower()
    assert "<h1>Sign in</h1>" in response.text
    assert not is_signed_in(browser)
