"""Check a control plane's machine and settings: disk space, shared memory, package versions and unsafe settings."""

from __future__ import annotations

import shutil
import stat
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

from amd.storage import is_remote, local_path
from service.operations.doctor.findings import Finding, ok, problem, warning
from service.settings import Settings
from service.web.hosts import is_loopback

FULL, NEARLY_FULL = 0.02, 0.10  # free fraction; Ray rejects tasks at 0.05
RAY_TEMP, SHARED_MEMORY = Path("/tmp/ray"), Path("/dev/shm")
PACKAGES = ("amd-service", "ray", "torch", "sqlalchemy", "fastapi")
GIB = 2**30
EVERYTHING = ("", "file:", "s3:", "gs:", "http:", "https:")  # URI prefixes without a host, bucket or folder


class DiskUsage(NamedTuple):
    """Size and free space of a filesystem in bytes."""

    total: int
    used: int
    free: int


def disk_usage(path: Path) -> DiskUsage:
    """Return the usage of the filesystem that contains a path, which need not exist yet. Raises OSError."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return DiskUsage(*shutil.disk_usage(path))


def local_folders(settings: Settings) -> dict[str, Path]:
    """Return the local folders that the service writes to, by name."""
    folders = {"disk-data": settings.data_dir, "disk-ray": RAY_TEMP}
    if not is_remote(settings.root):
        folders["disk-storage"] = local_path(settings.root)
    if SHARED_MEMORY.exists():
        folders["shared-memory"] = SHARED_MEMORY
    return folders


def check_space(name: str, path: Path, usage: Callable[[Path], DiskUsage] = disk_usage) -> Finding:
    """Check the free space of one filesystem."""
    try:
        found = usage(path)
    except OSError as error:
        return problem(name, f"{path}: {error.strerror}", "make the folder readable by the control plane")
    free = found.free / found.total if found.total else 1.0
    message = f"{path}: {found.free / GIB:.1f} of {found.total / GIB:.1f} GiB are free"
    if path == SHARED_MEMORY:
        remedy = "give the container more shared memory (docker --shm-size), or end programs that leave files there"
    else:
        remedy = "free space, for example with `amd gc --dry-run` and a retention policy, or use a larger disk"
    if free < FULL:
        return problem(name, message, remedy)
    return warning(name, message, remedy) if free < NEARLY_FULL else ok(name, message)


def check_versions() -> Finding:
    """Report the installed versions of the main packages."""
    found = dict(_versions())
    return ok("versions", ", ".join(f"{name} {found.get(name, 'not installed')}" for name in PACKAGES))


def _versions() -> Iterator[tuple[str, str]]:
    for name in PACKAGES:
        try:
            yield name, version(name)
        except PackageNotFoundError:
            continue


def check_settings(settings: Settings) -> Finding:
    """Report settings that are unsafe outside a protected network."""
    if found := list(_unsafe(settings)):
        messages, remedies = zip(*found, strict=True)
        return warning("settings", "; ".join(messages), "; ".join(remedies))
    return ok("settings", "no setting is unsafe")


def _unsafe(settings: Settings) -> Iterator[tuple[str, str]]:
    """Yield a description of each unsafe setting, and its remedy."""
    if not is_loopback(settings.host):
        message = f"AMD_HOST={settings.host}: keys are readable on the network, because the API has no TLS of its own"
        yield message, "keep the port private and publish it through a proxy with TLS"
    if not is_loopback(urlsplit(settings.ray_dashboard).hostname or "") and settings.ray_token_file is None:
        message = f"AMD_RAY_DASHBOARD={settings.ray_dashboard}: anyone who reaches it can run code: Ray has no token"
        yield message, "enable Ray's token authentication and set AMD_RAY_TOKEN_FILE"
    if settings.webhooks_http:
        yield "AMD_WEBHOOKS_HTTP=true: events are sent unencrypted", "unset it, and use https:// receivers"
    if broad := [uri for uri in settings.allowed_uris if uri.rstrip("/") in EVERYTHING]:
        yield f"AMD_ALLOWED_URIS={','.join(broad)}: jobs may read everything", "list the prefixes that jobs need"
    for file in (settings.admin_key_path, settings.ray_token_file, settings.oidc_client_secret_file):
        if file is not None and file.exists() and stat.S_IMODE(file.stat().st_mode) & 0o077:
            yield f"{file}: other users of this machine can read it", f"chmod 600 {file}"
