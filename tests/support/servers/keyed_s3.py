"""S3 server (moto) on loopback that grants each bucket to one access key."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Self

DENIED = b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"


class KeyedS3Server:
    """S3 server that answers 403 to requests for a bucket unless they are signed with the bucket's access key."""

    def __init__(self, keys: Mapping[str, str]) -> None:
        """`keys`: access key by bucket. The buckets are created."""
        from moto.server import DomainDispatcherApplication, create_backend_app
        from werkzeug.serving import make_server

        self.keys = dict(keys)
        self.requests: set[tuple[str, str]] = set()
        """Bucket and access key of every request so far."""
        self._app = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", 0, self._checked, threaded=True)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        for bucket in keys:
            self.client(bucket).create_bucket(Bucket=bucket)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def client(self, bucket: str) -> Any:
        """Return a client with the bucket's access key."""
        import boto3

        secret = {"aws_access_key_id": self.keys[bucket], "aws_secret_access_key": "testing"}
        return boto3.client("s3", endpoint_url=self.url, region_name="us-east-1", **secret)

    def environment(self, bucket: str) -> dict[str, str]:
        """Return the environment variables of a machine that has the bucket's access key."""
        return {
            "AWS_ENDPOINT_URL_S3": self.url,
            "AWS_ACCESS_KEY_ID": self.keys[bucket],
            "AWS_SECRET_ACCESS_KEY": "testing",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()

    def _checked(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        bucket = environ["PATH_INFO"].split("/")[1]
        found = re.search(r"Credential=([^/]+)/", environ.get("HTTP_AUTHORIZATION", ""))
        key = found[1] if found else ""
        self.requests.add((bucket, key))
        if key != self.keys.get(bucket):
            start_response("403 Forbidden", [("Content-Type", "application/xml")])
            return [DENIED]
        answer: Iterable[bytes] = self._app(environ, start_response)
        return answer
