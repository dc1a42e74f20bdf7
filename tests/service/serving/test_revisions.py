"""Tests for the revisions of deployments and for rollbacks, on SQLite and PostgreSQL."""

from __future__ import annotations

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import Engine, func, select, update
from sqlalchemy.orm import Session
from starlette.testclient import TestClient

from service.app import create_app
from service.db.models import Deployment, DeploymentRevision
from service.jobs.execution.ray_jobs import Capacity
from service.projects.schemas import ProjectPolicy
from service.projects.store import ProjectStore
from service.registry.store import EncoderStore
from service.serving import revisions
from service.serving.deployments import DeploymentStore, new_deployment
from service.serving.schemas import ServingSettings
from service.settings import Settings
from service.web.errors import NotFound
from tests.support.encoders.encoder_cards import index_encoder
from tests.support.service.apps import key_to
from tests.support.service.fake_cluster import FakeCluster

URL = "/v1/deployments/one"


@pytest.fixture
def client(engine: Engine, tmp_path: Path) -> Iterator[TestClient]:
    """Return a client that has an admin key and calls a service with the encoders `a` and `b`."""
    for encoder in ("a", "b"):
        index_encoder(engine, encoder)
    settings = Settings(storage=str(tmp_path), data_dir=tmp_path, rate_limit="100000/minute")
    app = create_app(settings, engine=engine, cluster=FakeCluster(cpus=16.0, gpus=4.0))
    with TestClient(app, headers=key_to(engine, "admin"), raise_server_exceptions=False) as client:
        yield client


def put(client: TestClient, **body: Any) -> httpx.Response:
    response: httpx.Response = client.put(URL, json={"encoder": "a", **body})
    assert response.status_code == 202, response.text
    return response


def roll_back(client: TestClient, revision: Any, **headers: str) -> httpx.Response:
    response: httpx.Response = client.post(f"{URL}/rollback", json={"revision": revision}, headers=headers)
    return response


def listed(client: TestClient) -> list[dict[str, Any]]:
    response = client.get(f"{URL}/revisions")
    assert response.status_code == 200, response.text
    items: list[dict[str, Any]] = response.json()["items"]
    return items


def settings_in(view: dict[str, Any]) -> dict[str, Any]:
    """Return the fields that a deployment and its revisions have in common."""
    return {name: view[name] for name in ("encoder", "candidate", "share", "settings")}


def rows(engine: Engine) -> int:
    with Session(engine) as session:
        return session.scalar(select(func.count()).select_from(DeploymentRevision)) or 0


def test_each_change_of_the_settings_is_listed_with_the_fields_that_it_changed(
    client: TestClient, engine: Engine
) -> None:
    EncoderStore(engine).move_alias("default", "production", "a", "me")
    put(client, encoder="production")
    other = key_to(engine, "submit")
    changed = {"encoder": "b", "candidate": "production", "replicas": {"min": 1, "max": 4}, "dtype": "bfloat16"}
    assert client.put(URL, json=changed, headers=other).status_code == 202
    EncoderStore(engine).move_alias("default", "production", "b", "me")
    newest, first = listed(client)
    assert (first["number"], first["changed"], first["resolved"]) == (1, None, {"main": "a"})
    assert (newest["number"], newest["actor"]) == (2, other["Authorization"].split("_")[1])
    assert newest["changed"] == ["encoder", "candidate", "share", "replicas.max", "dtype"]
    assert newest["resolved"] == {"main": "b", "candidate": "a"}, "the alias has moved since, which changes no revision"
    assert settings_in(newest) == settings_in(client.get(URL).json())


def test_a_change_that_requests_the_current_settings_adds_no_revision(client: TestClient) -> None:
    put(client)
    put(client)
    put(client, candidate=None, replicas={"min": 1, "max": 1})
    assert roll_back(client, 1).status_code == 202
    assert [one["number"] for one in listed(client)] == [1]


def test_a_rollback_restores_the_settings_as_a_new_revision(client: TestClient, engine: Engine) -> None:
    before = put(client, replicas={"min": 0, "max": 2}).json()
    put(client, encoder="b", candidate="a", share=0.5, gpus=1)
    response = roll_back(client, 1)
    assert response.status_code == 202, response.text
    assert settings_in(response.json()) == settings_in(before) == settings_in(client.get(URL).json())
    assert response.json()["state"] == "deploying"
    assert response.headers["etag"] == client.get(URL).headers["etag"] != before["etag"]
    newest = listed(client)[0]
    assert (newest["number"], newest["restored"]) == (3, 1)
    assert newest["changed"] == ["encoder", "candidate", "share", "replicas.min", "replicas.max", "gpus"]
    entry = client.get("/v1/audit").json()["items"][0]
    assert (entry["action"], entry["target"], entry["outcome"]) == (
        *("deployment.put", "one"),
        "rolled back to revision 1",
    )
    event = client.get("/v1/events").json()["items"][0]
    assert (event["type"], event["data"]) == ("deployment.put", {"outcome": "rolled back to revision 1"})


