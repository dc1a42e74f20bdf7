"""Tests that the settings of obstore are derived from a request of s3fs, and that unsupported ones are left to s3fs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from s3fs import S3FileSystem

from amd.storage import s3_reads
from amd.storage.s3_reads import BucketAccess, S3Credentials, bucket_access

KEY = "folder/a.jpg"


def access_of(fs: S3FileSystem, bucket: str) -> BucketAccess | None:
    """Return the settings that are derived from a request, which is not sent."""

    def stop(request: Any, **_: Any) -> None:
        raise ConnectionAbortedError

    fs.s3.meta.events.register_last("before-send.s3.GetObject", stop)
    with s3_reads._sent_requests(fs) as requests, pytest.raises(ConnectionAbortedError):
        fs.cat_file(f"{bucket}/{KEY}", max_concurrency=1)
    return bucket_access(fs, bucket, KEY, requests[-1])


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Set the environment of a machine in eu-west-1 with an AWS profile, without proxies and own certificates."""
    (tmp_path / "aws").write_text("[sets]\naws_access_key_id = sets\naws_secret_access_key = hidden\n")
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_CA_BUNDLE", "AWS_SESSION_TOKEN", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "aws"))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "node")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hidden")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-west-1")


NODE, OWN = S3Credentials("node", "hidden", None), S3Credentials("own", "hidden", None)


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize(
    ("bucket", "options", "expected"),
    [
        ("bucket", {}, ("https://bucket.s3.eu-west-1.amazonaws.com", True, "eu-west-1", NODE)),
        ("a.bucket", {}, ("https://s3.eu-west-1.amazonaws.com", False, "eu-west-1", NODE)),
        (
            "bucket",
            {"client_kwargs": {"region_name": "us-east-1"}},
            ("https://bucket.s3.amazonaws.com", True, "us-east-1", NODE),
        ),
        ("bucket", {"endpoint_url": "https://minio:9000"}, ("https://minio:9000", False, "eu-west-1", NODE)),
        ("bucket", {"endpoint_url": "http://minio"}, ("http://minio", False, "eu-west-1", NODE)),
        (
            "bucket",
            {"key": "own", "secret": "hidden"},
            ("https://bucket.s3.eu-west-1.amazonaws.com", True, "eu-west-1", OWN),
        ),
        (
            "bucket",
            {"key": "own", "secret": "hidden", "token": "t", "endpoint_url": "http://minio"},
            ("http://minio", False, "eu-west-1", S3Credentials("own", "hidden", "t")),
        ),
        (
            "bucket",
            {"profile": "sets", "endpoint_url": "http://minio"},
            ("http://minio", False, "eu-west-1", S3Credentials("sets", "hidden", None)),
        ),
        ("bucket", {"anon": True}, ("https://bucket.s3.eu-west-1.amazonaws.com", True, None, None)),
    ],
)
def test_settings_are_copied_from_s3fs(bucket: str, options: dict[str, Any], expected: tuple[Any, ...]) -> None:
    assert access_of(S3FileSystem(**options, skip_instance_cache=True), bucket) == BucketAccess(*expected)


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize(
    "environment",
    [
        {"HTTPS_PROXY": "http://proxy:3128"},
        {"http_proxy": "http://proxy:3128"},
        {"AWS_CA_BUNDLE": "/etc/ssl/certs/ca-certificates.crt"},
        {"AWS_SSE_CUSTOMER_KEY_BASE64": "a2V5"},
    ],
    ids=str,
)
def test_proxies_certificates_and_keys_in_the_environment_are_left_to_s3fs(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert access_of(S3FileSystem(skip_instance_cache=True), "bucket") is None


@pytest.mark.parametrize(
    "options",
    [
        {"requester_pays": True},
        {"version_aware": True},
        {"s3_additional_kwargs": {"SSECustomerAlgorithm": "AES256"}},
        {"client_kwargs": {"verify": False}},
        {"config_kwargs": {"proxies": {"https": "http://proxy"}}},
        {"config_kwargs": {"s3": {"use_accelerate_endpoint": True}}},
        {"config_kwargs": {"read_timeout": 7}},
    ],
    ids=str,
)
def test_other_options_are_left_to_s3fs(options: dict[str, Any]) -> None:
    assert s3_reads._bucket(S3FileSystem(), f"bucket/{KEY}") is not None
    assert s3_reads._bucket(S3FileSystem(**options), f"bucket/{KEY}") is None
