"""Locate a published encoder for a command: on the selected service, or otherwise under the storage root.

The service is used if a context or AMD_URL selects one. `--storage`, and an encoder given as a path or URL, take
precedence; in these cases, nothing is downloaded.
"""

from __future__ import annotations

import itertools
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from amd.artifacts.discovery import encoder_url, encoders_url
from amd.config import ConfigError
from amd.storage import listdir, resolve_root
from service.cli.connection import configured_target, connected, default_project, local_stack, service_target
from service.cli.ids import UNKNOWN_ID_STATUSES, named_id, only_match
from service.cli.job_arguments import SEARCHED_JOBS

if TYPE_CHECKING:
    from service.client import Client
    from service.registry.schemas import EncoderView

SEARCHED_ENCODERS = 2000  # number of newest encoders searched for a shortened id

T = TypeVar("T")


def uses_service(storage: str | None) -> bool:
    """Whether encoders are looked up on a service. `storage` is the value of --storage."""
    return storage is None and configured_target() is not None


@contextmanager
def published_encoder(
    name: str, storage: str | None, file: str | None = None, *, as_json: bool = False
) -> Iterator[str]:
    """Yield the folder of an encoder, given its ID, ID prefix, path or URL.

    If a service is used, `file`, or by default every file, is downloaded to a temporary folder, and `name` may also be
    an alias. Raises ConfigError if the ID is ambiguous. Exits if the service does not know the encoder; with `as_json`,
    the error is printed as JSON.
    """
    root = resolve_root(storage)
    if encoder_url(root, name) != name and uses_service(storage):
        with tempfile.TemporaryDirectory(prefix="amd-encoder-") as folder:
            yield _download(name, Path(folder), file, as_json)
    else:
        yield encoder_url(root, stored_encoder(name, storage))


def stored_encoder(name: str, storage: str | None) -> str:
    """Return the ID under the storage root that `name` abbreviates, or `name` itself if it is a path, a URL or unknown.

    Used by commands that run on this machine and write next to the encoder; they use the storage root even if a
    service is selected. An alias or the name of a job is known to the stack that `amd up` started on this machine, if
    no other service is selected. Raises ConfigError if several IDs match.
    """
    root = resolve_root(storage)
    if encoder_url(root, name) == name:
        return name
    stored = listdir(encoders_url(root))
    found = only_match(name, stored, "encoder")
    if found is None:
        named = _ask_local_stack(storage, lambda client: client.encoders.get(find_encoder(client, name, None)).id)
        found = named if named in stored else None
    return found or name


def encoders_of_local_stack(storage: str | None) -> dict[str, EncoderView]:
    """Return the newest encoders by ID, with the names and aliases that the stack on this machine knows.

    Empty if the stack does not run, or if another service or, by --storage, a storage root is selected.
    """
    views = _ask_local_stack(storage, lambda client: list(itertools.islice(client.encoders.list(), SEARCHED_ENCODERS)))
    return {view.id: view for view in views or ()}


def _ask_local_stack(storage: str | None, ask: Callable[[Client], T]) -> T | None:
    """Return `ask(client)`, or None if the stack on this machine does not run, is not selected or does not know."""
    from service.client import ApiError, Client, NoAnswer

    if storage is not None or configured_target() is not None or local_stack() is None:
        return None
    target = service_target()
    with suppress(ApiError, NoAnswer), Client(target.url, target.key) as client:
        return ask(client)
    return None


def submitted_encoder(client: Client, name: str, project: str | None) -> str:
    """Return the ID on the service that `name` abbreviates, or `name` itself if it is a path, a URL or unknown.

    The service verifies it when it receives the job. Raises ConfigError if several IDs match.
    """
    from service.client import ApiError

    if encoder_url("", name) == name:
        return name
    try:
        return find_encoder(client, name, project)
    except ApiError as error:
        if error.problem.status not in UNKNOWN_ID_STATUSES:
            raise
        return name


def _download(name: str, folder: Path, file: str | None, as_json: bool) -> str:
    project = default_project(None)
    with connected(as_json, persistent=True, announce=True) as client:
        encoder = find_encoder(client, name, project)
        if file is not None:
            client.encoders.download(encoder, folder / file, file, project)
            return str(folder)
        archive = folder / "encoder.tar"
        client.encoders.download(encoder, archive, None, project)
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    archive.unlink()
    (extracted,) = folder.iterdir()
    return str(extracted)


def find_encoder(client: Client, text: str, project: str | None) -> str:
    """Return `text` if it is an encoder's ID or alias, or otherwise the only ID that it names or abbreviates.

    An encoder's name is that of its job. Raises the service's error if there is none, and ConfigError if several match
    or if a job with this name is still to publish its encoder.
    """
    from service.client import ApiError

    try:
        client.encoders.get(text, project)
        return text
    except ApiError as error:
        if error.problem.status not in UNKNOWN_ID_STATUSES:
            raise
        newest = itertools.islice(client.encoders.list(), SEARCHED_ENCODERS)
        names = {encoder.id: encoder.name for encoder in newest}
        _check_published(client, text, [id for id, name in names.items() if name == text])
        return named_id(text, names, "encoder", error)


def _check_published(client: Client, name: str, encoders: Sequence[str]) -> None:
    """Raise ConfigError if a job with this name is still to publish its encoder. `encoders`: IDs with this name."""
    from service.jobs.schemas import ENDED, PUBLISHING

    for job in itertools.islice(client.jobs.list(), SEARCHED_JOBS):
        if job.name == name and job.kind in PUBLISHING and job.state not in ENDED and job.id not in encoders:
            problem = f"{name}: job {job.id} is {job.state}, and publishes its encoder when it succeeds"
            earlier = f", or use an earlier encoder by its ID: {', '.join(encoders)}" if encoders else ""
            raise ConfigError([f"{problem}; wait with `amd jobs wait {job.id}`{earlier}"])
