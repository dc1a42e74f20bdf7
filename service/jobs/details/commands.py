"""Arguments of the `amd` command that is equivalent to a job with a preset."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from typing import Any


def preset_arguments(preset: str, overrides: Mapping[str, Any]) -> str:
    """Return the arguments of a command that starts from a preset, quoted for a shell."""
    return f"--preset {shlex.quote(preset)} {override_arguments(overrides)}".rstrip()


def override_arguments(overrides: Mapping[str, Any]) -> str:
    """Return overrides as arguments of a command, quoted for a shell."""
    return " ".join(shlex.quote(f"{key}={_plain(value)}") for key, value in overrides.items())


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