@pytest.mark.parametrize("seed", range(4))
def test_the_newest_revision_has_the_current_settings_after_any_changes(client: TestClient, seed: int) -> None:
    choices, requested = random.Random(seed), dict[int, dict[str, Any]]()
    for _ in range(20):
        if requested and choices.random() < 0.4:
            number = choices.choice(list(requested))
            response, expected = roll_back(client, number), requested[number]
        else:
            body = {"encoder": choices.choice("ab"), "cpus": choices.choice([0, 1]), "threads": choices.choice([1, 2])}
            body |= {"candidate": choices.choice(["a", None]), "share": choices.choice([0.2, 0.3])}
            response, expected = client.put(URL, json=body), {}
        assert response.status_code == 202, response.text
        current, found = client.get(URL).json(), listed(client)
        assert settings_in(found[0]) == settings_in(current) == {**settings_in(current), **expected}
        assert [one["number"] for one in found] == list(range(len(found), 0, -1))
        for newer, older in pairwise(found):
            assert newer["changed"], "each revision differs from the one before"
            assert settings_in(newer) != settings_in(older)
        requested[found[0]["number"]] = settings_in(found[0])


def test_concurrent_changes_and_rollbacks_have_consecutive_numbers(client: TestClient, engine: Engine) -> None:
    put(client)

    def change(number: int) -> int:
        if number % 4 == 0:
            return roll_back(client, 1).status_code
        status: int = client.put(URL, json={"encoder": "b", "threads": number}).status_code
        return status

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(change, range(1, 33))) == {202}
    found = listed(client)
    assert [one["number"] for one in found] == list(range(len(found), 0, -1))
    threads = [one["settings"]["threads"] for one in found]
    assert {number for number in range(1, 33) if number % 4} <= set(threads), "every change has a revision"
    assert settings_in(found[0]) == settings_in(client.get(URL).json())


def test_concurrent_creations_have_consecutive_numbers(client: TestClient) -> None:
    with ThreadPoolExecutor(8) as pool:
        put_at_once = pool.map(lambda n: client.put(URL, json={"encoder": "a", "threads": n}), range(1, 9))
        assert {response.status_code for response in put_at_once} == {202}
    assert [one["number"] for one in listed(client)] == list(range(8, 0, -1))


