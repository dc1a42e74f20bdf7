"""Tests for the job list and the job pages."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine

from amd.config import ConfigError, TrainConfig
from amd.presets.load import load_config
from service.console import wording
from service.console.pages import operations
from service.jobs.actions import ACTIONS, act
from tests.service.console.conftest import new_app
from tests.support.browser import scenes
from tests.support.browser.console_client import ConsoleClient, text_of
from tests.support.service.apps import key_to
from tests.support.service.fake_cluster import queued


@pytest.fixture(scope="module")
def app(database: Engine, folder: Path) -> Any:
    app = new_app(database, folder)
    scenes.populate(database, app.state.settings.root)
    return app


def rows(page: str) -> list[str]:
    return re.findall(r'id="job-([^"]+)"', page)


def test_the_list_shows_the_newest_jobs_with_their_progress_or_reason_for_waiting(console: ConsoleClient) -> None:
    page = console.get("/console/jobs").text
    assert rows(page)[0] == scenes.QUEUED
    text = text_of(page)
    assert "waiting for 8 CPUs to become free" in text
    assert "1\u202f320 / 2\u202f000 steps" in text
    assert "7 min 11 s" in text


@pytest.mark.parametrize(
    ("query", "found"),
    [
        ("q=TEACHER+RATIO", {scenes.RUNNING}),
        ("q=3a4b5c6d", {scenes.QUEUED}),
        ("q=%25", set()),
        ("state=failed&label=study%3Dlr", {scenes.FAILED}),
        ("kind=search", {scenes.SWEEP, scenes.ENDED_SWEEP}),
        ("label=no-equals-sign&state=queued", {scenes.QUEUED}),
    ],
)
def test_the_list_is_filtered_by_text_state_kind_and_label(console: ConsoleClient, query: str, found: set[str]) -> None:
    assert set(rows(console.get(f"/console/jobs?{query}").text)) == found


def test_a_facet_counts_the_jobs_that_match_all_other_filters(console: ConsoleClient, database: Engine) -> None:
    headers = key_to(database, "read")
    found = console.get("/v1/jobs?facets=true&state=failed&q=Ablation", headers=headers).json()["facets"]
    assert found["state"]["succeeded"] > found["state"]["failed"] == found["kind"]["train"] > 0
    assert console.get("/v1/jobs", headers=headers).json()["facets"] is None


def test_jobs_can_be_filtered_by_time(console: ConsoleClient, database: Engine) -> None:
    headers = key_to(database, "read")
    day = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() - 86400))
    recent, old = (
        console.get(f"/v1/jobs?{bound}={day}&limit=200", headers=headers).json()["items"]
        for bound in ("since", "until")
    )
    assert {job["id"] for job in recent} >= {scenes.RUNNING, scenes.SUCCEEDED}
    assert {job["name"].split()[0] for job in old} == {"Ablation"}


def test_the_list_links_to_older_jobs(console: ConsoleClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.console.pages.jobs.PAGE", 10)
    page = console.get("/console/jobs?state=succeeded").text
    (older,) = re.findall(r'href="(/console/jobs\?[^"]*cursor=[^"]*)"', page)
    second = console.get(older.replace("&amp;", "&")).text
    assert len(rows(page)) == 10
    assert rows(second)
    assert not {*rows(page)} & {*rows(second)}
    assert "Newest" in second


@pytest.mark.parametrize("tab", ["", "/log", "/config", "/history", "/pictures", "/files", "/head"])
def test_every_job_page_shows_the_jobs_state(console: ConsoleClient, tab: str) -> None:
    response = console.get(f"/console/jobs/{scenes.RUNNING}{tab}")
    assert response.status_code == 200
    assert "Digits, teacher ratio 0.6" in response.text
    assert 'class="state busy">running' in response.text


def test_a_waiting_job_shows_its_place_in_its_projects_queue_and_what_it_is_waiting_for(
    console: ConsoleClient, app: Any
) -> None:
    first = queued(app.state.jobs, priority=5, name="urgent")
    other = queued(app.state.jobs, priority=9, project="another")
    text = text_of(console.get(f"/console/jobs/{scenes.QUEUED}").text)
    assert "2nd of 2 waiting jobs in project default" in text
    assert "waiting for 8 CPUs to become free" in text
    assert "urgent" in text
    third = queued(app.state.jobs, priority=-60)
    pages = {job_id: console.get(f"/console/jobs/{job_id}").text for job_id in (first.id, third.id, scenes.RUNNING)}
    assert "decides within seconds whether the job can start" in text_of(pages[first.id])
    assert "The jobs ahead of it are considered first" in text_of(pages[third.id])
    assert ["data-refresh" in page for page in pages.values()] == [True, True, False]
    for job in (first, other, third):
        console.submit(f"/console/jobs/{job.id}/cancel")


def test_a_failure_is_explained(console: ConsoleClient) -> None:
    text = text_of(console.get(f"/console/jobs/{scenes.FAILED}").text)
    assert "The loss became NaN or infinite. Lower optim.base_lr" in text
    assert "loss/total is not finite at step 241" in text


def test_config_keys_in_explanations_of_failures_exist() -> None:
    keys = {key for text in wording.REASONS.values() for key in re.findall(r"\b[a-z]+\.[a-z_]+\b", text)}
    assert "data.loader_workers" in keys
    for key in keys:
        with pytest.raises(ConfigError) as error:
            load_config(TrainConfig, "demo-image-amd", None, {key: []})
        assert "unknown key" not in str(error.value), key


def test_the_config_is_compared_with_its_preset(console: ConsoleClient) -> None:
    page = console.get(f"/console/jobs/{scenes.RUNNING}/config").text
    changed = re.findall(r'<tr class="changed"[^>]*><td[^>]*>([^<]+)</td><td[^>]*>([^<]+)</td><td[^>]*>([^<]+)', page)
    assert ("mask.teacher_ratio", "0.6") in [row[:2] for row in changed]
    assert not any(key in ("name", "storage") for key, *_ in changed)


def test_the_files_page_shows_checkpoints_and_bad_samples(console: ConsoleClient) -> None:
    text = text_of(console.get(f"/console/jobs/{scenes.RUNNING}/files").text)
    assert "step-00001000" in text
    assert "moov atom not found" in text
    assert re.search(r"bad_samples\.jsonl\s+\d+ B\s", text)


def test_the_pictures_page_has_one_slider_over_all_steps(console: ConsoleClient) -> None:
    page = console.get(f"/console/jobs/{scenes.RUNNING}/pictures").text
    assert 'data-steps="500,1000"' in page
    assert page.count('type="range"') == 1
    (url,) = re.findall(r'data-url="([^"]+)"', page)
    for name in re.findall(r'data-name="([^"]+)"', page):
        picture = console.get(f"{url}/1000/{name}")
        assert (picture.status_code, picture.headers["content-type"]) == (200, "image/webp")
        assert picture.headers["x-content-type-options"] == "nosniff"
    assert "No pictures yet" in console.get(f"/console/jobs/{scenes.QUEUED}/pictures").text


def test_metrics_can_be_requested_from_a_given_step(console: ConsoleClient) -> None:
    whole = console.get(f"/console/jobs/{scenes.RUNNING}/metrics.json").json()
    new = console.get(f"/console/jobs/{scenes.RUNNING}/metrics.json?since_step=1300").json()
    assert new["last_step"] == whole["last_step"] == 1315
    assert {one["name"] for one in new["series"]} == {one["name"] for one in whole["series"]}
    assert [one["steps"] for one in new["series"] if one["name"] == "loss/total"] == [[1300, 1305, 1310, 1315]]


# Buttons


@pytest.mark.parametrize("job_id", [scenes.RUNNING, scenes.QUEUED, scenes.SUCCEEDED, scenes.FAILED])
def test_buttons_match_the_actions_that_the_state_allows(console: ConsoleClient, app: Any, job_id: str) -> None:
    page = console.get(f"/console/jobs/{job_id}").text
    found = set(re.findall(r'id="act-(\w+)"', page)) - {"clone"}
    assert found == set(ACTIONS[app.state.jobs.get(job_id).state])


def test_the_button_that_deletes_a_job_is_the_last_one(console: ConsoleClient) -> None:
    page = console.get(f"/console/jobs/{scenes.SUCCEEDED}").text
    assert page.index('id="act-delete"') > max(page.index('id="act-clone"'), page.index('id="edit-name"'))


def test_a_user_with_a_read_only_key_sees_no_buttons_and_cannot_change_a_job(reader: ConsoleClient, app: Any) -> None:
    job = queued(app.state.jobs)
    for path in ("/console/jobs", f"/console/jobs/{job.id}", f"/console/jobs/{job.id}/files"):
        page = reader.get(path).text
        assert "hx-post" not in page
        assert "New job" not in page
    for action in ("cancel", "pause", "resume", "retry", "delete", "edit"):
        assert reader.submit(f"/console/jobs/{job.id}/{action}").status_code == 403
    assert app.state.jobs.get(job.id).state == "queued"
    app.state.jobs.change(job, "cancelled", state="cancelled")


def test_buttons_perform_their_action_on_the_job(console: ConsoleClient, app: Any) -> None:
    job = queued(app.state.jobs)
    for action, state in (
        ("pause", "paused"),
        ("resume", "queued"),
        ("cancel", "cancelled"),
        ("retry", "queued"),
        ("cancel", "cancelled"),
        ("delete", "deleting"),
    ):
        response = console.submit(f"/console/jobs/{job.id}/{action}")
        assert response.status_code == 204, response.text
        assert app.state.jobs.get(job.id, deleted=True).state == state
    assert response.headers["hx-redirect"] == "/console/jobs"


def test_the_attempt_of_a_starting_job_has_the_state_of_the_job(console: ConsoleClient, app: Any) -> None:
    job = queued(app.state.jobs)
    attempt = {"submission_id": job.id, "started_at": job.created_at, "state": "running", "message": ""}
    job = app.state.jobs.change(job, "starting", attempt=attempt, number=1, state="starting")
    for state in ("starting", "running", "cancelling"):
        job = app.state.jobs.change(job, state, state=state)
        page = console.get(f"/console/jobs/{job.id}").text
        assert re.findall(r'<span class="state \w+">(\w+)</span>', page) == [state, state]
    app.state.jobs.change(job, "cancelled", state="cancelled", attempt={"ended_at": time.time(), "state": "cancelled"})


def test_an_action_on_a_finished_job_is_rejected_with_an_explanation(console: ConsoleClient) -> None:
    response = console.submit(f"/console/jobs/{scenes.SUCCEEDED}/pause")
    assert response.status_code == 409
    assert "its state is succeeded" in response.text
    assert "<strong>Not possible</strong>" in response.text
    assert "<html" not in response.text


def test_the_page_and_the_api_show_how_long_the_teachers_training_took(
    console: ConsoleClient, app: Any, database: Engine
) -> None:
    headers = key_to(database, "read")
    assert console.get(f"/v1/jobs/{scenes.RUNNING}", headers=headers).json()["teacher"] == scenes.TEACHER
    page = text_of(console.get(f"/console/jobs/{scenes.RUNNING}").text)
    assert "Teacher 1 min 11 s 2 000 steps, trained before the student" in " ".join(page.split())
    result = {"teacher": {**scenes.TEACHER, "reused": True}}
    app.state.jobs.change(app.state.jobs.get(scenes.FAILED), "failed", result=result)
    assert console.get(f"/v1/jobs/{scenes.FAILED}", headers=headers).json()["teacher"] == result["teacher"]
    page = text_of(console.get(f"/console/jobs/{scenes.FAILED}").text)
    assert "Teacher Reused 2 000 steps, trained earlier in 1 min 11 s" in " ".join(page.split())
    assert console.get(f"/v1/jobs/{scenes.SUCCEEDED}", headers=headers).json()["teacher"] is None


def test_a_job_in_another_project_is_not_found(app: Any, database: Engine) -> None:
    client = ConsoleClient(app)
    client.sign_in(key_to(database, "read", project="other")["Authorization"])
    assert rows(client.get("/console/jobs").text) == []
    response = client.get(f"/console/jobs/{scenes.RUNNING}")
    assert response.status_code == 404
    assert "there is no job" in response.text
    assert "<h1>Not found</h1>" in response.text


# Details in the REST API


def test_changing_the_name_labels_or_priority_records_an_event(
    console: ConsoleClient, app: Any, database: Engine
) -> None:
    job, headers = queued(app.state.jobs, labels={"a": "1"}), key_to(database, "submit")
    body = {"name": "new", "labels": {"b": "2"}, "priority": 7}
    found = console.patch(f"/v1/jobs/{job.id}", json=body, headers=headers).json()
    assert {name: found[name] for name in body} == body
    listed = [console.get(f"/v1/jobs?label={pair}", headers=headers).json()["items"] for pair in ("a=1", "b=2")]
    assert [len(items) for items in listed] == [0, 1]
    history = console.get(f"/v1/jobs/{job.id}/history", headers=headers).json()["items"]
    assert [(event["type"], event["data"]) for event in history][1:] == [("edit", body)]
    assert console.patch(f"/v1/jobs/{job.id}", json={"name": None}, headers=headers).json()["name"] is None
    app.state.jobs.change(app.state.jobs.get(job.id), "cancelled", state="cancelled")
    late = console.patch(f"/v1/jobs/{job.id}", json={"priority": 1}, headers=headers)
    assert (late.status_code, late.json()["code"]) == (409, "illegal_action")


def test_labels_are_edited_in_a_form_with_one_label_per_line(console: ConsoleClient, app: Any) -> None:
    job = queued(app.state.jobs)
    assert console.submit(f"/console/jobs/{job.id}/edit", name="x", labels="a=1\n\nb = two words ").status_code == 204
    assert app.state.jobs.get(job.id).labels == {"a": "1", "b": "two words"}
    for invalid_labels, message in (
        ("a=1\nno value", "write key=value"),
        ("no\x00key=1", "must match pattern"),
    ):
        invalid = console.submit(f"/console/jobs/{job.id}/edit", labels=invalid_labels)
        assert invalid.status_code == 422
        assert "<strong>Invalid input</strong>" in invalid.text
        assert message in invalid.text
    assert "labels: {" in text_of(console.get(f"/console/jobs/{job.id}/history").text)
    console.submit(f"/console/jobs/{job.id}/cancel")


def test_a_clone_has_the_original_config_with_the_requested_changes(console: ConsoleClient, database: Engine) -> None:
    headers = key_to(database, "submit")
    body = {"overrides": {"seed": 5}, "name": "copy"}
    found = console.post(f"/v1/jobs/{scenes.SUCCEEDED}/clone", json=body, headers=headers)
    assert found.status_code == 202, found.text
    before, after = (
        console.get(f"/v1/jobs/{job_id}", headers=headers).json()["config"]
        for job_id in (scenes.SUCCEEDED, found.json()["id"])
    )
    assert after == {**before, "name": found.json()["id"], "seed": 5}
    assert found.json()["name"] == "copy"
    assert found.json()["preset"] == "demo-image-mae"
    console.post(f"/v1/jobs/{found.json()['id']}/cancel", headers=headers)


def test_the_clone_form_marks_the_name_as_a_copy_and_the_copy_keeps_the_preset(
    console: ConsoleClient, app: Any
) -> None:
    page = console.get(f"/console/jobs/{scenes.RUNNING}/clone").text
    assert 'value="Digits, teacher ratio 0.6 (copy)"' in page
    response = console.submit("/console/new", original=scenes.RUNNING, name="a copy", **{"o.seed": "9"})
    job_id = response.headers["hx-redirect"].rpartition("/")[2]
    config = text_of(console.get(f"/console/jobs/{job_id}/config").text)
    assert "Compared with the preset demo-image-amd : 2 differences" in " ".join(config.split())
    app.state.jobs.edit(app.state.jobs.get(job_id), {"name": "x" * 200}, "test")
    assert f'value="{"x" * 193} (copy)"' in console.get(f"/console/jobs/{job_id}/clone").text
    console.submit(f"/console/jobs/{job_id}/cancel")


def test_the_config_page_says_that_a_job_was_submitted_as_a_complete_config(console: ConsoleClient, app: Any) -> None:
    job = queued(app.state.jobs)
    assert "Submitted as a complete config" in console.get(f"/console/jobs/{job.id}/config").text
    assert "Submitted as a complete config" not in console.get(f"/console/jobs/{scenes.RUNNING}/config").text
    console.submit(f"/console/jobs/{job.id}/cancel")


def test_the_log_can_be_searched_and_read_backwards(console: ConsoleClient, database: Engine) -> None:
    headers, url = key_to(database, "read"), f"/v1/jobs/{scenes.RUNNING}/logs"
    log = console.get(url, headers=headers).text.encode()
    found = console.get(f"{url}/search?q=CANNOT+be+read", headers=headers).json()
    (match,) = found["items"]
    assert (match["line"], found["lines"], found["complete"]) == (201, 400, True)
    assert log[match["offset"] :].startswith(b"\x1b[33mWARNING")
    assert "\x1b" not in match["text"]
    text, end = "", 10**15
    while end > 0:
        piece = console.get(f"{url}/range?before={end}&size=4096", headers=headers).json()
        text, end = piece["text"] + text, piece["start"]
    assert text.encode() == log
    forward = console.get(f"{url}/range?after={match['offset']}&size=1024", headers=headers).json()
    assert log[match["offset"] : forward["end"]].decode() == forward["text"]
    assert forward["text"].endswith("\n")
    limited = console.get(f"{url}/search?q=step&limit=3", headers=headers).json()
    assert (len(limited["items"]), limited["complete"]) == (3, False)


def test_the_cluster_page_shows_the_first_jobs_of_a_long_queue_and_counts_all(
    console: ConsoleClient, app: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operations, "OCCUPANTS", 1)
    for number in range(2):
        queued(app.state.jobs, id=f"train-waiting-{number}", priority=-60)
    page = console.get("/console/cluster").text
    assert "train-waiting-" not in page
    assert "the first 1 of 3" in text_of(page)
    assert 'href="/console/jobs?state=queued&amp;state=retrying"' in page
    for number in range(2):
        act(app.state.jobs, f"train-waiting-{number}", None, "cancel", "test")


def test_the_history_shows_the_fields_that_a_user_changed(app: Any, console: ConsoleClient) -> None:
    job = queued(app.state.jobs)
    app.state.jobs.edit(job, {"name": "another name"}, "alice")
    assert "name: another name" in text_of(console.get(f"/console/jobs/{job.id}/history").text)
