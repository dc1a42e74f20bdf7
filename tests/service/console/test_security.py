"""Tests for the console's security headers, CSRF protection, and escaping of untrusted text."""

from __future__ import annotations

import hashlib
import json
import re
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from fastapi.routing import iter_route_contexts
from sqlalchemy import Engine
from sqlalchemy.orm import Session

from amd.storage import join, write_bytes
from amd.training.run_folder import run_folder
from service.auth.sessions import csrf_token
from service.console import rendering as pages
from service.db.audit import record_change
from service.db.models import GarbageCollection
from service.jobs.store import JobFilter
from service.operations.retention.history import record_collection
from service.serving.deployments import new_deployment
from service.serving.schemas import ServingSettings
from service.webhooks.store import WebhookStore
from tests.support.browser import scenes
from tests.support.browser.console_client import ConsoleClient
from tests.support.encoders.encoder_cards import index_encoder, score
from tests.support.service.apps import key_to
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


def test_templates_contain_no_inline_code_unescaped_values_or_other_hosts() -> None:
    for path in (pages.FOLDER / "templates").rglob("*.html"):
        text = path.read_text()
        assert not re.search(r"\son\w+=|\sstyle=|<script(?![^>]*\ssrc=)|\|\s*safe|javascript:|https?://", text), path


def test_vendored_files_match_their_recorded_hashes_and_have_allowed_licenses() -> None:
    pins = json.loads((pages.STATIC / "vendor" / "vendor.json").read_text())
    for package in pins["packages"]:
        for file in package["files"] if package["shipped"] else []:
            content = (pages.STATIC / "vendor" / file["name"]).read_bytes()
            assert hashlib.sha256(content).hexdigest() == file["sha256"], file["name"]
        assert package["license"] in {"0BSD", "MIT", "Apache-2.0", "MPL-2.0"}


def test_static_files_are_cached_permanently_and_no_other_file_is_served(console: ConsoleClient) -> None:
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


def test_the_version_in_static_paths_changes_when_any_file_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.js").write_text("1")
    monkeypatch.setattr(pages, "STATIC", tmp_path)
    before = pages._fingerprint()
    (tmp_path / "a.js").write_text("2")
    assert pages._fingerprint() != before


# Requests from other sites

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
def test_a_change_requires_the_csrf_token_of_the_session(
    app: Any, console: ConsoleClient, headers: dict[str, str], status: int
) -> None:
    job = queued(app.state.jobs)
    own = {name: csrf_token(console.session) if value == "own" else value for name, value in headers.items()}
    response = console.post(CANCEL.format(job.id), headers={"HX-Request": "true", **own})
    assert response.status_code == status
    assert app.state.jobs.get(job.id).state == ("cancelled" if status == 204 else "queued")


def test_a_form_on_another_site_cannot_sign_in_to_the_console(anonymous: ConsoleClient) -> None:
    response = anonymous.post("/console/sign-in", data={"key": "amd_x"}, headers={"Origin": "https://evil.example"})
    assert response.status_code == 403


def test_a_csrf_token_from_another_session_is_rejected(app: Any, console: ConsoleClient, reader: ConsoleClient) -> None:
    job = queued(app.state.jobs)
    response = console.post(CANCEL.format(job.id), headers={"X-CSRF-Token": csrf_token(reader.session)})
    assert response.status_code == 403


def test_forms_contain_the_csrf_token_in_a_field(console: ConsoleClient) -> None:
    assert f'name="csrf" value="{csrf_token(console.session)}"' in console.get("/console/jobs").text
    response = console.post("/console/sign-out", data={"csrf": csrf_token(console.session)}, follow_redirects=False)
    assert response.status_code == 303


# Hostile text

NASTY = (
    "<script>alert(1)</script>",
    "\"'><img src=x onerror=alert(1)>",
    "{{ 7 * 7 }}{% raw %}",
    "\u202egnp.exe\u202c\u200b\u2066",
    "\x1b[31m\x1b]8;;javascript:alert(1)\x07x",
    "x" * 180,
)


@pytest.fixture(scope="module")
def hostile(app: Any, database: Engine) -> dict[str, dict[str, Any]]:
    """Create jobs, encoders, aliases, keys and webhooks that contain hostile strings. Returns path parameters."""
    root, store = app.state.settings.root, app.state.jobs
    for text in NASTY:
        labels = {"label": text[:200]}
        job = queued(store, name=text, labels=labels, preset=text[:90], message=text, created_by=text[:90])
        scenes.start(store, job)
        scenes.finish(store, job.id, "failed", reason="unknown", message=text)
        queued(store, name=text, message=text)
        key_to(database, "read")
        metrics = "".join(json.dumps({"step": step, f"loss/{text}": 1.0}) + "\n" for step in range(2))
        write_bytes(join(run_folder(root, job.id), "metrics", "000000.jsonl"), metrics.encode())
        scenes.write_log(root, job.id, 2, f"{text}\n")
        fault = json.dumps({"record": 0, "location": text, "reason": text}) + "\n"
        write_bytes(join(run_folder(root, job.id), "bad_samples.jsonl"), fault.encode())
    config = {"note": NASTY[0], NASTY[1]: NASTY[2]}
    facts: dict[str, Any] = {"config": config, "weights_license": NASTY[1], "data": {"train": NASTY[0]}}
    for name in ("first", "second"):
        scores = (score("knn", 1.0, NASTY[0], NASTY[1]),)
        index_encoder(database, name, teacher={"preset": NASTY[0]}, scores=scores, **facts)
    app.state.encoders.move_alias("default", "alias", "first", "test")
    plain: dict[str, Any] = {"share": 0.5, "settings": ServingSettings()}
    for text in NASTY:
        desired = new_deployment("deployed", "default", text[:100], encoder=text, candidate=text, **plain)
        app.state.deployments.put(desired, resolved={"main": text, "candidate": text})
    desired = new_deployment("deployed", "default", "test", encoder="alias", candidate=None, **plain)
    stored, _ = app.state.deployments.put(desired)
    app.state.deployments.record_status(stored, "failed", NASTY[0], {"main": "first"})
    WebhookStore(database).add(f"https://example.com/{NASTY[0]}", None, [], "test")
    with Session(database) as session, session.begin():
        for text in NASTY:
            for action in ("job.cancel", "alias.move", "deployment.put", "key.create"):
                record_change(session, text[:100], action, text, "default", text)
    for text in NASTY:
        numbers = dict.fromkeys(("items", "skipped", "files", "bytes", "rows"), 1)
        now = time.time()
        record_collection(
            database, GarbageCollection(started_at=now, ended_at=now, actor=text[:100], **numbers), planned=1
        )
    return {"job_id": {"job_id": job.id}, "encoder": {"encoder": "first"}, "name": {"name": "deployed"}}


