"""Tests for listing and downloading the files that a job has written."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from sqlalchemy import Engine

from amd.storage import write_bytes
from amd.training.run_folder import run_folder
from service.client import Client
from service.jobs.execution.protocol import JobFolder
from tests.support.service.fake_cluster import FakeCluster
from tests.support.service.server import Server, serving

DEMO = {"kind": "train", "preset": "demo-image-amd"}
FILES = {
    "run/result.json": b"{}",
    "run/report/figure 1 (50 %).svg": b"<svg onload='alert(1)'/>",
    "run/test/größe.json": b"[]",
    "output/embeddings/0-4096.parquet": bytes(range(256)) * 8,
}
HIDDEN = ("run/lease.json", "run/checkpoints/step-00000010/model.safetensors")


@pytest.fixture
def server(sqlite_engine: Engine, tmp_path: Path) -> Iterator[Server]:
    with serving(sqlite_engine, tmp_path, FakeCluster(cpus=0.0)) as server:  # no job ever starts
        yield server


@pytest.fixture
def client(server: Server) -> Iterator[httpx.Client]:
    with server.http_client() as client:
        yield client


@pytest.fixture
def job(client: httpx.Client, server: Server) -> str:
    job_id = str(client.post("/jobs", json=DEMO).json()["id"])
    for path, content in {**FILES, **dict.fromkeys(HIDDEN, b"x")}.items():
        write_bytes(f"{_folder(server, job_id, path)}/{path.partition('/')[2]}", content)
    return job_id


def _folder(server: Server, job_id: str, path: str) -> str:
    root = server.app.state.settings.root
    return run_folder(root, job_id) if path.startswith("run/") else JobFolder(root, job_id).output


def test_all_files_but_checkpoints_are_listed(client: httpx.Client, job: str) -> None:
    listed = client.get(f"/jobs/{job}/artifacts").json()
    assert {item["path"]: item["bytes"] for item in listed["items"]} == {
        path: len(content) for path, content in FILES.items()
    }
    assert [item["path"] for item in listed["items"]] == sorted(FILES)
    assert (listed["total"], listed["bytes"]) == (len(FILES), sum(map(len, FILES.values())))
    assert all(item["modified_at"] for item in listed["items"])


@pytest.mark.parametrize("path", FILES)
def test_a_file_is_downloaded_as_an_attachment(client: httpx.Client, job: str, path: str) -> None:
    response = client.get(f"/jobs/{job}/artifacts/{path}")
    assert (response.status_code, response.content) == (200, FILES[path])
    assert response.headers["content-type"] == "application/octet-stream"
    assert response.headers["content-disposition"].startswith("attachment; filename")
    assert response.headers["x-content-type-options"] == "nosniff"
    known = {"If-None-Match": response.headers["etag"]}
    assert client.get(f"/jobs/{job}/artifacts/{path}", headers=known).status_code == 304


def test_a_part_of_a_file_can_be_downloaded(client: httpx.Client, job: str) -> None:
    response = client.get(f"/jobs/{job}/artifacts/output/embeddings/0-4096.parquet", headers={"Range": "bytes=3-5"})
    assert (response.status_code, response.content) == (206, bytes([3, 4, 5]))


def test_other_files_cannot_be_downloaded(client: httpx.Client, server: Server, job: str, tmp_path: Path) -> None:
    other = str(client.post("/jobs", json=DEMO).json()["id"])
    write_bytes(f"{_folder(server, other, 'run/')}/result.json", b"{}")
    (tmp_path / "secret").write_text("secret")
    run = Path(_folder(server, job, "run/"))
    (run / "link.json").symlink_to(tmp_path / "secret")
    (run / "linked").symlink_to(tmp_path)
    paths = [
        *HIDDEN,
        "run/link.json",
        "run/linked/secret",
        f"run/../{other}/result.json",
        f"run/%2e%2e/{other}/result.json",
        "run/..%2F..%2Fjobs",
        f"run/{tmp_path}/secret",
        "run//result.json",
        "run",
        "run/",
        "run/report",
        "result.json",
        "run/result.json%00",
        "x" * 1025,
    ]
    for path in paths:
        assert client.get(f"/jobs/{job}/artifacts/{path}").status_code in (404, 422), path
    listed = {item["path"] for item in client.get(f"/jobs/{job}/artifacts").json()["items"]}
    assert listed == {*FILES}


def test_the_client_downloads_files(server: Server, job: str, tmp_path: Path) -> None:
    with Client(server.url, server.key) as amd:
        for file in amd.jobs.artifacts(job).items:
            target = amd.jobs.download(job, file.path, tmp_path / "file")
            assert target.read_bytes() == FILES[file.path]
    assert not list(tmp_path.glob(".file.*"))
