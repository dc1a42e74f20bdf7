"""A client for the console that, like a browser without scripts, stores cookies and sends forms with CSRF tokens."""

from __future__ import annotations

import re
from typing import Any

import httpx
from starlette.testclient import TestClient

from service.auth.sessions import csrf_token


class ConsoleClient(TestClient):
    """A test client with a console session."""

    def sign_in(self, key: str) -> httpx.Response:
        return self.post("/console/sign-in", data={"key": key.removeprefix("Bearer ")})

    @property
    def session(self) -> str:
        (cookie,) = [cookie.value for cookie in self.cookies.jar if "amd_session" in cookie.name]
        assert cookie is not None
        return cookie

    def submit(self, path: str, **fields: Any) -> httpx.Response:
        """Send a form as htmx does. Redirects are not followed."""
        headers = {"X-CSRF-Token": csrf_token(self.session), "HX-Request": "true"}
        return self.post(path, data=fields, headers=headers, follow_redirects=False)


def text_of(page: str) -> str:
    """Return the text of a page, with tags removed and entities decoded."""
    import html

    return html.unescape(re.sub(r"<[^>]*>", " ", page))


def plain_text_of(page: str) -> str:
    """Return a page's text with single spaces."""
    return " ".join(text_of(page).split())