CONSOLE_PAGES = {
    *(
        "/console/jobs",
        "/console/sweeps",
        "/console/encoders",
        "/console/deployments",
        "/console/cluster",
        "/console/lab",
    ),
    *("/console/failures", "/console/keys", "/console/webhooks", "/console/new", "/console/jobs/{job_id}"),
    *("/console/activity", "/console/audit", "/console/retention", "/console/usage"),
    *(f"/console/jobs/{{job_id}}/{tab}" for tab in ("head", "log", "config", "history", "pictures", "files", "map")),
    *(f"/console/jobs/{{job_id}}/{action}" for action in ("clone", "report")),
    *("/console/encoders/{encoder}", "/console/compare", "/console/deployments/{name}"),
}
QUERIES = {"/console/compare": "?encoder=first&encoder=second", "/console/usage": "?by=user"}
OTHER_ROUTES = {  # not pages: files, data, streams, redirects and the sign-in page, which shows no stored text
    *("/console/sign-in/oidc", "/console/sign-in/callback"),  # tests are in test_oidc_sessions.py
    *("/console", "/console/sign-in", "/console/link", "/console/{path:path}", "/console/sweeps/{job_id}"),
    *("/console/jobs/{job_id}/metrics.json", "/console/jobs/{job_id}/events", "/console/sweeps/{job_id}/charts.json"),
    "/console/jobs/{job_id}/media/{step}/{picture}",
    "/console/jobs/{job_id}/artifacts/{path:path}",
    *(f"/console/jobs/{{job_id}}/log/{data}" for data in ("follow", "range", "search", "download")),
    "/console/jobs/{job_id}/map.json",
    *(f"/console/jobs/{{job_id}}/map/{data}" for data in ("thumbnails/{record}", "neighbours.json")),
    f"{pages.STATIC_PREFIX}/{{file:path}}",
}


def test_every_console_route_is_listed_as_a_page_or_an_exception(app: Any) -> None:
    routes = {route.path for route in iter_route_contexts(app.routes) if "GET" in (route.methods or ())}
    assert {path for path in routes if path.startswith("/console")} == CONSOLE_PAGES | OTHER_ROUTES


@pytest.mark.parametrize("path", sorted(CONSOLE_PAGES))
def test_hostile_text_is_escaped_on_every_page(
    console: ConsoleClient, hostile: dict[str, dict[str, Any]], app: Any, path: str
) -> None:
    jobs = [job.id for job in app.state.jobs.list(JobFilter(), limit=200).jobs] if "{job_id}" in path else [""]
    for job_id in jobs:
        url = path.format(job_id=job_id, encoder="first", name="deployed")
        response = console.get(url + QUERIES.get(path, ""))
        assert response.status_code == 200, response.text[:300]
        assert "text/html" in response.headers["content-type"]
        assert dangerous(response.text) == []
        assert "49{%" not in response.text


def dangerous(page: str) -> list[str]:
    """Return the elements and attributes on a page that do not come from its templates."""
    found: list[str] = []

    class TagCollector(HTMLParser):
        def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
            given = dict(attributes)
            foreign = tag == "img" or (tag == "script" and not (given.get("src") or "").startswith(pages.STATIC_PREFIX))
            found.extend([tag] * foreign)
            found.extend(name for name in given if name.startswith("on") or name == "style")

    TagCollector().feed(page)
    return found


def test_a_page_without_escaping_is_detected() -> None:
    assert dangerous("".join(NASTY)) == ["script", "img", "onerror"]


def test_a_read_only_key_cannot_make_any_change(app: Any, reader: ConsoleClient) -> None:
    posts = {route.path for route in iter_route_contexts(app.routes) if "POST" in (route.methods or ())}
    changes = {path for path in posts if path.startswith("/console")} - {"/console/sign-in", "/console/sign-out"}
    job = queued(app.state.jobs)
    values = {"job_id": job.id, "action": "cancel", "encoder": "first", "name": "deployed", "alias": "alias"}
    for path in sorted(changes - {"/console/encoders/{encoder}/try", "/console/lab/masks"}):
        url = path.format(**values, number=0, key_id="abc", webhook_id="wh_abc", delivery_id=1)
        assert reader.submit(url).status_code == 403, path
        assert ConsoleClient(app).post(url, follow_redirects=False).status_code == 303, path
    assert len(changes) > 15
