"""Tests for `amd jobs` and `--submit` against a real control plane over HTTP; only the cluster is fake."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from sqlalchemy import Engine

from amd.storage import write_bytes
from amd.training.run_folder import run_folder
from service.app import create_app
from service.db.engine import open_engine
from service.db.models import Job
from service.jobs.execution.protocol import JobFolder
from service.jobs.execution.reconciler import Reconciler
from service.jobs.store import JobStore
from service.registry.discovery import EncoderDiscovery
from service.settings import Settings
from tests.support.encoders.encoder_cards import index_encoder, publish
from tests.support.runs import ledgers
from tests.support.runs.pictures import write_pictures
from tests.support.service.apps import key_to
from tests.support.service.command import amd as run_command
from tests.support.service.fake_cluster import FakeCluster, queued, report_status
from tests.support.service.server import serve_app
from tune_spaces.stop_requests import requested_stops

Command = Callable[..., tuple[int, str, str]]


class Service(NamedTuple):
    store: JobStore
    root: str
    reconcile: Callable[[], object]
    """Run one step of the reconciler."""
    discover: Callable[[], object]
    """Register the encoders under the storage root."""

    def ended(self, **outcome: Any) -> Job:
        """Run a job that logs two lines and ends with this outcome."""
        job = queued(self.store, name="a name", preset="demo-image-amd", labels={"team": "video"})
        self.reconcile()
        write_bytes(f"{JobFolder(self.root, job.id).logs(1)}/{0:016d}.log", b"step 1\nstep 2\n")
        report_status(self.root, self.store.get(job.id), **outcome)
        self.reconcile()
        return self.store.get(job.id)


@pytest.fixture
def engine(sqlite_template: Path, tmp_path: Path) -> Iterator[Engine]:
    shutil.copy(sqlite_template, tmp_path / "control-plane.db")
    engine = open_engine(f"sqlite:///{tmp_path / 'control-plane.db'}")
    yield engine
    engine.dispose()


@pytest.fixture
def service(engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    settings = Settings(data_dir=tmp_path, storage=str(tmp_path / "storage"), allowed_uris=(str(tmp_path),))
    cluster = FakeCluster()
    app = create_app(settings, engine=engine, cluster=cluster)
    encoders = EncoderDiscovery(app.state.encoders, settings.root)
    reconciler = Reconciler(app.state.jobs, cluster, settings, encoders)
    with serve_app(app) as url:
        monkeypatch.setenv("AMD_URL", url)
        monkeypatch.setenv("AMD_KEY", key_to(engine, "admin")["Authorization"].removeprefix("Bearer "))
        monkeypatch.setenv("COLUMNS", "200")
        monkeypatch.setattr("service.client._sync.jobs.POLL_INTERVAL_S", 0.01)
        yield Service(app.state.jobs, settings.root, reconciler.step, encoders.scan)


@pytest.fixture
def amd(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    return lambda *args: run_command(monkeypatch, capfd, *map(str, args))


def short(job: Job) -> str:
    """Return the last part of a job's ID."""
    return job.id.rsplit("-", 1)[-1]


SUBMISSIONS = {
    "train": "train --preset demo-image-amd mask.teacher_ratio=0.6",
    "finetune": "finetune --preset demo-image-finetune weights=null schedule.steps=7",
    "detect": "detect --preset ava-vit-b weights=mine data.train=mine data.root=mine data.val=mine data.boxes=null "
    "data.excluded=null data.label_map=mine data.evaluated=null",
    "probe": "probe --encoder mine --kinds knn data.train=demo:digits/probe data.test=demo:digits/test",
    "embed": "embed --encoder mine data=demo:digits/probe normalize=true",
    "search": "search --study asymmetry --preset demo-image-amd --seeds 2 optim.base_lr=0.01",
}


