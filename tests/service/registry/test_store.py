"""Aliases and guards, on both databases."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
from sqlalchemy import Engine
from sqlalchemy.orm import Session

from service.db.engine import open_engine
from service.db.models import Deployment
from service.jobs.store import JobStore
from service.registry.store import EncoderFilter, EncoderStore
from service.web.errors import AliasMoved, EncoderInUse, Forbidden, IllegalAction, NotFound
from tests.support.service.encoder_cards import row
from tests.support.service.fake_cluster import queued

ROOT = "/root"


@pytest.fixture
def store(engine: Engine) -> EncoderStore:
    return EncoderStore(engine)


def history(store: EncoderStore, name: str = "production", project: str = "video") -> list[str | None]:
    return [move.encoder_id for move in store.alias(project, name)[1]]


def deployed(engine: Engine, **fields: object) -> None:
    plain = {"candidate": None, "share": 0.0, "settings": {}, "serving": {}, "state": "healthy", "message": ""}
    times = {"created_by": "me", "created_at": 0.0, "changed_at": 0.0, "version": 1, "project": "video"}
    with Session(engine) as session, session.begin():
        session.add(Deployment(**{"name": "eyes", "encoder": "another", **plain, **times, **fields}))


def test_an_alias_moves_with_a_history_that_outlives_it(engine: Engine, store: EncoderStore) -> None:
    first, second = row(engine, "a", "video"), row(engine, "b", "video")
    store.move("video", "production", first, "me")
    store.move("video", "production", second, "you")
    store.move("video", "production", second, "you")  # nothing happens
    assert store.resolve("production", "video").id == "b"
    store.drop("video", "production", "me")
    with pytest.raises(NotFound):
        store.resolve("production", "video")
    with pytest.raises(NotFound):
        store.drop("video", "production", "me")
    store.move("video", "production", first, "me")
    assert history(store) == ["a", "b", None, "a"]
    assert [move.actor for move in store.alias("video", "production")[1]] == ["me", "you", "me", "me"]
    assert store.alias("video", "production")[0].moves == 4


def test_an_alias_is_of_its_project_and_points_to_what_that_may_see(engine: Engine, store: EncoderStore) -> None:
    row(engine, "ours", "video"), row(engine, "theirs", "audio"), row(engine, "free", None)
    store.move("video", "production", "ours", "me")
    store.move("audio", "production", "theirs", "me")
    store.move("default", "production", "free", "me")
    assert store.resolve("production", "video").id == "ours"
    assert store.resolve("production", "audio").id == "theirs"
    assert store.resolve("production").id == "free"
    assert store.resolve("free", "video").id == "free"
    for name in ("theirs", "nowhere"):
        with pytest.raises(NotFound):
            store.move("video", "production", name, "me")
        with pytest.raises(NotFound):
            store.resolve(name, "video")
    store.move("video", "candidate", "free", "me")
    store.move("video", "production", "candidate", "me")  # promoted: what the other points to now
    assert store.alias("video", "production")[0].encoder_id == "free"


def test_an_alias_takes_no_encoders_id_and_outranks_one_that_comes_later(engine: Engine, store: EncoderStore) -> None:
    row(engine, "a", "video"), row(engine, "theirs", "audio")
    with pytest.raises(IllegalAction, match="a is the id of an encoder"):
        store.move("video", "a", "a", "me")
    store.move("video", "theirs", "a", "me")  # that there is such an encoder is nobody's business here
    assert store.resolve("theirs", "video").id == "a"
    store.move("video", "production", "a", "me")
    row(engine, "production", "video")
    assert store.resolve("production", "video").id == "a"


def test_what_is_expected_is_held_to(engine: Engine, store: EncoderStore) -> None:
    row(engine, "a", "video"), row(engine, "b", "video")
    with pytest.raises(AliasMoved, match="points to nothing yet"):
        store.move("video", "production", "a", "me", ["b"])
    store.move("video", "production", "a", "me", [None])
    with pytest.raises(AliasMoved) as refused:
        store.move("video", "production", "b", "me", [None])
    assert refused.value.extra == {"current": "a"}
    store.move("video", "production", "b", "me", ["a"])
    store.move("video", "production", "b", "me", ["a"])  # a lost answer's second try: it is as was asked
    assert history(store) == ["a", "b"]


@pytest.mark.parametrize("compared", [True, False], ids=["compare and set", "in any case"])
def test_of_moves_at_once_each_is_whole_and_one_history_tells_them_all(
    engine: Engine, database_url: str, store: EncoderStore, compared: bool
) -> None:
    ids = [row(engine, f"e{number}", "video") for number in range(4)]
    replicas = [open_engine(database_url) for _ in ids]
    for name in ("first", "second", "third"):
        expected = [None] if compared else []
        together = Barrier(len(ids))

        def move(replica: Engine, encoder: str) -> bool:
            together.wait()  # noqa: B023
            try:
                EncoderStore(replica).move("video", name, encoder, encoder, expected)  # noqa: B023
            except AliasMoved:
                return False
            return True

        with ThreadPoolExecutor(len(ids)) as pool:
            done = list(pool.map(move, replicas, ids))
        alias, moves = store.alias("video", name)
        assert done.count(True) == (1 if compared else len(ids))
        assert [one.number for one in moves] == list(range(1, done.count(True) + 1))
        assert {one.encoder_id for one in moves} == {one for one, won in zip(ids, done, strict=True) if won}
        assert alias.encoder_id == moves[-1].encoder_id
    for replica in replicas:
        replica.dispose()


def test_of_a_move_and_a_deletion_at_once_no_alias_is_left_pointing_to_nothing(
    engine: Engine, database_url: str, store: EncoderStore
) -> None:
    other = open_engine(database_url)
    for number in range(6):
        encoder, together = row(engine, f"e{number}", "video"), Barrier(2)

        def move() -> bool:
            together.wait()  # noqa: B023
            try:
                EncoderStore(other).move("video", f"a{number}", encoder, "me")  # noqa: B023
            except NotFound:
                return False
            return True

        def forget() -> bool:
            together.wait()  # noqa: B023
            try:
                store.forget(encoder, "video", ROOT)  # noqa: B023
            except EncoderInUse:
                return False
            return True

        with ThreadPoolExecutor(2) as pool:
            moved, forgotten = pool.submit(move), pool.submit(forget)
        assert moved.result() != forgotten.result()
    other.dispose()


def test_what_is_used_is_not_deleted_and_says_by_what(engine: Engine, store: EncoderStore) -> None:
    row(engine, "e", "video")
    jobs = JobStore(engine)
    store.move("video", "production", "e", "me")
    deployed(engine, serving={"main": "e"})
    teaching = queued(jobs, project="video", config={"teacher": {"weights": "e"}}, state="running")
    probing = queued(jobs, project="audio", kind="probe", config={"encoder": f"{ROOT}/encoders/e/"})
    queued(jobs, config={"encoder": "e"}, state="succeeded")
    sweep = queued(jobs, project="video", kind="search", config={"train": {"teacher": {"weights": "e"}}})
    with pytest.raises(EncoderInUse) as refused:
        store.forget("e", "video", ROOT)
    uses = refused.value.extra["used_by"]
    assert uses[:2] == ["alias production", "deployment eyes"]
    assert set(uses[2:]) == {f"job {teaching.id}", f"job {sweep.id}", "job of another project"}
    with pytest.raises(EncoderInUse, match=probing.id):
        store.forget("e", None, ROOT)
    store.drop("video", "production", "me")
    with Session(engine) as session, session.begin():
        session.query(Deployment).delete()
    for job in (teaching, probing, sweep):
        jobs.delete(job)
    store.forget("e", "video", ROOT)
    assert store.list(EncoderFilter()).encoders == []


@pytest.mark.parametrize("field", ["encoder", "candidate"])
def test_a_deployment_that_names_an_encoder_holds_it_before_it_is_served(
    engine: Engine, store: EncoderStore, field: str
) -> None:
    row(engine, "e", "video")
    deployed(engine, **{field: "e"})
    with pytest.raises(EncoderInUse, match="deployment eyes"):
        store.forget("e", "video", ROOT)


def test_others_encoders_are_not_there_and_those_of_nobody_are_deleted_by_who_may_act_for_all(
    engine: Engine, store: EncoderStore
) -> None:
    row(engine, "theirs", "audio"), row(engine, "free", None)
    with pytest.raises(NotFound):
        store.forget("theirs", "video", ROOT)
    with pytest.raises(Forbidden):
        store.forget("free", "video", ROOT)
    store.forget("free", None, ROOT)
    store.forget("theirs", None, ROOT)


def test_a_listing_goes_through_all_pages_once_and_filters(engine: Engine, store: EncoderStore) -> None:
    for number in range(7):
        row(engine, f"e{number}", "video", hours=number // 2)
    row(engine, "big", "audio", encoder={"size": "B"}, objective="mae", run="job-1")
    row(engine, "brought", None, objective=None, run=None)
    store.move("video", "production", "e3", "me")
    seen, cursor = list[str](), None
    while True:
        page = store.list(EncoderFilter("video"), cursor, 3)
        seen += [encoder.id for encoder in page.encoders]
        if (cursor := page.next_cursor) is None:
            break
    assert seen == ["e6", "e5", "e4", "e3", "e2", "e1", "e0", "brought"]

    def ids(**where: str) -> list[str]:
        return [encoder.id for encoder in store.list(EncoderFilter(**where)).encoders]

    assert ids(objective="mae") == ids(size="B") == ids(job="job-1") == ids(project="audio", objective="mae") == ["big"]
    assert ids(objective="imported") == ["brought"]
    assert ids(alias="production") == ["e3"]
    assert ids(alias="production", project="audio") == []
