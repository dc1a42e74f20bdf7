"""Tests for project isolation: another project's runs, jobs and encoders are reported as nonexistent.

The second half submits jobs that reference another project's objects in every location field of every kind of job. The
fields are found by setting each text field of each config to a location and calling `uris`.
"""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Union, get_args, get_origin

import pytest
from pydantic import BaseModel
from sqlalchemy import Engine
from starlette.testclient import TestClient

from amd.config import ConfigError
from amd.storage import write_json
from amd.training.run_folder import FACTS, run_folder
from service.app import create_app
from service.auth.isolation import FOLDERS, LocationPolicy
from service.auth.uri_policy import UriPolicy
from service.jobs.kinds import KINDS, JobKind, resolve, uris
from service.jobs.store import JobStore
from service.registry.store import EncoderStore
from service.settings import Settings
from service.web.errors import KeyReused, NotFound, ServiceError, UriNotAllowed
from tests.support.encoders.encoder_cards import index_encoder, publish
from tests.support.service.apps import key_to
from tests.support.service.fake_cluster import FakeCluster, new_job, queued


class FixedOwners:
    """Fixed owners of runs and encoders: `mine` belongs to `ours`, and `other` to `theirs`."""

    def of_run(self, run_id: str) -> str | None:
        return {"mine": "ours", "other": "theirs"}.get(run_id)

    of_encoder = of_run


def answer(policy: LocationPolicy, value: str, project: str | None = "ours") -> type[ServiceError] | None:
    """Return the type of error that a value raises, or None if the value is accepted."""
    try:
        policy.check("data.train", value, project)
    except ServiceError as error:
        return type(error)
    return None


class RootOnDisk(NamedTuple):
    """A storage root with a user folder that contains symlinks to one run of each project and to all runs."""

    root: str
    policy: LocationPolicy


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> RootOnDisk:
    base = tmp_path_factory.mktemp("disk")
    root = base / "data" / "amd"
    for folder in ("runs/mine", "runs/other", "sets"):
        (root / folder).mkdir(parents=True)
    for name, target in {"link-mine": "runs/mine", "link-other": "runs/other", "link-runs": "runs"}.items():
        (root / "sets" / name).symlink_to(root / target)
    (base / "storage").symlink_to(root)
    uri_policy = UriPolicy(str(base / "storage"), (str(base / "data"), "s3a://bucket", "s3://bucket"))
    return RootOnDisk(str(root), LocationPolicy(uri_policy, FixedOwners()))


OWNED = [name for name, kind in FOLDERS.items() if kind is not None]


@pytest.mark.parametrize("folder", OWNED)
@pytest.mark.parametrize("form", ["{root}/{path}", "file://{root}/{path}", "{root}/{path}/", "{root}/{path}/a/*.tar"])
def test_a_location_is_accepted_only_if_the_project_owns_it(tree: RootOnDisk, folder: str, form: str) -> None:
    for name, expected in {"mine": None, "other": NotFound, "unknown": NotFound}.items():
        value = form.format(root=tree.root, path=f"{folder}/{name}")
        assert answer(tree.policy, value) is expected, value
        assert answer(tree.policy, value, project=None) is None  # a caller with access to all projects sees everything


def test_another_projects_object_is_reported_exactly_like_a_nonexistent_one(tree: RootOnDisk) -> None:
    for form in ("{name}", *(f"{tree.root}/{folder}/{{name}}/x" for folder in OWNED)):
        messages = []
        for name in ("other", "unknown"):
            with pytest.raises(NotFound) as error:
                tree.policy.check("teacher.weights", form.format(name=name), "ours")
            assert error.value.extra == {"field": "teacher.weights"}
            messages.append(error.value.message.replace(name, "NAME"))
        assert messages[0] == messages[1]


@pytest.mark.parametrize(
    "path",
    [
        *("", "/", "/runs", "/runs/*", "/runs/o*", "/runs/{0..9}", "/runs/[o]ther/x.tar", "/jobs/", "/encoders/*"),
        *("/r*/other", "/*", "/**", "/**/x.tar", "/[r]uns/other", "/Runs/other", "/sets/../runs/other"),
        *("/features", "/features/abc", "/sets/link-runs", "/sets/link-runs/*", "/sets/link-r*/other"),
    ],
)
def test_a_location_that_may_cover_several_projects_is_rejected(tree: RootOnDisk, path: str) -> None:
    assert answer(tree.policy, f"{tree.root}{path}") is UriNotAllowed
    assert answer(tree.policy, f"file://{tree.root}{path}") is UriNotAllowed


