"""Tests for reading objects from S3, against a small HTTP server."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from amd.data.fetching.fetch import Fetcher
from amd.storage import filesystem

READS = 48  # more than botocore's default number of connections


class Object(BaseHTTPRequestHandler):
    """Responds to every GET once READS requests wait at the same time, or with 503 after 20 s; knows no HEAD."""

    barrier = threading.Barrier(READS)

    def do_GET(self) -> None:
        try:
            self.barrier.wait(20)
            self.send_response(200)
        except threading.BrokenBarrierError:
            self.send_response(503)
        self.send_header("Content-Length", "1")
        self.send_header("ETag", '"1"')
        self.end_headers()
        self.wfile.write(b"x")

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def object_server() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Object)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()


def test_many_objects_are_read_at_the_same_time_with_one_request_each(monkeypatch: pytest.MonkeyPatch) -> None:
    with object_server() as url, ThreadPoolExecutor(READS) as pool:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", url)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        fetcher = Fetcher(retries=0)
        assert list(pool.map(fetcher.fetch, ["s3://bucket/object"] * READS)) == [b"x"] * READS


def test_configured_botocore_options_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec

    monkeypatch.setitem(fsspec.config.conf, "s3", {"config_kwargs": {"read_timeout": 7, "max_pool_connections": 3}})
    assert filesystem("s3://bucket/object")[0].config_kwargs == {"read_timeout": 7, "max_pool_connections": 3}
