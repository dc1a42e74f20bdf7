"""Tests for the URI policy: no URI form reaches a location outside the allowed prefixes.

An accepted URI is expanded with the code that reads it, and every file found must be under an allowed prefix.
"""

from __future__ import annotations

import ipaddress
import os
import posixpath
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

import fsspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from amd.data.dataset.shards import expand, has_pattern
from amd.storage import StorageError, filesystem, is_remote
from service.auth.uri_policy import UriPolicy
from service.web.errors import UriNotAllowed

ROOT = "/srv/amd"


def accepts(policy: UriPolicy, uri: str) -> bool:
    try:
        policy.check("data.train", uri)
    except UriNotAllowed:
        return False
    return True


class Tree(NamedTuple):
    """A file tree with an allowed folder, a sibling with the same name prefix, and symlinks in the allowed folder."""

    allowed: str
    policy: UriPolicy


@pytest.fixture(scope="session")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Tree:
    base = tmp_path_factory.mktemp("disk")
    allowed = base / "data"
    for folder in ("data/a", "data/0", "database", "secret"):
        (base / folder).mkdir(parents=True)
    for file in ("data/a/x.tar", "data/0/x.tar", "database/x.tar", "secret/x.tar"):
        (base / file).touch()
    (allowed / "out").symlink_to(base / "secret")
    (allowed / "1").symlink_to(base / "secret")
    (allowed / "a" / "link.tar").symlink_to(base / "secret" / "x.tar")
    (allowed / "[x]0").symlink_to(base / "secret")
    (allowed / "in").symlink_to(allowed / "a")
    return Tree(str(allowed), UriPolicy(str(allowed), ()))


@pytest.mark.parametrize(
    "below",
    [
        *("", "/", "/a", "/a/", "/a/x.tar", "/a/{000..099}.tar"),
        *("/a/x*.tar", "/[a]/x.tar", "/in/x.tar", "/[!1o]/x.tar"),
        *("/not there yet.txt", "/ü/名前.txt", "/a@b+c=d.txt"),
    ],
)
def test_locations_under_a_prefix_are_accepted_as_paths_and_as_file_uris(tree: Tree, below: str) -> None:
    for uri in (f"{tree.allowed}{below}", f"file://{tree.allowed}{below}", f"local://{tree.allowed}{below}"):
        tree.policy.check("data.train", uri)


@pytest.mark.parametrize(
    "uri",
    [
        "{allowed}base/x.tar",
        "{allowed}/../secret/x.tar",
        "{allowed}/./a",
        "{allowed}//a",
        "/{allowed}",
        "{allowed}/a/..",
        "{allowed}/out/x.tar",
        "{allowed}/out",
        "{allowed}/o*/x.tar",
        "{allowed}/o[u]t/x.tar",
        "{allowed}/o[u]t/not-there-yet.tar",
        "{allowed}/**/x.tar",
        "{allowed}/{{0..1}}/x.tar",
        "{allowed}/[x]{{0..1}}/x.tar",
        "{allowed}/a/*.tar",
        "{allowed}/a/link.tar",
        "{allowed}/%2e%2e/secret",
        "{allowed}/a?x=1",
        "{allowed}/a#x",
        "{allowed}\\..\\secret",
        "{allowed}/a\0",
        "{allowed}/a\n",
        "file:{allowed}/a",
        "file:/{allowed}",
        "file://localhost{allowed}",
        "file:///etc/passwd",
        "FILE://{allowed}/a",
        "local:///etc/passwd",
        "/etc/passwd",
        "/",
        "//",
        "",
        " ",
        " {allowed}",
        "~/x",
        "~root/x",
        "a/b",
        "./a",
        "..",
        ".",
        "-a",
        "list.txt",
        "{allowed}/" + "x" * 2048,
        "{allowed}/\ud800",
        "simplecache::file://{allowed}/a",
        "zip://a::{allowed}/x.zip",
        "demo:../../etc",
        "demo:/etc",
        "demo:digits/train/x",
        "timm:hf-hub:someone/model",
        "timm:local-dir:/etc",
        "timm:/etc",
        "s3://bucket/x",
        "http://localhost/x",
    ],
)
def test_other_uri_forms_and_locations_are_rejected(tree: Tree, uri: str) -> None:
    assert not accepts(tree.policy, uri.format(allowed=tree.allowed) if "{allowed}" in uri else uri)


