"""Tests that owners of runs and encoders are found in the database or, if it has no record, under the storage root."""

from __future__ import annotations

from pathlib import Path

import pytest
from sqlalchemy import Engine

from amd.artifacts.discovery import CARD, encoder_folder
from amd.storage import join, write_bytes, write_json
from amd.training.run_folder import FACTS, run_folder
from service.jobs.execution.protocol import JobFolder
from service.jobs.store import JobStore
from service.registry.ownership import Owner, StorageOwners
from tests.support.encoders.encoder_cards import card, index_encoder, publish
from tests.support.service.fake_cluster import queued


@pytest.fixture
def root(tmp_path: Path) -> str:
    return str(tmp_path)


@pytest.fixture
def owners(sqlite_engine: Engine, root: str) -> StorageOwners:
    return StorageOwners(sqlite_engine, root)


@pytest.fixture
def jobs(sqlite_engine: Engine) -> JobStore:
    return JobStore(sqlite_engine)


def start_run(root: str, run_id: str, job: str | None) -> str:
    write_json(join(run_folder(root, run_id), FACTS), {"job": job})
    return run_id


def test_a_job_owns_its_run_its_future_encoder_and_the_runs_that_it_starts(
    owners: StorageOwners, jobs: JobStore, root: str
) -> None:
    job = queued(jobs, project="video").id
    trial = start_run(root, f"{job}-0000-s0", job)
    assert [owners.of_run(job), owners.of_run(trial), owners.of_encoder(job)] == ["video"] * 3


def test_objects_that_no_job_created_belong_to_the_default_project(owners: StorageOwners, root: str) -> None:
    publish(root, "by-hand", run=None)
    assert owners.of_encoder("by-hand") == "default"
    assert owners.of_run(start_run(root, "amd-train", None)) == "default"


@pytest.mark.parametrize("name", ["train-1", "..", "../runs/mine", ".hidden", "", "x" * 300, "ü", "a b", "a\n"])
def test_nonexistent_objects_have_no_owner(owners: StorageOwners, name: str) -> None:
    assert owners.of_run(name) is None
    assert owners.of_encoder(name) is None


def test_an_imported_encoder_belongs_to_the_importing_job_and_not_to_a_run_in_its_copied_card(
    owners: StorageOwners, jobs: JobStore, root: str
) -> None:
    trained, importing = queued(jobs, project="theirs").id, queued(jobs, project="ours", kind="import").id
    publish(root, "copy", run=trained, job=importing)
    assert owners.of_encoder("copy") == "ours"
    assert owners.of_card(card("copy", run=trained, job=importing)) == Owner("ours", importing)
    assert owners.of_card(card(trained)) == Owner("theirs", trained)


def test_importing_an_encoder_under_the_name_of_a_run_gives_no_access_to_the_run(
    owners: StorageOwners, jobs: JobStore, sqlite_engine: Engine, root: str
) -> None:
    teacher = start_run(root, "a-teacher-0123456789ab", queued(jobs, project="theirs").id)
    index_encoder(sqlite_engine, teacher, "ours")
    assert owners.of_run(teacher) == "theirs"


def test_a_teacher_keeps_its_owner_after_its_job_is_deleted(
    owners: StorageOwners, jobs: JobStore, sqlite_engine: Engine, root: str
) -> None:
    job = queued(jobs, project="video", state="succeeded")
    teacher = start_run(root, "a-teacher", job.id)
    index_encoder(sqlite_engine, teacher, "video")
    jobs.finish_deletion(job)
    assert [owners.of_run(teacher), owners.of_encoder(teacher)] == ["video", "video"]


def test_the_project_is_read_from_the_job_folder_if_the_database_was_lost(owners: StorageOwners, root: str) -> None:
    write_json(JobFolder(root, "train-1").request, {"kind": "train", "project": "video"})
    write_json(JobFolder(root, "train-0").request, {"kind": "train"})  # written by version 0.1
    trial = start_run(root, "trial", "train-1")
    publish(root, "train-1")
    assert [owners.of_run("train-1"), owners.of_run(trial), owners.of_encoder("train-1")] == ["video"] * 3
    assert owners.of_run("train-0") == "default"


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff"])
def test_unreadable_objects_have_no_owner(owners: StorageOwners, root: str, content: bytes) -> None:
    write_bytes(join(run_folder(root, "broken"), FACTS), content)
    write_bytes(join(encoder_folder(root, "broken"), CARD), content)
    assert [owners.of_run("broken"), owners.of_encoder("broken")] == [None, None]