def test_only_the_newest_revisions_are_kept(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(revisions, "KEPT", 3)
    for threads in range(1, 6):
        put(client, threads=threads)
    found = listed(client)
    assert [(one["number"], one["changed"]) for one in found] == [(5, ["threads"]), (4, ["threads"]), (3, None)]
    response = roll_back(client, 2)
    assert (response.status_code, response.json()["code"]) == (404, "not_found")
    assert "revision=2: deployment 'one' has no such revision" in response.json()["detail"]


def test_a_deployment_created_again_has_none_of_its_former_revisions(client: TestClient, engine: Engine) -> None:
    index_encoder(engine, "theirs", "theirs")
    put(client, threads=7)
    put(client, threads=8)
    assert client.delete(URL).status_code == 204
    assert rows(engine) == 0
    assert client.get(f"{URL}/revisions").status_code == roll_back(client, 1).status_code == 404
    put(client, encoder="theirs", project="theirs")
    (only,) = listed(client)
    assert (only["number"], only["encoder"], only["settings"]["threads"]) == (1, "theirs", None)


def test_another_projects_revisions_are_reported_as_unknown(client: TestClient, engine: Engine) -> None:
    put(client)
    theirs = key_to(engine, "admin", project="theirs")
    answers = []
    for name in ("one", "never"):
        for method, path, body in (("GET", "revisions", None), ("POST", "rollback", {"revision": 1})):
            response = client.request(method, f"/v1/deployments/{name}/{path}", json=body, headers=theirs)
            answers.append((response.status_code, response.json()["detail"].replace(name, "NAME")))
    assert answers[:2] == answers[2:] == [(404, "there is no deployment 'NAME'")] * 2


def test_a_revision_whose_encoder_was_deleted_cannot_be_restored(
    client: TestClient, engine: Engine, tmp_path: Path
) -> None:
    for body in ({"encoder": "b"}, {"candidate": "b"}, {}):
        put(client, **body)
    EncoderStore(engine).delete_encoder("b", None, str(tmp_path), "me")
    before = client.get(URL).json()
    for number in (1, 2):
        response = roll_back(client, number)
        assert (response.status_code, response.json()["code"]) == (422, "not_possible")
        expected = f"revision {number} cannot be restored: there is no encoder 'b'; restore another revision"
        assert response.json()["detail"] == expected
    assert client.get(URL).json() == before
    assert len(listed(client)) == 3


def test_a_revision_whose_candidate_became_the_main_encoder_cannot_be_restored(client: TestClient) -> None:
    def move_alias(encoder: str) -> None:
        assert client.put("/v1/encoders/aliases/production", json={"encoder": encoder}).is_success

    move_alias("a")
    put(client, encoder="production", candidate="b", share=0.1)
    move_alias("b")
    put(client, encoder="production")
    response = roll_back(client, 1)
    assert (response.status_code, response.json()["code"]) == (422, "not_possible")
    assert response.json()["detail"] == (
        "revision 1 cannot be restored: encoder=production and candidate=b now refer to b; "
        "move the alias back first, or restore another revision"
    )
    move_alias("a")
    assert roll_back(client, 1).json()["candidate"] == "b"


def test_a_revision_that_breaks_a_later_rule_is_listed_but_cannot_be_restored(
    client: TestClient, engine: Engine
) -> None:
    put(client)
    put(client, encoder="b")
    stored = ServingSettings.model_validate({"replicas": {"min": 3, "max": 1}}).model_dump(mode="json")
    with Session(engine) as session, session.begin():
        session.execute(update(DeploymentRevision).where(DeploymentRevision.number == 1).values(settings=stored))
    assert listed(client)[1]["settings"]["replicas"] == {"min": 3, "max": 1}
    response = roll_back(client, 1)
    assert (response.status_code, response.json()["code"]) == (422, "not_possible")
    assert response.json()["detail"].startswith(
        "revision 1 cannot be restored: replicas.min=3 must not be above replicas.max=1"
    )


def test_a_rollback_is_checked_like_an_update(client: TestClient, engine: Engine) -> None:
    outdated = put(client, gpus=2, replicas={"min": 2, "max": 2}).headers["etag"]
    current = put(client, encoder="b").headers["etag"]
    ProjectStore(engine).put("default", ProjectPolicy(max_replicas=1), "me")
    assert roll_back(client, 1).json()["code"] == "quota_exceeded"
    ProjectStore(engine).put("default", ProjectPolicy(), "me")
    cluster: FakeCluster = client.app.state.cluster  # type: ignore[attr-defined]
    cluster.total = Capacity(16.0, 1.0, 1e9)
    assert roll_back(client, 1).json()["code"] == "infeasible_resources"
    cluster.total = Capacity(16.0, 4.0, 1e9)
    assert roll_back(client, 1, **{"If-Match": outdated}).status_code == 412
    assert len(listed(client)) == 2, "a rejected rollback changes nothing"
    assert roll_back(client, 1, **{"If-Match": current}).status_code == 202


@pytest.mark.parametrize("revision", [0, -1, True, 10**16, 1.5, "x", None, [1]])
@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_an_invalid_revision_number_is_rejected(client: TestClient, revision: Any) -> None:
    put(client)
    response = roll_back(client, revision)
    assert (response.status_code, response.json()["code"]) == (422, "request_invalid")
    assert response.json()["errors"][0]["pointer"] == "#/revision"


def test_a_rollback_does_not_create_a_deployment_that_was_deleted_meanwhile(engine: Engine) -> None:
    desired = new_deployment("one", "default", "me", encoder="a", candidate=None, share=0.0, settings=ServingSettings())
    with pytest.raises(NotFound, match="there is no deployment 'one'"):
        DeploymentStore(engine).put(desired, restored=1)


def test_a_change_by_a_version_without_revisions_is_recorded_with_the_next_change(
    client: TestClient, engine: Engine
) -> None:
    put(client)
    with Session(engine) as session, session.begin():
        session.execute(update(Deployment).values(encoder="b"))
    put(client, encoder="b")
    assert [one["encoder"] for one in listed(client)] == ["b", "a"]
