"""Tests for the job routes, served on a real port, on SQLite and PostgreSQL."""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import Engine

from amd.storage import write_bytes
from amd.training.reporting.log_chunks import LogShipper, rank_log_folder
from amd.training.reporting.media_files import PICTURES, step_url
from amd.training.run_folder import run_folder
from service.jobs.execution.protocol import JobFolder
from tests.support.runs.pictures import webp, write_pictures
from tests.support.service.control_plane import wait_for
from tests.support.service.fake_cluster import FakeCluster, queued, report_status
from tests.support.service.server import Server, serving

DEMO = {"kind": "train", "preset": "demo-image-amd"}


@pytest.fixture
def server(engine: Engine, tmp_path: Path) -> Iterator[Server]:
    with serving(engine, tmp_path, FakeCluster(cpus=0.0), max_streams=200) as server:  # no job ever starts
        yield server


@pytest.fixture
def client(server: Server) -> Iterator[httpx.Client]:
    with server.http_client() as client:
        yield client


BAD: dict[str, tuple[str, str, dict[str, Any], int, str, str]] = {
    "wrong preset": ("POST", "/jobs", {"json": {**DEMO, "preset": "demo-imag-amd"}}, 422, "config_invalid", "did you"),
    "invalid config": (
        *("POST", "/jobs", {"json": {**DEMO, "overrides": {"mask.teacher_ratio": 0.9}}}),
        *(422, "config_invalid", "mask.teacher_ratio=0.9 must not be above mask.student_ratio"),
    ),
    "unknown config key": (
        *("POST", "/jobs", {"json": {**DEMO, "overrides": {"mask.techer_ratio": 0.5}}}),
        *(422, "config_invalid", "mask.techer_ratio"),
    ),
    "unknown field": ("POST", "/jobs", {"json": {**DEMO, "colour": "red"}}, 422, "request_invalid", "#/colour"),
    "unknown kind": ("POST", "/jobs", {"json": {**DEMO, "kind": "bake"}}, 422, "request_invalid", "#/kind"),
    "no config": ("POST", "/jobs", {"json": {"kind": "train"}}, 422, "config_invalid", "specify one of them"),
    "a body of 10 MB": ("POST", "/jobs", {"json": {**DEMO, "name": "x" * 10**7}}, 413, "body_too_large", "1048576"),
    "a body of 10 MB without its length": (
        *("POST", "/jobs", {"content": iter([b"x" * 10**6] * 10), "headers": {"Content-Type": "application/json"}}),
        *(413, "body_too_large", "1048576"),
    ),
    "not JSON": (
        *("POST", "/jobs", {"content": b"{", "headers": {"Content-Type": "application/json"}}),
        *(400, "json_invalid", "not valid JSON"),
    ),
    "wrong content type": ("POST", "/jobs", {"data": {"kind": "train"}}, 415, "unsupported_media_type", "json"),
    "missing data URI": (
        *("POST", "/jobs", {"json": {"kind": "train", "preset": "ssv2-vit-b"}}),
        *(422, "config_invalid", "data.train: presets contain no data"),
    ),
    "a location that is not allowed": (
        *("POST", "/jobs", {"json": {**DEMO, "overrides": {"data.train": "/etc"}}}),
        *(422, "uri_not_allowed", "data.train=/etc"),
    ),
    "a different storage root": (
        *("POST", "/jobs", {"json": {**DEMO, "overrides": {"storage": "/elsewhere"}}}),
        *(422, "uri_not_allowed", "storage=/elsewhere: the service stores"),
    ),
    "bad cursor": ("GET", "/jobs?cursor=abc", {}, 422, "cursor_invalid", "next_cursor"),
    "page too large": ("GET", "/jobs?limit=1000", {}, 422, "request_invalid", "limit"),
    "no such job": ("GET", "/jobs/train-1", {}, 404, "not_found", "no job 'train-1'"),
    "no such path": ("GET", "/job", {}, 404, "not_found", ""),
    "wrong method": ("PUT", "/jobs", {}, 405, "method_not_allowed", ""),
    "no such preset": ("GET", "/presets/best", {}, 404, "not_found", "GET /v1/presets"),
}


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_pictures_are_listed_and_served_as_images_that_run_no_scripts(client: httpx.Client, server: Server) -> None:
    job = client.post("/jobs", json=DEMO).json()["id"]
    assert client.get(f"/jobs/{job}/media").json() == []
    root = server.app.state.settings.root
    write_pictures(root, job, (3, 12))
    listed = client.get(f"/jobs/{job}/media").json()
    assert [step["step"] for step in listed] == [3, 12]
    assert {file["name"] for file in listed[0]["files"]} == {*PICTURES}
    response = client.get(f"/jobs/{job}/media/12/rebuilt.webp")
    assert (response.status_code, response.headers["content-type"]) == (200, "image/webp")
    assert len(response.content) == next(file["bytes"] for file in listed[1]["files"] if file["name"] == "rebuilt.webp")
    assert response.headers["x-content-type-options"] == "nosniff"
    assert "sandbox" in response.headers["content-security-policy"]


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
@pytest.mark.parametrize(("run", "teacher"), [(None, False), ("demo-image-teacher-1a2b3c", True)])
def test_progress_reports_whether_a_job_is_training_its_teacher(
    client: httpx.Client, server: Server, run: str | None, teacher: bool
) -> None:
    store, job = server.app.state.jobs, client.post("/jobs", json=DEMO).json()["id"]
    wait_for(
        lambda: bool(store.get(job).message)
    )  # written by the reconciler together with the progress that it has read
    store.note_progress(store.get(job), {"run": run or job, "step": 5, "steps": 10})
    for found in (client.get(f"/jobs/{job}").json(), client.get("/jobs").json()["items"][0]):
        assert (found["progress"]["step"], found["progress"]["teacher"]) == (5, teacher)


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_only_a_jobs_pictures_can_be_read(client: httpx.Client, server: Server) -> None:
    job = client.post("/jobs", json=DEMO).json()["id"]
    root = server.app.state.settings.root
    write_pictures(root, job, (3,))
    folder = step_url(run_folder(root, job), 3)
    write_bytes(f"{run_folder(root, job)}/config.json", b"{}")
    for name in ("../../config.json", "..%2F..%2Fconfig.json", "%2e%2e/config.json", "notes.txt", "input.webp%00", "."):
        assert client.get(f"/jobs/{job}/media/3/{name}").status_code in (404, 405, 422), name
    for step in ("-1", "3.5", "../3", "9" * 30, "x"):
        assert client.get(f"/jobs/{job}/media/{step}/input.webp").status_code in (404, 422), step
    assert client.get(f"/jobs/{job}/media/4/input.webp").json()["code"] == "not_found"
    for content in (b"<script>alert(1)</script>", webp().ljust(2**20 + 1)):
        write_bytes(f"{folder}/input.webp", content)
        damaged = client.get(f"/jobs/{job}/media/3/input.webp")
        assert (damaged.status_code, damaged.json()["code"]) == (422, "not_possible")


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)  # none of the requests reaches the database
@pytest.mark.parametrize("case", BAD)
def test_every_error_response_is_problem_details_with_a_code(client: httpx.Client, case: str) -> None:
    method, path, options, status, code, text = BAD[case]
    response = client.request(method, path, **options)
    assert (response.status_code, response.headers["content-type"]) == (status, "application/problem+json"), (
        response.text
    )
    problem = response.json()
    assert (problem["code"], problem["status"], problem["type"]) == (code, status, f"urn:amd:problem:{code}")
    assert text in problem["detail"]
    assert problem["request_id"] == response.headers["x-request-id"]


