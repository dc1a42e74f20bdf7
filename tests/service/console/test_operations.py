"""Tests for the operations pages: usage and quotas, the audit log, retention, and activity."""

from __future__ import annotations

import html
import re
import time
from datetime import UTC, datetime
from typing import Any

import pytest
from sqlalchemy import Engine
from sqlalchemy.orm import Session

from amd.storage import exists, join, write_bytes
from amd.training.run_folder import run_folder
from service.auth.api_keys import KeyRequest, KeyStore
from service.console.pages.projects import Month
from service.db.models import Attempt, Job
from service.projects.audit import ACTIONS
from service.projects.schemas import ProjectPolicy
from service.projects.store import ProjectStore
from service.webhooks.store import WebhookStore
from tests.support.browser.console_client import ConsoleClient, text_of
from tests.support.service.apps import key_to
from tests.support.service.fake_cluster import new_job, queued


def plain_text_of(page: str) -> str:
    return " ".join(text_of(page).split())


MONTH = "2021-03"
ENDED_AT = datetime(2021, 3, 15, tzinfo=UTC).timestamp()
"""Fixed: in the first hours of a month, an attempt that ended just now belongs in part to the month before."""


def add_attempt(engine: Engine, job: Job, hours: float, ended: bool = True) -> None:
    """Store an attempt that ended in `MONTH`, or one that began just now and still runs."""
    end = ENDED_AT if ended else time.time()
    facts: dict[str, Any] = {"submission_id": job.id, "state": "failed", "message": "", "cpus": 4.0, "gpus": 2.0}
    with Session(engine) as session, session.begin():
        started = end - hours * 3600
        session.add(Attempt(job_id=job.id, number=1, started_at=started, ended_at=end if ended else None, **facts))


def test_the_usage_page_shows_current_use_of_quotas_and_hours_by_month(
    app: Any, console: ConsoleClient, database: Engine
) -> None:
    policy = ProjectPolicy(share=3, max_running_jobs=4, max_gpus=16, gpu_hours_per_month=1.0, max_priority=7)
    ProjectStore(database).put("quotas", policy, "test")
    job = queued(app.state.jobs, project="quotas", state="running", attempt=1, workers=2, created_by="alice")
    add_attempt(database, job, 0.001, ended=False)
    text = plain_text_of(console.get("/console/usage").text)
    assert re.search(r"quotas 3 1 of 4 2 2 of 16 0 0 \d+ s of 1 h \d+ s 7", text)
    assert job.id not in text
    by_job = console.get("/console/usage?by=job").text
    assert f'href="/console/jobs/{job.id}/history"' in by_job
    assert "alice" in text_of(console.get("/console/usage?by=user").text)
    assert "No job ran in this month." in text_of(console.get("/console/usage?by=job&month=2021-02").text)
    assert 'href="/console/usage?month=2021-01&amp;by=job"' in console.get("/console/usage?by=job&month=2021-02").text
    for month in ("2021-13", "2021", "1999-01", "x"):
        assert console.get(f"/console/usage?month={month}").status_code == 422
    app.state.jobs.change(job, "failed", state="failed")


def test_a_reader_sees_its_projects_usage_but_no_quotas(app: Any, database: Engine) -> None:
    ProjectStore(database).put("seen", ProjectPolicy(max_gpus=5), "test")
    ours, theirs = (queued(app.state.jobs, project=project) for project in ("seen", "hidden"))
    for job in (ours, theirs):
        add_attempt(database, job, 0.001)
    reader = ConsoleClient(app)
    reader.sign_in(key_to(database, "read", project="seen")["Authorization"])
    page = reader.get(f"/console/usage?by=job&month={MONTH}").text
    assert ours.id in page
    assert theirs.id not in page
    assert "Quotas" not in page
    for path in ("audit", "retention"):
        assert f'href="/console/{path}"' not in page
        assert reader.get(f"/console/{path}").status_code == 403


def test_adding_months_carries_over_into_years() -> None:
    assert str(Month(2025, 12).plus(1)) == "2026-01"
    assert str(Month(2026, 1).plus(-1)) == "2025-12"
    assert Month.parse("2026-07").start.isoformat() == "2026-07-01T00:00:00+00:00"


def test_the_audit_log_is_filtered_and_paged_by_the_service(app: Any, console: ConsoleClient, database: Engine) -> None:
    store = ProjectStore(database)
    for number in range(60):
        store.put("audited", ProjectPolicy(max_gpus=number), "a-user")
    page = console.get("/console/audit?actor=a-user&action=project").text
    assert page.count("<td>project.put</td>") == 50
    older = re.search(r'href="(/console/audit\?[^"]*cursor[^"]*)"', page)
    assert older is not None
    rest = console.get(older[1].replace("&amp;", "&")).text
    assert rest.count("<td>project.put</td>") == 10
    assert "Newest" in text_of(rest)
    assert "No changes match." in text_of(console.get("/console/audit?target=nothing").text)
    assert "No changes match." in text_of(console.get("/console/audit?action=project.get").text)
    assert console.get("/console/audit?action=%25").status_code == 422
    own = ConsoleClient(app)
    own.sign_in(key_to(database, "admin", project="other")["Authorization"])
    assert "<td>project.put</td>" not in own.get("/console/audit").text


