"""Helpers for the deployment tests: read YAML files and find secrets in environments."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from service.settings import Settings

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
SETTINGS = {f"AMD_{name}".upper() for name in Settings.model_fields}
SECRET = re.compile(r"(PASSWORD|SECRET|TOKEN|CREDENTIAL|ACCESS_KEY|_URL$|_URI$)")
REFERS_TO_SECRET = re.compile(r"(_FILE|_PATH|^PGSERVICEFILE)$")
IMAGE = re.compile(
    r"[a-z0-9./-]+:(\d+(\.\d+)+)"
)  # requires a full version, so neither `latest` nor a missing tag matches


def read(path: Path) -> list[dict[str, Any]]:
    return [document for document in yaml.safe_load_all(path.read_text()) if document]


def secrets_among(environment: dict[str, str]) -> set[str]:
    """Return the variables that contain secrets, judging by their names or by passwords in URLs."""
    named = {name for name in environment if SECRET.search(name) and not REFERS_TO_SECRET.search(name)}
    harmless = {name for name in named if re.fullmatch(r"[a-z0-9+]+://[^@]*", environment[name])}
    return (named - harmless) | {name for name, value in environment.items() if re.search(r"://[^/]*@", value)}
