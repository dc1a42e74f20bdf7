"""Tests that `amd encoders` uses the selected service, or else the storage root, and reports which one it uses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from service.cli.context_store import ContextFile, ServiceContext, write_contexts
from service.client import Client
from service.stack.state import Stack
from tests.support.encoders.encoder_cards import publish
from tests.support.service.fake_cluster import queued
from tests.support.service.server import Server

Command = Callable[..., tuple[int, str, str]]
LOCAL, REMOTE = "train-20260101-120000-1a2b3c4d", "train-20260102-120000-5e6f7a8b"


@pytest.fixture
def storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a storage root with one encoder, which is not registered with the service."""
    monkeypatch.setenv("AMD_STORAGE", str(tmp_path / "storage"))
    publish(str(tmp_path / "storage"), LOCAL)
    return tmp_path / "storage"


@pytest.fixture
def registered(server: Server, storage: Path) -> Server:
    """Return a service with one encoder, which it has discovered in its storage root."""
    facts = {"weights_license": "CC-BY-NC-4.0", "scores": [score := {"protocol": "knn", "data": "d", "samples": 3}]}
    publish(
        server.app.state.settings.root, REMOTE, **facts | {"scores": [{**score, "values": {"eval/knn_top1": 61.5}}]}
    )
    with Client(server.url, server.key) as client:
        while not list(client.encoders.list()):
            pass
    return server


def select(server: Server) -> None:
    write_contexts(ContextFile().with_context("prod", ServiceContext(url=server.url, key=server.key)))


def listed(result: tuple[int, str, str]) -> list[str]:
    return [row["id"] for row in json.loads(result[1])]


