"""Tests that current code reads, continues and serves data written by version 0.1 (see `tests/support/stored.py`).

Programs are started through their public entry point where they have one.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from sqlalchemy import text
from starlette.testclient import TestClient

import amd.downstream.__main__ as downstream
import amd.training.__main__ as training
from amd.artifacts import encode, load_encoder
from service.app import create_app
from service.cli.main import main as amd_command
from service.db.engine import migrate, open_engine
from service.settings import Settings
from tests.support.stored import EXPECTED, STORE, copy_database, copy_root, shape
from tune_spaces.config import SearchConfig
from tune_spaces.search.progress import NullProgress
from tune_spaces.search.run import prepare_search
from tune_spaces.search.sweep import Sweep
from tune_spaces.spaces.space import build_space

RUNS, SWEEP, DATABASE = EXPECTED["runs"], EXPECTED["sweep"], EXPECTED["database"]
TOLERANCE = 1e-5  # the deviation is 0 on the machine that recorded the values; other CPUs sum in a different order
REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(scope="module", autouse=True)
def _demo_data(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Write the digits data set, on which the runs train, to a folder shared by all tests in this module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AMD_DEMO_DIR", str(tmp_path_factory.mktemp("demo")))
        yield


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return copy_root(tmp_path)


def train(root: Path, run_id: str, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """Start or continue a recorded run under `root` and return its result."""
    config = root / "runs" / run_id / "config.json"
    assert training.main(["--config", str(config), "--local", "--json", f"storage={root}"]) == 0
    result: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return result


def metrics(root: Path, run_id: str) -> list[dict[str, Any]]:
    """Return a run's training metrics, in the order in which they were written."""
    chunks = sorted((root / "runs" / run_id / "metrics").glob("*.jsonl"))
    lines = [json.loads(line) for chunk in chunks for line in chunk.read_text().splitlines()]
    return [line for line in lines if "loss/total" in line]


def embedding(root: Path, encoder_id: str) -> torch.Tensor:
    """Return an encoder's embeddings of the two synthetic images whose embeddings `expected.json` records."""
    encoder, card = load_encoder(str(root / "encoders" / encoder_id))
    images = (torch.arange(2 * 3 * 16 * 16) * 37 % 251).to(torch.uint8).reshape(2, 3, 1, 16, 16)
    with torch.no_grad():
        return encode(encoder, card.clip, images, card.pooling)


def assert_recorded(found: list[dict[str, Any]], recorded: list[dict[str, Any]]) -> None:
    assert [line["step"] for line in found] == [line["step"] for line in recorded]
    for line, expected in zip(found, recorded, strict=True):
        assert {name: line[name] for name in expected} == pytest.approx(expected, rel=TOLERANCE)


def assert_recorded_embedding(root: Path, encoder_id: str) -> None:
    expected = torch.tensor(RUNS["embeddings"][encoder_id])
    torch.testing.assert_close(embedding(root, encoder_id), expected, rtol=TOLERANCE, atol=TOLERANCE)


def assert_extended(read: Any, written: Any) -> None:
    """Check that a value read by this version contains all that version 0.1 wrote; extra keys are allowed."""
    if isinstance(written, dict):
        assert written.keys() <= read.keys()
        for key, value in written.items():
            assert_extended(read[key], value)
    elif isinstance(written, list):
        assert len(read) == len(written)
        for mine, theirs in zip(read, written, strict=True):
            assert_extended(mine, theirs)
    else:
        assert read == written


# Runs and encoders


def test_a_finished_run_returns_its_result_without_training_again(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.read_bytes() for path in (root / "runs" / "tiny-teacher" / "metrics").iterdir()}
    result = train(root, "tiny-teacher", capsys)
    assert_extended(result, json.loads((root / "runs" / "tiny-teacher" / "result.json").read_text()))
    assert (result["state"], result["steps"]) == ("succeeded", 12)
    assert {path: path.read_bytes() for path in (root / "runs" / "tiny-teacher" / "metrics").iterdir()} == before
    assert_recorded(metrics(root, "tiny-teacher"), RUNS["losses"]["tiny-teacher"])