def test_a_disallowed_action_is_rejected_but_repeating_a_cancel_is_a_no_op(
    client: httpx.Client, server: Server
) -> None:
    job = client.post("/jobs", json=DEMO).json()["id"]
    rejected = client.post(f"/jobs/{job}/retry")
    assert (rejected.status_code, rejected.json()["code"]) == (409, "illegal_action")
    assert rejected.json()["allowed_actions"] == ["cancel", "pause"]
    assert client.delete(f"/jobs/{job}").status_code == 409
    first, second = client.post(f"/jobs/{job}/cancel"), client.post(f"/jobs/{job}/cancel")
    assert (first.status_code, second.status_code) == (202, 202)
    assert first.json()["changed_at"] == second.json()["changed_at"]
    assert client.delete(f"/jobs/{job}").status_code == 204
    assert client.get(f"/jobs/{job}").status_code == 404
    assert client.get("/jobs").json()["items"] == []
    wait_for(lambda: bool(client.get("/jobs?state=deleted").json()["items"]))
    history = [event[2] for event in events(client, f"/jobs/{job}/events") if event[1] == "job"]
    deletion = next(event for event in history if event["type"] == "delete")
    assert deletion["actor"] == server.key.split("_")[1]


def test_a_hundred_requests_with_the_same_idempotency_key_create_one_job(client: httpx.Client) -> None:
    def post(number: int) -> httpx.Response:
        return client.post("/jobs", json=DEMO, headers={"Idempotency-Key": "one"})

    with ThreadPoolExecutor(20) as pool:
        responses = list(pool.map(post, range(100)))
    assert {response.status_code for response in responses} == {202}
    assert len({response.json()["id"] for response in responses}) == 1
    assert len(client.get("/jobs").json()["items"]) == 1
    other = client.post("/jobs", json={**DEMO, "priority": 1}, headers={"Idempotency-Key": "one"})
    assert (other.status_code, other.json()["code"]) == (422, "idempotency_key_reused")


