"""A published encoder's files as they lie on the storage root, sent piece by piece: one of them, or all as a tar.

Knows nothing of who may have them.
"""

from __future__ import annotations

import hashlib
import os
import tarfile
from collections.abc import Iterator, Mapping

from fastapi.responses import FileResponse, Response, StreamingResponse

from amd.storage import FileFacts, filesystem, is_remote, join, local_path
from service.web.errors import NotFound
from service.web.middleware import is_known

PIECE_BYTES = 2**20
BINARY, TAR = "application/octet-stream", "application/x-tar"  # left as they are: weights do not shrink


def one_file(url: str, name: str, facts: FileFacts, if_none_match: str | None) -> Response:
    """From a disk also in parts (`Range`). Raises NotFound where it has gone meanwhile."""
    headers = _headers(name, _tag(name, facts.stamp))
    if is_known(headers["ETag"], if_none_match):
        return Response(status_code=304, headers={"ETag": headers["ETag"]})
    path = join(url, name)
    if is_remote(url):
        headers |= {"Content-Length": str(facts.size), "Accept-Ranges": "none"}
        return StreamingResponse(_pieces(path, facts.size), media_type=BINARY, headers=headers)
    try:
        seen = os.stat(local_path(path))
    except FileNotFoundError:
        raise NotFound(f"{name} has just been removed") from None
    return FileResponse(local_path(path), media_type=BINARY, headers=headers, stat_result=seen)


def whole(url: str, encoder_id: str, files: Mapping[str, FileFacts], if_none_match: str | None) -> Response:
    """All files in a folder of the encoder's id, as a tar."""
    tag = _tag(*(f"{name}:{facts.stamp}" for name, facts in sorted(files.items())))
    if is_known(tag, if_none_match):
        return Response(status_code=304, headers={"ETag": tag})
    heads = {name: _head(f"{encoder_id}/{name}", facts.size) for name, facts in files.items()}
    length = sum(len(heads[name]) + facts.size + _padding(facts.size) for name, facts in files.items())

    def archive() -> Iterator[bytes]:
        for name, facts in files.items():
            yield heads[name]
            yield from _pieces(join(url, name), facts.size)
            yield bytes(_padding(facts.size))
        yield bytes(2 * tarfile.BLOCKSIZE)  # the end of a tar

    headers = _headers(f"{encoder_id}.tar", tag) | {"Content-Length": str(length + 2 * tarfile.BLOCKSIZE)}
    return StreamingResponse(archive(), media_type=TAR, headers=headers)


def _head(name: str, size: int) -> bytes:
    member = tarfile.TarInfo(name)
    member.size = size
    return member.tobuf(tarfile.GNU_FORMAT)


def _padding(size: int) -> int:
    return -size % tarfile.BLOCKSIZE


def _pieces(path: str, size: int) -> Iterator[bytes]:
    """So many bytes of a file, or an error: what was promised cannot be taken back, only broken off."""
    fs, inner = filesystem(path)
    left = size
    with fs.open(inner, "rb") as file:
        while left and (piece := file.read(min(PIECE_BYTES, left))):
            left -= len(piece)
            yield piece
    if left:
        raise OSError(f"{path}: it has become shorter while it was read")


def _headers(name: str, tag: str) -> dict[str, str]:
    return {"ETag": tag, "Content-Disposition": f'attachment; filename="{name}"'}


def _tag(*parts: str) -> str:
    return f'"{hashlib.sha256("|".join(parts).encode()).hexdigest()[:32]}"'
