"""Tests for jobs submitted over REST to a real cluster with failures: each job ends once, in the right state."""

from __future__ import annotations

import ipaddress
import json
import os
import shlex
import signal
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import httpx
import pytest

from amd.training.reporting.metrics_reader import read_metrics
from service.stack.ports import free_ports
from tests.flows.test_search_ray import is_idle
from tests.support.ray_cluster import RayCluster, end_head, second_node, start_head
from tests.support.runs.tiny_runs import tiny_run
from tests.support.s3 import S3Server
from tests.support.servers.keyed_s3 import KeyedS3Server
from tests.support.service.control_plane import ControlPlane, wait_for

pytestmark = pytest.mark.ray
LONG = 100_000


@pytest.fixture
def plane(ray_cluster: RayCluster, tmp_path: Path) -> Iterator[ControlPlane]:
    plane = ControlPlane(tmp_path / "data", ray_cluster.dashboard, AMD_ALLOWED_URIS=f"{tmp_path},s3://sets")
    plane.start()
    yield plane
    plane.kill()


def run_request(folder: Path, steps: int) -> dict[str, Any]:
    """Return a job request with a complete config, because no preset is this small."""
    config = tiny_run(
        folder,
        schedule__steps=steps,
        checkpoint__every_steps=20,
        checkpoint__every_minutes=None,
        tracking__log_every_steps=5,
    )
    return {"kind": "train", "config": {**config.model_dump(mode="json"), "storage": None}}


def live_node(plane: ControlPlane) -> dict[str, Any]:
    """Return the only live node of the cluster."""
    (node,) = [node for node in plane.request("GET", "/cluster")["nodes"] if node["state"] == "alive"]
    return dict(node)


def step_of(plane: ControlPlane, job_id: str) -> int:
    return int((plane.job(job_id)["progress"] or {}).get("step") or 0)


@pytest.mark.timeout(1200)
def test_a_job_survives_killing_the_control_plane_and_driver_and_stops_with_a_checkpoint(
    plane: ControlPlane, ray_cluster: RayCluster, tmp_path: Path
) -> None:
    job = plane.submit(**run_request(tmp_path, LONG), labels={"team": "x"})
    plane.wait_until(job, "running")
    wait_for(lambda: step_of(plane, job) > 20, 200)
    wait_for(lambda: (live_node(plane)["used_cpus"] or 0) > 0, 60)
    node = live_node(plane)
    assert (node["head"], node["cpus"], node["jobs"]) == (True, 4.0, [job]), node
    ipaddress.ip_address(node["address"])
    plane.kill()
    plane.start()
    assert plane.job(job)["state"] == "running"

    kill_driver(job)
    found = plane.wait_until(job, "retrying")
    assert (found["reason"], found["attempts"][0]["failure"]["reason"]) == ("node_lost", "node_lost")
    plane.wait_until(job, "running")
    before = step_of(plane, job)
    wait_for(lambda: step_of(plane, job) > before, 200)
    assert read_metrics(found["run_folder"])[0]["step"] == 5, "the metrics must start with the first attempt"

    plane.request("POST", f"/jobs/{job}/cancel")
    ended = plane.wait_until(job, "cancelled")
    assert ended["reason"] == "cancelled_by_user"
    steps = ended["result"]["steps"]
    assert steps >= before
    assert plane.request("GET", f"/jobs/{job}/checkpoints")[-1]["step"] == steps
    wait_for(lambda: is_idle(ray_cluster), 60)

    events = [event["type"] for event in history(plane, job)]
    expected = ["created", "starting", "running", "retrying", "starting", "running", "cancel", "cancelled"]
    assert events == expected
    listed = json.load(urllib.request.urlopen(f"{ray_cluster.dashboard}/api/jobs/", timeout=30))
    assert {job, f"{job}-2"} <= {entry["submission_id"] for entry in listed}