def test_a_request_for_an_unchanged_job_returns_304(client: httpx.Client) -> None:
    job = client.post("/jobs", json=DEMO).json()["id"]
    time.sleep(0.3)  # until the reconciler has set the message once
    tag = client.get(f"/jobs/{job}").headers["etag"]
    again = client.get(f"/jobs/{job}", headers={"If-None-Match": tag})
    assert (again.status_code, again.content) == (304, b"")
    client.post(f"/jobs/{job}/cancel")
    assert client.get(f"/jobs/{job}", headers={"If-None-Match": tag}).status_code == 200


def test_paging_returns_every_job_exactly_once_while_others_are_submitted(client: httpx.Client, server: Server) -> None:
    ids = [queued(server.app.state.jobs, labels={"n": str(n % 2)}).id for n in range(25)]
    listed, cursor = list[str](), None
    while True:
        page = client.get("/jobs", params={"limit": 7, **({"cursor": cursor} if cursor else {})}).json()
        listed += [job["id"] for job in page["items"]]
        queued(server.app.state.jobs)
        if (cursor := page["next_cursor"]) is None:
            break
    assert [job for job in listed if job in ids] == ids[::-1]
    assert len(set(listed)) == len(listed)
    odd = client.get("/jobs", params={"label": "n=1", "limit": 100}).json()["items"]
    assert [job["id"] for job in odd] == ids[1::2][::-1]
    assert client.get("/jobs", params={"state": "running"}).json()["items"] == []
    assert len(client.get("/jobs", params={"state": ["running", "queued"], "limit": 200}).json()["items"]) > 25


def events(
    client: httpx.Client, path: str, last: str | None = None, cut: int | None = None
) -> list[tuple[str, str, Any]]:
    """Read a stream to its end, or up to `cut` events, and return (id, event, data) for each event."""
    found = []
    with client.stream("GET", path, headers={"Last-Event-ID": last} if last else {}) as stream:
        fields: dict[str, str] = {}
        for line in stream.iter_lines():
            name, _, value = line.partition(": ")
            if line:
                fields[name] = value
            elif "event" in fields:
                found.append((fields.get("id", ""), fields["event"], json.loads(fields["data"])))
                if fields["event"] == "end" or len(found) == cut:
                    return found
                fields = {}
    return found


def test_interrupted_streams_resume_without_losing_or_repeating_events(
    client: httpx.Client, server: Server, engine: Engine, tmp_path: Path
) -> None:
    store, root = server.app.state.jobs, str(tmp_path / "root")
    job = queued(store)  # it never starts

    def live() -> None:
        for number in range(12):
            time.sleep(0.05)
            current = store.get(job.id)
            store.change(current, "noted", data={"number": number})
        for chunk in range(20):
            shipper.write(f"line {chunk} ä\n".encode())
            time.sleep(0.02)
        shipper.close()
        current = store.get(job.id)
        store.change(current, "succeeded", state="succeeded", attempt={"state": "succeeded"})

    shipper = LogShipper(JobFolder(root, job.id).logs(1), 0.01)
    rng, thread = random.Random(0), threading.Thread(target=live)
    thread.start()
    received, last = [], None
    while not received or received[-1][1] != "end":
        received += events(client, f"/jobs/{job.id}/events", last, cut=rng.randint(1, 4))
        last = next((found[0] for found in reversed(received) if found[0]), None)
    thread.join()
    history = [found for found in received if found[1] == "job"]
    assert [int(found[0]) for found in history] == list(range(1, store.get(job.id).version + 1))
    received, last = [], None
    while not received or received[-1][1] != "end":
        received += events(client, f"/jobs/{job.id}/logs?follow=true", last, cut=rng.randint(1, 3))
        last = next((found[0] for found in reversed(received) if found[0]), None)
    text = "".join(found[2]["text"] for found in received if found[1] == "log")
    assert text == "".join(f"line {chunk} ä\n" for chunk in range(20))
    assert client.get(f"/jobs/{job.id}/logs?tail=2").text == "line 18 ä\nline 19 ä\n"


