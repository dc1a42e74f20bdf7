"""Tests for webhook targets: non-public addresses are rejected in any notation, and the server's certificate must match
the host."""

from __future__ import annotations

import datetime as dt
import ipaddress
import ssl
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import Engine

from service.webhooks.addresses import AddressNotAllowed, checked_url, is_public
from service.webhooks.sender import WebhookSender
from service.webhooks.store import job_store
from tests.support.service.fake_cluster import queued
from tests.support.service.receivers import Receiver, serving
from tests.support.service.webhooks import SettableClock, add_webhook, deliveries

HOST = "hooks.example.test"


@pytest.mark.parametrize(
    "addresses",
    [
        ["127.0.0.1"],
        ["::1"],
        ["0.0.0.0"],
        ["::"],
        ["10.1.2.3"],
        ["172.16.0.1"],
        ["192.168.1.1"],
        ["100.64.0.1"],
        ["169.254.169.254"],
        ["fd00:ec2::254"],
        ["fe80::1"],
        ["224.0.0.1"],
        ["ff02::1"],
        ["255.255.255.255"],
        ["168.63.129.16"],
        ["::ffff:127.0.0.1"],
        ["::ffff:8.8.8.8"],
        ["64:ff9b::a9fe:a9fe"],
        ["2002:7f00:1::"],
        ["2001:db8::1"],
        ["8.8.8.8", "127.0.0.1"],
        [],
    ],
)
def test_a_host_that_resolves_to_an_internal_address_is_not_contacted(
    addresses: list[str], clock: SettableClock, sqlite_engine: Engine, receiver: Receiver
) -> None:
    async def resolve(host: str, port: int) -> list[str]:
        assert (host, port) == (HOST, receiver.port)
        return addresses

    add_webhook(sqlite_engine, receiver.url(HOST))
    queued(job_store(sqlite_engine))
    WebhookSender(sqlite_engine, allow_http=True, resolve=resolve, clock=clock).step()
    assert receiver.received == []
    assert "public" in deliveries(sqlite_engine)[0].answer


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "127.1", "2130706433", "0x7f000001", "017700000001", "localhost", "[::1]"]
)
def test_loopback_addresses_are_not_contacted_in_any_notation(
    host: str, clock: SettableClock, sqlite_engine: Engine, receiver: Receiver
) -> None:
    add_webhook(sqlite_engine, receiver.url(host))
    queued(job_store(sqlite_engine))
    WebhookSender(sqlite_engine, allow_http=True, clock=clock).step()
    assert receiver.received == []
    assert deliveries(sqlite_engine)[0].tries == 1


@given(st.ip_addresses(v=4))
def test_an_address_that_embeds_an_ipv4_address_is_not_public(address: ipaddress.IPv4Address) -> None:
    number = int(address)
    for embedded in (
        (0xFFFF << 32) | number,  # mapped
        number,  # compatible
        (0x64FF9B << 96) | number,  # translated
        (0x2002 << 112) | (number << 80),  # 6to4
        (0x20010000 << 96) | (number << 64) | (number ^ 0xFFFFFFFF),  # Teredo
    ):
        assert not is_public(str(ipaddress.IPv6Address(embedded)))


PRIVATE = [
    "10.0.0.0/8",
    "127.0.0.0/8",
    "169.254.0.0/16",
    "172.16.0.0/12",
    "192.168.0.0/16",
    "100.64.0.0/10",
    "0.0.0.0/8",
]


@given(st.sampled_from([*PRIVATE, "224.0.0.0/4", "240.0.0.0/4", "fc00::/7", "fe80::/10", "ff00::/8"]), st.data())
def test_special_purpose_addresses_are_not_public(network: str, data: st.DataObject) -> None:
    assert not is_public(str(data.draw(st.ip_addresses(network=network))))


@pytest.mark.parametrize("address", ["8.8.8.8", "93.184.216.34", "2606:4700:4700::1111", "2a00:1450:4001::1"])
def test_internet_addresses_are_public(address: str) -> None:
    assert is_public(address)


@given(st.text())
def test_malformed_urls_never_cause_an_internal_error(text: str) -> None:
    for url in (text, f"https://{text}", f"https://a.example.com{text}"):
        with suppress(AddressNotAllowed):
            checked_url(url, allow_http=False)


# Certificates


class Authority(NamedTuple):
    """TLS contexts for a server and a client."""

    server: ssl.SSLContext
    client: ssl.SSLContext


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """Create TLS contexts for a receiver with a certificate for HOST, and for a client that trusts it."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, HOST)])
    now = dt.datetime.now(dt.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - dt.timedelta(days=1))
        .not_valid_after(now + dt.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(HOST)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    folder: Path = tmp_path_factory.mktemp("tls")
    (folder / "certificate.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    (folder / "key.pem").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(folder / "certificate.pem", folder / "key.pem")
    client = ssl.create_default_context(cafile=str(folder / "certificate.pem"))
    return Authority(server, client)


def test_the_host_is_resolved_once_and_its_name_is_verified_by_tls(
    clock: SettableClock, sqlite_engine: Engine, authority: Authority
) -> None:
    """Check that the connection uses the checked address, and that certificate, SNI and Host use the host name."""
    resolved: list[tuple[str, int]] = []
    names: list[str | None] = []
    authority.server.sni_callback = lambda _, name, __: names.append(name)

    async def resolve(host: str, port: int) -> list[str]:
        resolved.append((host, port))
        return ["127.0.0.1"]  # no real resolver knows the name

    with serving(Receiver(), authority.server) as receiver:
        add_webhook(sqlite_engine, receiver.url(HOST, "https"))
        add_webhook(sqlite_engine, receiver.url("other.example.test", "https"))
        queued(job_store(sqlite_engine))
        WebhookSender(sqlite_engine, allow_private=True, resolve=resolve, tls=authority.client, clock=clock).step()
        assert sorted(resolved) == [(HOST, receiver.port), ("other.example.test", receiver.port)]
        assert [each.headers["host"] for each in receiver.received] == [f"{HOST}:{receiver.port}"]
    assert sorted(map(str, names)) == [HOST, "other.example.test"]
    assert [(row.state, row.answer) for row in deliveries(sqlite_engine)] == [
        ("taken", "responded with 204"),
        ("waiting", "could not be reached: ConnectError"),  # the certificate names a different host
    ]


def test_an_untrusted_certificate_is_rejected(
    clock: SettableClock, sqlite_engine: Engine, authority: Authority
) -> None:
    async def resolve(host: str, port: int) -> list[str]:
        return ["127.0.0.1"]

    with serving(Receiver(), authority.server) as receiver:
        add_webhook(sqlite_engine, receiver.url(HOST, "https"))
        queued(job_store(sqlite_engine))
        WebhookSender(sqlite_engine, allow_private=True, resolve=resolve, clock=clock).step()
        assert receiver.received == []
