"""Webhooks with real receivers on loopback: nothing lost, nothing sent elsewhere, everything signed."""

from __future__ import annotations

import base64
import datetime as dt
import hashlib
import hmac
import ipaddress
import itertools
import json
import ssl
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import Engine, select
from sqlalchemy.orm import Session

from service.db import Delivery, JobEvent, Webhook, open_engine
from service.jobs.store import JobStore, Stale
from service.settings import Settings
from service.webhooks import sender as sending
from service.webhooks.addresses import NotAllowed, checked_url, is_public
from service.webhooks.routes import router
from service.webhooks.sender import EACH, Sender, signed
from service.webhooks.store import PAUSES_S, WebhookStore, deliveries_for
from tests.service.clusters import queued
from tests.service.receivers import Received, Receiver, Reply, serving
from tests.service.rooms import client_of, key_to

HOST = "hooks.example.test"


class Clock:
    def __init__(self) -> None:
        self.now = 4e9  # after all that is written with the real one

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with serving(Receiver()) as receiver:
        yield receiver


@pytest.fixture
def clock() -> Clock:
    return Clock()


def loopback(engine: Engine, clock: Clock, **more: Any) -> Sender:
    return Sender(engine, allow_http=True, allow_private=True, clock=clock, **more)


def hook(engine: Engine, url: str, *events: str, project: str | None = None) -> Webhook:
    return WebhookStore(engine).add(url, project, events, "test")


def rows(engine: Engine) -> list[Delivery]:
    with Session(engine, expire_on_commit=False) as session:
        return list(session.scalars(select(Delivery).order_by(Delivery.id)))


def verified(secret: str, message: Received) -> dict[str, Any]:
    """What a receiver does by the book of Standard Webhooks, without our code."""
    text = f"{message.headers['webhook-id']}.{message.headers['webhook-timestamp']}.".encode() + message.body
    key = base64.b64decode(secret.split("_", 1)[1])
    version, _, signature = message.headers["webhook-signature"].partition(",")
    assert version == "v1"
    assert base64.b64decode(signature) == hmac.digest(key, text, hashlib.sha256)
    body: dict[str, Any] = json.loads(message.body)
    return body


# What is owed


def test_every_change_of_a_job_reaches_its_webhook_signed_and_once(
    engine: Engine, receiver: Receiver, clock: Clock
) -> None:
    store, webhook = JobStore(engine), hook(engine, receiver.url())
    job = queued(store, project="video", name="a", labels={"team": "x"})
    job = store.change(job, "starting", state="starting")
    store.change(job, "failed", actor="key", state="failed", reason="oom_gpu", message="too large")
    loopback(engine, clock).step()
    loopback(engine, clock).step()
    told = sorted(
        (verified(webhook.secret, each) for each in receiver.received), key=lambda body: body["data"]["version"]
    )
    assert [body["type"] for body in told] == ["job.created", "job.starting", "job.failed"]
    assert told[-1]["data"] == {
        "job_id": job.id,
        "version": 3,
        "project": "video",
        "kind": job.kind,
        "name": "a",
        "labels": {"team": "x"},
        "state": "failed",
        "reason": "oom_gpu",
        "message": "too large",
        "actor": "key",
    }
    assert dt.datetime.fromisoformat(told[-1]["timestamp"]).tzinfo is not None
    assert len({each.headers["webhook-id"] for each in receiver.received}) == 3
    assert {each.headers["content-type"] for each in receiver.received} == {"application/json"}
    assert {row.state for row in rows(engine)} == {"taken"}


def test_the_signature_is_that_of_the_published_example() -> None:
    headers = signed(
        "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw",
        "msg_p5jXN8AQM9LWM0D4loKWxJek",
        1614265330,
        b'{"test": 2432232314}',
    )
    assert headers["webhook-signature"] == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


def test_a_webhook_hears_of_its_project_and_its_events_only(engine: Engine) -> None:
    store = JobStore(engine)
    ours = hook(engine, "https://ours.example.com", project="ours")
    ends = hook(engine, "https://ends.example.com", "succeeded", "failed")
    for project in ("ours", "theirs"):
        job = queued(store, project=project)
        store.change(job, "succeeded", state="succeeded")
    owed = {(row.webhook_id, row.body["data"]["project"], row.body["type"]) for row in rows(engine)}
    assert owed == {
        (ours.id, "ours", "job.created"),
        (ours.id, "ours", "job.succeeded"),
        (ends.id, "ours", "job.succeeded"),
        (ends.id, "theirs", "job.succeeded"),
    }