def test_the_log_of_each_rank_can_be_requested(client: httpx.Client, server: Server, tmp_path: Path) -> None:
    job, root = queued(server.app.state.jobs), str(tmp_path / "root")
    for rank in (0, 3):
        shipper = LogShipper(rank_log_folder(run_folder(root, job.id), rank), 0.01)
        shipper.write(f"first line of rank {rank}\nsecond line\n".encode())
        shipper.close()
    assert client.get(f"/jobs/{job.id}/logs?rank=3").text == "first line of rank 3\nsecond line\n"
    assert client.get(f"/jobs/{job.id}/logs?rank=0&tail=1").text == "second line\n"
    missing = client.get(f"/jobs/{job.id}/logs?rank=1")
    assert (missing.status_code, missing.json()["code"]) == (404, "not_found")
    assert "rank=1: has no log; ranks with a log: 0, 3" in missing.json()["detail"]


def test_the_log_of_a_run_started_by_ray_job_submit_comes_from_ray(client: httpx.Client, server: Server) -> None:
    store, cluster = server.app.state.jobs, server.app.state.cluster
    by_hand = queued(store, id="by-hand", origin="external", state="running")
    started = queued(store, id="by-ray", origin="external", state="running")
    attempt = {"submission_id": "raysubmit_1", "started_at": 1.0, "ended_at": None, "state": "running"}
    attempt |= {"reason": None, "message": "", "outcome": None}
    store.change(started, "running", attempt=attempt, number=1)
    cluster.outputs["raysubmit_1"] = "one\ntwo ä\nthree"
    assert client.get("/jobs/by-ray/logs").text == "one\ntwo ä\nthree"
    assert client.get("/jobs/by-ray/logs?tail=2").text == "two ä\nthree"
    store.change(store.get("by-ray"), "succeeded", state="succeeded")
    streamed = events(client, "/jobs/by-ray/logs?follow=true", None)
    assert [found[2] for found in streamed] == [
        {"text": "one\ntwo ä\nthree"},
        {"state": "succeeded", "attempt": 1},
    ]
    del cluster.outputs["raysubmit_1"]
    for path in ("/jobs/by-ray/logs", "/jobs/by-ray/logs?follow=true", f"/jobs/{by_hand.id}/logs"):
        missing = client.get(path)
        assert missing.status_code == 404
        assert "--rank 0" in missing.json()["detail"]


def test_two_hundred_event_streams_receive_the_same_final_event(server: Server) -> None:
    store = server.app.state.jobs
    job = queued(store)
    limits = httpx.Limits(max_connections=300)
    with (
        server.http_client(limits=limits) as client,
        ExitStack() as stack,
    ):
        streams = [stack.enter_context(client.stream("GET", f"/jobs/{job.id}/events")) for _ in range(200)]
        store.change(store.get(job.id), "cancelled", state="cancelled")
        ends = [stream.read().decode().strip().split("\n\n")[-1] for stream in streams]
    assert set(ends) == {'event: end\ndata: {"state": "cancelled"}'}


def test_a_failed_job_is_returned_with_its_failure_and_log_tail(
    client: httpx.Client, server: Server, tmp_path: Path
) -> None:
    store, root = server.app.state.jobs, str(tmp_path / "root")
    cluster = server.app.state.cluster
    cluster.total = cluster.total._replace(cpus=4.0)
    job = queued(store)
    wait_for(lambda: store.get(job.id).state == "starting")
    report_status(
        root, store.get(job.id), "failed", "nan_loss", message="step 7 on rank 3: nan", rank=3, log_tail="last line"
    )
    wait_for(lambda: store.get(job.id).state == "failed")
    view = client.get(f"/jobs/{job.id}").json()
    assert view["failure"] == {
        "reason": "nan_loss",
        "message": "step 7 on rank 3: nan",
        "rank": 3,
        "log_tail": "last line",
    }
    assert view["attempts"][0]["failure"] == view["failure"]
    assert view["allowed_actions"] == ["retry", "delete"]


def test_validating_a_request_returns_an_estimate_and_warnings(client: httpx.Client) -> None:
    view = client.post("/validate", json={**DEMO, "overrides": {"scaling.workers": 8}}).json()
    assert view["config"]["scaling"]["workers"] == [8, 8]
    assert view["estimate"]["feasible"] is False
    assert view["estimate"]["student_parameters"] > 100_000
    assert any("the cluster has 0" in warning for warning in view["warnings"])


def test_the_service_is_ready_without_ray(server: Server) -> None:
    server.app.state.cluster.unavailable = True
    ready = httpx.get(f"{server.url}/readyz")
    assert ready.status_code == 200
    assert "does not respond" in ready.json()["parts"]["ray"]


def test_metrics_count_jobs_by_kind_and_state(server: Server, client: httpx.Client) -> None:
    client.post("/jobs", json=DEMO)
    assert 'amd_jobs{kind="train",state="queued"} 1.0' in httpx.get(f"{server.url}/metrics").text
