"""API keys: made, listed and revoked. A key is shown once, when it is made; what is kept cannot open anything.

Knows nothing of how a key opens a route (`auth`).
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from http import HTTPStatus
from pathlib import Path
from typing import Annotated

from fastapi import APIRouter, Request, Response
from fastapi import Path as InPath
from pydantic import AwareDatetime, Field, StringConstraints, field_validator
from sqlalchemy import Engine, select, text
from sqlalchemy.orm import Session

from service.auth.authentication import SCOPES, Admin, Scope, Secret, is_live, new_secret, read_secret
from service.db.models import Key
from service.jobs.schemas import Project, Wire
from service.web.errors import IllegalAction, NotFound

logger = logging.getLogger(__name__)

FIRST = "first admin key"
SERVICE = "service"

Name = Annotated[str, StringConstraints(min_length=1, max_length=200, pattern=r"^[^\x00-\x1f\x7f]+$")]


class KeyRequest(Wire):
    """A key to make."""

    name: Name
    """Who or what will use it."""
    scopes: list[Scope] = Field(min_length=1, max_length=len(SCOPES))
    """read: see jobs and encoders. submit: also run, cancel and delete jobs. admin: also keys and webhooks."""
    project: Project | None = None
    """The only one it opens; null: what your own key opens, one project or all."""
    expires_at: AwareDatetime | None = None
    """null: never."""

    @field_validator("expires_at")
    @classmethod
    def _ahead(cls, value: datetime | None) -> datetime | None:
        if value is not None and value.timestamp() <= time.time():
            raise ValueError("expires_at must be in the future")
        return value


class KeyView(Wire):
    id: str
    """Stands in the key itself: `amd_<id>_…`."""
    name: str
    project: str | None
    """null: all projects."""
    scopes: list[Scope]
    created_at: datetime
    created_by: str
    expires_at: datetime | None
    revoked_at: datetime | None
    used_at: datetime | None
    """Exact to a minute."""


class NewKeyView(KeyView):
    key: str
    """For `Authorization: Bearer …`. Shown here and never again."""


class KeyList(Wire):
    items: list[KeyView]


class KeyStore:
    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._reading = engine.execution_options(reads_only=True)

    def make(self, request: KeyRequest, project: str | None, actor: str) -> tuple[Key, Secret]:
        secret = new_secret()
        expires_at = request.expires_at.timestamp() if request.expires_at else None
        key = _key(secret, request.name, project, request.scopes, actor, expires_at)
        with Session(self._engine, expire_on_commit=False) as session, session.begin():
            session.add(key)
        return key, secret

    def list(self, project: str | None) -> Sequence[Key]:
        """Of a project, none: of all; newest first."""
        query = select(Key).order_by(Key.created_at.desc(), Key.id)
        if project is not None:
            query = query.where(Key.project == project)
        with Session(self._reading, expire_on_commit=False) as session:
            return list(session.scalars(query))

    def revoke(self, key_id: str, project: str | None) -> None:
        """Nothing happens where it is revoked already. Raises NotFound, also for a key of another project, and
        IllegalAction for the last one that could make others."""
        with _alone(self._engine) as session:
            key = session.get(Key, key_id)
            if key is None or (project is not None and key.project != project):
                raise NotFound(f"there is no key {key_id!r}")
            now = time.time()
            if _opens_all(key, now) and sum(_opens_all(other, now) for other in session.scalars(select(Key))) == 1:
                message = f"key {key_id!r} is the last admin key of all projects; make another one first"
                raise IllegalAction(message, allowed_actions=[])
            if key.revoked_at is None:
                key.revoked_at = now


def ensure_admin_key(engine: Engine, path: Path) -> bool:
    """Where no key opens everything, make one and write it into this file, which only its owner can read.

    Whether it did. The key is committed only once it stands in the file: one that nobody knows would lock everybody
    out. Raises OSError for a file that cannot be written, and FileExistsError for one that holds something else.
    """
    with _alone(engine) as session:
        if any(_opens_all(key, time.time()) for key in session.scalars(select(Key))):
            return False
        secret = new_secret()
        _write(path, secret)
        session.add(_key(secret, FIRST, None, ["admin"], SERVICE, None))
    logger.warning("a first admin key was made; it stands in %s", path)
    return True


def _write(path: Path, secret: Secret) -> None:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    if path.exists():
        if read_secret(path.read_text(errors="replace").strip()) is None:
            raise FileExistsError(f"{path} holds something else than a key; move it, or set AMD_ADMIN_KEY_FILE")
        path.unlink()  # a key that is dead, or that was never committed
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(f"{secret}\n")
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def _alone(engine: Engine) -> Iterator[Session]:
    """A transaction beside which no other changes keys, in any replica: what it counts stays true until it ends."""
    with Session(engine) as session, session.begin():
        if engine.dialect.name == "postgresql":  # SQLite has one writer at a time anyway
            session.execute(text("LOCK TABLE keys IN SHARE ROW EXCLUSIVE MODE"))
        yield session


def _opens_all(key: Key, now: float) -> bool:
    return key.project is None and "admin" in key.scopes and is_live(key, now)


def _key(
    secret: Secret, name: str, project: str | None, scopes: Sequence[Scope], actor: str, expires_at: float | None
) -> Key:
    return Key(
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


def _view(key: Key) -> KeyView:
    return KeyView(
        id=key.id,
        name=key.name,
        project=key.project,
        scopes=[scope for scope in SCOPES if scope in key.scopes],
        created_at=datetime.fromtimestamp(key.created_at, UTC),
        created_by=key.created_by,
        expires_at=_time(key.expires_at),
        revoked_at=_time(key.revoked_at),
        used_at=_time(key.used_at),
    )


def _time(at: float | None) -> datetime | None:
    return None if at is None else datetime.fromtimestamp(at, UTC)


router = APIRouter(prefix="/keys", tags=["keys"])
KeyId = Annotated[str, InPath(pattern=r"^[a-z0-9]{1,32}$")]


@router.post("", status_code=HTTPStatus.CREATED)
def make_key(request: Request, caller: Admin, body: KeyRequest, response: Response) -> NewKeyView:
    """Make a key. An admin of one project makes keys of that project only."""
    response.headers["Cache-Control"] = "no-store"
    key, secret = _keys(request).make(body, caller.own_project(body.project), caller.id)
    logger.info("key %s made by %s", key.id, caller.id)
    return NewKeyView(**_view(key).model_dump(), key=str(secret))


@router.get("")
def list_keys(request: Request, caller: Admin) -> KeyList:
    """All keys, revoked and expired ones too, without what opens anything; of your project where you have one."""
    return KeyList(items=[_view(key) for key in _keys(request).list(caller.project)])


@router.delete("/{key_id}", status_code=HTTPStatus.NO_CONTENT)
def revoke_key(request: Request, caller: Admin, key_id: KeyId) -> None:
    """Revoke a key, at once and for good."""
    _keys(request).revoke(key_id, caller.project)
    logger.info("key %s revoked by %s", key_id, caller.id)


def _keys(request: Request) -> KeyStore:
    return KeyStore(request.app.state.engine)
