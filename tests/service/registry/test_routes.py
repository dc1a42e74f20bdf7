"""Tests for the encoder routes over HTTP, on SQLite and PostgreSQL."""

from __future__ import annotations

import hashlib
import io
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import Engine

from amd.artifacts.discovery import encoder_folder
from service.jobs.execution.protocol import DRIVER_POLICY, DriverPolicy, JobFolder
from service.jobs.store import JobStore
from service.registry.discovery import EncoderDiscovery
from service.registry.store import EncoderStore
from tests.support.encoders.encoder_cards import index_encoder, publish, score
from tests.support.service.apps import key_to
from tests.support.service.control_plane import wait_for
from tests.support.service.fake_cluster import FakeCluster, queued
from tests.support.service.server import Server, serving


class InProcessCluster(FakeCluster):
    """Runs a job's driver to completion before `submit` returns."""

    def submit(
        self, submission_id: str, job_id: str, attempt: int, root: str, deadline_s: float, policy: DriverPolicy
    ) -> None:
        super().submit(submission_id, job_id, attempt, root, deadline_s, policy)
        program = [sys.executable, "-m", "service.jobs.runner", job_id, str(attempt), root]
        environment = {**os.environ, "AMD_JOB": job_id, DRIVER_POLICY: policy.model_dump_json()}
        subprocess.run(program, env=environment, check=False)


@pytest.fixture
def server(engine: Engine, tmp_path: Path) -> Iterator[Server]:
    with serving(engine, tmp_path, FakeCluster(cpus=0.0)) as server:  # no job ever starts
        yield server


@pytest.fixture
def root(tmp_path: Path) -> str:
    return str(tmp_path / "root")


@pytest.fixture
def client(server: Server) -> Iterator[httpx.Client]:
    with server.http_client() as client:
        yield client


@pytest.fixture
def scan(engine: Engine, root: str) -> Callable[[], None]:
    """Return a function that indexes published encoders."""
    return lambda: EncoderDiscovery(EncoderStore(engine), root).scan()


def test_an_encoder_view_contains_its_lineage_and_aliases(
    client: httpx.Client, root: str, scan: Callable[[], None]
) -> None:
    teacher = {"weights": "timm:vit_large", "encoder": {"size": "L"}}
    publish(root, "mine", teacher=teacher, weights_license="CC-BY-NC-4.0", scores=[score("knn", 71.5)])
    scan()
    assert client.put("/encoders/aliases/production", json={"encoder": "mine"}).status_code == 200
    view = client.get("/encoders/production").json()
    assert view == client.get("/encoders/mine").json()
    assert (view["id"], view["objective"], view["size"], view["width"]) == ("mine", "amd", "demo-student", 64)
    assert (view["input"]["kind"], view["input"]["frames"], view["input"]["size"]) == ("image", 1, [32, 32])
    assert view["input"]["sampling_rate_frames"] is None
    assert (view["best_score"], view["non_commercial"]) == ({"eval/top1": 71.5}, True)
    assert view["aliases"] == [{"project": "default", "name": "production"}]
    lineage = view["lineage"]
    assert (lineage["run"], lineage["teacher"], lineage["data"]["digest"]) == ("mine", teacher, "abc")
    assert (lineage["versions"], view["config"]["seed"]) == ({"amd-service": "0.1.0"}, 0)
    assert view["parameters"] > 0 < view["flops_per_clip"]
    (listed,) = client.get("/encoders?objective=amd&size=demo-student&alias=production").json()["items"]
    assert listed == {key: view[key] for key in listed}


def test_an_unchanged_resource_is_not_sent_again(client: httpx.Client, root: str, scan: Callable[[], None]) -> None:
    publish(root, "mine")
    scan()
    client.put("/encoders/aliases/production", json={"encoder": "mine"})
    for path in ("/encoders/mine", "/encoders/aliases/production"):
        first = client.get(path)
        again = client.get(path, headers={"If-None-Match": first.headers["ETag"]})
        assert (again.status_code, again.content, again.headers["ETag"]) == (304, b"", first.headers["ETag"])
    publish(root, "other")
    scan()
    client.put("/encoders/aliases/production", json={"encoder": "other"})
    for path in ("/encoders/mine", "/encoders/aliases/production"):
        assert client.get(path, headers={"If-None-Match": first.headers["ETag"]}).status_code == 200