def test_the_audit_log_can_be_filtered_by_all_actions(console: ConsoleClient) -> None:
    page = console.get("/console/audit?action=job.cancel").text
    options = re.findall(r'<option (?:value="(\w+)" )?(selected)?>([^<]*)</option>', page)
    assert {value or text for value, _, text in options} == {*ACTIONS, *(name.partition(".")[0] for name in ACTIONS)}
    assert [text for _, selected, text in options if selected] == ["job.cancel"]
    assert re.search('<option value="job" selected>', console.get("/console/audit?action=job").text)


def test_a_dry_run_reports_bytes_that_only_applying_it_removes(
    app: Any, console: ConsoleClient, database: Engine
) -> None:
    root = app.state.settings.root
    old = time.time() - 90 * 86_400
    job = queued(app.state.jobs, state="failed", attempt=1, ended_at=old, created_at=old, changed_at=old)
    checkpoint = join(run_folder(root, job.id), "checkpoints", "step-00000001", "weights")
    write_bytes(checkpoint, b"x" * 1234)
    assert "There was no collection in the last 30 days." in text_of(console.get("/console/retention").text)
    planned = console.submit("/console/retention/dry-run", checkpoints_days="30")
    assert planned.status_code == 200
    assert "Would free 1\u202f234 bytes in 1 file" in text_of(planned.text)
    assert 'hx-confirm="Remove 1\u202f234 bytes in 1 file and 0 database rows permanently?"' in planned.text
    assert 'id="collections"' not in planned.text
    assert '<input type="hidden" name="checkpoints_days" value="30.0">' in planned.text
    assert exists(checkpoint)
    nothing = console.submit("/console/retention/dry-run", checkpoints_days="365").text
    assert "There is nothing to remove." in text_of(nothing)
    assert "Apply" not in nothing
    applied = console.submit("/console/retention/apply", checkpoints_days="30.0")
    assert "Freed 1\u202f234 bytes" in text_of(applied.text)
    assert 'id="collections" hx-swap-oob="true"' in applied.text
    assert "There was no collection" not in text_of(applied.text)
    assert not exists(checkpoint)
    assert "1\u202f234" in text_of(console.get("/console/retention").text)
    invalid = console.submit("/console/retention/dry-run", checkpoints_days="-1")
    assert invalid.status_code == 422
    assert "checkpoints_days" in invalid.text


def test_retention_requires_an_admin_of_all_projects(app: Any, database: Engine) -> None:
    admin = ConsoleClient(app)
    admin.sign_in(key_to(database, "admin", project="own")["Authorization"])
    assert admin.get("/console/retention").status_code == 403
    for path in ("dry-run", "apply"):
        assert admin.submit(f"/console/retention/{path}").status_code == 403
    assert 'href="/console/retention"' not in admin.get("/console/usage").text


def test_the_activity_page_describes_events_and_links_to_their_objects(app: Any, console: ConsoleClient) -> None:
    job = queued(app.state.jobs, project="active", name="Digits <b>")
    app.state.jobs.change(job, "failed", state="failed", reason="nan_loss", message="step 3")
    page = console.get("/console/activity?type=job.failed").text
    assert f'href="/console/jobs/{job.id}/history"' in page
    text = plain_text_of(page)
    assert f"{job.name} Failed by the service , project active" in text
    assert f'title="{job.id}"' in page
    assert "The loss became NaN or infinite" in text
    assert "Submitted" not in text
    assert console.get("/console/activity?type=key").status_code == 422


def test_a_webhook_is_tested_and_a_delivery_is_repeated(console: ConsoleClient, database: Engine) -> None:
    webhook = WebhookStore(database).add("https://hooks.example.com", None, [], "test")
    assert console.submit(f"/console/webhooks/{webhook.id}/test").status_code == 204
    (delivery,) = WebhookStore(database).deliveries(webhook.id, None, 10)
    action = f"/console/webhooks/{webhook.id}/deliveries/{delivery.id}/redeliver"
    assert f'hx-post="{action}"' in console.get("/console/webhooks").text
    assert console.submit(action).status_code == 204


def test_a_new_webhook_is_listed_at_once_and_its_secret_is_shown_once(console: ConsoleClient, database: Engine) -> None:
    values = {"url": "https://hooks.example.com/<new>", "events": ["failed", "time_limit"], "project": "hooked"}
    fragment = console.submit("/console/webhooks", **values).text
    assert "shown only once" in fragment
    assert re.search(r'<div id="webhooks" [^>]* hx-swap-oob="true">', fragment)
    assert "https://hooks.example.com/&lt;new&gt;</h2>" in fragment
    (webhook,) = WebhookStore(database).of_project("hooked")
    assert (webhook.events, webhook.secret in fragment) == (["failed", "time_limit"], True)
    page = console.get("/console/webhooks").text
    assert "failed, time_limit, hooked" in text_of(page)
    assert webhook.secret not in page
    assert "hx-swap-oob" not in page
    offered = re.findall("<option>(.*?)</option>", page)
    assert {"created", "failed", "preempt", "pause"} <= set(offered)
    assert len(offered) == len(set(offered))


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"url": "http://hooks.example.com"}, "url: "),
        ({"url": "https://hooks.example.com", "events": "exploded"}, "must be "),
        ({"url": ""}, "must have at least 1 character"),
    ],
)
def test_an_invalid_webhook_is_rejected(console: ConsoleClient, values: dict[str, str], problem: str) -> None:
    response = console.submit("/console/webhooks", **values)
    assert response.status_code in (400, 403, 422), response.text
    assert problem in html.unescape(response.text)


