"""Tests for `amd deployments` against a real control plane whose deployer uses a fake Ray Serve."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator

import pytest
from sqlalchemy import Engine

from service.db.leases import LeaseKeeper
from service.registry.discovery import EncoderDiscovery
from service.serving import deployments
from service.serving.deployments import Deployer, new_deployment
from service.serving.schemas import ServingSettings
from tests.support.encoders.encoder_cards import publish
from tests.support.service.fake_cluster import queued
from tests.support.service.fake_serve import FakeServe
from tests.support.service.server import Server

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def serve(service: Server, sqlite_engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeServe]:
    """Publish the encoders `a` and `b`, and run a deployer."""
    state, serve, stop = service.app.state, FakeServe(), threading.Event()
    for encoder in ("a", "b"):
        publish(state.settings.root, encoder)
    EncoderDiscovery(state.encoders, state.settings.root).scan()
    monkeypatch.setattr(deployments, "POLL_INTERVAL_S", 0.02)
    monkeypatch.setattr("service.client._sync.deployments.POLL_INTERVAL_S", 0.02)
    lease = LeaseKeeper(sqlite_engine, "deployer")
    deployer = Deployer(state.deployments, state.encoders, lease, serve, state.settings)
    thread = threading.Thread(target=deployer.run, args=(stop,))
    thread.start()
    yield serve
    stop.set()
    thread.join()


def put(service: Server, encoder: str, actor: str = "ci", **settings: int) -> None:
    serving = ServingSettings(threads=settings.get("threads"))
    desired = new_deployment("one", "default", actor, encoder=encoder, candidate=None, share=0.0, settings=serving)
    service.app.state.deployments.put(desired, resolved={"main": "a"})


def test_revisions_are_listed_with_their_changes(service: Server, amd: Command) -> None:
    put(service, "production")
    put(service, "a", "[bold]me", threads=4)
    code, out, _ = amd("deployments", "revisions", "one")
    parts = out.split()
    assert code == 0
    assert {"2", "encoder,", "threads", "[bold]me"} < {*parts[: parts.index("production")]}
    assert {"1", "(a)", "ci"} < {*parts[parts.index("production") - 1 :]}
    listed = json.loads(amd("deployments", "revisions", "one", "--json")[1])
    assert [one["changed"] for one in listed] == [["encoder", "threads"], None]


def test_a_rollback_restores_the_revision_before_the_newest_or_a_given_one(
    service: Server, serve: FakeServe, amd: Command
) -> None:
    for encoder in ("a", "b"):
        assert amd("encoders", "deploy", encoder, "--name", "one")[:2] == (0, "one: healthy\n")
    assert amd("deployments", "rollback", "one")[:2] == (0, "one: healthy\n")
    assert service.app.state.deployments.get("one", None).encoder == "a"
    restored = json.loads(amd("deployments", "rollback", "one", "--to", "2", "--json")[1])
    assert (restored["encoder"], restored["state"]) == ("b", "healthy")
    assert serve.deployed("one")["user_config"]["main"].endswith("/encoders/b")
    listed = json.loads(amd("deployments", "revisions", "one", "-o", "json")[1])
    assert [(one["number"], one["encoder"], one["restored"]) for one in listed] == [
        *((4, "b", 2), (3, "a", 1)),
        *((2, "b", None), (1, "a", None)),
    ]


def test_a_rollback_that_is_not_possible_prints_why(service: Server, amd: Command) -> None:
    put(service, "never")
    code, _, err = amd("deployments", "rollback", "one")
    assert (code, "one: there is no earlier revision to restore" in err) == (2, True)
    code, out, err = amd("deployments", "rollback", "one", "--to", 1, "--json")
    assert (code, json.loads(out)["code"]) == (2, "not_possible")
    assert "revision 1 cannot be restored: there is no encoder 'never'" in " ".join(err.split())
    assert amd("deployments", "rollback", "one", "--to", 0)[0] == 2
    for command in ("revisions", "rollback", "delete"):
        code, _, err = amd("deployments", command, "two")
        assert (code, err.splitlines()[-1]) == (2, "error: there is no deployment 'two'")
        code, _, err = amd("deployments", command, "onne")
        assert (code, err.splitlines()[-1]) == (2, "error: there is no deployment 'onne'; did you mean one?")


def test_an_encoder_is_deployed_by_the_name_of_its_job(service: Server, serve: FakeServe, amd: Command) -> None:
    job = queued(service.app.state.jobs, name="first")
    publish(service.app.state.settings.root, job.id)
    EncoderDiscovery(service.app.state.encoders, service.app.state.settings.root).scan()
    code, out, err = amd("encoders", "deploy", "first", "--name", "one")
    assert (code, out) == (0, "one: healthy\n")
    assert service.app.state.deployments.get("one", None).encoder == job.id
    assert f"-F file=@FILE {service.url}/v1/encoders/one/embeddings" in err
    code, _, err = amd("encoders", "deploy", "fist", "--name", "two")
    assert (code, "there is no encoder 'fist'; did you mean first?" in " ".join(err.split())) == (2, True)


def test_an_encoder_that_a_job_is_still_to_publish_is_not_deployed(
    service: Server, serve: FakeServe, amd: Command
) -> None:
    jobs = service.app.state.jobs
    for kind in ("probe", "export"):
        queued(jobs, kind=kind, name="first")
    job = queued(jobs, name="first", state="paused")
    code, _, err = amd("encoders", "deploy", "first", "--name", "one")
    expected = f"first: job {job.id} is paused, and publishes its encoder when it succeeds; wait with `amd jobs wait"
    assert (code, expected in " ".join(err.split())) == (2, True), err
    publish(service.app.state.settings.root, job.id)
    EncoderDiscovery(service.app.state.encoders, service.app.state.settings.root).scan()
    jobs.change(job, "succeeded", state="succeeded")
    other = queued(jobs, name="first", state="paused")
    code, _, err = amd("encoders", "deploy", "first", "--name", "one")
    assert (code, other.id in err, f"or use an earlier encoder by its ID: {job.id}" in " ".join(err.split())) == (
        2,
        True,
        True,
    )
    jobs.change(other, "failed", state="failed")
    assert amd("encoders", "deploy", "first", "--name", "one")[0] == 0
    code, out, _ = amd("deployments", "delete", "one")
    assert (code, out) == (0, "one: deployment deleted\n")