def test_paging_returns_every_encoder(client: httpx.Client, engine: Engine) -> None:
    ids = [index_encoder(engine, f"e{number}", hours=-number) for number in range(5)]
    listed_ids, cursor = list[str](), ""
    while cursor is not None:
        page = client.get(f"/encoders?limit=2{cursor and f'&cursor={cursor}'}").json()
        listed_ids += [item["id"] for item in page["items"]]
        cursor = page["next_cursor"]
    assert listed_ids == ids


INVALID_REQUESTS: dict[str, tuple[str, str, Any, int, str, str]] = {
    "an unknown encoder": ("GET", "/encoders/none", None, 404, "not_found", "no encoder 'none'"),
    "an unknown alias": ("GET", "/encoders/aliases/none", None, 404, "not_found", "no alias 'none'"),
    "an alias of an unknown encoder": (
        "PUT",
        "/encoders/aliases/a",
        {"encoder": "none"},
        404,
        "not_found",
        "no encoder",
    ),
    "a name with capitals": ("PUT", "/encoders/aliases/Prod", {"encoder": "mine"}, 422, "request_invalid", "pattern"),
    "a reserved alias": ("PUT", "/encoders/aliases/aliases", {"encoder": "mine"}, 409, "illegal_action", "path"),
    "an id as an alias": ("PUT", "/encoders/aliases/mine", {"encoder": "mine"}, 409, "illegal_action", "is the ID"),
    "an invalid cursor": ("GET", "/encoders?cursor=abc", None, 422, "cursor_invalid", "next_cursor"),
    "an unknown file": ("GET", "/encoders/mine/download?file=weights.bin", None, 404, "not_found", "encoder.json"),
    "a file outside the folder": (
        "GET",
        "/encoders/mine/download?file=..%2Fa",
        None,
        422,
        "request_invalid",
        "pattern",
    ),
    "an id of dots": ("GET", "/encoders/..%2F..%2Fjobs", None, 404, "not_found", ""),
    "a forbidden location": (
        "POST",
        "/encoders",
        {"weights": "/etc/passwd"},
        422,
        "uri_not_allowed",
        "weights=/etc",
    ),
    "an invalid id": (
        "POST",
        "/encoders",
        {"weights": "timm:a", "id": "a/b"},
        422,
        "request_invalid",
        "id=a/b",
    ),
    "a reserved id": (
        *("POST", "/encoders", {"weights": "timm:a", "id": "aliases"}),
        *(422, "request_invalid", "choose another"),
    ),
    "an unknown size": (
        "POST",
        "/encoders",
        {"weights": "timm:a", "size": "XL"},
        422,
        "request_invalid",
        "size=XL",
    ),
    "an unknown field": ("POST", "/encoders", {"weights": "timm:a", "storage": "/x"}, 422, "request_invalid", ""),
}


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)  # independent of the database
@pytest.mark.parametrize("case", INVALID_REQUESTS)
def test_an_invalid_request_returns_an_error_code(client: httpx.Client, engine: Engine, root: str, case: str) -> None:
    publish(root, "mine")
    index_encoder(engine, "mine")
    method, path, body, status, code, text = INVALID_REQUESTS[case]
    response = client.request(method, path, **({} if body is None else {"json": body}))
    assert (response.status_code, response.headers["content-type"]) == (status, "application/problem+json"), (
        response.text
    )
    assert (response.json()["code"], text in response.json()["detail"]) == (code, True), response.text


def test_a_move_with_an_outdated_expected_target_is_rejected(client: httpx.Client, engine: Engine) -> None:
    index_encoder(engine, "a"), index_encoder(engine, "b")
    url = "/encoders/aliases/production"
    assert client.put(url, json={"encoder": "a", "expected": None}).status_code == 200
    rejected = client.put(url, json={"encoder": "b", "expected": None})
    assert (rejected.status_code, rejected.json()["code"], rejected.json()["current"]) == (409, "alias_moved", "a")
    moved = client.put(url, json={"encoder": "b", "expected": "a"}).json()
    assert (moved["encoder"], moved["moves"]) == ("b", 2)
    history = client.get(url).json()["history"]
    assert [(move["before"], move["after"]) for move in history] == [(None, "a"), ("a", "b")]
    assert len({move["actor"] for move in history}) == 1
    assert [item["name"] for item in client.get("/encoders/aliases").json()["items"]] == ["production"]
    assert client.delete(url).status_code == 204
    assert client.get(url).status_code == 404


