"""Tests for the webhook sender with real receivers on loopback: retries, redirects, timeouts and signatures."""

from __future__ import annotations

import itertools
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import Engine

from service.db.engine import open_engine
from service.webhooks import sender as sending
from service.webhooks.sender import MAX_ATTEMPTS_EACH, signature_headers
from service.webhooks.store import PAUSES_S, WebhookStore, job_store
from tests.support.service.fake_cluster import queued
from tests.support.service.receivers import Received, Receiver, Reply, serving
from tests.support.service.webhooks import SettableClock, add_webhook, deliveries, loopback_sender


def test_the_signature_matches_the_published_example() -> None:
    headers = signature_headers(
        "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw",
        "msg_p5jXN8AQM9LWM0D4loKWxJek",
        1614265330,
        b'{"test": 2432232314}',
    )
    assert headers["webhook-signature"] == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


def test_a_failing_delivery_is_retried_with_growing_pauses_for_a_day_then_abandoned(
    engine: Engine, receiver: Receiver, clock: SettableClock
) -> None:
    receiver.reply = Reply(503)
    add_webhook(engine, receiver.url())
    queued(job_store(engine))
    sender, start, tried = loopback_sender(engine, clock), clock.now, []
    while deliveries(engine)[0].state == "waiting":
        sender.step()
        tried.append(clock.now - start)
        clock.now += PAUSES_S[min(len(tried), len(PAUSES_S)) - 1] - 1
        sender.step()  # one second early
        assert len(receiver.received) == len(tried)
        clock.now += 1
    assert len(tried) == len(PAUSES_S) + 1
    pauses = [later - earlier for earlier, later in itertools.pairwise(tried)]
    assert pauses == sorted(pauses) == list(PAUSES_S)
    assert tried[-1] == pytest.approx(24 * 3600, rel=0.05)
    (row,) = deliveries(engine)
    assert (row.state, row.tries, row.answer) == ("given_up", len(PAUSES_S) + 1, "responded with 503")
    clock.now += 30 * 24 * 3600
    sender.step()
    assert len(receiver.received) == len(tried)
    # A receiver can recognise a repeated delivery by its ID.
    assert len({each.headers["webhook-id"] for each in receiver.received}) == 1
    assert len({each.headers["webhook-timestamp"] for each in receiver.received}) == len(tried)


def test_a_receiver_that_recovers_gets_the_deliveries_it_missed(
    engine: Engine, receiver: Receiver, clock: SettableClock
) -> None:
    receiver.reply = Reply(500)
    add_webhook(engine, receiver.url())
    queued(job_store(engine))
    loopback_sender(engine, clock).step()
    receiver.reply = Reply(200, body=b"thank you")
    clock.now += PAUSES_S[0]
    loopback_sender(engine, clock).step()
    (row,) = deliveries(engine)
    assert (row.state, row.tries, row.answer) == ("taken", 2, "responded with 200")


def test_redirects_are_not_followed(engine: Engine, receiver: Receiver, clock: SettableClock) -> None:
    with serving(Receiver()) as other:
        for status in (301, 302, 307, 308):
            receiver.reply = Reply(status, {"Location": other.url()})
            add_webhook(engine, receiver.url())
        queued(job_store(engine))
        loopback_sender(engine, clock).step()
        assert len(receiver.received) == 4
        assert other.received == []
    assert {row.state for row in deliveries(engine)} == {"waiting"}