@pytest.mark.parametrize(
    "name",
    ["demo:digits", "demo:moving-digits/val", "timm:vit_small_patch16_224.dino", "train-20261126-120000-ab12cd34"],
)
def test_names_that_are_not_locations_are_always_accepted(name: str) -> None:
    assert accepts(UriPolicy(ROOT, ()), name)


FRAGMENTS = [
    *("/", "//", "..", ".", "/../", "/./", "%2e%2e", "%2f", "\\", "::", "#", "?", "@", "~", "\0", " ", "*", "**"),
    *(
        "{0..1}",
        "{000..001}",
        "[a]",
        "[o]",
        "[.]",
        "[!x]",
        "[x]",
        "a",
        "o",
        "ut",
        "out",
        "in",
        "0",
        "1",
        "x.tar",
        "link.tar",
    ),
    *("base", "secret", "file://", "file:", "local://", "simplecache::", "s3://", "etc", "passwd"),
]


URI_FORMS = st.one_of(
    st.lists(st.sampled_from(FRAGMENTS), max_size=7).map("".join),
    st.lists(st.sampled_from(FRAGMENTS), min_size=1, max_size=4).map(lambda parts: "/" + "/".join(parts)),
)


@settings(max_examples=1000)
@given(
    st.sampled_from(["", "file://", "local://", "FILE://", "simplecache::"]),
    st.sampled_from([True, True, True, False]),
    URI_FORMS,
)
@example("", True, "/o[u]t/x.tar")
@example("", True, "/{0..1}/x.tar")
@example("", True, "/{0..1}/not-there-yet.tar")
@example("", True, "/o[u]t/not-there-yet.tar")
def test_no_uri_form_reaches_files_outside_the_allowed_prefixes(
    tree: Tree, scheme: str, inside: bool, rest: str
) -> None:
    uri = scheme + (tree.allowed if inside else "") + rest
    if not accepts(tree.policy, uri):
        return
    if "/" not in uri:
        return  # a bare name, not a location
    for found in files_read_for(uri):
        real = os.path.realpath(found)
        assert real == tree.allowed or real.startswith(f"{tree.allowed}/"), (uri, found)


def files_read_for(uri: str) -> list[str]:
    """Return the paths that a job would open for a URI on this machine, not including folder contents."""
    assert not is_remote(uri)
    try:
        urls = expand(uri) if has_pattern(uri) else []
    except (ValueError, StorageError):
        urls = []
    return [filesystem(url)[1] for url in [uri, *urls]]


