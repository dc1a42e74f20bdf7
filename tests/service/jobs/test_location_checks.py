"""Tests that a forbidden location in any field of a job, however it is set, is rejected before any file is opened."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
from sqlalchemy import Engine
from starlette.testclient import TestClient

from amd.config import locations_in, overridden
from service.app import create_app
from service.jobs.kinds import KINDS, JobKind
from service.settings import Settings
from tests.support.config_fields import ANY_KEY, ITEM, nested, text_fields
from tests.support.config_fields import Path as FieldPath
from tests.support.encoders.encoder_cards import index_encoder
from tests.support.runs.configs import mae, tiny_image_config
from tests.support.service.apps import key_to
from tests.support.service.connections import refused_connections
from tests.support.service.fake_cluster import FakeCluster

# Text fields that are not locations, and why they cannot name one.
HARMLESS = {
    "checkpoint.best_metric": "key of a dict of metrics",
    "data.frame_name": "validated: a relative name inside a frame folder",
    "data.rand_augment": "parsed by timm as the name and numbers of a policy",
    "encoder.size": "validated: a key of ENCODER_SIZES",
    "id": "validated: the name of a folder, without separators",
    "license": "text for a card",
    "name": "validated: the name of a folder, without separators; a job's name is its ID",
    "size": "validated: a key of ENCODER_SIZES",
    "teacher.encoder.size": "validated: a key of ENCODER_SIZES",
    "teacher.preset": "key of a table of presets",
    "teacher.weights_license": "text for a card",
    "tracking.mlflow_experiment": "text in a request to the MLflow server",
    "weights_license": "text for a card",
}
FORBIDDEN = ("/etc/shadow", "http://169.254.169.254/latest/meta-data")


def text_paths(kind: JobKind) -> list[FieldPath]:
    return sorted(set(text_fields(KINDS[kind].config.model_json_schema())))


def is_harmless(path: FieldPath) -> bool:
    while path[0] in ("train", "student", "probe"):
        path = path[1:]
    return ".".join(path) in HARMLESS


def location_fields(kind: JobKind) -> list[str]:
    """Return the dotted names of the location fields for a kind of job, omitting fields below arbitrary keys."""
    return [".".join(path) for path in text_paths(kind) if not is_harmless(path) and ANY_KEY not in path]


@pytest.mark.parametrize("kind", KINDS)
def test_every_text_field_in_a_config_is_a_location_or_listed_as_harmless(kind: JobKind) -> None:
    model = KINDS[kind].config
    for path in text_paths(kind):
        field = ".".join(path)
        keys = tuple("data.train" if name == ANY_KEY else name for name in path)
        found = [location.value for location in locations_in(model, nested(keys, "x"))]
        assert found == ([] if is_harmless(path) else ["x"]), (
            f"{field} contains text: give it a type of amd/config/locations.py, or review it and add it to HARMLESS"
        )


def test_text_fields_are_found_in_lists_dicts_and_unions() -> None:
    schema = {
        "properties": {
            "list": {"items": {"type": "string"}, "type": "array"},
            "dict": {"additionalProperties": {"anyOf": [{"type": "null"}, {"type": "string"}]}, "type": "object"},
            "any": {},
            "open": {"additionalProperties": True, "type": "object"},
            "literal": {"enum": ["a", "b"], "type": "string"},
            "number": {"type": "number"},
            "pair": {"prefixItems": [{"type": "integer"}, {"type": "string"}], "type": "array"},
        },
        "type": "object",
    }
    found = {("list", ITEM), ("dict", ANY_KEY), ("any",), ("open", ANY_KEY), ("pair", ITEM)}
    assert set(text_fields(schema)) == found


@pytest.mark.parametrize("single_machine", [True, False])
def test_missing_local_files_are_rejected_where_jobs_run_on_the_services_machine(
    single_machine: bool, sqlite_engine: Engine, tmp_path: Path
) -> None:
    settings = Settings(data_dir=tmp_path, storage=f"{tmp_path}/root", single_machine=single_machine)
    app = create_app(settings, engine=sqlite_engine, cluster=FakeCluster())
    client = TestClient(app, headers=key_to(sqlite_engine, "submit"))
    (tmp_path / "root" / "images").mkdir(parents=True)

    def submit(name: str, path: str = "/v1/jobs") -> Any:
        run = run_values()
        run["data"] |= {"train": f"{settings.root}/{name}", "cache_dir": f"{settings.root}/cache"}
        return client.post(path, json={"kind": "train", "config": run})

    for name in ("images", "*.tar", "{000..009}.tar"):
        assert submit(name).status_code == 202
    for path in ("/v1/jobs", "/v1/validate"):
        response = submit("imges", path)
        if single_machine:
            assert response.json()["code"] == "config_invalid"
            problem = f"data.train={settings.root}/imges does not exist on the service's machine; check the path"
            assert problem in response.json()["detail"]
        else:
            assert response.is_success


class JobService(NamedTuple):
    """The application, called in-process."""

    client: TestClient
    root: str
    submitted: list[str]

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """Post a request and check that handling it attempts no connection."""
        with refused_connections() as attempted:
            response = self.client.post(f"/v1{path}", json=body)
        assert not attempted
        return response

    def assert_refused(self, body: dict[str, Any], field: str, path: str = "/jobs") -> None:
        response = self.post(path, body)
        problem = response.json()
        assert (response.status_code, problem["code"], problem.get("field")) == (422, "uri_not_allowed", field), problem
        assert problem["detail"].startswith(field)


@pytest.fixture
def service(sqlite_engine: Engine, tmp_path: Path) -> JobService:
    root = str(tmp_path / "root")
    settings = Settings(data_dir=tmp_path, storage=root, rate_limit="1000000/minute", max_running=1)
    cluster = FakeCluster()
    index_encoder(sqlite_engine, "one")
    app = create_app(settings, engine=sqlite_engine, cluster=cluster)
    client = TestClient(app, headers=key_to(sqlite_engine, "submit"))
    return JobService(client, root, cluster.submitted)


def run_values() -> dict[str, Any]:
    probe = {"data": {"train": "demo:digits", "test": "demo:digits"}}
    return tiny_image_config(probe=probe, teacher__weights="timm:one").model_dump(mode="json")


def base_of(kind: JobKind) -> dict[str, Any]:
    """Return a valid config for a kind of job, with a name in place of every location."""
    run = run_values()
    shared = {name: run[name] for name in ("clip", "schedule", "scaling")}
    data = {"train": "demo:digits"}
    return {
        "train": run,
        "finetune": {**shared, "encoder": run["student"]["encoder"], "data": data, "augment": {"mix_prob": 0}},
        "detect": {**shared, "encoder": run["student"]["encoder"], "data": {**data, "label_map": "demo:digits"}},
        "probe": {"encoder": "one", "data": {**data, "test": "demo:digits"}},
        "embed": {"encoder": "one", "data": data},
        "search": {"train": run, "space": {"use": ["masking"]}},
        "import": {"weights": "timm:one"},
        "export": {"encoder": "one"},
        "prepare": {"data": data},
    }[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_the_base_configs_are_accepted(kind: JobKind, service: JobService) -> None:
    response = service.post("/jobs", {"kind": kind, "config": base_of(kind)})
    assert response.status_code == 202, response.text


FIELDS = [(kind, field) for kind in KINDS for field in location_fields(kind)]
FIELDS.remove(("search", "train.start"))  # sweep trials start from scratch


@pytest.mark.parametrize(("kind", "field"), FIELDS)
def test_a_forbidden_location_in_any_field_is_rejected(kind: JobKind, field: str, service: JobService) -> None:
    base = base_of(kind)
    for value in FORBIDDEN:
        service.assert_refused({"kind": kind, "config": overridden(base, {field: value})}, field)
        service.assert_refused({"kind": kind, "config": base, "overrides": {field: value}}, field)
    service.assert_refused({"kind": kind, "config": base, "overrides": {field: value}}, field, "/validate")


@pytest.mark.parametrize("field", location_fields("train"))
def test_a_forbidden_location_in_a_search_dimension_is_rejected(field: str, service: JobService) -> None:
    def request(dimensions: dict[str, Any]) -> dict[str, Any]:
        return {"kind": "search", "config": {"train": run_values(), "space": {"dimensions": dimensions}}}

    expected = f"space.dimensions.{field}"
    for value in FORBIDDEN:
        service.assert_refused(request({field: [value]}), expected)
        service.assert_refused(request({field: {"choices": ["demo:digits", value]}}), expected)
        overrides = {expected: [value]}
        service.assert_refused({**request({"optim.base_lr": [0.1, 0.2]}), "overrides": overrides}, expected)
    section, _, rest = field.partition(".")
    if rest:
        service.assert_refused(request({section: [nested(tuple(rest.split(".")), value)]}), expected)
    as_override = f"teacher.overrides.{field}"
    service.assert_refused(request({as_override: [value]}), f"space.dimensions.{as_override}")


@pytest.mark.parametrize("field", location_fields("train"))
@pytest.mark.parametrize("kind", ["train", "search"])
def test_a_forbidden_location_in_a_teacher_override_is_rejected(kind: JobKind, field: str, service: JobService) -> None:
    prefix = "train." if kind == "search" else ""
    request = {"kind": kind, **({"config": {"space": {"use": ["masking"]}}} if kind == "search" else {})}
    request["preset"] = "demo-image-amd"
    expected = f"{prefix}teacher.overrides.{field}"
    section, _, rest = field.partition(".")
    for value in FORBIDDEN:
        service.assert_refused({**request, "overrides": {"teacher.overrides": {field: value}}}, expected)
        service.assert_refused({**request, "overrides": {expected: value}}, expected)
    if rest:
        nested_value = {section: nested(tuple(rest.split(".")), value)}
        service.assert_refused({**request, "overrides": {"teacher.overrides": nested_value}}, expected)


@pytest.mark.parametrize("field", ["storage", "name", "tracking", "tracking.log_every_steps", "data.cache_dir"])
def test_an_output_location_cannot_be_a_dimension_or_a_teacher_override(field: str, service: JobService) -> None:
    value = f"{service.root}/x"  # allowed elsewhere
    run = {"kind": "train", "preset": "demo-image-amd", "overrides": {"teacher.overrides": {field: value}}}
    service.assert_refused(run, f"teacher.overrides.{field}")
    search = {"kind": "search", "config": {"train": run_values(), "space": {"dimensions": {field: [value]}}}}
    service.assert_refused(search, f"space.dimensions.{field}")


def test_data_locations_in_a_teacher_preset_are_checked(service: JobService, monkeypatch: pytest.MonkeyPatch) -> None:
    from amd.presets import pretraining
    from amd.presets.preset import Preset

    probe = {"data": {"train": "/etc/labelled", "test": "demo:digits"}}
    recipe = mae(tiny_image_config(probe=probe), student__encoder=run_values()["teacher"]["encoder"])
    monkeypatch.setitem(pretraining.PRESETS, "tiny-teacher", Preset("tiny-teacher", "", "", "", recipe))
    body = {"kind": "train", "config": run_values(), "overrides": {"teacher.preset": "tiny-teacher"}}
    service.assert_refused(body, "teacher.overrides.probe.data.train")
    body["overrides"] |= {"teacher.overrides": {"probe.data.train": f"{service.root}/labelled"}}
    assert service.post("/jobs", body).status_code == 202


def test_an_unsuitable_teacher_recipe_is_rejected_on_submission(service: JobService) -> None:
    overrides = {"teacher.preset": "k400-vit-l-teacher"}
    response = service.post("/jobs", {"kind": "train", "preset": "demo-video-amd", "overrides": overrides})
    assert (response.status_code, response.json()["code"]) == (422, "config_invalid")
    assert response.json()["detail"].startswith("teacher.preset=k400-vit-l-teacher trains ")


def test_importing_weights_from_a_forbidden_location_is_rejected(service: JobService) -> None:
    for value in FORBIDDEN:
        service.assert_refused({"weights": value, "id": "one"}, "weights", "/encoders")


def test_deeply_nested_overrides_are_rejected_as_an_invalid_config(service: JobService) -> None:
    overrides = {".".join(["teacher.overrides"] * 500): 1}
    response = service.post("/jobs", {"kind": "train", "preset": "demo-image-amd", "overrides": overrides})
    assert (response.status_code, response.json()["code"]) == (422, "config_invalid")
