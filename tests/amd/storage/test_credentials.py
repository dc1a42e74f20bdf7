"""Tests that each location is opened with its credential, and that secrets are never replaced, quoted or published."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from amd.config import DataConfig
from amd.data.dataset.manifest import Record
from amd.data.decoding.reader import SampleReader
from amd.storage import (
    STORAGE_CREDENTIALS,
    CredentialError,
    check_credentials,
    check_reference,
    filesystem,
    read_bytes,
    write_bytes,
)
from tests.support.servers.keyed_s3 import KeyedS3Server

PIXELS = np.full((8, 8, 3), 200, np.uint8)


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[KeyedS3Server]:
    """Start a store with the buckets `sets` and `open`, and give this machine the key of `open` only."""
    with KeyedS3Server({"sets": "key-of-sets", "open": "key-of-node"}) as server:
        for name, value in server.environment("open").items():
            monkeypatch.setenv(name, value)
        yield server


@pytest.fixture
def secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the file with the secret for the bucket `sets`."""
    file = tmp_path / "sets"
    file.write_text(json.dumps({"key": "key-of-sets", "secret": "hidden"}))
    refer(monkeypatch, sets=(["s3://sets"], f"file:{file}"))
    return file


def refer(monkeypatch: pytest.MonkeyPatch, **credentials: tuple[list[str], str]) -> None:
    """Set this process's storage credentials; each maps a name to its prefixes and its secret reference."""
    references = {name: {"prefixes": prefixes, "secret": secret} for name, (prefixes, secret) in credentials.items()}
    monkeypatch.setenv(STORAGE_CREDENTIALS, json.dumps(references))


def key_of(url: str) -> str | None:
    """Return the access key with which a URL would be opened; None for this machine's own rights."""
    key: str | None = filesystem(url)[0].key
    return key


def test_only_the_prefix_of_a_credential_is_opened_with_it(store: KeyedS3Server, secret: Path) -> None:
    for url in ("s3://sets/a", "s3a://sets/b", "s3://open/a"):
        write_bytes(url, b"content")
        assert read_bytes(url) == b"content"
    assert store.requests == {("sets", "key-of-sets"), ("open", "key-of-node")}


def test_without_the_credential_the_store_denies_access(store: KeyedS3Server) -> None:
    with pytest.raises(PermissionError):
        write_bytes("s3://sets/a", b"content")


def test_the_decoding_process_uses_the_credential(store: KeyedS3Server, secret: Path) -> None:
    encoded = io.BytesIO()
    Image.fromarray(PIXELS).save(encoded, "PNG")
    for bucket in ("sets", "open"):
        write_bytes(f"s3://{bucket}/a.png", encoded.getvalue())
    store.requests.clear()
    reader = SampleReader(DataConfig(train="x"))
    for bucket in ("sets", "open"):
        image = reader.read_clip(Record(f"s3://{bucket}/a.png", None, "image"), lambda count: np.arange(count))
        np.testing.assert_array_equal(image[0], PIXELS)
    reader.close()
    assert store.requests == {("sets", "key-of-sets"), ("open", "key-of-node")}


def test_a_rotated_secret_is_used_immediately(store: KeyedS3Server, secret: Path) -> None:
    write_bytes("s3://sets/a", b"content")
    store.keys["sets"] = "new-key"
    with pytest.raises(PermissionError):
        read_bytes("s3://sets/a")
    secret.write_text(json.dumps({"key": "new-key", "secret": "hidden"}))
    assert read_bytes("s3://sets/a") == b"content"


def test_an_aws_profile_takes_precedence_over_the_rights_of_the_machine(
    store: KeyedS3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "aws").write_text("[sets]\naws_access_key_id = key-of-sets\naws_secret_access_key = hidden\n[empty]\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "aws"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    refer(monkeypatch, sets=(["s3://sets"], "profile:sets"))
    write_bytes("s3://sets/a", b"content")
    assert ("sets", "key-of-node") not in store.requests
    refer(monkeypatch, sets=(["s3://sets"], "profile:empty"))
    with pytest.raises(CredentialError, match=r"profile:empty on .* contains no credentials"):
        check_credentials()
    refer(monkeypatch, sets=(["s3://sets"], "profile:missing"))
    with pytest.raises(CredentialError, match=r"profile:missing on .* does not exist"):
        check_credentials()


@pytest.mark.parametrize(
    ("url", "key"),
    [
        ("s3://bucket/a", "bucket-key"),
        ("s3://bucket", "bucket-key"),
        ("s3:///bucket/a", "bucket-key"),
        ("s3://bucket/sets/a", "sets-key"),
        ("s3a://bucket/sets", "sets-key"),
        ("s3://bucket/sets-of-others/a", "bucket-key"),
        ("s3://bucket-of-others/sets", None),
        ("s3://other", None),
    ],
)
def test_the_longest_prefix_of_whole_segments_decides(
    url: str, key: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("bucket", "sets"):
        (tmp_path / name).write_text(json.dumps({"key": f"{name}-key", "secret": "hidden"}))
    refer(
        monkeypatch,
        bucket=(["s3://bucket/"], f"file:{tmp_path}/bucket"),
        sets=(["s3a://bucket/sets"], f"file:{tmp_path}/sets"),
    )
    assert key_of(url) == key


def test_an_aws_credentials_file_is_accepted(secret: Path) -> None:
    secret.write_text("[default]\naws_access_key_id = a%b\naws_secret_access_key = c\nregion = eu-west-1\n")
    check_credentials()
    assert key_of("s3://sets/a") == "a%b"


def test_a_secret_may_set_the_endpoint(secret: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://other:1")
    secret.write_text(json.dumps({"key": "k", "secret": "hidden", "endpoint_url": "http://own:1"}))
    assert filesystem("s3://sets/a")[0].endpoint_url == "http://own:1"
    assert filesystem("s3://open/a")[0].endpoint_url == "http://other:1"


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "cannot be read (No such file or directory); mount it on every node"),
        ("hidden", "is not valid; it must be a JSON object or an AWS credentials file with the section [default]"),
        ('{"key": "hidden"', "is not valid"),
        (b"\xff\xfehidden", "is not valid"),
        ("[other]\naws_access_key_id = hidden\n", "is not valid"),
        ('{"key": "hidden"}', "must contain key and secret for s3:// locations"),
        ('{"key": "hidden", "secret": ""}', "must contain key and secret"),
        ("[default]\naws_access_key_id = hidden\n", "must contain key and secret"),
    ],
)
def test_an_unusable_secret_is_an_error_that_does_not_quote_it(
    secret: Path, content: str | bytes | None, problem: str, store: KeyedS3Server
) -> None:
    secret.unlink()
    if content is not None:
        secret.write_bytes(content.encode() if isinstance(content, str) else content)
    for operation in (check_credentials, lambda: read_bytes("s3://sets/a")):
        with pytest.raises(CredentialError) as caught:
            operation()
        message = str(caught.value)
        assert message.startswith(f"storage credential sets: file:{secret} on ")
        assert problem in message
        assert "hidden" not in message
    assert ("sets", "key-of-node") not in store.requests, "the rights of the node must not replace the credential"


