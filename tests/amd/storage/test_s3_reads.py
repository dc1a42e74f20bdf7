"""Tests that obstore reads S3 objects as s3fs does, with the same requests, and that s3fs reads everything else."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import boto3
import obstore
import pytest
from s3fs import S3FileSystem

from amd.storage import STORAGE_CREDENTIALS, filesystem, read_object, s3_reads
from tests.support.s3 import S3Server
from tests.support.servers.keyed_s3 import KeyedS3Server

KEY = "folder/a.jpg"
CONTENT = b"0123456789"


class RecordedResult:
    """A response to obstore, which records its key when its content is read."""

    def __init__(self, result: Any, key: str, keys: list[str]) -> None:
        self.range, self._result, self._key, self._keys = result.range, result, key, keys

    def bytes(self) -> Any:
        content = self._result.bytes()
        self._keys.append(self._key)
        return content


@pytest.fixture(autouse=True)
def obstore_keys(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the keys of the objects that were read with obstore. Forgets all clients of earlier tests."""
    keys: list[str] = []
    get = obstore.get
    monkeypatch.setattr(obstore, "get", lambda store, key, **given: RecordedResult(get(store, key, **given), key, keys))
    monkeypatch.setattr(s3_reads, "_buckets", {})
    return keys


@pytest.fixture
def root(s3_root: str) -> str:
    """Return the URL of a bucket from which s3fs has read an object, so that obstore reads the next ones."""
    put(s3_root, KEY, CONTENT)
    assert read(f"{s3_root}/{KEY}") == CONTENT
    return s3_root


def put(root: str, key: str, content: bytes) -> None:
    boto3.client("s3", endpoint_url=filesystem(root)[0].endpoint_url).put_object(
        Bucket=root.removeprefix("s3://"), Key=key, Body=content
    )


def read(url: str, start: int | None = None, end: int | None = None) -> bytes:
    return read_object(*filesystem(url), start, end)


def read_with_s3fs(fs: S3FileSystem, path: str, start: int | None = None, end: int | None = None) -> bytes:
    content: bytes = fs.cat_file(path, start=start, end=end, max_concurrency=1)
    return content


def outcome(operation: Callable[[], bytes]) -> bytes | tuple[type, str]:
    """Return the content, or the type and message of the error."""
    try:
        return operation()
    except Exception as error:
        return type(error), str(error)


def test_s3fs_reads_one_object_and_obstore_the_others(s3_root: str, obstore_keys: list[str]) -> None:
    keys = [f"{n}.jpg" for n in range(4)]
    for key in keys:
        put(s3_root, key, key.encode())
        assert read(f"{s3_root}/{key}") == key.encode()
    assert obstore_keys == keys[1:]


