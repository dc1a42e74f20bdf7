"""S3 server on loopback that serves a folder read-only and waits before each response.

Runs as a separate process: `python -m tests.support.servers.slow_s3 FOLDER LATENCY_S`. The folder's subfolders are the
buckets. Supports GET with ranges, HEAD and unpaged lists; checks no signatures.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from xml.sax.saxutils import escape

from aiohttp import web

MODIFIED = "2026-11-30T00:00:00.000Z"
HEADERS = {"ETag": '"1"', "Last-Modified": "Mon, 30 Nov 2026 00:00:00 GMT", "Accept-Ranges": "bytes"}


@contextmanager
def slow_s3(folder: Path, latency_s: float) -> Iterator[str]:
    """Start a server in its own process. Yields its URL."""
    command = [sys.executable, "-m", __name__, str(folder), str(latency_s)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().strip()
        finally:
            process.terminate()


class FolderServer:
    def __init__(self, folder: Path, latency_s: float) -> None:
        self._folder, self._latency = folder, latency_s

    async def respond(self, request: web.Request) -> web.Response:
        await asyncio.sleep(self._latency)
        bucket, _, key = request.match_info["path"].partition("/")
        if not key:
            return self._list(bucket, request.query.get("prefix", ""), request.query.get("delimiter", ""))
        try:
            with (self._folder / bucket / key).open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                start, stop, _ = request.http_range.indices(size)
                file.seek(start)
                content = file.read(stop - start)
        except OSError:
            return web.Response(status=404, body=b"<Error><Code>NoSuchKey</Code></Error>")
        if "Range" not in request.headers:
            return web.Response(body=content, headers=HEADERS)
        found = {"Content-Range": f"bytes {start}-{stop - 1}/{size}"}
        return web.Response(status=206, body=content, headers=HEADERS | found)

    def _list(self, bucket: str, prefix: str, delimiter: str) -> web.Response:
        root = self._folder / bucket
        start = root / prefix.rpartition("/")[0]
        entries, folders = [], []
        for path in sorted(start.iterdir() if delimiter else start.glob("**/*")) if start.is_dir() else []:
            key = str(path.relative_to(root))
            if key.startswith(prefix) and path.is_file():
                size = path.stat().st_size
                entries.append(f"<Key>{escape(key)}</Key><LastModified>{MODIFIED}</LastModified><Size>{size}</Size>")
            elif delimiter and key.startswith(prefix):
                folders.append(f"<Prefix>{escape(key)}/</Prefix>")
        contents = "".join(f"<Contents>{entry}<ETag>1</ETag></Contents>" for entry in entries)
        prefixes = "".join(f"<CommonPrefixes>{folder}</CommonPrefixes>" for folder in folders)
        found = f"<KeyCount>{len(entries) + len(folders)}</KeyCount><IsTruncated>false</IsTruncated>"
        return web.Response(text=f"<ListBucketResult>{found}{contents}{prefixes}</ListBucketResult>")


async def serve(folder: Path, latency_s: float) -> None:
    app = web.Application()
    app.router.add_get("/{path:.*}", FolderServer(folder, latency_s).respond)  # and HEAD
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    print(f"http://127.0.0.1:{runner.addresses[0][1]}", flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(serve(Path(sys.argv[1]), float(sys.argv[2])))
