"""The control plane's environment as one object, read once and handed on. Nothing else here reads the environment."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

from pydantic import Field, SecretStr, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from amd.storage import resolve_root


def default_data_dir() -> Path:
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Application Support" / "amd-service"
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "amd-service"


class Settings(BaseSettings):
    """Every field is an environment variable: `AMD_` and its name."""

    model_config = SettingsConfigDict(env_prefix="AMD_", frozen=True, extra="ignore", use_attribute_docstrings=True)

    data_dir: Path = Field(default_factory=default_data_dir)
    """Of a control plane on one machine: its database, its keys, its logs."""
    database_url: SecretStr | None = None
    """SQLAlchemy's; none: SQLite in the data directory. May hold a password, so it is never printed."""
    migrate: bool = False
    """Bring the database's tables up to date at start. SQLite's always are."""
    storage: str | None = None
    """Root of runs, encoders and jobs, any fsspec URL; none: a folder in the user's data directory."""

    ray_dashboard: str = "http://127.0.0.1:8265"
    ray_token_file: Path | None = None
    """Holds Ray's token; none: Ray runs without authentication."""
    ray_python: str = "python"
    """The interpreter on the nodes that has this package: it runs the jobs' drivers."""
    autoscaling: bool = False
    """The cluster grows on demand: what does not fit it now is submitted all the same."""

    serve_host: str = "127.0.0.1"
    serve_port: int = 8000
    """Where Ray Serve listens once something is deployed. It asks for no key: never where others reach it."""
    serve_url: str | None = None
    """Of the same as this process reaches it; none: `http://{serve_host}:{serve_port}`."""

    host: str = "127.0.0.1"
    port: int = 8400
    admin_key_file: Path | None = None
    """Where the first admin key is written, with mode 0600; none: `admin-key` in the data directory."""
    allowed_uris: Annotated[tuple[str, ...], NoDecode] = ()
    """Prefixes of data and weights that jobs may read besides the storage root, with commas."""
    oidc_issuer: str | None = None
    oidc_audience: str | None = None
    oidc_jwks_url: str | None = None
    """None: found through the issuer's `/.well-known/openid-configuration`."""

    webhooks_http: bool = False
    """Webhooks may also go to `http://` addresses, where anybody on the way can read them."""

    max_body_mib: float = Field(1.0, gt=0)
    max_upload_mib: float = Field(64.0, gt=0)
    """Of a request to an encoder: its files together."""
    rate_limit: str = "1200/minute"
    """Requests of a key; past it: 429."""
    inference_rate_limit: str = "60000/minute"
    """Of a key's requests to encoders, counted apart."""
    failure_limit: str = "30/minute"
    """Wrong keys and tokens of one client address."""
    max_running: int = Field(32, ge=1)
    """Jobs that run at once: each has a driver process on the cluster."""
    project_max_running: int | None = Field(None, ge=1)
    project_max_workers: int | None = Field(None, ge=1)

    reconcile_s: float = Field(1.0, gt=0)
    """Between two looks at the cluster."""
    start_timeout_s: float = Field(600.0, gt=0)
    """How long Ray may take from submission to the job's first sign of life."""
    silence_s: float = Field(60.0, gt=0)
    """A job of which Ray knows nothing, and which has been silent for so long, is lost."""

    @field_validator("allowed_uris", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value

    @property
    def root(self) -> str:
        return resolve_root(self.storage)

    @property
    def database(self) -> str:
        """The URL as SQLAlchemy takes it."""
        if self.database_url is None:
            return f"sqlite:///{self.data_dir / 'control-plane.db'}"
        url = self.database_url.get_secret_value()
        scheme, separator, rest = url.partition("://")
        return f"postgresql+psycopg://{rest}" if scheme in ("postgres", "postgresql") and separator else url

    @property
    def serve(self) -> str:
        return self.serve_url or f"http://{self.serve_host}:{self.serve_port}"

    @property
    def admin_key_path(self) -> Path:
        return self.admin_key_file or self.data_dir / "admin-key"
