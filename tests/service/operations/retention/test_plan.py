"""Tests for planning what a retention policy removes, on in-memory inventories."""

from __future__ import annotations

from typing import Any

from amd.storage import StoredFile
from service.operations.retention.plan import DAY_S, Inventory, JobRecord, plan_removals
from service.operations.retention.policy import RetentionPolicy

NOW = 1_000 * DAY_S
OLD, YOUNG = StoredFile(10, NOW - 40 * DAY_S), StoredFile(10, NOW - DAY_S)
MONTH = RetentionPolicy(jobs_days=30, trials_days=30, logs_days=30, checkpoints_days=30, orphans_days=30)


def record(id: str, state: str = "failed", days: float = 40, origin: str = "api") -> JobRecord:
    return JobRecord(id, origin, state, 1, NOW - days * DAY_S)


def inventory(*records: JobRecord, **fields: Any) -> Inventory:
    empty: dict[str, Any] = {"runs": {}, "jobs": {}, "encoders": {}, "results": {}, "protected": frozenset()}
    return Inventory(now=NOW, records={each.id: each for each in records}, **{**empty, **fields})


def removed(found: Inventory, policy: RetentionPolicy = MONTH) -> dict[str, tuple[str, ...]]:
    return {f"{removal.kind} {removal.id}": removal.paths for removal in plan_removals(found, policy)}


def test_the_default_policy_removes_no_user_data() -> None:
    found = inventory(record("a"), runs={"a": {"run.json": OLD, "checkpoints/step-00000001/manifest.json": OLD}})
    assert removed(found, RetentionPolicy()) == {}
    assert not RetentionPolicy(deliveries_days=7).removes_user_data


def test_a_job_is_removed_with_its_trials_unless_one_of_them_is_in_use() -> None:
    runs = {"s": {"run.json": OLD}, "s-0000-s0": {"run.json": OLD}, "s-0001-s0": {"run.json": YOUNG}}
    found = inventory(record("s"), runs=runs, jobs={"s": {"config.json": OLD}})
    paths = ("jobs/s/config.json", "runs/s-0000-s0/run.json", "runs/s-0001-s0/run.json", "runs/s/run.json")
    assert removed(found) == {"jobs s": paths}
    assert removed(found._replace(protected=frozenset({"s-0001-s0"}))) == {}


def test_pictures_are_kept_as_long_as_their_run() -> None:
    picture = "media/step-00000001/input.webp"
    found = inventory(record("a"), runs={"a": {"run.json": OLD, picture: OLD}})
    assert removed(found, RetentionPolicy(checkpoints_days=30, logs_days=30, orphans_days=30)) == {}
    assert removed(found) == {"jobs a": (f"runs/a/{picture}", "runs/a/run.json")}


def test_a_jobs_age_is_measured_from_its_end_and_not_from_its_files() -> None:
    assert removed(inventory(record("a", days=29), runs={"a": {"run.json": OLD}})) == {}
    assert removed(inventory(record("a", days=31), runs={"a": {"run.json": YOUNG}})) == {"jobs a": ("runs/a/run.json",)}


def test_the_manifest_of_a_checkpoint_is_removed_first() -> None:
    step = "checkpoints/step-00000001"
    files = {f"{step}/{name}": OLD for name in ("a.safetensors", "manifest.json", "state.json")}
    found = inventory(runs={"a": {**files, "run.json": OLD, "result.json": OLD}}, results={"a": "failed"})
    names = ("manifest.json", "a.safetensors", "state.json")
    assert removed(found) == {"checkpoints a": tuple(f"runs/a/{step}/{name}" for name in names)}


def test_a_paused_run_and_another_services_run_keep_their_checkpoints() -> None:
    files = {"run.json": OLD, "result.json": OLD, "checkpoints/step-00000001/manifest.json": OLD}
    assert removed(inventory(runs={"a": files}, results={"a": "paused"})) == {}
    assert removed(inventory(runs={"a": files}, jobs={"a": {"config.json": OLD}}, results={"a": "failed"})) == {}


def test_trials_of_an_interrupted_sweep_are_kept() -> None:
    trial = {"run.json": OLD, "result.json": OLD, "checkpoints/step-00000001/manifest.json": OLD}
    runs = {"s": {"run.json": OLD, "trials/0000.json": OLD}, "s-0000-s0": trial}
    assert removed(inventory(runs=runs, results={"s-0000-s0": "failed"})) == {}
    ended = {**runs, "s": {**runs["s"], "result.json": OLD}}
    found = inventory(runs=ended, results={"s": "succeeded", "s-0000-s0": "failed"})
    assert list(removed(found)) == ["trials s-0000-s0"]


def test_incomplete_files_are_orphans_once_they_are_old() -> None:
    runs = {
        "a": {
            "run.json": OLD,
            "checkpoints/step-00000001/model.safetensors": OLD,
            "checkpoints/step-00000002/model.safetensors": YOUNG,
            "checkpoints/step-00000003/model.safetensors": OLD,
            "checkpoints/step-00000003/manifest.json": OLD,
            ".run.json.0123abcd": OLD,
        },
        "never-started": {"config.json": OLD},
        "deleted": {"run.json": OLD},
    }
    encoders = {"half": {"encoder.safetensors": OLD}, "whole": {"encoder.safetensors": OLD, "encoder.json": OLD}}
    found = inventory(record("deleted", "deleted"), runs=runs, encoders=encoders)
    assert removed(found) == {
        "orphans a": ("runs/a/.run.json.0123abcd", "runs/a/checkpoints/step-00000001/model.safetensors"),
        "orphans never-started": ("runs/never-started/config.json",),
        "orphans deleted": ("runs/deleted/run.json",),
        "orphans half": ("encoders/half/encoder.safetensors",),
    }


def test_the_history_of_a_deleted_job_is_kept_while_files_remain() -> None:
    policy = RetentionPolicy(history_days=30)
    assert removed(inventory(record("a", "deleted")), policy) == {"history a": ()}
    assert removed(inventory(record("a", "deleted"), runs={"a-0000-s0": {"run.json": OLD}}), policy) == {}
    assert removed(inventory(record("a", "deleted"), protected=frozenset({"a"})), policy) == {}