def test_s3fs_reads_another_object_every_minute(
    root: str, obstore_keys: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    s3_reads._buckets.clear()
    monkeypatch.setattr(s3_reads, "RENEW_S", 0.0)
    for _ in range(3):
        read(f"{root}/{KEY}")
    assert obstore_keys == []


KEYS = [
    *("a b", "a+b", "a%20b", "a%b", "a%2Fb", "ä/ö", "日本.jpg", "a=b&c", "a#b", "a*b", "a~b", "(a)", "a'b!", "a:b@c"),
    *("a,b;c", "a$b", "a[b]{c}", "a|b", "a\\b", 'a"b', "a<b>", "a^b`c", "...", "a?b", "a\u00a0b", "e\u0301"),
    *("a//b", "/a", "//a", "a/./b", "a/../b", "./a", "a\tb", "a/"),
]


def test_keys_have_the_same_content_as_with_s3fs(root: str, obstore_keys: list[str]) -> None:
    client = boto3.client("s3", endpoint_url=filesystem(root)[0].endpoint_url)
    fs, bucket = filesystem(root)
    for key in KEYS:
        client.put_object(Bucket=bucket, Key=key, Body=key.encode())
    paths = [f"{bucket}/{key}" for key in [*KEYS, "nothing", "b?versionId=1"]]
    expected = {path: outcome(lambda: read_with_s3fs(fs, path)) for path in paths}  # noqa: B023
    assert {path: outcome(lambda: read_object(fs, path)) for path in paths} == expected  # noqa: B023
    assert set(KEYS) - set(obstore_keys) == {"a\u00a0b", "a//b", "/a", "//a", "a/./b", "a/../b", "./a", "a\tb", "a/"}


def test_ranges_have_the_same_content_as_with_s3fs(root: str) -> None:
    put(root, "empty", b"")
    fs, bucket = filesystem(root)
    ranges = [(0, 4), (4, 10), (9, 10), (4, 20), (0, 10), (10, 12), (20, 30), (4, 4), (None, 4), (4, None), (-4, None)]
    for path in (f"{bucket}/{KEY}", f"{bucket}/empty"):
        expected = {r: outcome(lambda: read_with_s3fs(fs, path, *r)) for r in ranges}  # noqa: B023
        assert {r: outcome(lambda: read_object(fs, path, *r)) for r in ranges} == expected  # noqa: B023


def test_empty_objects_and_ranges_are_read_with_obstore(root: str, obstore_keys: list[str]) -> None:
    put(root, "empty", b"")
    assert read(f"{root}/empty") == b""
    assert read(f"{root}/{KEY}", 2, 5) == b"234"
    assert obstore_keys == ["empty", KEY]


def test_a_missing_object_does_not_stop_obstore(root: str, obstore_keys: list[str]) -> None:
    with pytest.raises(FileNotFoundError):
        read(f"{root}/nothing")
    assert read(f"{root}/{KEY}") == CONTENT
    assert obstore_keys == [KEY]


def test_large_objects_and_ranges_are_read_with_s3fs(
    root: str, obstore_keys: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_reads, "MAX_BYTES", len(CONTENT) - 1)
    assert read(f"{root}/{KEY}") == CONTENT
    assert read(f"{root}/{KEY}", 0, len(CONTENT)) == CONTENT
    assert read(f"{root}/{KEY}", 1, len(CONTENT)) == CONTENT[1:]
    assert obstore_keys == [KEY]


def test_threads_read_at_the_same_time(root: str, obstore_keys: list[str]) -> None:
    s3_reads._buckets.clear()
    with ThreadPoolExecutor(32) as pool:
        assert set(pool.map(read, [f"{root}/{KEY}"] * 128)) == {CONTENT}
    assert len(obstore_keys) > 64


def test_after_an_outage_obstore_reads_again(
    root: str, obstore_keys: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_reads, "PAUSE_S", 0.0)
    monkeypatch.setattr("s3fs.core.S3FileSystem.retries", 1)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    server = S3Server()
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", server.url)
    read(f"{root}/{KEY}")
    read(f"{root}/{KEY}")
    assert obstore_keys == [KEY]
    server.stop()
    for _ in range(2):
        with pytest.raises(Exception, match="Could not connect to the endpoint URL"):
            read(f"{root}/{KEY}")
    server.start()
    for _ in range(2):
        assert read(f"{root}/{KEY}") == CONTENT
    assert obstore_keys == [KEY, KEY]
    server.stop()


def test_after_a_failure_s3fs_reads_for_a_while(
    root: str, obstore_keys: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    attempts: list[str] = []

    def fail(store: Any, key: str, **_: Any) -> None:
        attempts.append(key)
        raise obstore.exceptions.GenericError("slow down")

    monkeypatch.setattr(obstore, "get", fail)
    for _ in range(3):
        assert read(f"{root}/{KEY}") == CONTENT
    assert attempts == [KEY]


def test_s3fs_reads_everything_without_obstore(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    s3_reads._buckets.clear()
    for name in ("obstore", "obstore.store"):
        monkeypatch.setitem(sys.modules, name, None)
    for _ in range(3):
        assert read(f"{root}/{KEY}") == CONTENT


def test_s3fs_reads_everything_in_a_forked_process(
    root: str, obstore_keys: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_reads, "_process", 0)
    assert read(f"{root}/{KEY}") == CONTENT
    assert obstore_keys == []


def test_other_filesystems_are_read_without_obstore(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(CONTENT)
    assert read(str(tmp_path / "a")) == CONTENT
    assert read(f"file://{tmp_path}/a", 2, 4) == b"23"


def test_each_bucket_is_read_with_its_storage_credential(
    tmp_path: Path, obstore_keys: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = tmp_path / "sets"
    reference = {"prefixes": ["s3://sets/private"], "secret": f"file:{secret}"}
    monkeypatch.setenv(STORAGE_CREDENTIALS, json.dumps({"sets": reference}))
    with KeyedS3Server({"sets": "key-of-sets", "open": "key-of-node"}) as server:
        for name, value in server.environment("open").items():
            monkeypatch.setenv(name, value)
        for bucket in server.keys:
            server.client(bucket).put_object(Bucket=bucket, Key="private/a", Body=bucket.encode())
        secret.write_text(json.dumps({"key": "key-of-sets", "secret": "hidden"}))
        server.requests.clear()
        for _ in range(3):
            assert read("s3://sets/private/a") == b"sets"
            assert read("s3://open/private/a") == b"open"
        assert len(obstore_keys) == 4
        assert server.requests == {("sets", "key-of-sets"), ("open", "key-of-node")}
        with pytest.raises(PermissionError):
            read("s3://sets/outside")  # beside the prefix, with the rights of the machine
        secret.write_text(json.dumps({"key": "stolen", "secret": "hidden"}))
        with pytest.raises(PermissionError):
            read("s3://sets/private/a")
        secret.write_text(json.dumps({"key": "key-of-sets", "secret": "hidden"}))
        server.keys["sets"] = "new-key"
        for _ in range(2):
            with pytest.raises(PermissionError):
                read("s3://sets/private/a")
        secret.write_text(json.dumps({"key": "new-key", "secret": "hidden"}))
        assert read("s3://sets/private/a") == b"sets"


def test_renewed_credentials_of_the_machine_are_used(
    tmp_path: Path, obstore_keys: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_reads, "PAUSE_S", 0.0)
    credentials = tmp_path / "credentials"
    (tmp_path / "config").write_text(f"[default]\ncredential_process = cat {credentials}\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))

    def issue(key: str) -> None:
        expires = (datetime.now(UTC) + timedelta(minutes=5)).isoformat()  # so soon that botocore asks before each read
        secret = {"Version": 1, "AccessKeyId": key, "SecretAccessKey": "s", "SessionToken": "t", "Expiration": expires}
        credentials.write_text(json.dumps(secret))

    with KeyedS3Server({"sets": "first"}) as server:
        for name, value in server.environment("sets").items():
            monkeypatch.setenv(name, value)
        server.client("sets").put_object(Bucket="sets", Key=KEY, Body=CONTENT)
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.delenv(name)
        for key in ("first", "second"):
            issue(key)
            server.keys["sets"] = key
            for _ in range(3):
                assert read(f"s3://sets/{KEY}") == CONTENT
    assert len(obstore_keys) == 3  # two with the first key, and one with the second after the failure


class RecordingObject(BaseHTTPRequestHandler):
    """An object; records the path and headers of all requests."""

    protocol_version = "HTTP/1.1"
    requests: list[tuple[str, dict[str, str]]]

    def do_GET(self) -> None:
        self.requests.append((self.path, {name.lower(): value for name, value in self.headers.items()}))
        self.send_response(200)
        for name, value in {
            "Content-Length": "1",
            "ETag": '"1"',
            "Last-Modified": "Mon, 30 Nov 2026 00:00:00 GMT",
        }.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(b"x")

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, dict[str, str]]]]:
    """Start a server for RecordingObject; return its requests."""
    handler = type("Handler", (RecordingObject,), {"requests": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{server.server_port}")
    yield handler.requests
    server.shutdown()


ENVIRONMENTS: dict[str, dict[str, str]] = {
    "temporary credentials": {"AWS_SESSION_TOKEN": "token"},
    "variables that only obstore reads": {
        "AWS_ENDPOINT": "http://127.0.0.1:1",
        "AWS_PROXY_URL": "http://127.0.0.1:1",
        "AWS_REGION": "eu-north-1",
        "AWS_REQUEST_PAYER": "true",
        "AWS_S3_EXPRESS": "true",
        "AWS_SKIP_SIGNATURE": "true",
        "AWS_UNSIGNED_PAYLOAD": "true",
        "AWS_VIRTUAL_HOSTED_STYLE_REQUEST": "true",
        "AWS_ALLOW_HTTP": "false",
        "AWS_BUCKET": "other",
    },
}


@pytest.mark.parametrize("environment", ENVIRONMENTS)
@pytest.mark.parametrize("options", [{}, {"key": "own", "secret": "hidden"}, {"anon": True}], ids=str)
def test_both_clients_send_the_same_request(
    environment: str,
    options: dict[str, Any],
    recorded: list[tuple[str, dict[str, str]]],
    obstore_keys: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in {
        "AWS_ACCESS_KEY_ID": "node",
        "AWS_SECRET_ACCESS_KEY": "hidden",
        **ENVIRONMENTS[environment],
    }.items():
        monkeypatch.setenv(name, value)
    fs = S3FileSystem(endpoint_url=filesystem("s3://bucket")[0].endpoint_url, **options)
    for _ in range(2):
        assert read_object(fs, f"bucket/{KEY}") == b"x"
    assert obstore_keys == [KEY]
    of_s3fs, of_obstore = map(essentials, recorded)
    assert of_obstore == of_s3fs


def essentials(request: tuple[str, dict[str, str]]) -> tuple[str, dict[str, str]]:
    """Return the path and headers of a request, without those that do not affect the response."""
    path, headers = request
    headers["authorization"] = headers.get("authorization", "none").partition(",")[0]
    ignored = {"accept", "amz-sdk-invocation-id", "amz-sdk-request", "user-agent", "x-amz-checksum-mode", "x-amz-date"}
    return path, {name: value for name, value in headers.items() if name not in ignored}
