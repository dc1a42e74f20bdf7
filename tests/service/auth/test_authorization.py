"""Tests for authorization of every route, with every scope, on objects in the caller's project and in another project.

RULES lists the scope that each route requires; the first test fails for a route that is not listed. For an object that
is not visible to the caller, a route returns 404 and leaves the object unchanged.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from fastapi.routing import iter_route_contexts
from sqlalchemy import Engine
from sqlalchemy.orm import Session
from starlette.testclient import TestClient

from service.app import create_app
from service.auth import authentication
from service.auth.authentication import SCOPES, Scope
from service.auth.sessions import is_browser_path
from service.db.models import Alias, ApiKey, Delivery, Deployment, Job, RegisteredEncoder, Webhook
from service.jobs.kinds import resolve
from service.jobs.store import JobStore
from service.projects.audit import AuditFilter, AuditLog
from service.projects.schemas import ProjectPolicy
from service.projects.store import ProjectStore
from service.registry.store import EncoderStore
from service.serving.deployments import DeploymentStore, ServingSettings, new_deployment
from service.settings import Settings
from service.webhooks.store import WebhookStore
from tests.support.runs.pictures import write_pictures
from tests.support.service.apps import key_to
from tests.support.service.encoder_cards import index_encoder, publish
from tests.support.service.fake_cluster import FakeCluster, queued

OPEN = None  # requires no key
JOB = {"kind": "train", "preset": "demo-image-amd"}
CONFIG = resolve("train", "demo-image-amd", None, {}).model_dump(mode="json")  # a clone needs a complete one
PICTURE = {"input": "data:image/png;base64,AAAA"}
STORED_PICTURE = {"step": "1", "picture": "input.webp"}  # of every job


class Rule(NamedTuple):
    """The scope that a route requires, and how tests call the route."""

    needs: Scope | None
    body: Any = None
    """Request body. Like the path, its strings may contain placeholders for objects."""
    lists: bool = False
    """Whether the route lists objects in the caller's project."""
    names: bool = False
    """Whether the route takes a name within a project, which must be specified if the key covers all projects."""
    unknown: int = 404
    """Status for an object that does not exist."""
    all_projects: bool = False
    """Whether the key must cover all projects."""