def test_a_change_that_did_not_happen_is_not_told(engine: Engine) -> None:
    store = JobStore(engine)
    hook(engine, "https://a.example.com")
    job = queued(store)
    store.change(job, "starting", state="starting")
    with pytest.raises(Stale):
        store.change(job, "cancel", wanted="cancel")
    assert [row.version for row in rows(engine)] == [1, 2]


def test_an_event_that_commits_after_later_ones_were_sent_is_sent_too(
    engine: Engine, receiver: Receiver, clock: Clock
) -> None:
    if engine.dialect.name == "sqlite":
        pytest.skip("SQLite has one writer at a time: events commit in their order")
    store = JobStore(engine)
    hook(engine, receiver.url())
    early = queued(store)
    loopback(engine, clock).step()
    with store._write() as slow:
        late = JobEvent(job_id=early.id, version=2, at=early.created_at, type="starting", actor="service", data={})
        slow.add(late)
        deliveries_for(slow, early, late)
        slow.flush()
        later = queued(store)
        loopback(engine, clock).step()
        assert [json.loads(each.body)["data"]["job_id"] for each in receiver.received] == [early.id, later.id]
    loopback(engine, clock).step()
    assert json.loads(receiver.received[-1].body)["type"] == "job.starting"


def test_a_webhook_that_is_removed_meanwhile_does_not_hinder_the_job(engine: Engine, database_url: str) -> None:
    webhook = hook(engine, "https://a.example.com")
    other = open_engine(database_url)
    store = JobStore(other)
    with ThreadPoolExecutor(1) as pool:
        with Session(engine) as session, session.begin():
            session.delete(session.get_one(Webhook, webhook.id))
            session.flush()
            adding = pool.submit(queued, store)
        job = adding.result()
    assert store.get(job.id).version == 1
    assert rows(engine) == []
    other.dispose()


def test_a_deleted_job_is_still_told_about(engine: Engine, receiver: Receiver, clock: Clock) -> None:
    store = JobStore(engine)
    hook(engine, receiver.url())
    store.delete(queued(store))
    loopback(engine, clock).step()
    assert len(receiver.received) == 1


# Sending


def test_a_receiver_that_fails_is_tried_for_a_day_at_growing_pauses_then_given_up(
    engine: Engine, receiver: Receiver, clock: Clock
) -> None:
    receiver.reply = Reply(503)
    hook(engine, receiver.url())
    queued(JobStore(engine))
    sender, start, tried = loopback(engine, clock), clock.now, []
    while rows(engine)[0].state == "waiting":
        sender.step()
        tried.append(clock.now - start)
        clock.now += PAUSES_S[min(len(tried), len(PAUSES_S)) - 1] - 1
        sender.step()  # a second too early
        assert len(receiver.received) == len(tried)
        clock.now += 1
    assert len(tried) == len(PAUSES_S) + 1
    pauses = [later - earlier for earlier, later in itertools.pairwise(tried)]
    assert pauses == sorted(pauses) == list(PAUSES_S)
    assert tried[-1] == pytest.approx(24 * 3600, rel=0.05)
    (row,) = rows(engine)
    assert (row.state, row.tries, row.answer) == ("given_up", len(PAUSES_S) + 1, "answered 503")
    clock.now += 30 * 24 * 3600
    sender.step()
    assert len(receiver.received) == len(tried)
    assert len({each.headers["webhook-id"] for each in receiver.received}) == 1  # by which a receiver knows it again
    assert len({each.headers["webhook-timestamp"] for each in receiver.received}) == len(tried)


def test_a_receiver_that_comes_back_gets_what_it_missed(engine: Engine, receiver: Receiver, clock: Clock) -> None:
    receiver.reply = Reply(500)
    hook(engine, receiver.url())
    queued(JobStore(engine))
    loopback(engine, clock).step()
    receiver.reply = Reply(200, body=b"thank you")
    clock.now += PAUSES_S[0]
    loopback(engine, clock).step()
    (row,) = rows(engine)
    assert (row.state, row.tries, row.answer) == ("taken", 2, "answered 200")