def test_a_pattern_outside_the_prefixes_is_not_expanded(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.auth.uri_policy.glob.iglob", lambda *_, **__: pytest.fail("the pattern was expanded"))
    for uri in ("/**", "/*/*/*", f"{tree.allowed}base/*", f"{tree.allowed}/out/*"):
        assert not accepts(tree.policy, uri)


def test_an_unreadable_symlink_is_rejected(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    def hidden(path: str, **_: object) -> str:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr("os.readlink", hidden)  # as for /proc/1/cwd
    assert not accepts(tree.policy, f"{tree.allowed}/in/x.tar")


def test_a_prefix_that_becomes_a_symlink_is_resolved_at_each_check(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    policy = UriPolicy(str(tmp_path / "data"), ())
    (tmp_path / "data").symlink_to(tmp_path / "one")
    assert accepts(policy, f"{tmp_path}/data/x")
    assert accepts(policy, f"{tmp_path}/one/x")
    assert not accepts(policy, f"{tmp_path}/two/x")
    (tmp_path / "data").unlink()
    (tmp_path / "data").symlink_to(tmp_path / "two")
    assert not accepts(policy, f"{tmp_path}/one/x")


S3 = UriPolicy("s3://bucket/a", ("s3://whole", "gs://other/x"))


@pytest.mark.parametrize(
    ("uri", "accepted"),
    [
        ("s3://bucket/a", True),
        ("s3://bucket/a/", True),
        ("s3://bucket/a/{000..099}.tar", True),
        ("s3://bucket/a/*/x.tar", True),
        ("s3://whole", True),
        ("s3://whole/x", True),
        ("gs://other/x/y", True),
        ("s3://bucket/ab", False),
        ("s3://bucket/A", False),
        ("s3://bucket", False),
        ("s3://bucket-2/a", False),
        ("s3://wholesale/x", False),
        ("S3://bucket/a", False),
        ("s3a://bucket/a", False),
        ("s3://bucket//a", False),
        ("s3://bucket/a//b", False),
        ("s3://bucket/a/../b", False),
        ("s3://bucket/a/%2e%2e/b", False),
        ("s3://bucket/a?versionId=1", False),
        ("s3://bucket/a#b", False),
        ("s3://user:secret@bucket/a", False),
        ("s3://{0..9}/a", False),
        ("s3://*/a", False),
        ("s3:///a", False),
        ("s3:bucket/a", False),
        ("gs://bucket/a", False),
        ("simplecache::s3://bucket/a/x", False),
        ("zip://x::s3://bucket/a/x.zip", False),
        ("s3://bucket/a::s3://other/b", False),
    ],
)
def test_uris_are_accepted_only_under_the_allowed_buckets_and_prefixes(uri: str, accepted: bool) -> None:
    assert accepts(S3, uri) is accepted


@settings(max_examples=400)
@given(URI_FORMS, st.sampled_from(["bucket/a", "bucket", "whole", "", "bucket/../whole", "bucket/b/../a"]))
def test_no_uri_form_reaches_object_keys_outside_the_allowed_prefixes(rest: str, start: str) -> None:
    uri = f"s3://{start}{rest}"
    if accepts(S3, uri):
        _, path = fsspec.core.url_to_fs(uri, anon=True)
        bucket, _, key = posixpath.normpath(unquote(path)).partition("/")
        assert bucket == "whole" or (bucket == "bucket" and (key == "a" or key.startswith("a/"))), uri


def test_http_uris_are_accepted_only_for_the_allowed_hosts() -> None:
    policy = UriPolicy(ROOT, ("https://data.example.org/sets", "http://plain.example.org:8080"))
    assert accepts(policy, "https://data.example.org/sets/a.tar")
    assert accepts(policy, "http://plain.example.org:8080/a.tar")
    for uri in (
        "http://data.example.org/sets/a.tar",
        "https://data.example.org/a.tar",
        "https://data.example.org:444/sets/a.tar",
        "https://data.example.org.evil.org/sets/a.tar",
        "https://evil.org/sets/a.tar",
        "https://data.example.org@evil.org/sets/a.tar",
        "https://data.example.org\\@evil.org/sets/a.tar",
        "https://evil.org#data.example.org/sets/a.tar",
        "https://DATA.example.org/sets/a.tar",
        "https://data。example。org/sets/a.tar",
        "http://plain.example.org/a.tar",
    ):
        assert not accepts(policy, uri), uri


def notations_of(address: ipaddress.IPv4Address) -> list[str]:
    """Return every notation of an address that resolvers accept."""
    number, octets = int(address), address.packed
    return [
        str(address),
        str(number),
        hex(number),
        "0" + oct(number)[2:],
        ".".join(hex(octet) for octet in octets),
        ".".join("0" + oct(octet)[2:] for octet in octets),
        f"{octets[0]}.{int.from_bytes(octets[1:])}",
        f"{octets[0]}.{octets[1]}.{int.from_bytes(octets[2:])}",
        f"{address}.",
        f"[::ffff:{address}]",
        f"[{ipaddress.IPv6Address(f'::ffff:{address}')}]",
        f"[64:ff9b::{address}]",
        f"u:p@{address}",
    ]


@given(st.ip_addresses(v=4))
@example(ipaddress.IPv4Address("127.0.0.1"))
@example(ipaddress.IPv4Address("169.254.169.254"))
@example(ipaddress.IPv4Address("10.0.0.1"))
def test_ip_addresses_are_never_allowed_in_any_notation(address: ipaddress.IPv4Address) -> None:
    anywhere = UriPolicy(ROOT, ("https://data.example.org",))
    for host in notations_of(address):
        for port in ("", ":80"):
            with pytest.raises(ValueError, match="AMD_ALLOWED_URIS"):
                UriPolicy(ROOT, (f"http://{host}{port}/",))
            assert not accepts(anywhere, f"http://{host}{port}/x"), host


@pytest.mark.parametrize(
    "host",
    ["localhost", "LOCALHOST.", "a.localhost", "metadata", "metadata.google.internal", "kubernetes.default.local"],
)
def test_internal_host_names_cannot_be_allowed(host: str) -> None:
    with pytest.raises(ValueError, match="internal"):
        UriPolicy(ROOT, (f"http://{host}/",))


@given(st.text())
def test_arbitrary_text_never_causes_an_internal_error(text: str) -> None:
    for uri in (text, f"/{text}", f"{ROOT}/{text}", f"s3://{text}", f"https://data.example.org/{text}"):
        accepts(UriPolicy(ROOT, ("s3://b", "https://data.example.org")), uri)


def test_the_error_does_not_contain_the_password_from_the_uri() -> None:
    with pytest.raises(UriNotAllowed) as error:
        UriPolicy(ROOT, ("s3://bucket",)).check("data.train", "s3://key:pa55word@bucket/x")
    assert "pa55word" not in error.value.message


@pytest.mark.parametrize(
    ("uri", "meant"),
    [
        ("/data/imgaes/train", "Did you mean /data/images/train?"),
        ("s3://buckte/videos/a.tar", "Did you mean s3://bucket/videos/a.tar?"),
        *((uri, None) for uri in ("/", "/data", "/data/videos/train", "gs://bucket/videos", "/date/imagse")),
    ],
)
def test_the_error_suggests_the_allowed_prefix_that_was_misspelt(uri: str, meant: str | None) -> None:
    with pytest.raises(UriNotAllowed) as error:
        UriPolicy(ROOT, ("/data/images", "s3://bucket/videos")).check("data.train", uri)
    assert (meant or "under one of") in error.value.message
    assert meant or "Did you mean" not in error.value.message


def test_no_prefix_is_suggested_where_a_symlink_leads_elsewhere(tree: Tree) -> None:
    with pytest.raises(UriNotAllowed) as error:
        tree.policy.check("data.train", f"{tree.allowed}/out")
    assert "Did you mean" not in error.value.message


@pytest.mark.parametrize("prefix", ["data", "", "s3://", "s3://b/../c", "s3://u:p@b/x", "simplecache::s3://b/x"])
def test_an_invalid_prefix_is_rejected_at_startup(prefix: str) -> None:
    with pytest.raises(ValueError, match="AMD_ALLOWED_URIS"):
        UriPolicy(ROOT, (prefix,))


PARTS = st.lists(st.sampled_from(["a", "b", "ab", "a b"]), max_size=3)


@given(PARTS, PARTS)
def test_locations_under_a_prefix_are_accepted_but_its_parents_and_siblings_are_rejected(
    prefix: list[str], below: list[str]
) -> None:
    above = "/" + "/".join(["nowhere", *prefix])
    policy = UriPolicy(above, ())
    assert accepts(policy, "/".join([above, *below]))
    assert not accepts(policy, above.rpartition("/")[0])
    assert not accepts(policy, f"{above}b")