def test_encoder_files_can_be_downloaded_completely_in_ranges_or_as_a_tar(
    client: httpx.Client, root: str, scan: Callable[[], None]
) -> None:
    weights = b"weights" * 10_000
    publish(root, "mine", weights=weights)
    Path(encoder_folder(root, "mine"), "decoder.safetensors").write_bytes(b"decoder")
    scan()
    url = "/encoders/mine/download"
    assert client.get(url, params={"file": "decoder.safetensors"}).content == b"decoder"
    downloaded = client.get(url, params={"file": "encoder.safetensors"})
    assert (downloaded.content, int(downloaded.headers["Content-Length"])) == (weights, len(weights))
    part = client.get(url, params={"file": "encoder.safetensors"}, headers={"Range": "bytes=7-13"})
    assert (part.status_code, part.content) == (206, b"weights")
    assert part.headers["ETag"] == downloaded.headers["ETag"]
    archive = client.get(url)
    assert len(archive.content) == int(archive.headers["Content-Length"])
    with tarfile.open(fileobj=io.BytesIO(archive.content)) as tar:
        names = ["decoder.safetensors", "encoder.json", "encoder.safetensors"]
        assert sorted(tar.getnames()) == [f"mine/{name}" for name in names]
        assert tar.extractfile("mine/encoder.safetensors").read() == weights  # type: ignore[union-attr]
    for params in ({"file": "encoder.safetensors"}, {}):
        tag = client.get(url, params=params).headers["ETag"]
        assert client.get(url, params=params, headers={"If-None-Match": tag}).status_code == 304
    publish(root, "mine", weights=b"other")
    assert client.get(url, headers={"If-None-Match": tag}).status_code == 200


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_files_are_streamed_from_an_object_store(engine: Engine, tmp_path: Path, s3_root: str) -> None:
    weights = hashlib.sha256(b"a").digest() * 100_000
    publish(s3_root, "mine", weights=weights)
    EncoderDiscovery(EncoderStore(engine), s3_root).scan()
    with serving(engine, tmp_path, FakeCluster(cpus=0.0), storage=s3_root) as server:
        headers = {"Authorization": f"Bearer {server.key}"}
        with httpx.Client(base_url=f"{server.url}/v1/encoders/mine", headers=headers, timeout=60) as client:
            downloaded = client.get("/download", params={"file": "encoder.safetensors"})
            assert (downloaded.content == weights, int(downloaded.headers["Content-Length"])) == (True, len(weights))
            with tarfile.open(fileobj=io.BytesIO(client.get("/download").content)) as tar:
                assert tar.extractfile("mine/encoder.safetensors").read() == weights  # type: ignore[union-attr]


def test_deletion_removes_all_files_and_is_rejected_while_the_encoder_is_in_use(
    client: httpx.Client, root: str, scan: Callable[[], None]
) -> None:
    publish(root, "mine")
    scan()
    client.put("/encoders/aliases/production", json={"encoder": "mine"})
    rejected = client.delete("/encoders/mine")
    assert (rejected.status_code, rejected.json()["code"]) == (409, "encoder_in_use")
    assert rejected.json()["used_by"] == ["alias production"]
    assert client.delete("/encoders/production").status_code == 404  # an alias is not followed
    assert Path(encoder_folder(root, "mine"), "encoder.safetensors").exists()
    client.delete("/encoders/aliases/production")
    assert client.delete("/encoders/mine").status_code == 204
    assert client.get("/encoders/mine").status_code == 404
    wait_for(lambda: not Path(encoder_folder(root, "mine")).exists())
    scan()
    assert client.get("/encoders/mine").status_code == 404