@pytest.mark.parametrize("kind", SUBMISSIONS)
def test_a_command_line_is_submitted_as_a_job(kind: str, engine: Engine, service: Service, amd: Command) -> None:
    index_encoder(engine, "mine", "vision")
    options = ("--name", "my job", "--label", "team=video", "--label", "a=b", "--priority", 7, "--project", "vision")
    code, out, err = amd(*SUBMISSIONS[kind].split(), "--submit", *options)
    assert (code, err) == (0, f"queued; follow it with `amd jobs logs -f {out.strip()}`\n")
    job = service.store.get(out.strip())
    assert (job.kind, job.name, job.labels) == (kind, "my job", {"team": "video", "a": "b"})
    assert (job.priority, job.project, job.state) == (7, "vision", "queued")
    sweep = job.config.get("train", {})
    expected = {
        "train": lambda: job.config["mask"]["teacher_ratio"] == 0.6,
        "finetune": lambda: job.config["schedule"]["steps"] == 7,
        "detect": lambda: job.config["weights"] == "mine",
        "probe": lambda: (job.config["encoder"], job.config["kinds"]) == ("mine", ["knn"]),
        "embed": lambda: (job.config["data"]["train"], job.config["normalize"]) == ("demo:digits/probe", True),
        "search": lambda: (sweep["optim"]["base_lr"], job.config["seeds"]) == (0.01, 2),
    }
    assert expected[kind]()