@pytest.mark.parametrize(
    "path", ["", "/*", "/a*", "/**", "/*/runs/other", "/[a]md/jobs/other", "/amd*/sets/link-other/x"]
)
def test_a_location_above_the_root_is_rejected(tree: RootOnDisk, path: str) -> None:
    above = tree.root.rpartition("/")[0]  # an allowed prefix that contains the root
    assert answer(tree.policy, above + path) in (UriNotAllowed, NotFound)
    assert answer(tree.policy, f"{above}/sets{path}") is None


def test_symlinks_are_followed(tree: RootOnDisk) -> None:
    assert answer(tree.policy, f"{tree.root}/sets/link-mine/x") is None
    assert answer(tree.policy, f"{tree.root}/sets/link-m*/x.tar") is None
    assert answer(tree.policy, f"{tree.root}/sets/link-other/x") is NotFound
    assert answer(tree.policy, f"{tree.root}/sets/link-o*/x.tar") is NotFound
    storage = str(Path(tree.root).parents[1] / "storage")  # a link to the root
    assert answer(tree.policy, f"{storage}/runs/mine") is None
    assert answer(tree.policy, f"{storage}/runs/other") is NotFound


@pytest.mark.parametrize("path", ["sets", "sets/a.tar", "sets/{000..099}.tar", "*.tar", "runs.txt", "my-runs/other"])
def test_other_folders_under_the_root_are_shared(tree: RootOnDisk, path: str) -> None:
    assert answer(tree.policy, f"{tree.root}/{path}") is None


def test_data_outside_the_root_is_shared(tree: RootOnDisk) -> None:
    assert answer(tree.policy, f"{tree.root}-2/runs/other") is None
    assert answer(tree.policy, "s3://bucket/runs/other") is None


@pytest.mark.parametrize("name", ["demo:digits", "timm:vit_small_patch16_224.dino"])
def test_names_without_an_owner_are_accepted(tree: RootOnDisk, name: str) -> None:
    assert answer(tree.policy, name) is None


@pytest.mark.parametrize("scheme", ["s3", "s3a"])
def test_object_stores_are_compared_by_bucket_and_key(scheme: str) -> None:
    policy = LocationPolicy(UriPolicy("s3://bucket/amd", ("s3a://bucket", "s3://bucket")), FixedOwners())
    assert answer(policy, f"{scheme}://bucket/amd/runs/mine/x") is None
    assert answer(policy, f"{scheme}://bucket/amd/runs/other/x") is NotFound
    assert answer(policy, f"{scheme}://bucket/sets/runs/other") is None
    for path in ("", "/", "/amd", "/a*/runs/other", "/**", "/amd/run*/other/x.tar", "/*"):
        assert answer(policy, f"{scheme}://bucket{path}") in (UriNotAllowed, NotFound), path


# Every location field of every kind of job, over HTTP

MARKER = "/marker"
IMAGE = {"train": "demo:digits", "val": "demo:digits", "test": "demo:digits"}
DETECTION = dict.fromkeys(("train", "root", "val", "label_map"), "demo:digits")
PROBE = {"encoder": "e", "data": {"train": "demo:digits", "test": "demo:digits"}}
BASE: dict[JobKind, dict[str, Any]] = {
    "train": {"preset": "demo-image-amd"},
    "finetune": {"config": {"data": IMAGE, "schedule": {"steps": 1}, "head": {"classes": 10}}},
    "detect": {"config": {"data": DETECTION, "schedule": {"steps": 1}}},
    "probe": {"config": PROBE},
    "embed": {"config": {"encoder": "e", "data": {"train": "demo:digits"}}},
    "search": {"preset": "demo-image-amd", "config": {"space": {"use": ["masking"]}}},
    "import": {"config": {"weights": "timm:vit_tiny_patch16_224"}},
    "export": {"config": {"encoder": "e"}},
    "prepare": {"config": {"data": {"train": "demo:digits"}}},
}


