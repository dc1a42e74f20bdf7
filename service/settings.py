"""Control-plane settings, read once from the environment. No other control-plane module reads the environment."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

from pydantic import Field, SecretStr, ValidationInfo, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from amd.storage import resolve_root
from service.logs import LogFormat


def default_data_dir() -> Path:
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Application Support" / "amd-service"
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "amd-service"


class Settings(BaseSettings):
    """Control-plane settings. Each field is read from the environment variable `AMD_<FIELD>`."""

    model_config = SettingsConfigDict(env_prefix="AMD_", frozen=True, extra="ignore", use_attribute_docstrings=True)

    data_dir: Path = Field(default_factory=default_data_dir)
    """Local data directory for the database, keys and logs."""
    database_url: SecretStr | None = None
    """SQLAlchemy URL of the database. Default: SQLite in the data directory. It is never printed, because it may
    contain a password."""
    migrate: bool = False
    """Whether to migrate the database schema at startup. SQLite is always migrated."""
    storage: str | None = None
    """Storage root for runs, encoders and jobs, as an fsspec URL. Default: a folder in the user's data directory."""

    ray_dashboard: str = "http://127.0.0.1:8265"
    """URL of the Ray dashboard, which serves the Ray Jobs API."""
    ray_token_file: Path | None = None
    """File that contains Ray's authentication token. Default: none; Ray is used without authentication."""
    ray_python: str = "python"
    """Python interpreter that runs job drivers on the nodes; this package must be installed in it."""
    autoscaling: bool = False
    """Whether the cluster grows on demand. If so, jobs that do not fit its current size are submitted anyway."""

    serve_host: str = "127.0.0.1"
    """Host of Ray Serve."""
    serve_port: int = 8000
    """Port of Ray Serve, open once an encoder is deployed. Never expose it: Ray Serve has no authentication."""
    serve_url: str | None = None
    """URL at which this process reaches Ray Serve. Default: `http://{serve_host}:{serve_port}`."""

    host: str = "127.0.0.1"
    """Address that the REST API listens on."""
    port: int = 8400
    """Port of the REST API."""
    drain_s: float = Field(90.0, ge=0)
    """Maximum time in seconds that requests in progress may take to finish after a stop signal. Event and log streams
    end immediately, and their clients reconnect."""
    admin_key_file: Path | None = None
    """File for the first admin key, created with mode 0600. Default: `admin-key` in the data directory."""
    allowed_uris: Annotated[tuple[str, ...], NoDecode] = ()
    """Comma-separated URI prefixes from which jobs may read data and weights, in addition to the storage root."""
    single_machine: bool = False
    """Whether jobs run on this machine, so that a job whose local files do not exist is rejected. Set by `amd up`."""
    oidc_issuer: str | None = None
    """OIDC issuer whose bearer tokens are accepted. Default: none; only API keys are accepted."""
    oidc_audience: str | None = None
    """Required audience (`aud` claim) of the issuer's tokens."""
    oidc_jwks_url: str | None = None
    """URL of the issuer's JWKS. Default: taken from the issuer's `/.well-known/openid-configuration`."""
    oidc_client_id: str | None = Field(None, min_length=1)
    """Client ID of the web console at the OIDC issuer. Default: none; the console accepts only API keys."""
    oidc_client_secret: SecretStr | None = Field(None, min_length=1)
    """Client secret of the web console at the OIDC issuer. Default: none, for a public client. It is never printed."""
    oidc_client_secret_file: Path | None = None
    """File that contains the client secret, instead of `oidc_client_secret`."""
    oidc_scopes: str = "openid"
    """Space-separated scopes that the web console requests from the OIDC issuer; they must contain `openid`."""

    key_cache_s: float = Field(10.0, gt=0)
    """Cache lifetime of an API key, in seconds. A key revoked through another control plane may remain valid for up to
    this time."""
    key_outage_s: float = Field(300.0, ge=0)
    """Maximum time in seconds that a cached API key remains valid while the database is not responding."""

    webhooks_http: bool = False
    """Whether webhooks may use `http://`, which sends events unencrypted."""

    max_body_mib: float = Field(1.0, gt=0)
    """Maximum size of a request body in MiB, except for requests to encoders."""
    max_upload_mib: float = Field(64.0, gt=0)
    """Maximum total size in MiB of the files in a request to an encoder."""
    max_bodies_mib: float | None = Field(None, gt=0)
    """Maximum total size in MiB of request bodies and encoder replies held in memory; requests beyond it are
    rejected with 429. Default: four times the larger of `max_body_mib` and `max_upload_mib`."""
    rate_limit: str = "1200/minute"
    """Rate limit per key; requests beyond it are rejected with 429."""
    inference_rate_limit: str = "60000/minute"
    """Separate rate limit per key for requests to encoders."""
    failure_limit: str = "30/minute"
    """Rate limit for failed authentications, per client address."""
    max_streams: int = Field(100, ge=1)
    """Maximum number of open event and log streams per key."""
    stream_lifetime_s: float = Field(3600.0, gt=0)
    """Maximum lifetime of an event or log stream, in seconds; the client then reconnects and continues."""
    concurrency_limit: int = Field(256, ge=1)
    """Maximum number of concurrent requests per key, including streams; further requests are rejected with 429."""
    anonymous_concurrency_limit: int = Field(64, ge=1)
    """Maximum number of concurrent requests without a valid key, across all addresses."""
    max_running: int = Field(32, ge=1)
    """Maximum number of concurrent jobs, each of which has a driver process on the cluster."""
    project_max_running: int | None = Field(None, ge=1)
    """Maximum number of concurrent jobs per project. Default: no limit."""
    project_max_workers: int | None = Field(None, ge=1)
    """Maximum number of workers across a project's concurrent jobs. Default: no limit."""
    preemption: bool = False
    """Whether a job that lacks resources preempts running jobs of lower priority. Preempted jobs save a final
    checkpoint and return to the queue."""

    storage_threads: int = Field(32, ge=1)
    """Maximum number of concurrent requests that read the storage root; they run in separate threads."""
    storage_timeout_s: float = Field(5.0, gt=0)
    """Time in seconds without progress after which a request that needs the storage root fails with 503."""

    retain_jobs_days: float | None = Field(None, gt=0, le=36500)
    """Days to keep a job after it ends, with its run, trials, log and output; null: forever. For this and the following
    settings, anything that an encoder's card, an alias, a deployment or an unfinished job refers to is always kept."""
    retain_trials_days: float | None = Field(None, gt=0, le=36500)
    """Days to keep the runs of a sweep's trials after the sweep ends; null: forever."""
    retain_logs_days: float | None = Field(None, gt=0, le=36500)
    """Days to keep a log after its job or run ends; null: forever."""
    retain_checkpoints_days: float | None = Field(None, gt=0, le=36500)
    """Days to keep a run's checkpoints after it ends; null: forever. Without them, the run cannot be continued."""
    retain_orphans_days: float | None = Field(None, gt=0, le=36500)
    """Days to keep incomplete files that nothing will complete, such as uncommitted checkpoints; null: forever."""
    retain_history_days: float | None = Field(None, gt=0, le=36500)
    """Days to keep the records of deleted jobs, encoders and deployments, with the jobs' events; null: forever."""
    retain_deliveries_days: float | None = Field(7.0, gt=0, le=36500)
    """Days to keep finished webhook deliveries; null: forever."""

    log_format: LogFormat = "text"
    """Format of the log on stderr. json: one object per line, with the request, key, project and job as fields."""

    reconcile_s: float = Field(1.0, gt=0)
    """Interval between reconcile steps, in seconds."""
    start_timeout_s: float = Field(600.0, gt=0)
    """Maximum time in seconds from the submission of an attempt to its first heartbeat."""
    silence_s: float = Field(60.0, gt=0)
    """Time in seconds without a heartbeat after which an attempt that is unknown to Ray is considered lost."""

    @field_validator("allowed_uris", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value

    @field_validator("max_bodies_mib")
    @classmethod
    def _fits_one_body(cls, value: float | None, info: ValidationInfo) -> float | None:
        largest = max(info.data.get(name, 0.0) for name in ("max_body_mib", "max_upload_mib"))
        if value is not None and value < largest:
            raise ValueError(
                f"{value:g} is less than AMD_MAX_BODY_MIB or AMD_MAX_UPLOAD_MIB; set it to at least {largest:g}"
            )
        return value

    @property
    def bodies_mib(self) -> float:
        return self.max_bodies_mib or 4 * max(self.max_body_mib, self.max_upload_mib)

    @property
    def root(self) -> str:
        return resolve_root(self.storage)

    @property
    def database(self) -> str:
        """Database URL in SQLAlchemy's format."""
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
