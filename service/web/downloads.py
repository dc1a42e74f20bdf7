"""Download responses: one file of a folder, or all its files as a tar archive.

Does not check permissions.
"""

from __future__ import annotations

import hashlib
import os
import posixpath
import tarfile
from collections.abc import Iterator, Mapping
from urllib.parse import quote

from fastapi.responses import FileResponse, Response, StreamingResponse

from amd.storage import FileFacts, filesystem, is_remote, join, local_path
from service.web.bounded_calls import BoundedCalls
from service.web.errors import NotFound
from service.web.middleware import is_known

CHUNK_BYTES = 2**20
BINARY, TAR = "application/octet-stream", "application/x-tar"  # excluded from gzip: weights do not compress


async def file_response(
    storage: BoundedCalls, url: str, name: str, facts: FileFacts, if_none_match: str | None
) -> Response:
    """Stream one file; `Range` is supported on local disks. Raises NotFound if the file no longer exists."""
    headers = _headers(name, _etag(name, facts.stamp))
    if is_known(headers["ETag"], if_none_match):
        return Response(status_code=304, headers={"ETag": headers["ETag"]})
    path = join(url, name)
    if is_remote(url):
        headers |= {"Content-Length": str(facts.size), "Accept-Ranges": "none"}
        return StreamingResponse(storage.iterate(_chunks(path, facts.size)), media_type=BINARY, headers=headers)
    try:
        stat_result = await storage.run(os.stat, local_path(path))
    except FileNotFoundError:
        raise NotFound(f"{name} no longer exists") from None
    return FileResponse(local_path(path), media_type=BINARY, headers=headers, stat_result=stat_result)


def archive_response(
    storage: BoundedCalls, url: str, name: str, files: Mapping[str, FileFacts], if_none_match: str | None
) -> Response:
    """Stream all files as a tar archive with one folder, called `name`."""
    etag = _etag(*(f"{file}:{facts.stamp}" for file, facts in sorted(files.items())))
    if is_known(etag, if_none_match):
        return Response(status_code=304, headers={"ETag": etag})
    headers_by_file = {file: _tar_header(f"{name}/{file}", facts.size) for file, facts in files.items()}
    length = sum(len(headers_by_file[file]) + facts.size + _padding(facts.size) for file, facts in files.items())

    def archive() -> Iterator[bytes]:
        for file, facts in files.items():
            yield headers_by_file[file]
            yield from _chunks(join(url, file), facts.size)
            yield bytes(_padding(facts.size))
        yield bytes(2 * tarfile.BLOCKSIZE)  # end-of-archive marker

    headers = _headers(f"{name}.tar", etag) | {"Content-Length": str(length + 2 * tarfile.BLOCKSIZE)}
    return StreamingResponse(storage.iterate(archive()), media_type=TAR, headers=headers)


def _tar_header(name: str, size: int) -> bytes:
    member = tarfile.TarInfo(name)
    member.size = size
    return member.tobuf(tarfile.GNU_FORMAT)


def _padding(size: int) -> int:
    return -size % tarfile.BLOCKSIZE


def _chunks(path: str, size: int) -> Iterator[bytes]:
    """Yield exactly `size` bytes of a file.

    Raises OSError if the file is shorter, because Content-Length has already been sent.
    """
    fs, inner = filesystem(path)
    remaining = size
    with fs.open(inner, "rb") as file:
        while remaining and (chunk := file.read(min(CHUNK_BYTES, remaining))):
            remaining -= len(chunk)
            yield chunk
    if remaining:
        raise OSError(f"{path}: the file was truncated while being read")


def _headers(name: str, etag: str) -> dict[str, str]:
    name = posixpath.basename(name)
    quoted = quote(name, safe="")
    filename = f'filename="{name}"' if quoted == name else f"filename*=UTF-8''{quoted}"
    return {"ETag": etag, "Content-Disposition": f"attachment; {filename}", "X-Content-Type-Options": "nosniff"}


def _etag(*parts: str) -> str:
    return f'"{hashlib.sha256("|".join(parts).encode()).hexdigest()[:32]}"'