def text_fields(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Yield the dotted names of all fields of a config that may contain text."""
    for name, field in model.model_fields.items():
        for kind in _members(field.annotation):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from text_fields(kind, f"{prefix}{name}.")
            elif kind is str:
                yield f"{prefix}{name}"


def _members(annotation: Any) -> Iterator[Any]:
    if get_origin(annotation) in (Union, types.UnionType):
        for each in get_args(annotation):
            yield from _members(each)
    else:
        yield annotation


def with_field(kind: JobKind, field: str, value: str, **others: Any) -> dict[str, Any]:
    """Return a request whose field has this value. Fields of a sweep's training config are set as in `amd search`."""
    field = field.removeprefix("train.") if kind == "search" else field
    overrides: dict[str, Any] = {}
    if field == "teacher.weights":
        overrides["teacher.preset"] = None
    if field.startswith("probe.data."):
        overrides["probe"] = {"data": {"train": "demo:digits", "test": "demo:digits"}}
    return {"kind": kind, **BASE[kind], "overrides": {**overrides, field: value, **others}}


def location_fields(kind: JobKind) -> list[str]:
    """Return the fields whose values `uris` yields for a kind of job."""
    found = []
    for field in dict.fromkeys(text_fields(KINDS[kind].config)):
        if field.rpartition(".")[2] in ("storage", "output", "name"):
            continue  # the service sets them; requests cannot
        request = with_field(kind, field, MARKER)
        try:
            config = resolve(kind, request.get("preset"), request.get("config"), request["overrides"])
            if (field, MARKER) in set(uris(config)):
                found.append(field)
        except ConfigError:
            continue  # not a location: it must be one of several names, or match a pattern
    return found


class TwoProjects:
    """A service in which `theirs` has a job with its run, trial, output and encoder, and `ours` has none."""

    def __init__(self, engine: Engine, client: TestClient, root: str) -> None:
        self.engine, self.client, self.root = engine, client, root
        self.theirs = queued(JobStore(engine), project="theirs", state="succeeded").id
        self.unknown = "train-20260101-000000-00000000"
        publish(root, self.theirs)
        index_encoder(engine, self.theirs, "theirs")
        write_json(f"{run_folder(root, f'{self.theirs}-0000-s0')}/{FACTS}", {"job": self.theirs})
        self.keys = {project: key_to(engine, "submit", project=project) for project in ("ours", "theirs")}

    def values(self, job: str) -> list[str]:
        """Return all values by which a config may refer to a job: its encoder, its trial's run, and its output."""
        paths = f"runs/{job}-0000-s0/checkpoints", f"jobs/{job}/output"
        return [job, f"file://{self.root}/encoders/{job}/x.safetensors", *(f"{self.root}/{path}" for path in paths)]

    def submit(self, request: Mapping[str, Any], project: str = "ours", path: str = "/v1/jobs") -> tuple[int, Any]:
        response = self.client.post(path, json=request, headers=self.keys[project])
        problem = response.json()
        return response.status_code, {key: problem.get(key) for key in ("code", "title", "detail", "errors", "field")}


@pytest.fixture
def projects(sqlite_engine: Engine, tmp_path: Path) -> Iterator[TwoProjects]:
    many = "100000/minute"
    settings = Settings(storage=str(tmp_path / "storage"), data_dir=tmp_path, rate_limit=many)
    app = create_app(settings, engine=sqlite_engine, cluster=FakeCluster())
    with TestClient(app) as client:
        index_encoder(sqlite_engine, "e", "ours")
        yield TwoProjects(sqlite_engine, client, settings.root)


@pytest.mark.parametrize("kind", KINDS)
def test_another_projects_objects_are_reported_as_unknown_in_every_location_field(
    projects: TwoProjects, kind: JobKind
) -> None:
    fields = location_fields(kind)
    assert fields
    for field in fields:
        answers = []
        for job in (projects.theirs, projects.unknown):
            for value in projects.values(job):
                status, problem = projects.submit(with_field(kind, field, value))
                assert (status, problem["code"], problem["field"]) == (404, "not_found", field), value
                answers.append({key: str(text).replace(job, "JOB") for key, text in problem.items()})
        assert answers[: len(answers) // 2] == answers[len(answers) // 2 :]
        status, problem = projects.submit(with_field(kind, field, f"{projects.root}/runs/*"))
        assert (status, problem["code"], problem["field"]) == (422, "uri_not_allowed", field)
    validated = projects.submit(with_field(kind, fields[0], projects.theirs), path="/v1/validate")
    assert validated[0] == 404
    assert JobStore(projects.engine).counts() == {("train", "succeeded"): 1}


@pytest.mark.parametrize(
    ("kind", "field"),
    [("probe", "encoder"), ("finetune", "weights"), ("train", "teacher.weights"), ("embed", "data.train")],
)
def test_a_project_can_use_its_own_objects_and_shared_data(projects: TwoProjects, kind: JobKind, field: str) -> None:
    index_encoder(projects.engine, "f", "theirs")
    for value in (*projects.values(projects.theirs), "f", f"{projects.root}/encoders/f", f"{projects.root}/sets/a"):
        base = {"encoder": "f"} if field == "data.train" else {}
        status, problem = projects.submit(with_field(kind, field, value, **base), "theirs")
        assert status == 202, (value, problem)


def test_a_job_can_access_only_its_project_regardless_of_who_submits_it(projects: TwoProjects) -> None:
    projects.keys["all"] = key_to(projects.engine, "admin")
    probe = {"kind": "probe", "config": {**PROBE, "encoder": projects.theirs}}
    assert projects.submit({**probe, "project": "theirs"}, "all")[0] == 202
    for project in ("ours", "default", None):
        status, problem = projects.submit({**probe, "project": project}, "all")
        assert (status, problem["code"]) == (404, "not_found")
        assert f"in project {project or 'default'!r}" in problem["detail"]


def test_a_retry_checks_the_jobs_locations_again(projects: TwoProjects) -> None:
    jobs, encoders = JobStore(projects.engine), EncoderStore(projects.engine)
    index_encoder(projects.engine, "dino-s", "ours")
    failed = [queued(jobs, project="ours", kind="probe", config={"encoder": "dino-s"}, state="failed") for _ in "ab"]
    headers = projects.keys["ours"]
    assert projects.client.post(f"/v1/jobs/{failed[0].id}/retry", headers=headers).status_code == 202
    jobs.change(jobs.get(failed[0].id), "cancelled", state="cancelled")
    encoders.delete_encoder("dino-s", "ours", projects.root, "me")
    index_encoder(projects.engine, "dino-s", "theirs")  # another project publishes an encoder with the same id
    response = projects.client.post(f"/v1/jobs/{failed[1].id}/retry", headers=headers)
    assert (response.status_code, response.json()["field"]) == (404, "encoder")
    assert jobs.get(failed[1].id).state == "failed"


def test_an_idempotency_key_never_returns_another_projects_job(projects: TwoProjects) -> None:
    jobs, request = JobStore(projects.engine), b"{}"
    first, _ = jobs.add_once(new_job(project="theirs"), "oidc:someone", "key", request)
    again, is_new = jobs.add_once(new_job(project="theirs"), "oidc:someone", "key", request)
    assert (again.id, is_new) == (first.id, False)
    with pytest.raises(KeyReused):  # the caller's token is for another project now
        jobs.add_once(new_job(project="ours"), "oidc:someone", "key", request)


@pytest.mark.parametrize("path", ["/v1/encoders/e/embeddings", "/openai/v1/embeddings"])
def test_inference_reads_only_files_in_the_callers_project(projects: TwoProjects, path: str) -> None:
    def ask(value: str, headers: dict[str, str]) -> dict[str, Any]:
        body = {"input": value, **({"model": "e"} if "openai" in path else {})}
        problem: dict[str, Any] = projects.client.post(path, json=body, headers=headers).json()
        return problem

    found = ask(f"{projects.root}/jobs/{projects.theirs}/output/a.png", projects.keys["ours"])
    missing = ask(f"{projects.root}/jobs/train-1/output/a.png", projects.keys["ours"])
    assert (found["code"], found["field"]) == ("not_found", "input.0")
    assert found["detail"].replace(projects.theirs, "train-1") == missing["detail"]
    everything = ask(f"{projects.root}/jobs/{projects.theirs}/output/a.png", key_to(projects.engine, "read"))
    assert everything["code"] == "encoder_not_deployed"  # the location was accepted


class NoOwners:
    """Owners for a storage root that contains no runs or encoders."""

    def of_run(self, run_id: str) -> str | None:
        return None

    def of_encoder(self, encoder_id: str) -> str | None:
        return None


def test_all_fields_are_checked_and_the_error_reports_the_invalid_one() -> None:
    policy = LocationPolicy(UriPolicy("/nowhere/root", ()), NoOwners())
    allowed = ("data.train", "/nowhere/root/a")
    policy.check_all([allowed, ("teacher.weights", "timm:vit_base_patch16_224")], None)
    with pytest.raises(UriNotAllowed, match=r"teacher\.weights") as error:
        policy.check_all([allowed, ("teacher.weights", "/etc/passwd")], None)
    assert error.value.extra == {"field": "teacher.weights"}