def test_redirects_are_not_followed(engine: Engine, receiver: Receiver, clock: Clock) -> None:
    with serving(Receiver()) as other:
        for status in (301, 302, 307, 308):
            receiver.reply = Reply(status, {"Location": other.url()})
            hook(engine, receiver.url())
        queued(JobStore(engine))
        loopback(engine, clock).step()
        assert len(receiver.received) == 4
        assert other.received == []
    assert {row.state for row in rows(engine)} == {"waiting"}


def test_proxies_of_the_environment_are_not_used(
    engine: Engine, receiver: Receiver, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(Receiver()) as proxy:
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
            monkeypatch.setenv(name, proxy.url(path=""))
        hook(engine, receiver.url())
        queued(JobStore(engine))
        loopback(engine, clock).step()
        assert proxy.received == []
    assert len(receiver.received) == 1


def test_a_receiver_that_never_ends_its_answer_is_left(
    engine: Engine, receiver: Receiver, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sending, "TIMEOUT_S", 0.3)
    asked = threading.Event()

    def wait(_: Received) -> Reply:
        asked.wait(60)
        return Reply()

    receiver.reply = wait
    hook(engine, receiver.url())
    queued(JobStore(engine))
    loopback(engine, clock).step()
    asked.set()
    (row,) = rows(engine)
    assert row.state == "waiting"
    assert "no answer" in row.answer or "Timeout" in row.answer


def test_a_receiver_that_is_away_is_not_in_the_way_of_the_others(
    engine: Engine, receiver: Receiver, clock: Clock
) -> None:
    with serving(Receiver()) as gone:
        away = gone.url()
    store = JobStore(engine)
    hook(engine, away, project="a")
    for _ in range(3 * EACH):
        queued(store, project="a")
    hook(engine, receiver.url(), project="b")
    queued(store, project="b")
    loopback(engine, clock).step()
    assert len(receiver.received) == 1
    assert [row.answer for row in rows(engine) if row.tries and row.state == "waiting"] == [
        "not reached: ConnectError"
    ] * EACH


def test_senders_side_by_side_make_each_try_once(
    engine: Engine, database_url: str, receiver: Receiver, clock: Clock
) -> None:
    store = JobStore(engine)
    hook(engine, receiver.url())
    for _ in range(2 * EACH):
        queued(store)
    engines = [open_engine(database_url) for _ in range(4)]
    senders = [loopback(each, clock) for each in engines]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(4):
            list(pool.map(lambda sender: sender.step(), senders))
    assert len(receiver.received) == 2 * EACH
    assert {row.tries for row in rows(engine)} == {1}
    for each in engines:
        each.dispose()


def test_a_sender_that_dies_in_the_middle_has_used_up_a_try(engine: Engine, receiver: Receiver, clock: Clock) -> None:
    hook(engine, receiver.url())
    queued(JobStore(engine))
    store = WebhookStore(engine)
    assert len(store.claim(clock.now, 1, 1)) == 1  # and never settled
    loopback(engine, clock).step()
    assert receiver.received == []
    clock.now += PAUSES_S[0]
    loopback(engine, clock).step()
    (row,) = rows(engine)
    assert (row.state, row.tries) == ("taken", 2)


def test_a_sender_that_dies_over_the_last_try_leaves_nothing_waiting(engine: Engine, clock: Clock) -> None:
    hook(engine, "https://a.example.com")
    queued(JobStore(engine))
    store = WebhookStore(engine)
    for pause in (*PAUSES_S, PAUSES_S[-1]):
        assert len(store.claim(clock.now, 1, 1)) == 1
        clock.now += pause
    assert store.claim(clock.now, 1, 1) == []
    assert rows(engine)[0].state == "given_up"


def test_what_ended_long_ago_is_forgotten_and_what_waits_is_not(
    engine: Engine, receiver: Receiver, clock: Clock
) -> None:
    hook(engine, receiver.url(), "created")
    hook(engine, receiver.url(path="/later"), "created")
    receiver.reply = lambda message: Reply(500 if message.path == "/later" else 204)
    queued(JobStore(engine))
    sender = loopback(engine, clock)
    sender.step()
    clock.now += 8 * 24 * 3600
    sender.step()
    assert [row.state for row in rows(engine)] == ["waiting"]


# Where it may go


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
def test_a_name_that_leads_inside_is_not_connected_to(
    addresses: list[str], clock: Clock, sqlite_engine: Engine, receiver: Receiver
) -> None:
    async def resolve(host: str, port: int) -> list[str]:
        assert (host, port) == (HOST, receiver.port)
        return addresses

    hook(sqlite_engine, receiver.url(HOST))
    queued(JobStore(sqlite_engine))
    Sender(sqlite_engine, allow_http=True, resolve=resolve, clock=clock).step()
    assert receiver.received == []
    assert "public" in rows(sqlite_engine)[0].answer


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "127.1", "2130706433", "0x7f000001", "017700000001", "localhost", "[::1]"]
)
def test_no_spelling_of_this_machine_is_connected_to(
    host: str, clock: Clock, sqlite_engine: Engine, receiver: Receiver
) -> None:
    hook(sqlite_engine, receiver.url(host))
    queued(JobStore(sqlite_engine))
    Sender(sqlite_engine, allow_http=True, clock=clock).step()
    assert receiver.received == []
    assert rows(sqlite_engine)[0].tries == 1