RULES: dict[tuple[str, str], Rule] = {
    ("GET", "/livez"): Rule(OPEN),
    ("GET", "/readyz"): Rule(OPEN),
    ("GET", "/metrics"): Rule(OPEN),
    ("GET", "/openapi.json"): Rule(OPEN),
    ("GET", "/docs"): Rule(OPEN),
    ("GET", "/docs/oauth2-redirect"): Rule(OPEN),
    ("GET", "/redoc"): Rule(OPEN),
    ("GET", "/"): Rule(OPEN),  # the console, whose routes are tested in tests/service/console
    ("GET", "/v1/me"): Rule("infer"),
    ("POST", "/v1/console-links"): Rule("read"),
    ("GET", "/v1/cluster"): Rule("read"),
    ("GET", "/v1/presets"): Rule("read"),
    ("GET", "/v1/presets/{name}"): Rule("read"),
    ("GET", "/v1/schemas/{kind}"): Rule("read"),
    ("POST", "/v1/validate"): Rule("submit", JOB),
    ("POST", "/v1/jobs"): Rule("submit", JOB),
    ("GET", "/v1/jobs"): Rule("read", lists=True),
    ("GET", "/v1/jobs/{job_id}"): Rule("read"),
    ("GET", "/v1/jobs/{job_id}/logs"): Rule("read"),
    ("GET", "/v1/jobs/{job_id}/metrics"): Rule("read"),
    ("GET", "/v1/jobs/{job_id}/events"): Rule("read"),
    ("GET", "/v1/jobs/{job_id}/trials"): Rule("read"),
    ("GET", "/v1/jobs/{job_id}/checkpoints"): Rule("read"),
    ("GET", "/v1/jobs/{job_id}/history"): Rule("read"),
    ("GET", "/v1/jobs/{job_id}/logs/search"): Rule("read"),
    ("GET", "/v1/jobs/{job_id}/logs/range"): Rule("read"),
    ("GET", "/v1/jobs/{job_id}/bad-samples"): Rule("read"),
    ("GET", "/v1/jobs/{job_id}/media"): Rule("read"),
    ("GET", "/v1/jobs/{job_id}/media/{step}/{picture}"): Rule("read"),
    ("PATCH", "/v1/jobs/{job_id}"): Rule("submit", {"name": "a"}),
    ("POST", "/v1/jobs/{job_id}/clone"): Rule("submit"),
    ("POST", "/v1/jobs/{job_id}/neighbours"): Rule("read", {"record": 0}),
    ("POST", "/v1/jobs/{job_id}/cancel"): Rule("submit"),
    ("POST", "/v1/jobs/{job_id}/pause"): Rule("submit"),
    ("POST", "/v1/jobs/{job_id}/resume"): Rule("submit"),
    ("POST", "/v1/jobs/{job_id}/retry"): Rule("submit"),
    ("DELETE", "/v1/jobs/{job_id}"): Rule("submit"),
    ("GET", "/v1/encoders"): Rule("read", lists=True),
    ("POST", "/v1/encoders"): Rule("submit", {"weights": "timm:vit_tiny_patch16_224"}),
    ("GET", "/v1/encoders/aliases"): Rule("read", lists=True),
    ("GET", "/v1/encoders/aliases/{alias}"): Rule("read", names=True),
    ("PUT", "/v1/encoders/aliases/{alias}"): Rule("submit", {"encoder": "{encoder}"}, names=True),
    ("DELETE", "/v1/encoders/aliases/{alias}"): Rule("submit", names=True),
    ("GET", "/v1/encoders/{encoder}"): Rule("read"),
    ("DELETE", "/v1/encoders/{encoder}"): Rule("submit"),
    ("GET", "/v1/encoders/{encoder}/download"): Rule("read"),
    ("GET", "/v1/encoders/{encoder}/compare/{other}"): Rule("read"),
    ("POST", "/v1/encoders/{encoder}/embeddings"): Rule("infer", PICTURE, unknown=409),
    ("POST", "/v1/encoders/{encoder}/classifications"): Rule("infer", PICTURE, unknown=409),
    ("POST", "/v1/encoders/{encoder}/reconstructions"): Rule("infer", PICTURE, unknown=409),
    ("POST", "/openai/v1/embeddings"): Rule("infer", {"model": "{encoder}", **PICTURE}, unknown=409),
    ("GET", "/openai/v1/models"): Rule("infer"),
    ("GET", "/v1/deployments"): Rule("read", lists=True),
    ("PUT", "/v1/deployments/{name}"): Rule("submit", {"encoder": "{encoder}", "candidate": "{other}"}, names=True),
    ("GET", "/v1/deployments/{name}"): Rule("read"),
    ("GET", "/v1/deployments/{name}/drift"): Rule("read"),
    ("DELETE", "/v1/deployments/{name}"): Rule("submit"),
    ("POST", "/v1/keys"): Rule("admin", {"name": "a", "scopes": ["read"]}),
    ("GET", "/v1/keys"): Rule("admin", lists=True),
    ("DELETE", "/v1/keys/{key_id}"): Rule("admin"),
    ("POST", "/v1/webhooks"): Rule("admin", {"url": "https://hooks.example.com"}),
    ("GET", "/v1/webhooks"): Rule("admin", lists=True),
    ("DELETE", "/v1/webhooks/{webhook_id}"): Rule("admin"),
    ("GET", "/v1/webhooks/{webhook_id}/deliveries"): Rule("admin"),
    ("GET", "/v1/projects"): Rule("admin"),
    ("GET", "/v1/projects/{project}"): Rule("admin"),
    ("PUT", "/v1/projects/{project}"): Rule("admin", {"share": 2}, all_projects=True),
    ("GET", "/v1/usage"): Rule("read"),
    ("GET", "/v1/doctor"): Rule("admin", all_projects=True),
    ("POST", "/v1/gc"): Rule("admin", {"dry_run": False}, all_projects=True),
    ("POST", "/v1/lab/masks"): Rule("infer", {"encoder": "{encoder}"}),  # which has no decoder, and is refused
    ("GET", "/v1/audit"): Rule("admin", lists=True),
}
QUESTIONS = {"/v1/validate", "/v1/jobs/{job_id}/neighbours"}
CHANGES_NOTHING = {  # routes that answer a question sent as a body
    route for route, rule in RULES.items() if route[0] == "GET" or rule.needs == "infer" or route[1] in QUESTIONS
}
PUBLIC = {  # parameters of routes whose objects belong to no project
    "/v1/presets/{name}": {"name": "demo-image-amd"},
    "/v1/schemas/{kind}": {"kind": "train"},
    "/v1/projects/{project}": {"project": "ours"},  # isolation is tested in tests/service/projects
}
NEVER = {  # IDs of objects that do not exist
    "job_id": "train-never",
    "key_id": "abc",
    "webhook_id": "wh_abc",
    **dict.fromkeys(("encoder", "other", "alias", "name"), "never"),
}


def ids_of(route: tuple[str, str]) -> list[str]:
    """Return the placeholders for objects in a route's path and body."""
    return [key for key in NEVER if route[1] not in PUBLIC and f"{{{key}}}" in f"{route[1]} {RULES[route].body}"]


OF_OBJECTS = [route for route in RULES if ids_of(route)]