def test_a_config_file_is_submitted_with_absolute_local_paths(
    service: Service, amd: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "labelled.txt").write_text("")
    monkeypatch.chdir(tmp_path)
    code, out, _ = amd("presets", "demo-image-mae")
    config = {**json.loads(out), "probe": {"data": {"train": "labelled.txt", "test": "demo:digits/test"}}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    code, out, err = amd("train", "--config", "config.json", "--submit", "--json", "data.train=pictures")
    assert (code, err) == (0, "")
    sent = service.store.get(json.loads(out)["id"]).config
    assert sent["data"]["train"] == str(tmp_path / "pictures")
    assert sent["probe"]["data"]["train"] == str(tmp_path / "labelled.txt")
    assert sent["probe"]["data"]["test"] == "demo:digits/test"


MISTAKES = {
    "train --preset demo-image-amd mask.teacher_ratio=0.9 --submit": "mask.teacher_ratio=0.9",
    "train --preset demo-imge-amd --submit": "did you mean demo-image-amd?",
    "train --preset demo-image-amd data.train=/etc --submit": "/etc",
    "train --preset demo-image-amd --label odd --submit": "must have the form KEY=VALUE",
    "train --preset demo-image-amd --label -=x --submit": "labels",
    "train --preset demo-image-amd --local --submit": "--local and --submit",
    "train --preset demo-image-amd --name mine": "--name: applies only to jobs",
    "jobs show nothing": "no job 'nothing'",
    "jobs list --state asleep": "queued",
}


@pytest.mark.parametrize("args", MISTAKES)
def test_a_rejected_request_prints_the_services_error_and_exits_with_code_2(
    args: str, service: Service, amd: Command
) -> None:
    code, out, err = amd(*args.split(), "--json")
    assert code == 2
    assert MISTAKES[args] in err
    assert "Traceback" not in err
    assert MISTAKES[args] in " ".join(json.loads(out.strip().splitlines()[-1])["problems"])


def test_a_report_is_written_to_a_file(
    service: Service, amd: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = queued(service.store, name="a <name>")
    monkeypatch.chdir(tmp_path)
    code, out, _ = amd("jobs", "report", short(job))
    assert (code, out.split(":")[0]) == (0, f"{job.id}.html")
    assert "a &lt;name&gt;" in (tmp_path / f"{job.id}.html").read_text()
    code, out, _ = amd("jobs", "report", job.id, "--output", "mine.html", "--json")
    facts = json.loads(out)
    assert (code, facts["job"], facts["file"]) == (0, job.id, "mine.html")
    assert facts["bytes"] == (tmp_path / "mine.html").stat().st_size
    code, _, err = amd("jobs", "report", job.id, "--output", "missing/mine.html")
    assert code == 2
    assert "--output missing/mine.html: cannot be written (No such file or directory)" in err


@pytest.mark.parametrize("kind", ["probe", "embed"])
def test_a_submission_accepts_a_shortened_encoder_id(kind: str, service: Service, amd: Command) -> None:
    for name in ("train-20260101-120000-1a2b3c4d", "train-20260102-120000-5e6f7a8b"):
        publish(service.root, name)
    service.discover()
    submitted = SUBMISSIONS[kind].replace("mine", "1a2b")
    code, out, err = amd(*submitted.split(), "--submit")
    assert code == 0, err
    assert service.store.get(out.strip()).config["encoder"] == "train-20260101-120000-1a2b3c4d"
    code, out, err = amd(*submitted.replace("1a2b", "train").split(), "--submit", "--json")
    assert (code, "'train' matches 2 encoders" in err, json.loads(out)["state"]) == (2, True, "invalid")


def test_a_job_is_found_by_its_name_if_the_name_is_unique(service: Service, amd: Command) -> None:
    job = queued(service.store, name="first")
    assert json.loads(amd("jobs", "show", "first", "--json")[1])["id"] == job.id
    queued(service.store, name="firsts")
    assert json.loads(amd("jobs", "show", "first", "--json")[1])["id"] == job.id
    other = queued(service.store, name="first")
    code, _, err = amd("jobs", "show", "first")
    assert (code, "first: is the name of 2 jobs" in err, job.id in err, other.id in err) == (2, True, True, True)
    assert amd("jobs", "show", "second")[0] == 2


@pytest.mark.parametrize(
    "args",
    ["jobs show", "jobs events", "jobs cancel", "jobs wait", "jobs delete", "encoders show", "encoders download"],
)
def test_every_command_reports_an_unknown_id_with_the_same_exit_code(args: str, service: Service, amd: Command) -> None:
    code, out, err = amd(*args.split(), "nothing", "--json")
    printed = json.loads(out.strip().splitlines()[-1])
    assert (code, printed["state"], printed["code"]) == (2, "refused", "not_found"), err


@pytest.mark.parametrize("args", ["keys revoke", "webhooks delete", "webhooks show"])
def test_an_unknown_key_or_webhook_is_reported_as_json(args: str, service: Service, amd: Command) -> None:
    code, out, _ = amd(*args.split(), "nothing", "--json")
    assert (code, "nothing" in " ".join(json.loads(out)["problems"])) == (2, True)


def test_following_a_job_prints_its_log_and_the_exit_code_reflects_the_outcome(service: Service, amd: Command) -> None:
    stop = threading.Event()

    def run_jobs() -> None:
        """Run submitted jobs to completion until stopped."""
        while not stop.wait(0.05):
            service.reconcile()
            for job in service.store.in_states({"starting"}):
                write_bytes(f"{JobFolder(service.root, job.id).logs(1)}/{0:016d}.log", b"step 1\nstep 2\n")
                state = "failed" if job.name == "bad" else "succeeded"
                reason = "nan_loss" if job.name == "bad" else None
                report_status(service.root, job, state, reason, message="the loss is not finite" if reason else "")

    running = threading.Thread(target=run_jobs)
    running.start()
    try:
        code, out, _ = amd("train", "--preset", "demo-image-mae", "--submit", "--follow")
        assert code == 0
        first, *log, last = out.splitlines()
        assert log == ["step 1", "step 2"]
        assert last == f"{first}: succeeded"
        code, out, err = amd("train", "--preset", "demo-image-mae", "--submit", "--follow", "--json", "--name", "bad")
        assert code == 1
        assert json.loads(out)["reason"] == "nan_loss"
        assert "step 1\nstep 2\n" in err
    finally:
        stop.set()
        running.join()


def test_jobs_are_listed_as_text_and_as_json(service: Service, amd: Command) -> None:
    ended, waiting = service.ended(state="succeeded"), queued(service.store, preset="ssv2-vit-b")
    code, out, _ = amd("jobs", "list")
    assert code == 0
    rows = {line.split()[0]: line for line in out.splitlines()[1:]}
    assert list(rows) == [waiting.id, ended.id]
    assert "a name" in rows[ended.id]
    assert "succeeded" in rows[ended.id]
    for args, found in (
        (("--state", "succeeded"), [ended.id]),
        (("--label", "team=video"), [ended.id]),
        (("--kind", "search"), []),
        (("--limit", "1"), [waiting.id]),
        ((), [waiting.id, ended.id]),
    ):
        code, out, _ = amd("jobs", "list", "--json", *args)
        assert [job["id"] for job in json.loads(out)] == found


def test_a_job_id_may_be_shortened_if_it_is_unambiguous(service: Service, amd: Command) -> None:
    result = {"teacher": {"run_id": "t-1", "steps": 3, "seconds": 42.0, "reused": True}}
    failure = {"state": "failed", "reason": "nan_loss", "message": "the loss is not finite", "log_tail": "last lines"}
    job = service.ended(**failure, result=result)
    for text in (job.id, job.id[:-2], short(job), short(job)[:5]):
        code, out, _ = amd("jobs", "show", text)
        assert code == 0
        for part in (job.id, "failed (nan_loss): the loss is not finite", "last lines", "team=video", "retry, delete"):
            assert part in out
        assert "3 steps in 42 s, reused" in out
    other = service.ended(state="succeeded")
    code, _, err = amd("jobs", "show", "train-")
    assert code == 2
    assert "'train-' matches 2 jobs" in err
    assert job.id in err
    assert other.id in err


def test_logs_and_events_of_a_finished_job_are_printed_without_waiting(service: Service, amd: Command) -> None:
    job = service.ended(state="succeeded")
    assert amd("jobs", "logs", short(job))[:2] == (0, "step 1\nstep 2\n")
    assert amd("jobs", "logs", short(job), "-f")[:2] == (0, "step 1\nstep 2\n")
    assert amd("jobs", "logs", short(job), "--tail", 1)[:2] == (0, "step 2\n")
    code, out, _ = amd("jobs", "events", short(job), "--json")
    history = [json.loads(line) for line in out.splitlines()]
    assert (code, history[0]["type"], history[-1]["data"]["state"]) == (0, "created", "succeeded")
    assert [event["id"] for event in history] == list(range(1, len(history) + 1))
    assert "by test" in amd("jobs", "events", short(job))[1]


def test_pictures_are_listed_and_downloaded(service: Service, amd: Command, tmp_path: Path) -> None:
    job = queued(service.store)
    write_pictures(service.root, job.id, (5, 10))
    _, listed, _ = amd("jobs", "media", job.id)
    assert [line.split()[:2] for line in listed.splitlines()[1:4]] == [
        ["5", "input.webp"],
        ["5", "rebuilt.webp"],
        ["5", "student.webp"],
    ]
    code, printed, _ = amd("jobs", "media", job.id, "--download", str(tmp_path / "pictures"))
    assert (code, printed.split(" in ")[0]) == (0, "6 pictures from 2 steps")
    stored = Path(run_folder(service.root, job.id)) / "media"
    downloaded = {str(path.relative_to(tmp_path / "pictures")) for path in (tmp_path / "pictures").rglob("*.webp")}
    assert downloaded == {str(path.relative_to(stored)) for path in stored.rglob("*.webp")}
    for name in downloaded:
        assert (tmp_path / "pictures" / name).read_bytes() == (stored / name).read_bytes()
    assert [step["step"] for step in json.loads(amd("jobs", "media", job.id, "--json")[1])] == [5, 10]


def test_artifacts_are_listed_and_downloaded(service: Service, amd: Command, tmp_path: Path) -> None:
    job = queued(service.store)
    folder = Path(run_folder(service.root, job.id))
    for path, text in {"result.json": "{}", "report/cost.svg": "<svg/>"}.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)
    _, listed, _ = amd("jobs", "artifacts", job.id)
    assert [line.split()[:2] for line in listed.splitlines()[1:3]] == [
        ["run/report/cost.svg", "6"],
        ["run/result.json", "2"],
    ]
    code, printed, _ = amd("jobs", "artifacts", job.id, "--only", "run/report/", "--download", str(tmp_path / "files"))
    assert (code, printed.split(" to ")[0]) == (0, "1 file downloaded")
    assert [path.read_text() for path in (tmp_path / "files").rglob("*") if path.is_file()] == ["<svg/>"]
    assert (tmp_path / "files/run/report/cost.svg").exists()


def test_a_job_is_paused_and_resumed(service: Service, amd: Command) -> None:
    job = queued(service.store)
    assert amd("jobs", "pause", short(job))[:2] == (0, f"{job.id}: paused\n")
    assert amd("jobs", "resume", short(job))[:2] == (0, f"{job.id}: queued\n")
    service.reconcile()
    code, out, _ = amd("jobs", "cancel", short(job), "--deadline", 5, "--json")
    assert (code, json.loads(out)["state"]) == (0, "cancelling")
    report_status(service.root, service.store.get(job.id), "cancelled", "cancelled_by_user", asked_to_stop=True)
    service.reconcile()
    assert amd("jobs", "retry", short(job))[0] == 0
    code, out, err = amd("jobs", "delete", short(job))
    assert (code, "queued" in err) == (2, True), "a job cannot be deleted before it ends"
    amd("jobs", "cancel", short(job))
    assert amd("jobs", "delete", short(job))[:2] == (0, f"{job.id}: deleted\n")
    assert amd("jobs", "show", job.id)[0] == 2
    history = amd("jobs", "events", job.id)[1]
    assert "delete  by" in history


def test_the_exit_code_of_wait_reflects_the_outcome_of_the_job(service: Service, amd: Command) -> None:
    assert amd("jobs", "wait", short(service.ended(state="succeeded")))[0] == 0
    assert amd("jobs", "wait", short(service.ended(state="failed", reason="nan_loss")))[0] == 1
    code, _, err = amd("jobs", "wait", short(queued(service.store)), "--timeout", 0)
    assert code == 1
    assert "still queued" in err


def test_a_key_without_permission_is_rejected(service: Service, amd: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AMD_KEY", "amd_0_wrong")
    code, _, err = amd("jobs", "list")
    assert (code, "key" in err) == (1, True)


def test_the_error_for_a_missing_service_explains_how_to_start_one(
    tmp_path: Path, amd: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AMD_URL", raising=False)
    monkeypatch.setenv("AMD_DATA_DIR", str(tmp_path))
    code, _, err = amd("jobs", "list")
    assert code == 1
    assert "amd up" in err


def test_a_trial_of_a_running_sweep_is_stopped(service: Service, amd: Command) -> None:
    sweep = queued(service.store, kind="search")
    folder = run_folder(service.root, sweep.id)
    ledgers.write_sweep(folder, ledgers.search(), [ledgers.trial(3, {}, [], "running")])
    code, _, err = amd("jobs", "stop-trial", sweep.id, 3)
    assert (code, requested_stops(folder)) == (2, set())
    assert "because the sweep is queued" in err
    service.reconcile()
    code, out, err = amd("jobs", "stop-trial", short(sweep), 3)
    assert (code, out.strip(), err) == (0, f"{sweep.id}: trial 3 is saving a final checkpoint", "")
    assert requested_stops(folder) == {3}


def test_a_job_is_forked_from_a_checkpoint(service: Service, amd: Command) -> None:
    _, out, _ = amd("train", "--preset", "demo-image-amd", "--submit")
    job = service.store.get(out.strip())
    code, _, err = amd("jobs", "fork", short(job), 400)
    assert (code, f"{job.id} has no checkpoint at step 400" in err) == (2, True)
    write_bytes(f"{run_folder(service.root, job.id)}/checkpoints/step-00000400/manifest.json", b"{}")
    code, out, err = amd("jobs", "fork", short(job), 400, "optim.base_lr=0.002", "--name", "faster", "--json")
    assert (code, err) == (0, "")
    fork = service.store.get(json.loads(out)["id"])
    assert (fork.name, fork.config["optim"]["base_lr"]) == ("faster", 0.002)
    assert fork.config["start"].endswith(f"/runs/{job.id}/checkpoints/step-00000400")