def test_a_reader_cannot_create_webhooks(reader: ConsoleClient) -> None:
    assert reader.submit("/console/webhooks", url="https://hooks.example.com").status_code == 403


def test_a_new_key_is_shown_once_and_listed_at_once(console: ConsoleClient) -> None:
    fragment = console.submit("/console/keys", name="Ada", scope="read").text
    assert "Key for Ada, shown only once" in fragment
    assert re.search(r'<div id="keys" class="panel table" hx-swap-oob="true">.*>Ada<', fragment, re.DOTALL)
    page = console.get("/console/keys").text
    assert '<div id="keys" class="panel table" >' in page
    assert "shown only once" not in page


def test_pages_show_the_names_of_keys_with_their_ids_as_titles(
    app: Any, console: ConsoleClient, database: Engine
) -> None:
    key, _ = KeyStore(database).create(KeyRequest(name="Grace <b>", scopes=["submit"]), "named", "test")
    job = app.state.jobs.add(new_job(project="named", created_by=key.id), key.id)
    add_attempt(database, job, 0.1)
    ProjectStore(database).put("named", ProjectPolicy(), key.id)
    for path in (
        f"jobs/{job.id}",
        f"jobs/{job.id}/history",
        "activity",
        "audit?target=named",
        f"usage?by=user&month={MONTH}",
    ):
        assert re.search(rf'title="{key.id}"[^>]*>Grace &lt;b&gt;<', console.get(f"/console/{path}").text), path
    other = queued(app.state.jobs, project="named", created_by="0123456789abcdef")
    assert 'by <span title="0123456789abcdef">0123456789abcdef</span>' in console.get(f"/console/jobs/{other.id}").text


def test_a_reader_sees_no_names_of_other_projects_keys(app: Any, database: Engine) -> None:
    store = KeyStore(database)
    theirs, ours, shared = (
        store.create(KeyRequest(name=f"key of {project}", scopes=["submit"]), project, "test")[0]
        for project in ("theirs", "ours", None)
    )
    reader = ConsoleClient(app)
    reader.sign_in(key_to(database, "read", project="ours")["Authorization"])
    for key, shown in ((theirs, theirs.id), (ours, "key of ours"), (shared, "key of None")):
        job = queued(app.state.jobs, project="ours", created_by=key.id)
        assert f'by <span title="{key.id}">{shown}</span>' in reader.get(f"/console/jobs/{job.id}").text


def test_the_audit_log_names_jobs(app: Any, console: ConsoleClient) -> None:
    job = app.state.jobs.add(new_job(name="Ablation", project="audited-jobs"), "someone")
    page = console.get(f"/console/audit?target={job.id}").text
    assert re.search(rf'<a [^>]*title="{job.id}"[^>]*>Ablation</a>', page)


def test_usage_without_hours_has_a_unit(console: ConsoleClient) -> None:
    assert "GPU time 0 h, CPU time 0 h" in text_of(console.get("/console/usage?month=2021-02").text)


def test_usage_shows_short_times_in_minutes_and_the_names_of_jobs(
    app: Any, console: ConsoleClient, database: Engine
) -> None:
    named = queued(app.state.jobs, project="short", name="Digits")
    unnamed = queued(app.state.jobs, project="short", name=None)
    for job, hours in ((named, 197 / 3600 / 4), (unnamed, 1.0)):
        add_attempt(database, job, hours)
    page = console.get(f"/console/usage?by=job&month={MONTH}").text
    text = plain_text_of(page)
    assert f"Digits {named.id} short 1 min 38 s 3 min 17 s 1" in text
    assert f"{unnamed.id} short 2 h 4 h 1" in text
    assert app.state.jobs.names([named.id, unnamed.id, "unknown"]) == {named.id: "Digits"}


def test_times_of_events_state_their_time_zone(app: Any, console: ConsoleClient) -> None:
    job = queued(app.state.jobs)
    for path in ("activity", f"jobs/{job.id}/history"):
        assert re.search(r'<time [^>]*title="[0-9 :-]+ UTC, ', console.get(f"/console/{path}").text)


def test_the_retention_page_states_how_long_deliveries_are_kept(app: Any, console: ConsoleClient) -> None:
    text = plain_text_of(console.get("/console/retention").text)
    assert "No policy is set, so user data is kept. Finished webhook deliveries are removed after 7 days." in text
