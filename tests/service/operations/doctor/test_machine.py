"""Tests for the doctor's checks of disks and settings, in good and bad states."""

from __future__ import annotations

from pathlib import Path

import pytest

from service.operations.doctor import machine
from service.operations.doctor.machine import DiskUsage
from service.settings import Settings


@pytest.mark.parametrize(("free", "severity"), [(50, "ok"), (9, "warning"), (1, "error")])
def test_free_space_determines_the_severity(free: int, severity: str) -> None:
    found = machine.check_space("disk-data", Path("/data"), lambda path: DiskUsage(100, 100 - free, free))
    assert (found.check, found.severity, bool(found.remedy)) == ("disk-data", severity, severity != "ok")


def test_full_shared_memory_has_its_own_remedy() -> None:
    found = machine.check_space("shared-memory", machine.SHARED_MEMORY, lambda path: DiskUsage(100, 99, 1))
    assert "--shm-size" in found.remedy


def test_the_disk_of_a_folder_that_does_not_exist_yet_is_found(tmp_path: Path) -> None:
    assert machine.disk_usage(tmp_path / "new" / "folder").total == machine.disk_usage(tmp_path).total


def test_only_a_local_storage_root_is_checked_for_disk_space(tmp_path: Path) -> None:
    assert machine.local_folders(Settings(storage=str(tmp_path)))["disk-storage"] == tmp_path
    assert "disk-storage" not in machine.local_folders(Settings(storage="s3://bucket/root"))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"host": "0.0.0.0"}, "AMD_HOST"),
        ({"ray_dashboard": "http://10.0.0.1:8265"}, "AMD_RAY_TOKEN_FILE"),
        ({"webhooks_http": True}, "AMD_WEBHOOKS_HTTP"),
        ({"allowed_uris": ("/",)}, "AMD_ALLOWED_URIS"),
    ],
)
def test_unsafe_settings_are_reported_with_a_remedy(settings: dict[str, object], expected: str, tmp_path: Path) -> None:
    safe = {"data_dir": tmp_path, "allowed_uris": ("s3://bucket/sets", "/data")}
    assert machine.check_settings(Settings(**safe)).severity == "ok"  # type: ignore[arg-type]
    found = machine.check_settings(Settings(**{**safe, **settings}))  # type: ignore[arg-type]
    assert found.severity == "warning"
    assert expected in found.message + found.remedy


def test_an_admin_key_that_others_can_read_is_reported(tmp_path: Path) -> None:
    key = tmp_path / "admin-key"
    key.touch(mode=0o600)
    assert machine.check_settings(Settings(data_dir=tmp_path)).severity == "ok"
    key.chmod(0o644)
    assert machine.check_settings(Settings(data_dir=tmp_path)).remedy == f"chmod 600 {key}"