def test_proxies_from_the_environment_are_not_used(
    engine: Engine, receiver: Receiver, clock: SettableClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(Receiver()) as proxy:
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
            monkeypatch.setenv(name, proxy.url(path=""))
        add_webhook(engine, receiver.url())
        queued(job_store(engine))
        loopback_sender(engine, clock).step()
        assert proxy.received == []
    assert len(receiver.received) == 1


def test_a_receiver_that_never_completes_its_response_times_out(
    engine: Engine, receiver: Receiver, clock: SettableClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sending, "TIMEOUT_S", 0.3)
    timed_out = threading.Event()

    def wait(_: Received) -> Reply:
        timed_out.wait(60)
        return Reply()

    receiver.reply = wait
    add_webhook(engine, receiver.url())
    queued(job_store(engine))
    loopback_sender(engine, clock).step()
    timed_out.set()
    (row,) = deliveries(engine)
    assert row.state == "waiting"
    assert "no response" in row.answer or "Timeout" in row.answer


def test_an_unreachable_receiver_does_not_block_other_receivers(
    engine: Engine, receiver: Receiver, clock: SettableClock
) -> None:
    with serving(Receiver()) as closed:
        unreachable = closed.url()
    store = job_store(engine)
    add_webhook(engine, unreachable, project="a")
    for _ in range(3 * MAX_ATTEMPTS_EACH):
        queued(store, project="a")
    add_webhook(engine, receiver.url(), project="b")
    queued(store, project="b")
    loopback_sender(engine, clock).step()
    assert len(receiver.received) == 1
    assert [row.answer for row in deliveries(engine) if row.tries and row.state == "waiting"] == [
        "could not be reached: ConnectError"
    ] * MAX_ATTEMPTS_EACH


def test_concurrent_senders_send_each_attempt_once(
    engine: Engine, database_url: str, receiver: Receiver, clock: SettableClock
) -> None:
    store = job_store(engine)
    add_webhook(engine, receiver.url())
    for _ in range(2 * MAX_ATTEMPTS_EACH):
        queued(store)
    engines = [open_engine(database_url) for _ in range(4)]
    senders = [loopback_sender(each, clock) for each in engines]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(4):
            list(pool.map(lambda sender: sender.step(), senders))
    assert len(receiver.received) == 2 * MAX_ATTEMPTS_EACH
    assert {row.tries for row in deliveries(engine)} == {1}
    for each in engines:
        each.dispose()


def test_a_delivery_whose_sender_dies_counts_as_an_attempt(
    engine: Engine, receiver: Receiver, clock: SettableClock
) -> None:
    add_webhook(engine, receiver.url())
    queued(job_store(engine))
    store = WebhookStore(engine)
    assert len(store.claim(clock.now, 1, 1)) == 1  # no result is ever recorded
    loopback_sender(engine, clock).step()
    assert receiver.received == []
    clock.now += PAUSES_S[0]
    loopback_sender(engine, clock).step()
    (row,) = deliveries(engine)
    assert (row.state, row.tries) == ("taken", 2)


def test_a_delivery_is_abandoned_if_the_sender_dies_during_the_last_attempt(
    engine: Engine, clock: SettableClock
) -> None:
    add_webhook(engine, "https://a.example.com")
    queued(job_store(engine))
    store = WebhookStore(engine)
    for pause in (*PAUSES_S, PAUSES_S[-1]):
        assert len(store.claim(clock.now, 1, 1)) == 1
        clock.now += pause
    assert store.claim(clock.now, 1, 1) == []
    assert deliveries(engine)[0].state == "given_up"


def test_old_finished_deliveries_are_purged_and_waiting_ones_are_kept(
    engine: Engine, receiver: Receiver, clock: SettableClock
) -> None:
    add_webhook(engine, receiver.url(), "created")
    add_webhook(engine, receiver.url(path="/later"), "created")
    receiver.reply = lambda message: Reply(500 if message.path == "/later" else 204)
    queued(job_store(engine))
    sender = loopback_sender(engine, clock)
    sender.step()
    clock.now += 8 * 24 * 3600
    sender.step()
    assert [row.state for row in deliveries(engine)] == ["waiting"]


@pytest.mark.timeout(60)
def test_a_slow_receiver_delays_only_its_own_deliveries(
    sqlite_engine: Engine, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sending, "PAUSE_S", 0.02)
    answer, stop, third = threading.Event(), threading.Event(), threading.Event()

    def wait(_: Received) -> Reply:
        answer.wait(30)
        return Reply()

    def count(_: Received) -> Reply:
        if len(receiver.received) == 3:
            third.set()
        return Reply()

    receiver.reply = count
    sender = sending.WebhookSender(sqlite_engine, allow_http=True, allow_private=True)
    running = threading.Thread(target=sender.run, args=(stop,))
    with serving(Receiver(wait)) as slow:
        add_webhook(sqlite_engine, slow.url())
        add_webhook(sqlite_engine, receiver.url())
        store = job_store(sqlite_engine)
        running.start()
        try:
            for number in range(3):  # each in a step of its own, while the first one's other delivery waits
                queued(store)
                while len(receiver.received) <= number:
                    assert running.is_alive()
                    stop.wait(0.01)
            assert third.wait(10)
            assert slow.received
            assert not answer.is_set()
        finally:
            answer.set()
            stop.set()
            running.join()