@pytest.mark.parametrize(
    ("url", "options"),
    [
        ("gs://bucket/a", {"token": "t"}),
        ("az://container/a", {"account_name": "a", "account_key": "k"}),
    ],
)
def test_other_stores_require_their_own_options(
    url: str, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = []
    monkeypatch.setattr("fsspec.core.url_to_fs", lambda url, **given: opened.append(given) or (None, url))
    refer(monkeypatch, other=([url], f"file:{tmp_path}/secret"))
    (tmp_path / "secret").write_text(json.dumps(options))
    filesystem(f"{url}/b")
    assert opened == [options]
    (tmp_path / "secret").write_text('{"key": "k", "secret": "s"}')
    with pytest.raises(CredentialError, match=f"must contain {' and '.join(sorted(options))}"):
        filesystem(f"{url}/b")


def test_errors_of_the_filesystem_do_not_quote_the_secret(secret: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(url: str, **options: Any) -> None:
        raise FileNotFoundError(options["secret"])  # as gcsfs does for a token that is not a file

    monkeypatch.setattr("fsspec.core.url_to_fs", fail)
    with pytest.raises(CredentialError, match="is rejected by the filesystem; correct its options") as caught:
        filesystem("s3://sets/a")
    assert "hidden" not in str(caught.value)


@pytest.mark.parametrize("url", ["abfss://sets@account.dfs.core.windows.net/a", "az://sets/a"])
def test_other_forms_of_an_azure_url_use_the_same_credential(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    refer(monkeypatch, sets=(["abfs://sets"], "file:/missing"))
    with pytest.raises(CredentialError, match="storage credential sets"):
        filesystem(url)


def test_chained_urls_are_rejected_because_they_could_avoid_a_credential(secret: Path) -> None:
    with pytest.raises(CredentialError, match="chained URLs cannot be used"):
        filesystem("simplecache::s3://sets/a")


@pytest.mark.parametrize(
    ("prefix", "secret", "problem"),
    [
        ("s3://sets", "wJalrXUtnFEMI/K7MDENG", "secret: must be file:/path or profile:NAME"),
        ("s3://sets", "file:relative", "secret: must be file:/path"),
        ("s3://sets", '{"key": "wJalrXUtnFEMI"}', "secret: must be file:/path"),
        ("s3://sets", "profile:wJalrXUtnFEMI/K7MDENG", "secret: must be file:/path"),
        ("gs://sets", "profile:sets", "opens only s3:// prefixes"),
        ("/data", "file:/a", "prefixes: /data must be the plain URI"),
        ("https://host/data", "file:/a", "must be the plain URI"),
        ("s3://", "file:/a", "must be the plain URI"),
        ("s3://sets/*", "file:/a", "must be the plain URI"),
        ("s3://sets/../other", "file:/a", "must be the plain URI"),
        ("s3://sets//a", "file:/a", "must be the plain URI"),
        ("simplecache::s3://sets", "file:/a", "must be the plain URI"),
    ],
)
def test_invalid_references_are_rejected_without_quoting_the_secret(prefix: str, secret: str, problem: str) -> None:
    with pytest.raises(ValueError, match=re.escape(problem)) as caught:
        check_reference([prefix], secret)
    assert "wJalrXUtnFEMI" not in str(caught.value)


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"a": {"prefixes": ["s3://a"]}}', '{"a": {"prefixes": 1, "secret": "x"}}']
)
def test_an_invalid_environment_variable_is_an_error(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(STORAGE_CREDENTIALS, text)
    with pytest.raises(CredentialError, match="AMD_STORAGE_CREDENTIALS is not valid; it must have the form"):
        filesystem("s3://bucket/a")
