"""Tests for signing in through an OIDC issuer in a real browser, which sends cookies and checks the policies itself."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from playwright.sync_api import Browser, Page, expect

from service.app import create_app
from service.db.engine import migrate, open_engine
from service.settings import Settings
from tests.browser.conftest import PATIENCE_MS
from tests.support.service.fake_cluster import FakeCluster
from tests.support.service.oidc_provider import (
    AUDIENCE,
    CLIENT_ID,
    CLIENT_SECRET,
    Provider,
    running_provider,
)
from tests.support.service.receivers import Received, Reply
from tests.support.service.server import serve_app

expect.set_options(timeout=PATIENCE_MS)


class SignInService(NamedTuple):
    """A service at `localhost`, and its issuer at `127.0.0.1`, which is another site for the browser."""

    url: str
    provider: Provider


@pytest.fixture
def sign_in_service(tmp_path: Path) -> Iterator[SignInService]:
    engine = open_engine(f"sqlite:///{tmp_path / 'control-plane.db'}")
    migrate(engine)
    with running_provider() as provider:
        settings = Settings(
            data_dir=tmp_path,
            storage=str(tmp_path / "root"),
            oidc_issuer=provider.url,
            oidc_audience=AUDIENCE,
            oidc_client_id=CLIENT_ID,
            oidc_client_secret=CLIENT_SECRET,
        )
        _ask_for_consent(provider)
        with serve_app(create_app(settings, engine=engine, cluster=FakeCluster())) as url:
            yield SignInService(url.replace("127.0.0.1", "localhost"), provider)


def _ask_for_consent(provider: Provider) -> None:
    """Make the issuer show a page whose link continues, so that another site starts the navigation back."""
    authorize = provider.authorize

    def ask(request: Received) -> Reply:
        query = request.path.partition("?")[2].replace("&", "&amp;")
        return Reply(200, {"content-type": "text/html"}, f'<a href="/realm/consent?{query}">Continue</a>'.encode())

    provider.replies |= {"/authorize": ask, "/consent": authorize, "/favicon.ico": Reply(204)}


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """Open a page. Fails on console errors and policy violations."""
    problems: list[str] = []
    context = browser.new_context()
    context.set_default_timeout(PATIENCE_MS)
    page = context.new_page()
    page.on("console", lambda line: problems.append(line.text) if line.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    yield page
    context.close()
    assert problems == []


def test_a_user_signs_in_with_the_keyboard_through_another_site(page: Page, sign_in_service: SignInService) -> None:
    page.goto(f"{sign_in_service.url}/console/jobs?state=failed")
    page.keyboard.press("Tab")
    link = page.get_by_role("link", name="Sign in with SSO")
    expect(link).to_be_focused()
    page.keyboard.press("Enter")
    page.get_by_role("link", name="Continue").click()
    page.wait_for_url("**/console/jobs?state=failed")
    expect(page.get_by_title("Signed in as oidc:someone")).to_contain_text("video")
    page.get_by_role("button", name="Sign out").click()
    page.wait_for_url("**/console/sign-in")


def test_two_tabs_sign_in_at_the_same_time(page: Page, sign_in_service: SignInService) -> None:
    other = page.context.new_page()
    for tab in (page, other):
        tab.goto(f"{sign_in_service.url}/console/sign-in")
        tab.get_by_role("link", name="Sign in with SSO").click()
    for tab in (page, other):
        tab.get_by_role("link", name="Continue").click()
        tab.wait_for_url("**/console/jobs")
    assert [cookie["name"] for cookie in page.context.cookies() if "sign_in" in cookie["name"]] == []


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_sign_in_page_has_no_serious_accessibility_violations(
    page: Page, sign_in_service: SignInService, axe: str, theme: str
) -> None:
    page.emulate_media(color_scheme=theme)  # type: ignore[arg-type]
    page.goto(f"{sign_in_service.url}/console/sign-in")
    expect(page.get_by_role("link", name=re.compile("SSO"))).to_be_visible()
    found = page.evaluate(f"() => {{ {axe}; return axe.run(document, {{resultTypes: ['violations']}}); }}")
    assert [rule["id"] for rule in found["violations"] if rule["impact"] in ("serious", "critical")] == []