def test_a_stopped_run_continues_from_its_checkpoint_to_the_recorded_result(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stopped_after = RUNS["stopped_after"]
    assert [line["step"] for line in metrics(root, "tiny-student")] == list(range(1, stopped_after + 1))
    result = train(root, "tiny-student", capsys)
    assert (result["state"], result["steps"]) == ("succeeded", 12)
    assert_recorded(metrics(root, "tiny-student"), RUNS["losses"]["tiny-student"])
    assert_recorded_embedding(root, "tiny-student")


def test_training_from_scratch_reproduces_the_recorded_losses_files_and_keys(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "runs" / "tiny-teacher" / "config.json"
    config.parent.mkdir(parents=True)
    shutil.copy(STORE / "root" / "runs" / "tiny-teacher" / "config.json", config)
    train(tmp_path, "tiny-teacher", capsys)
    assert_recorded(metrics(tmp_path, "tiny-teacher"), RUNS["losses"]["tiny-teacher"])
    assert_recorded_embedding(tmp_path, "tiny-teacher")
    data = ["data.train=demo:digits/few", "data.test=demo:digits/select", "data.loader_workers=0"]
    args = ["kinds=[knn,linear]", "linear.method=logistic", "scaling.device=cpu"]
    assert downstream.main(["probe", "encoder=tiny-teacher", f"storage={tmp_path}", *data, *args]) == 0
    for folder in ("runs/tiny-teacher", "encoders/tiny-teacher", "features"):
        missing = shape(STORE / "root" / folder) - shape(tmp_path / folder)
        assert not missing, f"{folder}: these files and keys of version 0.1 are missing"


def test_a_loaded_encoder_returns_the_recorded_embedding(root: Path) -> None:
    assert_recorded_embedding(root, "tiny-teacher")


def test_a_card_is_read_completely_including_its_scores(root: Path) -> None:
    _, card = load_encoder(str(root / "encoders" / "tiny-teacher"))
    written = json.loads((root / "encoders" / "tiny-teacher" / "encoder.json").read_text())
    read = card.model_dump(mode="json")
    assert_extended(read, written)
    assert {score["protocol"] for score in written["scores"]} == {"knn", "linear"}


# Sweeps


def test_a_stopped_sweep_continues_with_the_recorded_trials(root: Path) -> None:
    folder = root / "runs" / "tiny-sweep"
    config = SearchConfig.model_validate(json.loads((folder / "config.json").read_text()))
    config, _ = prepare_search(config, str(root), "tiny-sweep")
    assert config.differences(json.loads((folder / "run.json").read_text())["decides"]) == []
    sweep = Sweep(config, build_space(config.space, config.train), str(root), "tiny-sweep", NullProgress())
    assert {str(number): record.state for number, record in sweep.records.items()} == SWEEP["states"]
    started = [sweep.next_trial() for _ in SWEEP["next"]]
    found = [{"number": r.number, "point": r.point, "level": r.level, "runs": list(r.runs)} for r in started if r]
    assert found == SWEEP["next"]
    earlier, later = (json.loads((folder / "trials" / f"000{number}.json").read_text()) for number in (0, 3))
    assert earlier.keys() == later.keys()


def test_a_sweep_report_is_written_from_the_ledger(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = root / "runs" / "tiny-sweep"
    recorded = json.loads((folder / "report" / "report.json").read_text())
    shutil.rmtree(folder / "report")
    monkeypatch.setattr(sys, "argv", ["amd", "search", "report", str(folder), "--json"])
    with pytest.raises(SystemExit) as exited:
        amd_command()
    assert exited.value.code in (0, None)
    written = json.loads((folder / "report" / "report.json").read_text())
    assert {key: written[key] for key in ("best", "metric", "rungs", "rows")} == {
        key: recorded[key] for key in ("best", "metric", "rungs", "rows")
    }
    assert set(recorded["files"]) <= {path.name for path in (folder / "report").iterdir()}
    assert not shape(STORE / "root" / "runs" / "tiny-sweep" / "report") - shape(folder / "report")


# Jobs


def test_running_a_job_again_writes_the_recorded_files_and_keys(root: Path) -> None:
    (job,) = (root / "jobs").iterdir()
    for name in ("attempts", "logs", "output"):
        shutil.rmtree(job / name)
    command = [sys.executable, "-m", "service.jobs.runner", job.name, "1", str(root)]
    subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True)
    attempt = json.loads((job / "attempts" / "0001.json").read_text())
    assert (attempt["outcome"]["state"], attempt["outcome"]["exit_code"]) == ("succeeded", 0)
    assert not shape(STORE / "root" / "jobs" / job.name) - shape(job)


@pytest.fixture
def served(root: Path, tmp_path: Path) -> Iterator[TestClient]:
    """Return an API client on the migrated database, authenticated with the recorded key."""
    engine = open_engine(f"sqlite:///{copy_database(tmp_path, root)}")
    migrate(engine)
    app = create_app(Settings(data_dir=tmp_path, storage=str(root)), engine=engine)
    yield TestClient(app, headers={"Authorization": f"Bearer {DATABASE['key']}"})
    engine.dispose()


def get(served: TestClient, path: str) -> Any:
    response = served.get(f"/v1{path}")
    assert response.status_code == 200, response.text
    return response.json()


def test_every_job_in_the_database_is_listed_with_its_state(served: TestClient) -> None:
    assert {job["id"]: job["state"] for job in get(served, "/jobs?limit=100")["items"]} == DATABASE["job_states"]


def test_every_job_in_the_database_is_shown_with_its_attempts_and_result(served: TestClient) -> None:
    for job_id, state in DATABASE["job_states"].items():
        job = get(served, f"/jobs/{job_id}")
        assert job["state"] == state
        assert len(job["attempts"]) == job["attempt"]
        if state == "failed":
            assert (job["failure"]["reason"], job["progress"]["step"]) == ("nan_loss", 6)
        if job["kind"] == "export":
            assert get_text(served, f"/jobs/{job_id}/logs").strip()
            assert job["result"]["encoder"] == "tiny-teacher"


def get_text(served: TestClient, path: str) -> str:
    response = served.get(f"/v1{path}")
    assert response.status_code == 200, response.text
    return response.text


def test_api_keys_in_the_database_keep_their_scopes_and_revocations(served: TestClient) -> None:
    keys = {key["id"]: key for key in get(served, "/keys")["items"]}
    assert [keys[DATABASE["key"].split("_")[1]]["scopes"], keys["fedcba9876543210"]["scopes"]] == [["admin"], ["read"]]
    assert served.get("/v1/jobs", headers={"Authorization": f"Bearer {DATABASE['key'][:-1]}B"}).status_code == 401
    revoked = f"amd_fedcba9876543210_{'B' * 43}"
    assert served.get("/v1/jobs", headers={"Authorization": f"Bearer {revoked}"}).status_code == 401


def test_encoders_aliases_and_deployments_in_the_database_are_listed(served: TestClient) -> None:
    assert sorted(encoder["id"] for encoder in get(served, "/encoders")["items"]) == DATABASE["encoders"]
    aliases = get(served, "/encoders/aliases")["items"]
    assert {alias["name"]: alias["encoder"] for alias in aliases} == DATABASE["aliases"]
    assert get(served, "/encoders/best")["id"] == DATABASE["aliases"]["best"]
    deployments = get(served, "/deployments")["items"]
    assert {one["name"]: one["encoder"] for one in deployments} == DATABASE["deployments"]


def test_a_deployment_in_the_database_has_its_settings_as_the_first_revision(served: TestClient) -> None:
    (deployment,) = get(served, "/deployments")["items"]
    (revision,) = get(served, f"/deployments/{deployment['name']}/revisions")["items"]
    names = ("encoder", "candidate", "share", "settings")
    assert {name: revision[name] for name in names} == {name: deployment[name] for name in names}
    assert (revision["number"], revision["changed"], revision["resolved"]) == (1, None, deployment["serving"])


def test_webhooks_in_the_database_are_listed_with_their_deliveries(served: TestClient) -> None:
    webhooks = {webhook["id"]: webhook["url"] for webhook in get(served, "/webhooks")["items"]}
    assert webhooks == DATABASE["webhooks"]
    (webhook_id,) = webhooks
    deliveries = get(served, f"/webhooks/{webhook_id}/deliveries")["items"]
    assert [delivery["job_id"] for delivery in deliveries] == DATABASE["deliveries"]


def test_idempotency_keys_in_the_database_survive_the_migration(root: Path, tmp_path: Path) -> None:
    engine = open_engine(f"sqlite:///{copy_database(tmp_path, root)}")
    migrate(engine)
    with engine.connect() as connection:
        rows = connection.execute(text("SELECT key FROM idempotency ORDER BY key")).scalars().all()
    engine.dispose()
    assert list(rows) == DATABASE["idempotency_keys"]
