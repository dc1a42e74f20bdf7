"""Tests for the deployer with a fake Ray Serve; tests/flows uses a real one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine
from sqlalchemy.orm import Session

from service.db.leases import LeaseKeeper
from service.db.models import Deletion
from service.jobs.execution.backfill import Usage
from service.jobs.execution.ray_jobs import Capacity
from service.registry.discovery import EncoderDiscovery
from service.registry.store import EncoderStore
from service.serving.deployments import Deployer, DeploymentStore, new_deployment
from service.serving.reservations import check_fits, running_reservation
from service.serving.schemas import ServingSettings
from service.settings import Settings
from service.web.errors import ClusterUnavailable, InfeasibleDeployment, NotFound
from tests.support.encoders.published_encoders import publish
from tests.support.service.fake_serve import FakeServe


class DeployerFixture:
    """A deployer on a fake Serve, with encoders published under a local root."""

    def __init__(self, engine: Engine, root: Path) -> None:
        self.root = root
        self.store, self.encoders, self.serve = DeploymentStore(engine), EncoderStore(engine), FakeServe()
        settings = Settings(storage=str(root), data_dir=root)
        self.deployer = Deployer(self.store, self.encoders, LeaseKeeper(engine, "deployer"), self.serve, settings)

    def publish(self, *names: str) -> None:
        for name in names:
            publish(self.root / "encoders" / name)
        EncoderDiscovery(self.encoders, str(self.root)).scan()

    def urls(self, main: str, candidate: str | None = None) -> dict[str, str | None]:
        return {
            slot: str(self.root / "encoders" / name) if name else None
            for slot, name in (("main", main), ("candidate", candidate))
        }

    def put(self, name: str, encoder: str, project: str = "default", **fields: Any) -> None:
        settings = ServingSettings.model_validate(fields.pop("settings", {}))
        fields = {"candidate": None, "share": 0.0, **fields}
        self.store.put(new_deployment(name, project, "me", encoder=encoder, settings=settings, **fields))


@pytest.fixture
def fixture(engine: Engine, tmp_path: Path) -> DeployerFixture:
    return DeployerFixture(engine, tmp_path)


def test_deployments_are_applied_once_and_removed_when_deleted(fixture: DeployerFixture) -> None:
    fixture.publish("a", "b")
    fixture.put("one", "a")
    fixture.deployer.step()
    assert fixture.serve.deployed("one")["user_config"] == fixture.urls(main="a")
    assert fixture.store.get("one", None).state == "deploying"
    fixture.deployer.step()
    fixture.deployer.step()
    assert fixture.serve.puts == 1, "an unchanged deployment must not be applied again"
    assert (fixture.store.get("one", None).state, fixture.store.get("one", None).serving) == ("healthy", {"main": "a"})
    fixture.put("one", "b", settings={"replicas": {"min": 1, "max": 4}, "cpus": 0.5})
    assert fixture.store.get("one", None).state == "deploying", (
        "the state must not be healthy before Serve reports the change"
    )
    fixture.deployer.step()
    assert fixture.store.get("one", None).state == "deploying"
    assert fixture.serve.deployed("one")["autoscaling_config"]["max_replicas"] == 4
    fixture.store.delete("one", "default", "alice")
    fixture.deployer.step()
    assert fixture.serve.apps == {}
    with Session(fixture.store._engine) as session:
        deletion = session.query(Deletion).one()
        assert (deletion.kind, deletion.object_id, deletion.actor) == ("deployment", "one", "alice")


def test_a_stored_deployment_with_a_minimum_above_its_maximum_is_still_applied(fixture: DeployerFixture) -> None:
    fixture.publish("a")
    fixture.put("one", "a", settings={"replicas": {"min": 3, "max": 1}})
    fixture.deployer.step()
    assert fixture.serve.deployed("one")["autoscaling_config"]["max_replicas"] == 3


def test_a_withdrawn_candidate_is_removed_from_the_replicas(fixture: DeployerFixture) -> None:
    fixture.publish("a", "b")
    fixture.put("one", "a", candidate="b", share=0.5)
    fixture.deployer.step()
    assert fixture.serve.deployed("one")["user_config"] == fixture.urls(main="a", candidate="b")
    fixture.put("one", "a")
    fixture.deployer.step()
    assert fixture.serve.deployed("one")["user_config"] == fixture.urls(main="a")


def test_lost_deployments_are_restored_and_other_applications_are_preserved(
    fixture: DeployerFixture,
) -> None:
    fixture.publish("a")
    theirs = {"name": "theirs", "import_path": "x:y", "deployments": []}
    fixture.serve.put([theirs])
    fixture.put("one", "a")
    fixture.deployer.step()
    assert fixture.serve.apps.keys() == {"theirs", "amd-one"}
    fixture.serve.apps = {}
    fixture.deployer.step()
    assert fixture.serve.apps.keys() == {"amd-one"}


def test_serve_errors_are_recorded_in_the_deployment(fixture: DeployerFixture) -> None:
    fixture.publish("a")
    fixture.put("one", "a")
    fixture.serve.unreachable = True
    with pytest.raises(ClusterUnavailable):
        fixture.deployer.step()
    assert fixture.store.get("one", None).message == "Ray Serve does not respond"
    fixture.serve.unreachable, fixture.serve.status = False, "DEPLOY_FAILED"
    fixture.deployer.step()
    fixture.deployer.step()
    assert fixture.store.get("one", None).state == "failed"


def test_an_encoder_is_served_after_its_alias_is_deleted(fixture: DeployerFixture) -> None:
    fixture.publish("a", "b")
    fixture.encoders.move_alias("default", "production", "a", "me")
    fixture.put("one", "production")
    fixture.deployer.step()
    fixture.encoders.move_alias("default", "production", "b", "me")
    fixture.deployer.step()
    assert fixture.serve.deployed("one")["user_config"] == fixture.urls(main="b")
    fixture.encoders.delete_alias("default", "production", "me")
    fixture.deployer.step()
    assert fixture.serve.deployed("one")["user_config"] == fixture.urls(main="b")
    assert fixture.store.get("one", None).serving == {"main": "b"}


def test_a_deployment_name_belongs_to_one_project(fixture: DeployerFixture) -> None:
    fixture.publish("a")
    fixture.put("one", "a", project="ours")
    with pytest.raises(NotFound, match="another project uses the name"):
        fixture.put("one", "a", project="theirs")
    with pytest.raises(NotFound):
        fixture.store.get("one", "theirs")
    with pytest.raises(NotFound):
        fixture.store.delete("one", "theirs", "me")
    fixture.deployer.step()
    for name in ("one", "a"):
        assert fixture.store.find_serving(name, "theirs") is None
        found = fixture.store.find_serving(name, "ours")
        assert found is not None
        assert found.name == "one"
    assert fixture.store.find_serving("b", None) is None


def test_a_deployment_reserves_resources_for_at_least_its_minimum_replicas(fixture: DeployerFixture) -> None:
    fixture.publish("a")
    settings = {"replicas": {"min": 2, "max": 1000}, "cpus": 0.5, "gpus": 1}
    fixture.put("one", "a", settings=settings)
    reserved = running_reservation(fixture.store)
    assert reserved() == Usage(1.0, 2.0), "the maximum is not reserved"
    fixture.serve.replicas = 3
    fixture.deployer.step()
    fixture.deployer.step()
    assert fixture.store.get("one", None).replicas == 3
    assert reserved() == Usage(1.5, 3.0)
    fixture.serve.replicas = 0
    fixture.deployer.step()
    assert reserved() == Usage(1.0, 2.0)


def test_a_deployment_that_does_not_fit_is_rejected_with_the_available_resources(fixture: DeployerFixture) -> None:
    capacity = Capacity(8.0, 4.0, 1e9)

    def check(name: str, **settings: Any) -> None:
        desired = {"encoder": "a", "candidate": None, "share": 0.0, "settings": ServingSettings(**settings)}
        check_fits(new_deployment(name, "default", "me", **desired), fixture.store.all(), capacity)

    fixture.put("other", "a", settings={"replicas": {"min": 2, "max": 9}, "gpus": 1, "cpus": 1})
    check("one", gpus=2, cpus=6)
    check("one", gpus=1, replicas={"min": 2, "max": 1000})
    check("other", gpus=1, replicas={"min": 4, "max": 4})
    with pytest.raises(
        InfeasibleDeployment, match="3 x 1 GPUs do not fit: the cluster has 4 GPUs, of which the min"
    ) as error:
        check("one", gpus=1, replicas={"min": 3, "max": 3})
    assert error.value.extra == {"field": "gpus", "needed": 3.0, "reserved": 2.0, "total": 4.0}
    with pytest.raises(InfeasibleDeployment, match="CPUs"):
        check("one", cpus=7)
    with pytest.raises(InfeasibleDeployment, match="GPUs"):
        check("idle", gpus=4, replicas={"min": 0, "max": 1})


def test_a_deployment_whose_new_encoder_cannot_be_loaded_reports_why(fixture: DeployerFixture) -> None:
    fixture.publish("a", "b")
    fixture.put("one", "a")
    fixture.deployer.step()
    fixture.deployer.step()
    assert fixture.store.get("one", None).state == "healthy"
    fixture.put("one", "b")
    fixture.serve.errors = {"main": "b: encoder.safetensors is damaged"}
    fixture.deployer.step()
    fixture.deployer.step()
    found = fixture.store.get("one", None)
    message = "b cannot be loaded: b: encoder.safetensors is damaged; the previous encoder serves instead"
    assert (found.state, found.message) == ("unhealthy", message)
    fixture.serve.errors = {}
    fixture.deployer.step()
    assert (fixture.store.get("one", None).state, fixture.store.get("one", None).message) == ("healthy", "")
