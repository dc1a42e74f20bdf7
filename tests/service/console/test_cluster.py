"""Tests for the cluster page and the route that it shows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine

from tests.service.console.conftest import new_app
from tests.support.browser import scenes
from tests.support.browser.console_client import ConsoleClient, plain_text_of
from tests.support.service.apps import key_to


@pytest.fixture(scope="module")
def app(database: Engine, folder: Path) -> Any:
    app = new_app(database, folder)
    scenes.populate(database, app.state.settings.root)
    return app


def test_the_cluster_queue_hides_the_job_names_of_other_projects(
    console: ConsoleClient, app: Any, database: Engine
) -> None:
    own = console.get("/v1/cluster", headers=key_to(database, "read")).json()
    assert own["resources"]["cpus"] == 4.0
    assert scenes.QUEUED in [job["job"] for job in own["waiting"]]
    other = console.get("/v1/cluster", headers=key_to(database, "read", project="other")).json()
    assert len(other["waiting"]) == len(own["waiting"])
    assert {(job["job"], job["name"], job["message"]) for job in other["waiting"] + other["running"]} == {
        (None, None, "")
    }
    app.state.cluster.unavailable = True
    broken = console.get("/v1/cluster", headers=key_to(database, "read")).json()
    app.state.cluster.unavailable = False
    assert broken["resources"] is None
    assert "does not respond" in broken["problem"]


def test_the_cluster_page_lists_the_nodes_and_what_runs_there(
    console: ConsoleClient, app: Any, database: Engine
) -> None:
    app.state.cluster.node_list = scenes.nodes()
    page = console.get("/console/cluster").text
    text = plain_text_of(page[page.index('id="nodes-title"') : page.index('id="running-title"')])
    assert "alive head-0 head 10.0.0.4 3 of 4 CPUs 0 of 0 GPUs 34.4 GB Mask ratios of the digits" in text
    assert "worker-1 10.0.0.7 1.5 of 4 CPUs 0 of 0 GPUs 34.4 GB Digits, teacher ratio 0.6 deployment digits" in text
    assert "lost worker-2 10.0.0.9 Expected termination: node was preempted" in text
    assert f'href="/console/jobs/{scenes.RUNNING}"' in page
    own = console.get("/v1/cluster", headers=key_to(database, "read")).json()["nodes"]
    assert [(node["name"], node["jobs"], node["deployments"], node["others"]) for node in own] == [
        ("head-0", [scenes.SWEEP], [], 0),
        ("worker-1", [scenes.RUNNING], [scenes.DEPLOYMENT], 0),
        ("worker-2", [], [], 0),
    ]
    other = console.get("/v1/cluster", headers=key_to(database, "read", project="other")).json()["nodes"]
    assert [(node["jobs"], node["deployments"], node["others"]) for node in other] == [
        ([], [], 1),
        ([], [], 2),
        ([], [], 0),
    ]
    app.state.cluster.node_list = []


def test_the_cluster_page_shows_reserved_cpus_and_since_when_jobs_wait(
    console: ConsoleClient, database: Engine
) -> None:
    running = console.get("/v1/cluster", headers=key_to(database, "read")).json()["running"]
    reserved = sum(job["cpus"] for job in running)
    page = console.get("/console/cluster").text
    assert f"CPUs reserved {reserved:g} of 4" in plain_text_of(page)
    assert "5 min ago" in page[page.index('id="waiting-title"') :]