@pytest.mark.timeout(600)
def test_a_run_submitted_to_ray_directly_is_listed_watched_and_cancelled(
    plane: ControlPlane, ray_cluster: RayCluster, tmp_path: Path
) -> None:
    root = plane.environment["AMD_STORAGE"]
    config = tiny_run(tmp_path, name="direct", schedule__steps=LONG, storage=root, scaling__workers=1)
    config_file = tmp_path / "direct.json"
    config_file.write_text(config.model_dump_json())
    submission = submit_without_waiting(
        ray_cluster, [sys.executable, "-m", "amd.training", "--config", str(config_file)], AMD_PROJECT="vision"
    )
    wait_for(lambda: "direct" in {job["id"] for job in plane.request("GET", "/jobs?origin=external")["items"]}, 200)
    plane.wait_until("direct", "running")
    wait_for(lambda: (plane.request("GET", "/jobs/direct/metrics")["last_step"] or 0) > 20, 200)
    found = plane.job("direct")
    assert (found["project"], found["attempts"][0]["submission_id"]) == ("vision", submission)
    assert "1 worker on" in log_of(plane, "direct")
    assert "cancel" in found["allowed_actions"]

    plane.request("POST", "/jobs/direct/cancel")
    ended = plane.wait_until("direct", "cancelled")
    assert ended["reason"] == "cancelled_by_user", ended
    assert plane.request("GET", "/jobs/direct/checkpoints")[-1]["step"] == ended["result"]["steps"] > 20
    wait_for(lambda: is_idle(ray_cluster), 60)


@pytest.mark.timeout(900)
def test_projects_share_a_cluster_within_their_quotas_and_budgets(plane: ControlPlane, tmp_path: Path) -> None:
    policies = {"narrow": {"max_running_jobs": 1}, "wide": {"share": 2}, "spent": {"cpu_hours_per_month": 0}}
    for project, policy in policies.items():
        plane.request("PUT", f"/projects/{project}", json=policy)
    request = run_request(tmp_path, 60)
    narrow, wide, spent = (
        [plane.submit(**request, project=project) for _ in range(jobs)]
        for project, jobs in (("narrow", 2), ("wide", 2), ("spent", 1))
    )
    counts = {project: {0} for project in policies}

    def all_succeeded(jobs: list[str]) -> bool:
        listed = plane.request("GET", "/jobs?limit=50")["items"]
        for project, seen in counts.items():
            seen.add(sum(job["state"] in ("starting", "running") for job in listed if job["project"] == project))
        states = {job["id"]: job["state"] for job in listed}
        assert "failed" not in states.values(), listed
        return {states[job] for job in jobs} == {"succeeded"}

    wait_for(lambda: all_succeeded(narrow + wide), 600)
    assert counts == {"narrow": {0, 1}, "wide": {0, 1, 2}, "spent": {0}}
    waiting = plane.job(spent[0])
    assert (waiting["state"], "0 CPU-hours" in waiting["message"]) == ("queued", True), waiting

    plane.request("PUT", "/projects/spent", json={})
    wait_for(lambda: all_succeeded(spent), 300)
    used = {item["key"]: item["jobs"] for item in plane.request("GET", "/usage?by=project")["items"]}
    assert used == {"narrow": 2, "wide": 2, "spent": 1}


@pytest.mark.timeout(600)
def test_workers_read_data_with_the_credential_of_their_jobs_project(plane: ControlPlane, tmp_path: Path) -> None:
    request = run_request(tmp_path, 10)
    with KeyedS3Server({"sets": "key-of-sets"}) as store:
        for path in (tmp_path / "images").rglob("*.png"):
            store.client("sets").upload_file(str(path), "sets", str(path.relative_to(tmp_path)))
        store.requests.clear()
        request["config"]["data"] |= {"train": "s3://sets/images", "loader_workers": 1}
        secret = tmp_path / "secret"  # another store than that of the nodes
        secret.write_text(json.dumps({"key": "key-of-sets", "secret": "testing", "endpoint_url": store.url}))
        credential = {"prefixes": ["s3://sets"], "secret": f"file:{secret}"}
        plane.request("PUT", "/projects/vision", json={"credentials": {"sets": credential}})
        ended = plane.wait_until(plane.submit(**request, project="vision"), "succeeded", "failed")
        assert (ended["state"], ended["result"]["steps"]) == ("succeeded", 10), ended
        assert store.requests == {("sets", "key-of-sets")}


@pytest.mark.chaos
@pytest.mark.timeout(1200)
def test_a_job_is_requeued_when_the_ray_head_dies_and_finishes_on_its_replacement(tmp_path: Path) -> None:
    ports = free_ports(5)
    cluster, head, folder = start_head(dict(os.environ), ports)
    plane = ControlPlane(tmp_path / "data", cluster.dashboard, AMD_ALLOWED_URIS=str(tmp_path), AMD_SILENCE_S="10")
    try:
        plane.start()
        job = plane.submit(**run_request(tmp_path, 3000))
        plane.wait_until(job, "running")
        wait_for(lambda: step_of(plane, job) > 20, 200)
        end_head(head, folder)
        wait_for(lambda: "does not respond" in plane.job(job)["message"], 60)
        cluster, head, folder = start_head(dict(os.environ), ports)
        ended = plane.wait_until(job, "succeeded", "failed", seconds=400)
        assert ended["state"] == "succeeded", ended
        assert ended["result"]["steps"] == 3000
        assert ended["attempt"] == 2
        assert ended["attempts"][0]["failure"]["reason"] == "node_lost"
    finally:
        plane.kill()
        end_head(head, folder)