@given(st.ip_addresses(v=4))
def test_an_address_in_disguise_is_never_public(address: ipaddress.IPv4Address) -> None:
    number = int(address)
    for disguise in (
        (0xFFFF << 32) | number,  # mapped
        number,  # compatible
        (0x64FF9B << 96) | number,  # translated
        (0x2002 << 112) | (number << 80),  # 6to4
        (0x20010000 << 96) | (number << 64) | (number ^ 0xFFFFFFFF),  # Teredo
    ):
        assert not is_public(str(ipaddress.IPv6Address(disguise)))


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
def test_no_address_of_the_special_networks_is_public(network: str, data: st.DataObject) -> None:
    assert not is_public(str(data.draw(st.ip_addresses(network=network))))


@pytest.mark.parametrize("address", ["8.8.8.8", "93.184.216.34", "2606:4700:4700::1111", "2a00:1450:4001::1"])
def test_addresses_of_the_internet_are_public(address: str) -> None:
    assert is_public(address)


class Authority(NamedTuple):
    server: ssl.SSLContext
    client: ssl.SSLContext


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """A receiver's certificate for HOST, and who trusts it."""
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


def test_the_address_is_looked_up_once_and_the_name_still_counts(
    clock: Clock, sqlite_engine: Engine, authority: Authority
) -> None:
    """The connection goes to the address that was checked; certificate, SNI and Host are the name's."""
    asked: list[tuple[str, int]] = []
    names: list[str | None] = []
    authority.server.sni_callback = lambda _, name, __: names.append(name)

    async def resolve(host: str, port: int) -> list[str]:
        asked.append((host, port))
        return ["127.0.0.1"]  # no resolver of this machine knows that name

    with serving(Receiver(), authority.server) as receiver:
        hook(sqlite_engine, receiver.url(HOST, "https"))
        hook(sqlite_engine, receiver.url("other.example.test", "https"))
        queued(JobStore(sqlite_engine))
        Sender(sqlite_engine, allow_private=True, resolve=resolve, tls=authority.client, clock=clock).step()
        assert sorted(asked) == [(HOST, receiver.port), ("other.example.test", receiver.port)]
        assert [each.headers["host"] for each in receiver.received] == [f"{HOST}:{receiver.port}"]
    assert sorted(map(str, names)) == [HOST, "other.example.test"]
    assert [(row.state, row.answer) for row in rows(sqlite_engine)] == [
        ("taken", "answered 204"),
        ("waiting", "not reached: ConnectError"),  # the certificate is for another name
    ]


def test_a_certificate_that_nobody_vouches_for_is_refused(
    clock: Clock, sqlite_engine: Engine, authority: Authority
) -> None:
    async def resolve(host: str, port: int) -> list[str]:
        return ["127.0.0.1"]

    with serving(Receiver(), authority.server) as receiver:
        hook(sqlite_engine, receiver.url(HOST, "https"))
        queued(JobStore(sqlite_engine))
        Sender(sqlite_engine, allow_private=True, resolve=resolve, clock=clock).step()
        assert receiver.received == []


# Over HTTP


