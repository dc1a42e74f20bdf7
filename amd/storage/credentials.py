"""Storage credentials: which secret opens which locations, and where this machine keeps the secret.

AMD_STORAGE_CREDENTIALS refers to secrets and never contains them:

    {"sets": {"prefixes": ["s3://bucket/sets"], "secret": "file:/var/run/secrets/amd/sets"}}

Child processes and Ray workers inherit the variable. They read the secret whenever they open a location, so a rotated
secret needs no restart. A location under a prefix is never opened without its credential. Depends on no filesystem.
"""

from __future__ import annotations

import configparser
import json
import os
import re
import socket
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

from amd.storage.errors import StorageError

STORAGE_CREDENTIALS = "AMD_STORAGE_CREDENTIALS"
SAME_STORE = {"s3a": "s3", "gcs": "gs", "az": "abfs", "abfss": "abfs"}
"""Alternative schemes for the same stores."""

# Options of which a secret must contain one set, by store: without them, fsspec would use the machine's own rights.
_REQUIRED = {
    "s3": ({"key", "secret"},),
    "gs": ({"token"},),
    "abfs": (
        {"account_name", "account_key"},
        {"account_name", "sas_token"},
        {"account_name", "tenant_id", "client_id", "client_secret"},
        {"connection_string"},
    ),
}
_AWS_OPTIONS = {
    "aws_access_key_id": "key",
    "aws_secret_access_key": "secret",
    "aws_session_token": "token",
    "endpoint_url": "endpoint_url",
}
_PROFILE_FIELDS = {
    "aws_access_key_id",
    "credential_process",
    "role_arn",
    "sso_account_id",
    "web_identity_token_file",
}
_SPECIAL = r"?#%*{}\[\]\\\s"
_PREFIX = re.compile(rf"({'|'.join([*_REQUIRED, *SAME_STORE])})://[^/:@{_SPECIAL}]+(/[^/{_SPECIAL}]+)*/?")
_SECRET = re.compile(r"file:/[^\s{}\"']+|profile:[A-Za-z0-9_.@-]{1,64}")


class CredentialError(StorageError):
    """Raised when a credential cannot be used on this machine. The message never contains the secret."""


class Credential(NamedTuple):
    """A credential by reference."""

    name: str
    prefixes: tuple[str, ...]
    """URIs of the folders and buckets that it grants access to, as returned by `normalized_url`."""
    secret: str
    """Location of the secret: `file:/path` or `profile:NAME`."""

    def options(self, store: str) -> dict[str, Any]:
        """Read the secret. Returns the options of the fsspec filesystem. Raises CredentialError."""
        kind, _, where = self.secret.partition(":")
        if kind == "profile":
            _check_profile(self)
            return {"profile": where}
        try:
            with open(where, encoding="utf-8") as file:
                options = _parsed(file.read())
        except OSError as error:
            raise self.error(f"cannot be read ({error.strerror}); mount it on every node") from None
        except (ValueError, LookupError, configparser.Error):  # their messages may quote the secret
            forms = "a JSON object or an AWS credentials file with the section [default]"
            raise self.error(f"is not valid; it must be {forms}") from None
        if not any(required <= options.keys() for required in _REQUIRED[store]):
            alternatives = ", or ".join(" and ".join(sorted(required)) for required in _REQUIRED[store])
            raise self.error(f"must contain {alternatives} for {store}:// locations")
        return options

    def error(self, problem: str) -> CredentialError:
        """Return an error about the secret. `problem` continues its location."""
        return CredentialError(f"storage credential {self.name}: {self.secret} on {socket.gethostname()} {problem}")


def credential_for(url: str) -> Credential | None:
    """Return the credential with the longest prefix that contains the URL, or None. Raises CredentialError."""
    credentials = _credentials()
    if not credentials:
        return None
    if "::" in url:  # the URLs in a chain would need one credential each
        raise CredentialError(f"{url}: chained URLs cannot be used together with storage credentials; use a plain URL")
    location = normalized_url(url) + "/"
    matches = [
        (len(prefix), credential)
        for credential in credentials
        for prefix in credential.prefixes
        if location.startswith(prefix + "/")
    ]
    return max(matches)[1] if matches else None


def check_reference(prefixes: Sequence[str], secret: str) -> None:
    """Raise ValueError unless a credential has valid prefixes and refers to its secret. Never quotes the secret."""
    for prefix in prefixes:
        if not _PREFIX.fullmatch(prefix) or {".", ".."} & set(prefix.split("/")):
            raise ValueError(f"prefixes: {prefix} must be the plain URI of a folder or bucket: s3://, gs:// or abfs://")
    if not _SECRET.fullmatch(secret):
        raise ValueError(
            "secret: must be file:/path or profile:NAME, which refer to the secret on the Ray nodes; "
            "if you sent the secret itself, replace it with a new one"
        )
    if secret.startswith("profile:") and any(store_of(prefix) != "s3" for prefix in prefixes):
        raise ValueError(f"secret: {secret} is an AWS profile, which opens only s3:// prefixes; use file:/path")


def check_credentials() -> None:
    """Raise CredentialError for the first credential whose secret cannot be used on this machine."""
    for credential in _credentials():
        for store in sorted({store_of(prefix) for prefix in credential.prefixes}):
            credential.options(store)


def normalized_url(url: str) -> str:
    """Return a URL in the form in which prefixes are compared.

    One scheme per store, no account in Azure's `container@account`, and no slash before the bucket or at the end.
    """
    scheme, _, path = url.partition("://")
    bucket, slash, key = path.strip("/").partition("/")
    return f"{SAME_STORE.get(scheme, scheme)}://{bucket.partition('@')[0]}{slash}{key}"


def store_of(url: str) -> str:
    return normalized_url(url).partition("://")[0]


def _credentials() -> tuple[Credential, ...]:
    text = os.environ.get(STORAGE_CREDENTIALS)
    return _parsed_references(text) if text else ()


@cache
def _parsed_references(text: str) -> tuple[Credential, ...]:
    try:
        given = json.loads(text)
        for reference in given.values():
            check_reference(reference["prefixes"], reference["secret"])
    except (ValueError, LookupError, TypeError, AttributeError):
        example = '{"NAME": {"prefixes": ["s3://bucket/folder"], "secret": "file:/path"}}'
        raise CredentialError(f"{STORAGE_CREDENTIALS} is not valid; it must have the form {example}") from None
    return tuple(
        Credential(name, tuple(map(normalized_url, reference["prefixes"])), reference["secret"])
        for name, reference in given.items()
    )


def _parsed(text: str) -> dict[str, Any]:
    """Parse a secret: a JSON object of fsspec options, or an AWS credentials file. Omits empty values."""
    if text.lstrip().startswith("{"):
        options: dict[str, Any] = json.loads(text)
    else:
        file = configparser.ConfigParser(interpolation=None)
        file.read_string(text)
        options = {option: file["default"].get(name) for name, option in _AWS_OPTIONS.items()}
    return {name: value for name, value in options.items() if value}


@cache
def _check_profile(credential: Credential) -> None:
    """Check that a profile names credentials: without them, botocore would use the machine's own rights."""
    from botocore.exceptions import BotoCoreError
    from botocore.session import Session

    try:
        found = Session(profile=credential.secret.removeprefix("profile:")).get_scoped_config()
    except BotoCoreError:
        raise credential.error("does not exist; add the profile to the AWS files of every node") from None
    if not _PROFILE_FIELDS & found.keys():
        raise credential.error("contains no credentials; add them to the AWS files of every node")