@pytest.mark.chaos
@pytest.mark.timeout(1200)
def test_a_job_whose_node_is_lost_continues_with_the_remaining_workers(
    plane: ControlPlane, ray_cluster: RayCluster, tmp_path: Path
) -> None:
    body = run_request(tmp_path, LONG)
    body["config"]["scaling"] |= {
        "workers": [1, 2],
        "cpus_per_worker": 3,  # one worker fits on the head, and one on the second node
    }
    with second_node(ray_cluster, cpus=3, mark="second") as node:
        job = plane.submit(**body)
        plane.wait_until(job, "running")
        wait_for(lambda: "2 workers" in log_of(plane, job), 300)  # it may have started with one
        position = log_of(plane, job).index("2 workers")
        step = step_of(plane, job)
        wait_for(lambda: step_of(plane, job) > step + 40, 300)
        os.killpg(node.pid, signal.SIGKILL)
    wait_for(lambda: "1 worker on" in log_of(plane, job)[position:], 400)
    before = step_of(plane, job)
    wait_for(lambda: step_of(plane, job) > before, 200)
    plane.request("POST", f"/jobs/{job}/cancel")
    ended = plane.wait_until(job, "cancelled")
    assert (ended["attempt"], ended["result"]["steps"] > 40) == (1, True), (
        "Ray Train must recover without a new attempt"
    )
    wait_for(lambda: is_idle(ray_cluster), 60)


@pytest.mark.chaos
@pytest.mark.timeout(1200)
def test_running_and_new_jobs_survive_a_minute_without_storage(
    s3_endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = S3Server()
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", store.url)
    boto3.client("s3").create_bucket(Bucket="far")
    cluster, head, folder = start_head(dict(os.environ))
    environment = {"AMD_STORAGE": "s3://far/root", "AMD_ALLOWED_URIS": str(tmp_path)}
    plane = ControlPlane(tmp_path / "data", cluster.dashboard, **environment)
    try:
        plane.start()
        running = plane.submit(**run_request(tmp_path, LONG))
        plane.wait_until(running, "running")
        wait_for(lambda: step_of(plane, running) > 20, 200)
        store.stop()
        accepted = plane.submit(**run_request(tmp_path, 30))
        time.sleep(60)
        assert plane.job(running)["state"] == "running"
        store.start()
        ended = plane.wait_until(accepted, "succeeded", "failed", seconds=400)
        assert (ended["state"], ended["attempt"], ended["result"]["steps"]) == ("succeeded", 1, 30), ended
        before = step_of(plane, running)
        wait_for(lambda: step_of(plane, running) > before, 200)
        plane.request("POST", f"/jobs/{running}/cancel")
        ended = plane.wait_until(running, "cancelled")
        assert (ended["attempt"], ended["reason"]) == (1, "cancelled_by_user"), ended
        assert plane.request("GET", f"/jobs/{running}/checkpoints")[-1]["step"] == ended["result"]["steps"] > before
    finally:
        plane.kill()
        end_head(head, folder)
        store.stop()


def submit_without_waiting(cluster: RayCluster, entrypoint: list[str], **environment: str) -> str:
    """Submit a program to Ray as a user would, and return the submission ID."""
    runtime_env = {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "90", **environment}}
    body = {"entrypoint": shlex.join(entrypoint), "runtime_env": runtime_env}
    response = httpx.post(f"{cluster.dashboard}/api/jobs/", json=body, timeout=60)
    response.raise_for_status()
    return str(response.json()["submission_id"])


def log_of(plane: ControlPlane, job: str) -> str:
    return plane.get(f"/jobs/{job}/logs").text


def history(plane: ControlPlane, job: str) -> list[dict[str, Any]]:
    """Read all of a job's events from its event stream."""
    text = plane.get(f"/jobs/{job}/events").text
    blocks = [block.split("\n") for block in text.split("\n\n")]
    return [json.loads(lines[2].removeprefix("data: ")) for lines in blocks if lines[0].startswith("id: ")]


def kill_driver(job: str) -> None:
    """Send SIGKILL to the job's runner, as the kernel does when a node runs out of memory."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            args = (process / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if b"service.jobs.runner" in args and job.encode() in args:
            os.kill(int(process.name), signal.SIGKILL)
