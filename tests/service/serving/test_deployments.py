"""What is wanted of Serve and what is told of it, with a Serve of ten lines; a real one is in tests/flows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine

from service.jobs.store import JobStore
from service.registry.discovery import EncoderDiscovery
from service.registry.store import EncoderStore
from service.serving.deployments import Deployer, DeploymentStore, new_deployment, reserved_cpus
from service.serving.schemas import ServingSettings
from service.serving.serve_api import Running
from service.settings import Settings
from service.web.errors import ClusterUnavailable, NotFound
from tests.support.service.published_encoders import publish


class FakeServe:
    """Keeps what it was told, and adds to it as Serve does."""

    def __init__(self) -> None:
        self.apps: dict[str, Running] = {}
        self.puts, self.away, self.status = 0, False, "RUNNING"

    def applications(self) -> dict[str, Running]:
        if self.away:
            raise ClusterUnavailable("Ray Serve does not answer")
        return {name: app._replace(status=self.status) for name, app in self.apps.items()}

    def put(self, applications: Sequence[Mapping[str, Any]]) -> None:
        self.puts += 1
        self.apps = {app["name"]: Running("RUNNING", "", {**app, "external": False}, 1) for app in applications}

    def told(self, name: str) -> Any:
        return self.apps[f"amd-{name}"].config["deployments"][0]


class World:
    def __init__(self, engine: Engine, root: Path) -> None:
        self.root = root
        self.store, self.encoders, self.serve = DeploymentStore(engine), EncoderStore(engine), FakeServe()
        settings = Settings(storage=str(root), data_dir=root)
        self.deployer = Deployer(self.store, self.encoders, JobStore(engine), self.serve, settings)

    def publish(self, *names: str) -> None:
        for name in names:
            publish(self.root / "encoders" / name)
        EncoderDiscovery(self.encoders, str(self.root)).look()

    def urls(self, main: str, candidate: str | None = None) -> dict[str, str | None]:
        return {
            slot: str(self.root / "encoders" / name) if name else None
            for slot, name in (("main", main), ("candidate", candidate))
        }

    def put(self, name: str, encoder: str, project: str = "default", **words: Any) -> None:
        settings = ServingSettings.model_validate(words.pop("settings", {}))
        words = {"candidate": None, "share": 0.0, **words}
        self.store.put(new_deployment(name, project, "me", encoder=encoder, settings=settings, **words))


@pytest.fixture
def world(engine: Engine, tmp_path: Path) -> World:
    return World(engine, tmp_path)


def test_what_is_wanted_is_told_once_and_what_is_not_is_taken_down(world: World) -> None:
    world.publish("a", "b")
    world.put("one", "a")
    world.deployer.step()
    assert world.serve.told("one")["user_config"] == world.urls(main="a")
    assert world.store.get("one", None).state == "deploying"
    world.deployer.step()
    world.deployer.step()
    assert world.serve.puts == 1, "nothing has changed"
    assert (world.store.get("one", None).state, world.store.get("one", None).serving) == ("healthy", {"main": "a"})
    world.put("one", "b", settings={"replicas": {"min": 1, "max": 4}, "cpus": 0.5})
    assert world.store.get("one", None).state == "deploying", "until Serve has been seen to hold the change"
    world.deployer.step()
    assert world.store.get("one", None).state == "deploying"
    assert world.serve.told("one")["autoscaling_config"]["max_replicas"] == 4
    assert reserved_cpus(world.store)() == 2.0
    world.store.delete("one", "default")
    world.deployer.step()
    assert world.serve.apps == {}


def test_a_candidate_that_is_withdrawn_is_taken_from_the_replicas(world: World) -> None:
    world.publish("a", "b")
    world.put("one", "a", candidate="b", share=0.5)
    world.deployer.step()
    assert world.serve.told("one")["user_config"] == world.urls(main="a", candidate="b")
    world.put("one", "a")
    world.deployer.step()
    assert world.serve.told("one")["user_config"] == world.urls(main="a")


def test_a_head_that_was_replaced_is_told_anew_and_others_applications_are_left_alone(world: World) -> None:
    world.publish("a")
    theirs = {"name": "theirs", "import_path": "x:y", "deployments": []}
    world.serve.put([theirs])
    world.put("one", "a")
    world.deployer.step()
    assert world.serve.apps.keys() == {"theirs", "amd-one"}
    world.serve.apps = {}
    world.deployer.step()
    assert world.serve.apps.keys() == {"amd-one"}


def test_trouble_is_told_and_loses_nothing(world: World) -> None:
    world.publish("a")
    world.put("one", "a")
    world.serve.away = True
    with pytest.raises(ClusterUnavailable):
        world.deployer.step()
    assert world.store.get("one", None).message == "Ray Serve does not answer"
    world.serve.away, world.serve.status = False, "DEPLOY_FAILED"
    world.deployer.step()
    world.deployer.step()
    assert world.store.get("one", None).state == "failed"


def test_what_an_alias_loses_goes_on_being_served(world: World) -> None:
    world.publish("a", "b")
    world.encoders.move("default", "production", "a", "me")
    world.put("one", "production")
    world.deployer.step()
    world.encoders.move("default", "production", "b", "me")
    world.deployer.step()
    assert world.serve.told("one")["user_config"] == world.urls(main="b")
    world.encoders.drop("default", "production", "me")
    world.deployer.step()
    assert world.serve.told("one")["user_config"] == world.urls(main="b")
    assert world.store.get("one", None).serving == {"main": "b"}


def test_a_name_belongs_to_one_project_and_answers_for_it_alone(world: World) -> None:
    world.publish("a")
    world.put("one", "a", project="ours")
    with pytest.raises(NotFound, match="its name is taken"):
        world.put("one", "a", project="theirs")
    with pytest.raises(NotFound):
        world.store.get("one", "theirs")
    with pytest.raises(NotFound):
        world.store.delete("one", "theirs")
    world.deployer.step()
    for name in ("one", "a"):
        assert world.store.serving(name, "theirs") is None
        found = world.store.serving(name, "ours")
        assert found is not None
        assert found.name == "one"
    assert world.store.serving("b", None) is None
