"""API keys: create, list and revoke. A key is shown once, when it is created; only its hash is stored.

Requests are authenticated in `authentication`.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from http import HTTPStatus
from pathlib import Path
from typing import Annotated

from fastapi import APIRouter, Request, Response
from fastapi import Path as InPath
from pydantic import Field, StringConstraints, field_validator
from sqlalchemy import Engine, or_, select, text
from sqlalchemy.orm import Session
from starlette.concurrency import run_in_threadpool

from service.auth.authentication import SCOPES, Admin, Scope, Secret, is_live, new_secret, read_secret
from service.db.audit import record_change
from service.db.models import ApiKey
from service.web.errors import IllegalAction, NotFound
from service.web.parameters import Timestamp
from service.web.schemas import ApiModel, Project, utc_datetime, utc_datetime_or_none

logger = logging.getLogger(__name__)

FIRST_KEY_NAME = "first admin key"
SERVICE = "service"

Name = Annotated[str, StringConstraints(min_length=1, max_length=200, pattern=r"^[^\x00-\x1f\x7f]+$")]


class KeyRequest(ApiModel):
    """Request to create an API key."""

    name: Name
    """Name of the person or program that uses the key."""
    scopes: list[Scope] = Field(min_length=1, max_length=len(SCOPES))
    """Scopes of the key; each scope includes those before it. infer: send files to deployed encoders. read: also view
    jobs and encoders. submit: also run, cancel and delete jobs. admin: also manage keys and webhooks."""
    project: Project | None = None
    """Project that the key is limited to. Default: your key's project, or all projects if your key covers them all."""
    expires_at: Timestamp | None = None
    """Time at which the key expires. Default: never."""

    @field_validator("expires_at")
    @classmethod
    def _in_the_future(cls, value: datetime | None) -> datetime | None:
        if value is not None and value.timestamp() <= time.time():
            raise ValueError("expires_at must be in the future")
        return value


class KeyView(ApiModel):
    """An API key without its secret."""

    id: str
    """ID of the key, which is also part of the key itself: `amd_<id>_…`."""
    name: str
    project: str | None
    """Project that the key is limited to; null if it covers all projects."""
    scopes: list[Scope]
    created_at: datetime
    created_by: str
    expires_at: datetime | None
    revoked_at: datetime | None
    used_at: datetime | None
    """Time of the last use, accurate to the minute."""


class NewKeyView(KeyView):
    """A new API key."""

    key: str
    """The key, for `Authorization: Bearer …`. It is not shown again."""


class KeyList(ApiModel):
    items: list[KeyView]