def test_a_folder_in_the_working_directory_is_not_mistaken_for_an_encoder(
    client: httpx.Client, root: str, scan: Callable[[], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(root, "mine")
    scan()
    (tmp_path / "cwd" / "mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "cwd")
    assert client.get("/encoders/mine/download?file=encoder.safetensors").content == b"weights"
    assert client.delete("/encoders/mine").status_code == 204
    scan()
    assert (tmp_path / "cwd" / "mine").exists()
    assert not Path(encoder_folder(root, "mine")).exists()


def test_an_encoder_that_no_job_published_belongs_to_the_default_project(
    client: httpx.Client, engine: Engine, root: str, scan: Callable[[], None]
) -> None:
    publish(root, "by-hand")
    scan()
    ours, default = (key_to(engine, "submit", project=project) for project in ("ours", "default"))
    assert client.get("/encoders/by-hand", headers=default).json()["project"] == "default"
    assert client.get("/encoders/by-hand", headers=ours).status_code == 404
    assert client.put("/encoders/aliases/a", json={"encoder": "by-hand"}, headers=ours).status_code == 404


def test_an_import_cannot_reuse_an_encoder_id_from_another_project(
    client: httpx.Client, engine: Engine, root: str, scan: Callable[[], None]
) -> None:
    theirs = queued(JobStore(engine), project="theirs").id
    publish(root, "dino-s", job=theirs)
    scan()
    publish(root, "not-indexed-yet")
    ours = key_to(engine, "submit", project="ours")
    for name in ("dino-s", "not-indexed-yet", theirs):
        body = {"weights": "timm:vit_small_patch16_224.dino", "id": name}
        response = client.post("/encoders", json=body, headers=ours)
        assert (response.status_code, response.json()["code"]) == (422, "config_invalid")
        assert f"id={name}: this ID is already taken" in response.text
    assert client.post("/encoders", json={**body, "id": "free"}, headers=ours).status_code == 202


def test_repeating_an_import_with_an_idempotency_key_returns_the_same_job(client: httpx.Client, engine: Engine) -> None:
    body = {"weights": "timm:vit_tiny_patch16_224", "license": "Apache-2.0", "labels": {"team": "video"}}
    responses = [client.post("/encoders", json=body, headers={"Idempotency-Key": "k"}) for _ in range(2)]
    assert [response.status_code for response in responses] == [202, 202]
    assert responses[0].json()["id"] == responses[1].json()["id"]
    job = JobStore(engine).get(responses[0].json()["id"])
    assert responses[0].headers["Location"] == f"/v1/jobs/{job.id}"
    assert (job.kind, job.labels, job.config["id"]) == ("import", {"team": "video"}, "vit_tiny_patch16_224")
    other = client.post("/encoders", json={**body, "id": "other"}, headers={"Idempotency-Key": "k"})
    assert other.json()["code"] == "idempotency_key_reused"


@pytest.mark.parametrize("kind", ["export", "prepare"])
def test_a_job_can_write_its_output_only_to_its_own_folder(
    client: httpx.Client, engine: Engine, root: str, kind: str
) -> None:
    index_encoder(engine, "mine")
    config = {"encoder": "mine"} if kind == "export" else {"data": {"train": "demo:digits"}, "workers": 3}
    job = JobStore(engine).get(client.post("/jobs", json={"kind": kind, "config": config}).json()["id"])
    assert job.config["output"] == JobFolder(root, job.id).output
    assert job.cpus == (3.0 if kind == "prepare" else 1.0)
    rejected = client.post("/jobs", json={"kind": kind, "config": {**config, "output": f"{root}/encoders/mine"}})
    assert (rejected.json()["code"], "output=" in rejected.json()["detail"]) == ("uri_not_allowed", True)


@pytest.mark.slow
@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_imported_weights_are_listed_after_their_job_and_can_be_exported(
    engine: Engine, tmp_path: Path, golden: Path
) -> None:
    with (
        serving(engine, tmp_path, InProcessCluster(), allowed_uris=(str(golden),)) as server,
        server.http_client() as client,
    ):

        def wait_until_done(job: dict[str, Any]) -> dict[str, Any]:
            wait_for(lambda: client.get(f"/jobs/{job['id']}").json()["state"] in ("succeeded", "failed"))
            done: dict[str, Any] = client.get(f"/jobs/{job['id']}").json()
            assert done["state"] == "succeeded", done
            return done

        body = {"weights": str(golden / "mae_state.safetensors"), "id": "mine", "heads": 3, "project": "video"}
        job = wait_until_done(client.post("/encoders", json=body).json())
        assert job["encoder"] == "mine"
        wait_for(lambda: client.get("/encoders/mine").status_code == 200, 10)
        view = client.get("/encoders/mine").json()
        assert (view["project"], view["objective"], view["lineage"]["job"]) == ("video", "imported", job["id"])
        export = {"kind": "export", "config": {"encoder": "mine", "format": "official"}, "project": "video"}
        exported = wait_until_done(client.post("/jobs", json=export).json())["result"]
        assert Path(exported["output"]).stat().st_size > 0
