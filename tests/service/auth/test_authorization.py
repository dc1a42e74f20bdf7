"""Tests for authorization of every route, with every scope, on objects in the caller's project and in another project.

RULES lists the scope that each route requires; the first test fails for a route that is not listed. For an object that
is not visible to the caller, a route returns 404 and leaves the object unchanged.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi.routing import iter_route_contexts
from sqlalchemy import Engine, update
from sqlalchemy.orm import Session
from starlette.testclient import TestClient

from amd.storage import join, write_bytes
from amd.training.run_folder import run_folder
from service.app import create_app
from service.auth import authentication
from service.auth.authentication import SCOPES, Scope
from service.auth.sessions import is_browser_path
from service.db.models import Alias, ApiKey, Base, Delivery, Deployment, Job, RegisteredEncoder, Webhook
from service.jobs.store import JobStore
from service.projects.audit import ACTIONS, AuditFilter, AuditLog
from service.projects.schemas import ProjectPolicy
from service.projects.store import ProjectStore
from service.registry.store import EncoderStore
from service.serving.deployments import DeploymentStore, ServingSettings, new_deployment
from service.settings import Settings
from service.webhooks.store import WebhookStore
from tests.support.browser import scenes
from tests.support.encoders.encoder_cards import index_encoder, publish
from tests.support.runs import ledgers
from tests.support.runs.pictures import write_pictures
from tests.support.service.apps import key_to
from tests.support.service.fake_cluster import FakeCluster, queued
from tests.support.service.route_rules import (
    CHANGES_NOTHING,
    CONFIG,
    FIXED,
    NEVER,
    OF_OBJECTS,
    OPEN,
    PUBLIC,
    RULES,
    ids_of,
)


class ApiFixture:
    """A control plane with a job, an encoder, its alias, a deployment, a key and a webhook in each of two projects."""

    def __init__(self, engine: Engine, client: TestClient, root: str) -> None:
        self.engine, self.client, self.root = engine, client, root
        self.objects = dict[str, dict[str, str]]()

    def create_objects(self) -> None:
        self.objects = {project: self._create_objects(project) for project in ("ours", "theirs")}

    def _create_objects(self, project: str) -> dict[str, str]:
        webhook = WebhookStore(self.engine).add(f"https://{project}.example.com", project, [], "test")
        now = time.time()
        ended = {"state": "succeeded", "attempt": 1, "ended_at": now, "started_at": now}
        job = queued(JobStore(self.engine), project=project, config=CONFIG, **ended)
        scenes.write_checkpoints(self.root, job.id, (4,))
        write_pictures(self.root, job.id, (1,))
        write_bytes(join(run_folder(self.root, job.id), "result.json"), b"{}")
        key = key_to(self.engine, "read", project=project)["Authorization"].split("_")[1]
        encoder, alias = index_encoder(self.engine, f"encoder-of-{job.id}", project), f"alias-{key}"
        publish(self.root, encoder)
        EncoderStore(self.engine).move_alias(project, alias, encoder, "test")
        deployed = f"serves-{key}"  # serves a different encoder, so that requests to this one find no deployment
        ProjectStore(self.engine).put(project, ProjectPolicy(), "test")
        plain: dict[str, Any] = {"candidate": None, "share": 0.0, "settings": ServingSettings()}
        DeploymentStore(self.engine).put(new_deployment(deployed, project, "test", encoder="another", **plain))
        names = {"encoder": encoder, "other": encoder, "alias": alias, "name": deployed}
        webhooks = {"webhook_id": webhook.id, "delivery_id": str(self._add_delivery(webhook.id))}
        return {"job_id": job.id, "key_id": key, **webhooks, **names}

    def _add_delivery(self, webhook_id: str) -> int:
        """Add a delivery with an ID so long that `answer` cannot match it inside another number."""
        delivery = WebhookStore(self.engine).add_test(webhook_id, None, "test")
        long_id = delivery.id if delivery.id > 10**9 else delivery.id + 10**9  # following IDs are long, too
        with Session(self.engine) as session, session.begin():
            session.execute(update(Delivery).where(Delivery.id == delivery.id).values(id=long_id))
        return long_id

    def request(
        self, route: tuple[str, str], header: dict[str, str], of: str = "ours", named: bool = False, **more: str
    ) -> Any:
        """Send a request. `named` adds the project for routes that take a name; `more` adds fields to the body."""
        method, path = route
        objects, rule = FIXED | self.objects[of] | PUBLIC.get(path, {}), RULES[route]
        texts = {key: value for key, value in (rule.body or {}).items() if isinstance(value, str)}
        body = {**(rule.body or {}), **{key: value.format(**objects) for key, value in texts.items()}, **more}
        options: dict[str, Any] = {"json": body} if body else {}
        if named and rule.names:
            options = {"json": {**body, "project": of}} if body else {"params": {"project": of}}
        return self.client.request(method, f"{path}{rule.query}".format(**objects), headers=header, **options)

    def state(self) -> list[tuple[Any, ...]]:
        """Return all state that a request could change, except the times at which keys were last used."""
        with Session(self.engine) as session:
            return [
                *((job.id, job.version, job.state, job.wanted) for job in session.query(Job).order_by(Job.id)),
                *((key.id, key.revoked_at) for key in session.query(ApiKey).order_by(ApiKey.id)),
                *(
                    (encoder.id, encoder.project)
                    for encoder in session.query(RegisteredEncoder).order_by(RegisteredEncoder.id)
                ),
                *((alias.name, alias.moves) for alias in session.query(Alias).order_by(Alias.name)),
                *((one.name, one.version) for one in session.query(Deployment).order_by(Deployment.name)),
                *((webhook.id,) for webhook in session.query(Webhook).order_by(Webhook.id)),
                *((delivery.id, delivery.state) for delivery in session.query(Delivery).order_by(Delivery.id)),
            ]


@pytest.fixture(scope="module")
def served(module_engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiFixture]:
    """Serve one application for all tests: SQLAlchemy compiles every statement again for a new engine."""
    folder, many = tmp_path_factory.mktemp("authorization"), "100000/minute"
    limits = {"rate_limit": many, "failure_limit": many}
    settings = Settings(storage=str(folder / "storage"), data_dir=folder, serve_url="http://127.0.0.1:1", **limits)
    with TestClient(create_app(settings, engine=module_engine, cluster=FakeCluster())) as client:
        yield ApiFixture(module_engine, client, settings.root)


@pytest.fixture
def api(served: ApiFixture) -> Iterator[ApiFixture]:
    """Create the objects of both projects, and empty the database after the test."""
    served.create_objects()
    yield served
    with served.engine.begin() as connection:
        for table in reversed(Base.metadata.sorted_tables):
            connection.execute(table.delete())


def test_the_rules_cover_exactly_the_apps_routes(api: ApiFixture) -> None:
    routes = list(iter_route_contexts(api.client.app.routes))  # type: ignore[attr-defined]
    served = {
        (method, (route.path or "").replace(":path}", "}"))
        for route in routes
        for method in (route.methods or {"ANY"}) - {"HEAD"}
    }
    assert {route for route in served if not is_browser_path(route[1])} == set(RULES)


@pytest.mark.parametrize("route", RULES, ids=" ".join)
def test_requests_without_a_valid_key_are_rejected_except_on_public_routes(
    api: ApiFixture, route: tuple[str, str]
) -> None:
    before = api.state()
    headers = {
        "no key": {},
        "expired": key_to(api.engine, "admin", expires_at=1.0),
        "revoked": key_to(api.engine, "admin", revoked_at=1.0),
        "unknown": {"Authorization": f"Bearer {authentication.new_secret()}"},
        "another scheme": {"Authorization": "Basic YTpi"},
    }
    for name, header in headers.items():
        status = api.request(route, header).status_code
        if RULES[route].needs is OPEN:
            assert status == 200, name
        else:
            assert status == 401, name
    assert [row for row in api.state() if row in before] == before


@pytest.mark.parametrize("route", [route for route, rule in RULES.items() if rule.needs is not OPEN], ids=" ".join)
def test_a_route_accepts_its_required_scope_and_rejects_lesser_scopes(api: ApiFixture, route: tuple[str, str]) -> None:
    needed = RULES[route].needs
    assert needed is not None
    for scopes in ((), *((scope,) for scope in SCOPES)):
        sufficient = bool(scopes) and SCOPES.index(scopes[0]) >= SCOPES.index(needed)
        for project in ("ours", None):
            api.create_objects()  # the previous request may have deleted the objects
            header, before = key_to(api.engine, *scopes, project=project), api.state()
            response = api.request(route, header, named=project is None)
            if sufficient and RULES[route].all_projects and project is not None:
                assert response.status_code == 403
                assert api.state() == before
            elif sufficient:
                authorized = response.status_code < 400 or response.json()["code"] == "not_possible"
                assert authorized or response.status_code == 409, (scopes, project, response.text)
            else:
                assert response.status_code == 403, (scopes, project)
                assert response.json()["needed_scope"] == needed
                assert api.state() == before


@pytest.mark.parametrize("route", OF_OBJECTS, ids=" ".join)
@pytest.mark.parametrize("scope", SCOPES)
def test_objects_in_other_projects_are_not_found(api: ApiFixture, route: tuple[str, str], scope: Scope) -> None:
    header, before = key_to(api.engine, scope, project="ours"), api.state()
    needed = RULES[route].needs
    assert needed is not None
    response = api.request(route, header, of="theirs")
    unknown = RULES[route].unknown
    assert response.status_code == (unknown if SCOPES.index(scope) >= SCOPES.index(needed) else 403)
    assert api.state() == before
    if response.status_code == unknown:  # indistinguishable from an object that never existed
        theirs, api.objects["theirs"] = api.objects["theirs"], NEVER
        assert answer(api.request(route, header, of="theirs"), NEVER) == answer(response, theirs)


def answer(response: Any, objects: dict[str, str]) -> dict[str, Any]:
    """Return an error response without its request ID, and with object IDs replaced by a placeholder."""
    text = response.text
    for name in sorted(objects.values(), key=len, reverse=True):  # some IDs contain others
        text = text.replace(name, "ID")
    problem = json.loads(text) if response.is_error else {}
    return {**problem, "status": response.status_code, "request_id": None}


@pytest.mark.parametrize(
    ("route", "key"),
    [pytest.param(route, key, id=f"{' '.join(route)} {key}") for route in OF_OBJECTS for key in ids_of(route)],
)
def test_an_id_from_another_project_is_reported_as_unknown_even_among_valid_ids(
    api: ApiFixture, route: tuple[str, str], key: str
) -> None:
    header, before = key_to(api.engine, "admin", project="ours"), api.state()
    found = {}
    for of, objects in {"foreign": api.objects["theirs"], "unknown": NEVER}.items():
        api.objects[of] = {**api.objects["ours"], key: objects[key]}
        found[of] = answer(api.request(route, header, of=of), {key: objects[key]})
    if (*route, key) == ("PUT", "/v1/deployments/{name}", "name"):  # names are unique in the service
        assert "another project uses the name" in found["foreign"]["detail"]
    else:
        assert found["foreign"] == found["unknown"]
    assert set(before) <= set(api.state())  # an alias of the same name may have been created in one's own project


@pytest.mark.parametrize("route", [route for route, rule in RULES.items() if rule.unknown == 409], ids=" ".join)
@pytest.mark.parametrize("named", ["encoder", "alias", "name"])
def test_deployments_in_other_projects_serve_no_requests(api: ApiFixture, route: tuple[str, str], named: str) -> None:
    theirs = api.objects["theirs"]
    with Session(api.engine) as session, session.begin():
        deployed = session.get(Deployment, theirs["name"])
        assert deployed is not None
        deployed.encoder, deployed.serving, deployed.state = theirs["alias"], {"main": theirs["encoder"]}, "healthy"
    theirs["encoder"] = theirs[named]
    codes = {"ours": "encoder_not_deployed", "theirs": "encoder_unavailable"}  # no replica runs here
    for project, code in codes.items():
        assert api.request(route, key_to(api.engine, "read", project=project), of="theirs").json()["code"] == code
        models = api.client.get("/openai/v1/models", headers=key_to(api.engine, "read", project=project)).json()["data"]
        assert {model["owned_by"] for model in models} == ({"theirs"} if project == "theirs" else set())


@pytest.mark.parametrize("route", [route for route, rule in RULES.items() if rule.lists], ids=" ".join)
def test_lists_are_limited_to_the_callers_project(api: ApiFixture, route: tuple[str, str]) -> None:
    everything = api.request(route, key_to(api.engine, "admin")).json()["items"]
    assert {item["project"] for item in everything} >= {"ours", "theirs"}
    shown = api.request(route, key_to(api.engine, "admin", project="ours"))
    assert {item["project"] for item in shown.json()["items"]} == {"ours"}
    assert not any(name in shown.text for name in api.objects["theirs"].values())


STOP_TRIAL = ("POST", "/v1/jobs/{job_id}/trials/{number}/stop")
JOB_STATES = {"cancel": "queued", "pause": "queued", "resume": "paused", "retry": "failed", "stop": "running"}


@pytest.mark.parametrize("route", [route for route in RULES if route not in CHANGES_NOTHING], ids=" ".join)
def test_every_change_leaves_an_audit_entry(api: ApiFixture, route: tuple[str, str]) -> None:
    ours = api.objects["ours"]
    with Session(api.engine) as session, session.begin():
        job = session.get(Job, ours["job_id"])
        assert job is not None
        job.state = JOB_STATES.get(route[1].rpartition("/")[2], "succeeded")
        if route == STOP_TRIAL:
            job.kind = "search"
            ledgers.write_sweep(run_folder(api.root, job.id), ledgers.search(), [ledgers.trial(0, {}, [], "running")])
    if route == ("DELETE", "/v1/encoders/{encoder}"):
        EncoderStore(api.engine).delete_alias("ours", ours["alias"], "test")  # an encoder in use is not deleted
    if route == ("PUT", "/v1/encoders/aliases/{alias}"):
        ours["encoder"] = index_encoder(api.engine, "another-encoder", "ours")  # otherwise the alias does not move
    if route == ("POST", "/v1/deployments/{name}/rollback"):
        index_encoder(api.engine, "another", "ours")  # the encoder that the deployment serves
    header = key_to(api.engine, "admin")
    response = api.request(route, header, named=True)
    assert response.status_code < 400, response.text
    (entry,) = AuditLog(api.engine).list(AuditFilter(actor=header["Authorization"].split("_")[1]))[0]
    assert entry.project in ("ours", "default", None)
    assert entry.action in ACTIONS
    path = route[1].format(**ours | {"project": "ours", "number": "0"})
    assert entry.target in response.text + path + header["Authorization"]


CREATING = [route for route, rule in RULES.items() if rule.body is not None and rule.needs not in ("infer", "read")]
CREATING.remove(("PATCH", "/v1/jobs/{job_id}"))  # a job stays in its project
CREATING.remove(("POST", "/v1/jobs/{job_id}/fork"))  # so does its fork
CREATING.remove(("POST", "/v1/deployments/{name}/rollback"))  # so does a deployment
CREATING.remove(("PUT", "/v1/projects/{project}"))
CREATING.remove(("POST", "/v1/gc"))  # concerns all projects


@pytest.mark.parametrize("route", CREATING, ids=" ".join)
def test_creating_objects_in_other_projects_is_rejected(api: ApiFixture, route: tuple[str, str]) -> None:
    header, before = key_to(api.engine, "admin", project="ours"), api.state()
    assert api.request(route, header, of="theirs", project="theirs").status_code == 403
    assert api.state() == before


@pytest.mark.parametrize(
    "route", [route for route, rule in RULES.items() if rule.body and "input" in rule.body], ids=" ".join
)
def test_reading_a_file_by_its_uri_requires_more_than_the_infer_scope(api: ApiFixture, route: tuple[str, str]) -> None:
    by_uri = f"{api.root}/shared/picture.png"
    for scope, status in (("infer", 403), ("read", 409)):  # 409: no deployment serves the encoder
        response = api.request(route, key_to(api.engine, scope, project="ours"), input=by_uri)
        assert response.status_code == status, response.text
        if status == 403:
            assert response.json()["needed_scope"] == "read"