class KeyStore:
    """API keys in the database."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._reading = engine.execution_options(reads_only=True)

    def create(self, request: KeyRequest, project: str | None, actor: str) -> tuple[ApiKey, Secret]:
        secret = new_secret()
        expires_at = request.expires_at.timestamp() if request.expires_at else None
        key = _key(secret, request.name, project, request.scopes, actor, expires_at)
        with Session(self._engine, expire_on_commit=False) as session, session.begin():
            session.add(key)
            record_change(session, actor, "key.create", key.id, project, f"scopes {', '.join(key.scopes)}")
        return key, secret

    def list(self, project: str | None) -> Sequence[ApiKey]:
        """List the keys of a project, or of all projects if `project` is None, newest first."""
        query = select(ApiKey).order_by(ApiKey.created_at.desc(), ApiKey.id)
        if project is not None:
            query = query.where(ApiKey.project == project)
        with Session(self._reading, expire_on_commit=False) as session:
            return list(session.scalars(query))

    def names(self, project: str | None) -> dict[str, str]:
        """Return the names of keys by ID: the keys that cover `project`, or all keys if `project` is None."""
        query = select(ApiKey.id, ApiKey.name)
        if project is not None:
            query = query.where(or_(ApiKey.project == project, ApiKey.project.is_(None)))
        with Session(self._reading) as session:
            return dict(session.execute(query).tuples().all())

    def revoke(self, key_id: str, project: str | None, actor: str) -> None:
        """Revoke a key. No-op if it is already revoked.

        Raises NotFound, including for a key from another project, or IllegalAction for the last admin key that covers
        all projects.
        """
        with _exclusive(self._engine) as session:
            key = session.get(ApiKey, key_id)
            if key is None or (project is not None and key.project != project):
                raise NotFound(f"there is no key {key_id!r}")
            now = time.time()
            if (
                _is_global_admin(key, now)
                and sum(_is_global_admin(other, now) for other in session.scalars(select(ApiKey))) == 1
            ):
                message = f"key {key_id!r} is the last admin key that covers all projects; create another one first"
                raise IllegalAction(message, allowed_actions=[])
            if key.revoked_at is None:
                key.revoked_at = now
                record_change(session, actor, "key.revoke", key_id, key.project, "revoked")


def ensure_admin_key(engine: Engine, path: Path) -> bool:
    """Create an admin key for all projects if there is none, and write it to a file that only its owner can read.

    Returns whether a key was created. The key is committed only after it has been written to the file: a committed key
    that nobody knows would lock everybody out. Raises OSError if the file cannot be written, or FileExistsError if it
    exists and does not contain a key.
    """
    with _exclusive(engine) as session:
        if any(_is_global_admin(key, time.time()) for key in session.scalars(select(ApiKey))):
            return False
        secret = new_secret()
        _write(path, secret)
        session.add(_key(secret, FIRST_KEY_NAME, None, ["admin"], SERVICE, None))
    logger.warning("the first admin key was created; it is stored in %s", path)
    return True


def _write(path: Path, secret: Secret) -> None:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    if path.exists():
        if read_secret(path.read_text(errors="replace").strip()) is None:
            raise FileExistsError(f"{path} exists and does not contain a key; move it, or set AMD_ADMIN_KEY_FILE")
        path.unlink()  # a key that is no longer valid, or was never committed
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(f"{secret}\n")
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def _exclusive(engine: Engine) -> Iterator[Session]:
    """Open a transaction that prevents all replicas from changing keys, so that key counts stay valid within it."""
    with Session(engine) as session, session.begin():
        if engine.dialect.name == "postgresql":  # SQLite allows one writer at a time anyway
            session.execute(text("LOCK TABLE keys IN SHARE ROW EXCLUSIVE MODE"))
        yield session


def _is_global_admin(key: ApiKey, now: float) -> bool:
    return key.project is None and "admin" in key.scopes and is_live(key, now)


def _key(
    secret: Secret, name: str, project: str | None, scopes: Sequence[Scope], actor: str, expires_at: float | None
) -> ApiKey:
    return ApiKey(
        id=secret.id,
        name=name,
        project=project,
        scopes=[scope for scope in SCOPES if scope in scopes],
        digest=secret.digest,
        created_at=time.time(),
        created_by=actor,
        expires_at=expires_at,
        revoked_at=None,
        used_at=None,
    )


def _view(key: ApiKey) -> KeyView:
    return KeyView(
        id=key.id,
        name=key.name,
        project=key.project,
        scopes=[scope for scope in SCOPES if scope in key.scopes],
        created_at=utc_datetime(key.created_at),
        created_by=key.created_by,
        expires_at=utc_datetime_or_none(key.expires_at),
        revoked_at=utc_datetime_or_none(key.revoked_at),
        used_at=utc_datetime_or_none(key.used_at),
    )


router = APIRouter(prefix="/keys", tags=["keys"])
KeyId = Annotated[str, InPath(pattern=r"^[a-z0-9]{1,32}$", description="ID of the key.")]


@router.post("", status_code=HTTPStatus.CREATED)
def create_key(request: Request, caller: Admin, body: KeyRequest, response: Response) -> NewKeyView:
    """Create a key. An admin of one project can create keys only for that project."""
    response.headers["Cache-Control"] = "no-store"
    key, secret = _keys(request).create(body, caller.own_project(body.project), caller.id)
    logger.info("key %s created by %s", key.id, caller.id)
    return NewKeyView(**_view(key).model_dump(), key=str(secret))


@router.get("")
def list_keys(request: Request, caller: Admin) -> KeyList:
    """List the keys in your key's project, or all keys if your key covers all projects.

    Includes revoked and expired keys, but never secrets.
    """
    return KeyList(items=[_view(key) for key in _keys(request).list(caller.project)])


@router.delete("/{key_id}", status_code=HTTPStatus.NO_CONTENT)
async def revoke_key(request: Request, caller: Admin, key_id: KeyId) -> None:
    """Revoke a key permanently. Other control planes may accept it for up to `AMD_KEY_CACHE_S` (default: 10 s)."""
    await run_in_threadpool(_keys(request).revoke, key_id, caller.project, caller.id)
    request.app.state.authenticator.forget_key(key_id)
    logger.info("key %s revoked by %s", key_id, caller.id)


def _keys(request: Request) -> KeyStore:
    return KeyStore(request.app.state.engine)