def test_encoders_are_listed_from_the_selected_service_or_the_storage_root(
    registered: Server, storage: Path, amd: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, out, err = amd("encoders", "list")
    assert (LOCAL in out, REMOTE in out, err.strip()) == (True, False, f"storage root {storage}")
    select(registered)
    _, out, err = amd("encoders", "list")
    assert (LOCAL in out, REMOTE in out, err.strip()) == (False, True, f"{registered.url} (context prod)")
    assert "NC: non-commercial use only." in out
    assert listed(amd("encoders", "list", "--storage", storage, "--json")) == [LOCAL]
    write_contexts(ContextFile())
    monkeypatch.setenv("AMD_URL", registered.url)
    monkeypatch.setenv("AMD_KEY", registered.key)
    assert listed(amd("encoders", "list", "--json")) == [REMOTE]


def test_the_service_and_the_storage_root_list_the_same_fields(registered: Server, storage: Path, amd: Command) -> None:
    (local,) = json.loads(amd("encoders", "list", "--storage", registered.app.state.settings.root, "--json")[1])
    select(registered)
    (remote,) = json.loads(amd("encoders", "list", "--json")[1])
    assert {**local, "project": "default", "aliases": [], "name": None} == remote


def test_cards_and_aliases_are_read_from_the_selected_service_or_the_storage_root(
    registered: Server, storage: Path, amd: Command
) -> None:
    assert json.loads(amd("encoders", "show", "train-", "--json")[1])["id"] == LOCAL
    select(registered)
    assert json.loads(amd("encoders", "show", "5e6f", "--json")[1])["id"] == REMOTE
    assert amd("encoders", "alias", "production", "train-")[:2] == (0, f"production: {REMOTE}\n")
    assert json.loads(amd("encoders", "show", "production", "--json")[1])["id"] == REMOTE
    assert json.loads(amd("encoders", "show", storage / "encoders" / LOCAL, "--json")[1])["id"] == LOCAL
    code, _, err = amd("encoders", "show", LOCAL)
    assert (code, f"no encoder '{LOCAL}'" in err) == (2, True)
    history = json.loads(amd("encoders", "aliases", "production", "-o", "json")[1])["history"]
    assert [move["after"] for move in history] == [REMOTE]
    assert amd("encoders", "aliases", "production", "-o", "json", "--watch")[0] == 2
    _, out, _ = amd("encoders", "aliases")
    assert all(len(line) <= 80 for line in out.splitlines())
    assert REMOTE in out


def test_downloading_all_files_unpacks_them(registered: Server, storage: Path) -> None:
    from service.cli.encoder_source import published_encoder

    select(registered)
    with published_encoder("train-", None) as url:
        assert Path(url).name == REMOTE
        assert (Path(url) / "encoder.safetensors").read_bytes() == b"weights"
    assert not Path(url).exists()


def test_an_ambiguous_encoder_id_is_rejected_with_the_candidates(
    registered: Server, storage: Path, amd: Command
) -> None:
    publish(str(storage), "train-other")
    code, _, err = amd("encoders", "show", "train")
    assert (code, f"'train' matches 2 encoders: {LOCAL}, train-other" in err) == (2, True)


def test_names_that_only_the_stack_on_this_machine_knows_are_found(
    registered: Server, amd: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    app, root = registered.app, registered.app.state.settings.root
    job = queued(app.state.jobs, name="cats").id
    publish(root, job, run=job)
    publish(root, "teacher", run=job)  # published by the same job, but not what its name means
    monkeypatch.setenv("AMD_STORAGE", root)
    assert amd("encoders", "show", "cats", "--json")[0] == 2
    (tmp_path / "key").write_text(registered.key)
    stack = Stack(registered.url, tmp_path / "key", tmp_path)
    monkeypatch.setattr("service.stack.find_stack", lambda: stack)
    with Client(registered.url, registered.key) as client:
        while job not in [encoder.id for encoder in client.encoders.list()]:
            pass
        client.aliases.move("best", job)
    for name in ("cats", "best", job):
        result = amd("encoders", "show", name, "--json")
        assert json.loads(result[1]).get("id") == job, result
    listed = {row["id"]: row for row in json.loads(amd("encoders", "list", "--json")[1])}
    assert (listed[job]["name"], listed[job]["aliases"], listed["teacher"]["name"]) == ("cats", ["best"], None)
    plain = json.loads(amd("encoders", "list", "--storage", root, "--json")[1])
    assert all("name" not in row for row in plain)
    code, _, err = amd("encoders", "show", "dogs")
    assert (code, "not a published encoder" in err) == (2, True)
    assert amd("encoders", "show", "cats", "--storage", root)[0] == 2, "the storage root alone knows no names"


def test_the_project_option_requires_a_service(storage: Path, amd: Command) -> None:
    for args in (("list", "--project", "video"), ("import", "timm:none", "--project", "video")):
        code, _, err = amd("encoders", *args)
        assert (code, "--project" in err) == (2, True)


def test_weights_are_imported_by_the_selected_service_or_into_the_storage_root(
    registered: Server, storage: Path, amd: Command, golden: Path
) -> None:
    select(registered)
    code, out, err = amd("encoders", "import", "timm:vit_tiny_patch16_224", "--id", "tiny", "--heads", 3, "--json")
    job = json.loads(out)
    assert (code, err.strip()) == (0, f"{registered.url} (context prod)")
    assert (job["kind"], job["name"], job["project"]) == ("import", "tiny", "default")
    with Client(registered.url, registered.key) as client:
        config = client.jobs.get(job["id"]).config
    assert (config["weights"], config["heads"]) == ("timm:vit_tiny_patch16_224", 3)
    weights = golden / "mae_state.safetensors"
    code, out, err = amd("encoders", "import", weights, "--heads", 3, "--json")
    assert (code, json.loads(out)["code"]) == (2, "uri_not_allowed")
    assert "set --storage to the storage root" in err
    code, out, _ = amd("encoders", "import", weights, "--heads", 3, "--storage", storage, "--json")
    assert (code, json.loads(out)["url"]) == (0, str(storage / "encoders" / "mae_state"))