def test_a_webhook_is_made_listed_watched_and_removed(engine: Engine, receiver: Receiver, clock: Clock) -> None:
    client = client_of(engine, router, settings=Settings(webhooks_http=True))
    admin = key_to(engine, "admin")
    made = client.post("/v1/webhooks", json={"url": "http://a.example.com/x", "events": ["failed"]}, headers=admin)
    assert made.status_code == 201
    assert made.headers["Cache-Control"] == "no-store"
    secret, webhook_id = made.json()["secret"], made.json()["id"]
    assert len(base64.b64decode(secret.removeprefix("whsec_"))) == 32
    listed = client.get("/v1/webhooks", headers=admin)
    assert [each["id"] for each in listed.json()["items"]] == [webhook_id]
    assert secret not in listed.text
    store = JobStore(engine)
    job = store.change(queued(store), "failed", state="failed")
    with Session(engine) as session, session.begin():
        session.get_one(Webhook, webhook_id).url = receiver.url()
    receiver.reply = Reply(500)
    loopback(engine, clock).step()
    (told,) = client.get(f"/v1/webhooks/{webhook_id}/deliveries", headers=admin).json()["items"]
    assert (told["job_id"], told["type"], told["state"], told["tries"]) == (job.id, "job.failed", "waiting", 1)
    assert told["answer"] == "answered 500"
    assert told["next_try_at"] > told["tried_at"]
    verified(secret, receiver.received[0])
    assert client.delete(f"/v1/webhooks/{webhook_id}", headers=admin).status_code == 204
    assert client.delete(f"/v1/webhooks/{webhook_id}", headers=admin).status_code == 404
    assert rows(engine) == []


def test_webhooks_of_other_projects_are_nobodys_business(engine: Engine) -> None:
    client = client_of(engine, router)
    ours, theirs = key_to(engine, "admin", project="ours"), key_to(engine, "admin", project="theirs")
    made = client.post("/v1/webhooks", json={"url": "https://a.example.com"}, headers=theirs).json()
    assert made["project"] == "theirs"
    assert client.get("/v1/webhooks", headers=ours).json()["items"] == []
    assert client.get(f"/v1/webhooks/{made['id']}/deliveries", headers=ours).status_code == 404
    assert client.delete(f"/v1/webhooks/{made['id']}", headers=ours).status_code == 404
    other = client.post("/v1/webhooks", json={"url": "https://a.example.com", "project": "theirs"}, headers=ours)
    assert other.status_code == 403
    for scope in ("read", "submit"):
        header = key_to(engine, scope, project="theirs")
        assert client.get("/v1/webhooks", headers=header).status_code == 403
        assert client.post("/v1/webhooks", json={"url": "https://a.example.com"}, headers=header).status_code == 403


@pytest.mark.parametrize(
    "url",
    [
        "http://a.example.com",
        "ftp://a.example.com",
        "https://",
        "https:///x",
        "a.example.com",
        "",
        "https://user:word@a.example.com",
        "https://a.example.com/#x",
        "https://127.0.0.1/",
        "https://[::1]/",
        "https://[::ffff:10.0.0.1]/",
        "https://169.254.169.254/latest/meta-data",
        "https://a.example.com:99999999/",
        "https://a\u0000b/",
        "https://" + "a" * 2000,
        "javascript:alert(1)",
        "file:///etc/passwd",
    ],
)
def test_urls_that_lead_nowhere_good_are_refused_at_once(engine: Engine, url: str) -> None:
    client = client_of(engine, router)
    answer = client.post("/v1/webhooks", json={"url": url}, headers=key_to(engine, "admin"))
    assert answer.status_code == 422
    assert answer.json()["code"] in ("uri_not_allowed", "request_invalid")
    assert WebhookStore(engine).of_project(None) == []


@given(st.text())
def test_no_url_is_an_accident(text: str) -> None:
    for url in (text, f"https://{text}", f"https://a.example.com{text}"):
        with suppress(NotAllowed):
            checked_url(url, allow_http=False)


def test_an_event_that_is_none_is_refused(engine: Engine) -> None:
    client = client_of(engine, router)
    body = {"url": "https://a.example.com", "events": ["suceeded"]}
    assert client.post("/v1/webhooks", json=body, headers=key_to(engine, "admin")).status_code == 422