class ApiFixture:
    """A control plane with a job, an encoder, its alias, a deployment, a key and a webhook in each of two projects."""

    def __init__(self, engine: Engine, client: TestClient, root: str) -> None:
        self.engine, self.client, self.root = engine, client, root
        self.objects = {project: self._create_objects(project) for project in ("ours", "theirs")}

    def _create_objects(self, project: str) -> dict[str, str]:
        webhook = WebhookStore(self.engine).add(f"https://{project}.example.com", project, [], "test")
        now = time.time()
        ended = {"state": "succeeded", "attempt": 1, "ended_at": now, "started_at": now}
        job = queued(JobStore(self.engine), project=project, config=CONFIG, **ended)
        write_pictures(self.root, job.id, (1,))
        key = key_to(self.engine, "read", project=project)["Authorization"].split("_")[1]
        encoder, alias = index_encoder(self.engine, f"encoder-of-{job.id}", project), f"alias-{key}"
        publish(self.root, encoder)
        EncoderStore(self.engine).move_alias(project, alias, encoder, "test")
        deployed = f"serves-{key}"  # serves a different encoder, so that requests to this one find no deployment
        ProjectStore(self.engine).put(project, ProjectPolicy(), "test")
        plain: dict[str, Any] = {"candidate": None, "share": 0.0, "settings": ServingSettings()}
        DeploymentStore(self.engine).put(new_deployment(deployed, project, "test", encoder="another", **plain))
        names = {"encoder": encoder, "other": encoder, "alias": alias, "name": deployed}
        return {"job_id": job.id, "key_id": key, "webhook_id": webhook.id, **names}

    def request(
        self, route: tuple[str, str], header: dict[str, str], of: str = "ours", named: bool = False, **more: str
    ) -> Any:
        """Send a request. `named` adds the project for routes that take a name; `more` adds fields to the body."""
        method, path = route
        objects, rule = self.objects[of] | STORED_PICTURE | PUBLIC.get(path, {}), RULES[route]
        texts = {key: value for key, value in (rule.body or {}).items() if isinstance(value, str)}
        body = {**(rule.body or {}), **{key: value.format(**objects) for key, value in texts.items()}, **more}
        options: dict[str, Any] = {"json": body} if body else {}
        if named and rule.names:
            options = {"json": {**body, "project": of}} if body else {"params": {"project": of}}
        return self.client.request(method, path.format(**objects), headers=header, **options)

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


@pytest.fixture
def api(sqlite_engine: Engine, tmp_path: Path) -> Iterator[ApiFixture]:
    many = "100000/minute"
    limits = {"rate_limit": many, "failure_limit": many}
    settings = Settings(storage=str(tmp_path / "storage"), data_dir=tmp_path, serve_url="http://127.0.0.1:1", **limits)
    app = create_app(settings, engine=sqlite_engine, cluster=FakeCluster())
    with TestClient(app) as client:
        yield ApiFixture(sqlite_engine, client, settings.root)


def test_the_rules_cover_exactly_the_routes_of_the_app(api: ApiFixture) -> None:
    routes = list(iter_route_contexts(api.client.app.routes))  # type: ignore[attr-defined]
    served = {(method, route.path) for route in routes for method in (route.methods or {"ANY"}) - {"HEAD"}}
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
            # The previous request may have deleted the objects.
            api.objects = {name: api._create_objects(name) for name in ("ours", "theirs")}
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
    for name in sorted(objects.values(), key=len, reverse=True):  # some contain others
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
def test_deployments_of_other_projects_serve_no_requests(api: ApiFixture, route: tuple[str, str], named: str) -> None:
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


JOB_STATES = {"cancel": "queued", "pause": "queued", "resume": "paused", "retry": "failed"}  # that allow the action


@pytest.mark.parametrize("route", [route for route in RULES if route not in CHANGES_NOTHING], ids=" ".join)
def test_every_change_leaves_an_audit_entry(api: ApiFixture, route: tuple[str, str]) -> None:
    ours = api.objects["ours"]
    with Session(api.engine) as session, session.begin():
        job = session.get(Job, ours["job_id"])
        assert job is not None
        job.state = JOB_STATES.get(route[1].rpartition("/")[2], "succeeded")
    if route == ("DELETE", "/v1/encoders/{encoder}"):
        EncoderStore(api.engine).delete_alias("ours", ours["alias"], "test")  # an encoder in use is not deleted
    if route == ("PUT", "/v1/encoders/aliases/{alias}"):
        ours["encoder"] = index_encoder(api.engine, "another-encoder", "ours")  # otherwise the alias does not move
    header = key_to(api.engine, "admin")
    response = api.request(route, header, named=True)
    assert response.status_code < 400, response.text
    (entry,) = AuditLog(api.engine).list(AuditFilter(actor=header["Authorization"].split("_")[1]))[0]
    assert entry.project in ("ours", "default", None)
    assert entry.target in response.text + route[1].format(**ours | {"project": "ours"}) + header["Authorization"]


CREATING = [route for route, rule in RULES.items() if rule.body is not None and rule.needs not in ("infer", "read")]
CREATING.remove(("PATCH", "/v1/jobs/{job_id}"))  # a job stays in its project
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
