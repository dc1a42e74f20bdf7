"""Tests for the console's headers, its protection from other sites, and hostile text."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest

from service.auth.sessions import csrf_token
from service.console import rendering as pages
from tests.support.browser.console_client import ConsoleClient
from tests.support.service.fake_cluster import queued


@pytest.mark.parametrize(
    "path", ["/console/sign-in", "/console/jobs", "/console/nothing", f"{pages.STATIC_PREFIX}/console.css"]
)
def test_every_response_forbids_inline_code_other_hosts_and_frames(console: ConsoleClient, path: str) -> None:
    headers = console.get(path, follow_redirects=False).headers
    policy = headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "frame-ancestors 'none'" in policy  # clickjacking
    assert headers["x-frame-options"] == "DENY"
    assert headers["x-content-type-options"] == "nosniff"


def test_responses_outside_the_console_are_unchanged(console: ConsoleClient) -> None:
    assert "content-security-policy" not in console.get("/livez").headers


def test_templates_contain_neither_inline_code_nor_unescaped_values_nor_other_hosts() -> None:
    for path in (pages.FOLDER / "templates").rglob("*.html"):
        text = path.read_text()
        assert not re.search(r"\son\w+=|\sstyle=|<script(?![^>]*\ssrc=)|\|\s*safe|javascript:|https?://", text), path


def test_files_of_other_projects_are_those_of_their_registry() -> None:
    pins = json.loads((pages.STATIC / "vendor" / "vendor.json").read_text())
    for package in pins["packages"]:
        for file in package["files"] if package["shipped"] else []:
            content = (pages.STATIC / "vendor" / file["name"]).read_bytes()
            assert hashlib.sha256(content).hexdigest() == file["sha256"], file["name"]
        assert package["license"] in {"0BSD", "MIT", "Apache-2.0", "MPL-2.0"}


def test_static_files_are_kept_for_good_and_no_other_file_is_served(console: ConsoleClient) -> None:
    response = console.get(f"{pages.STATIC_PREFIX}/vendor/uplot.min.js")
    assert response.headers["cache-control"] == "public, max-age=31536000, immutable"
    for path in (
        "../pages.py",
        "%2e%2e/pages.py",
        "vendor/../../pages.py",
        "vendor",
        "console.css/x",
        "vendor/vendor.json",
    ):
        assert console.get(f"{pages.STATIC_PREFIX}/{path}").status_code in (404, 422), path


def test_the_version_in_static_paths_changes_with_any_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.js").write_text("1")
    monkeypatch.setattr(pages, "STATIC", tmp_path)
    before = pages._fingerprint()
    (tmp_path / "a.js").write_text("2")
    assert pages._fingerprint() != before


# Requests of other sites

CANCEL = "/console/jobs/{}/cancel"


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 403),
        ({"X-CSRF-Token": "0" * 64}, 403),
        ({"Origin": "https://evil.example"}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
        ({"X-CSRF-Token": "own"}, 204),
        ({"X-CSRF-Token": "own", "Origin": "http://testserver", "Sec-Fetch-Site": "same-origin"}, 204),
        ({"X-CSRF-Token": "own", "Origin": "https://evil.example"}, 403),
    ],
)
def test_a_change_needs_the_token_of_the_session(
    app: Any, console: ConsoleClient, headers: dict[str, str], status: int
) -> None:
    job = queued(app.state.jobs)
    own = {name: csrf_token(console.session) if value == "own" else value for name, value in headers.items()}
    response = console.post(CANCEL.format(job.id), headers={"HX-Request": "true", **own})
    assert response.status_code == status
    assert app.state.jobs.get(job.id).state == ("cancelled" if status == 204 else "queued")


def test_a_form_of_another_site_cannot_sign_the_browser_in(anonymous: ConsoleClient) -> None:
    response = anonymous.post("/console/sign-in", data={"key": "amd_x"}, headers={"Origin": "https://evil.example"})
    assert response.status_code == 403


def test_a_token_of_another_session_is_refused(app: Any, console: ConsoleClient, reader: ConsoleClient) -> None:
    job = queued(app.state.jobs)
    response = console.post(CANCEL.format(job.id), headers={"X-CSRF-Token": csrf_token(reader.session)})
    assert response.status_code == 403


def test_forms_send_the_token_in_a_field(console: ConsoleClient) -> None:
    assert f'name="csrf" value="{csrf_token(console.session)}"' in console.get("/console/jobs").text
    response = console.post("/console/sign-out", data={"csrf": csrf_token(console.session)}, follow_redirects=False)
    assert response.status_code == 303
