"""Tests for aliases, deletion guards and listings, on SQLite and PostgreSQL."""

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
from service.web.errors import AliasMoved, EncoderInUse, IllegalAction, NotFound
from tests.support.encoders.encoder_cards import index_encoder
from tests.support.service.fake_cluster import queued

ROOT = "/root"


@pytest.fixture
def store(engine: Engine) -> EncoderStore:
    return EncoderStore(engine)


def history(store: EncoderStore, name: str = "production", project: str = "video") -> list[str | None]:
    return [move.encoder_id for move in store.alias(project, name)[1]]


def add_deployment(engine: Engine, **fields: object) -> None:
    defaults = {"candidate": None, "share": 0.0, "settings": {}, "serving": {}, "state": "healthy", "message": ""}
    times = {"created_by": "me", "created_at": 0.0, "changed_at": 0.0, "version": 1, "project": "video"}
    with Session(engine) as session, session.begin():
        session.add(Deployment(**{"name": "eyes", "encoder": "another", **defaults, **times, **fields}))


def test_the_history_of_an_alias_survives_its_deletion(engine: Engine, store: EncoderStore) -> None:
    first, second = index_encoder(engine, "a", "video"), index_encoder(engine, "b", "video")
    store.move_alias("video", "production", first, "me")
    store.move_alias("video", "production", second, "you")
    store.move_alias("video", "production", second, "you")  # no-op
    assert store.resolve("production", "video").id == "b"
    store.delete_alias("video", "production", "me")
    with pytest.raises(NotFound):
        store.resolve("production", "video")
    with pytest.raises(NotFound):
        store.delete_alias("video", "production", "me")
    store.move_alias("video", "production", first, "me")
    assert history(store) == ["a", "b", None, "a"]
    assert [move.actor for move in store.alias("video", "production")[1]] == ["me", "you", "me", "me"]
    assert store.alias("video", "production")[0].moves == 4


def test_an_alias_belongs_to_a_project_and_points_to_a_visible_encoder(engine: Engine, store: EncoderStore) -> None:
    (
        index_encoder(engine, "ours", "video"),
        index_encoder(engine, "theirs", "audio"),
        index_encoder(engine, "external", "default"),
    )
    store.move_alias("video", "production", "ours", "me")
    store.move_alias("audio", "production", "theirs", "me")
    store.move_alias("default", "production", "external", "me")
    assert store.resolve("production", "video").id == "ours"
    assert store.resolve("production", "audio").id == "theirs"
    assert store.resolve("production").id == "external"
    for name in ("theirs", "external", "nowhere"):
        with pytest.raises(NotFound):
            store.move_alias("video", "production", name, "me")
        with pytest.raises(NotFound):
            store.resolve(name, "video")
    index_encoder(engine, "newer", "video")
    store.move_alias("video", "candidate", "newer", "me")
    # A promotion resolves the other alias immediately.
    store.move_alias("video", "production", "candidate", "me")
    assert store.alias("video", "production")[0].encoder_id == "newer"


def test_an_alias_cannot_reuse_an_encoder_id_but_shadows_an_encoder_published_later(
    engine: Engine, store: EncoderStore
) -> None:
    index_encoder(engine, "a", "video"), index_encoder(engine, "theirs", "audio")
    with pytest.raises(IllegalAction, match="a is the ID of an encoder"):
        store.move_alias("video", "a", "a", "me")
    store.move_alias("video", "theirs", "a", "me")  # an encoder in another project is not disclosed
    assert store.resolve("theirs", "video").id == "a"
    store.move_alias("video", "production", "a", "me")
    index_encoder(engine, "production", "video")
    assert store.resolve("production", "video").id == "a"


def test_a_move_fails_unless_the_alias_points_to_the_expected_encoder(engine: Engine, store: EncoderStore) -> None:
    index_encoder(engine, "a", "video"), index_encoder(engine, "b", "video")
    with pytest.raises(AliasMoved, match="does not exist"):
        store.move_alias("video", "production", "a", "me", ["b"])
    store.move_alias("video", "production", "a", "me", [None])
    with pytest.raises(AliasMoved) as rejected:
        store.move_alias("video", "production", "b", "me", [None])
    assert rejected.value.extra == {"current": "a"}
    store.move_alias("video", "production", "b", "me", ["a"])
    store.move_alias("video", "production", "b", "me", ["a"])  # a retry after a lost response is a no-op
    assert history(store) == ["a", "b"]


@pytest.mark.parametrize("conditional", [True, False], ids=["compare and set", "unconditional"])
def test_concurrent_moves_are_atomic_and_share_one_history(
    engine: Engine, database_url: str, store: EncoderStore, conditional: bool
) -> None:
    ids = [index_encoder(engine, f"e{number}", "video") for number in range(4)]
    replicas = [open_engine(database_url) for _ in ids]
    for name in ("first", "second", "third"):
        expected = [None] if conditional else []
        barrier = Barrier(len(ids))

        def move(replica: Engine, encoder: str) -> bool:
            barrier.wait()  # noqa: B023
            try:
                EncoderStore(replica).move_alias("video", name, encoder, encoder, expected)  # noqa: B023
            except AliasMoved:
                return False
            return True

        with ThreadPoolExecutor(len(ids)) as pool:
            succeeded = list(pool.map(move, replicas, ids))
        alias, moves = store.alias("video", name)
        assert succeeded.count(True) == (1 if conditional else len(ids))
        assert [one.number for one in moves] == list(range(1, succeeded.count(True) + 1))
        assert {one.encoder_id for one in moves} == {one for one, won in zip(ids, succeeded, strict=True) if won}
        assert alias.encoder_id == moves[-1].encoder_id
    for replica in replicas:
        replica.dispose()


def test_a_concurrent_move_and_deletion_leave_no_dangling_alias(
    engine: Engine, database_url: str, store: EncoderStore
) -> None:
    other = open_engine(database_url)
    for number in range(6):
        encoder, barrier = index_encoder(engine, f"e{number}", "video"), Barrier(2)

        def move() -> bool:
            barrier.wait()  # noqa: B023
            try:
                EncoderStore(other).move_alias("video", f"a{number}", encoder, "me")  # noqa: B023
            except NotFound:
                return False
            return True

        def delete() -> bool:
            barrier.wait()  # noqa: B023
            try:
                store.delete_encoder(encoder, "video", ROOT, "me")  # noqa: B023
            except EncoderInUse:
                return False
            return True

        with ThreadPoolExecutor(2) as pool:
            moved, deleted = pool.submit(move), pool.submit(delete)
        assert moved.result() != deleted.result()
    other.dispose()


def test_an_encoder_in_use_is_not_deleted_and_the_error_lists_its_uses(engine: Engine, store: EncoderStore) -> None:
    index_encoder(engine, "e", "video")
    jobs = JobStore(engine)
    store.move_alias("video", "production", "e", "me")
    add_deployment(engine, serving={"main": "e"})
    training = queued(jobs, project="video", config={"teacher": {"weights": "e"}}, state="running")
    probing = queued(jobs, project="audio", kind="probe", config={"encoder": f"{ROOT}/encoders/e/"})
    queued(jobs, config={"encoder": "e"}, state="succeeded")
    sweep = queued(jobs, project="video", kind="search", config={"train": {"teacher": {"weights": "e"}}})
    with pytest.raises(EncoderInUse) as rejected:
        store.delete_encoder("e", "video", ROOT, "me")
    uses = rejected.value.extra["used_by"]
    assert uses[:2] == ["alias production", "deployment eyes"]
    assert set(uses[2:]) == {f"job {training.id}", f"job {sweep.id}", "job of another project"}
    with pytest.raises(EncoderInUse, match=probing.id):
        store.delete_encoder("e", None, ROOT, "me")
    store.delete_alias("video", "production", "me")
    with Session(engine) as session, session.begin():
        session.query(Deployment).delete()
    for job in (training, probing, sweep):
        jobs.change(job, "cancelled", state="cancelled")
    store.delete_encoder("e", "video", ROOT, "me")
    assert store.list(EncoderFilter()).encoders == []


@pytest.mark.parametrize("field", ["encoder", "candidate"])
def test_a_deployment_protects_its_encoder_before_serving_it(engine: Engine, store: EncoderStore, field: str) -> None:
    index_encoder(engine, "e", "video")
    add_deployment(engine, **{field: "e"})
    with pytest.raises(EncoderInUse, match="deployment eyes"):
        store.delete_encoder("e", "video", ROOT, "me")


def test_encoders_in_other_projects_are_not_deleted(engine: Engine, store: EncoderStore) -> None:
    index_encoder(engine, "theirs", "audio"), index_encoder(engine, "external", "default")
    for name in ("theirs", "external"):
        with pytest.raises(NotFound):
            store.delete_encoder(name, "video", ROOT, "me")
        store.delete_encoder(name, None, ROOT, "me")


@pytest.mark.parametrize("value", ["e", "{root}/encoders/e", "file://{root}/encoders/e/encoder.safetensors"])
def test_an_active_job_protects_an_encoder_referenced_in_any_form(
    engine: Engine, store: EncoderStore, value: str
) -> None:
    index_encoder(engine, "e", "video")
    queued(JobStore(engine), project="video", kind="probe", config={"encoder": value.format(root=ROOT)})
    with pytest.raises(EncoderInUse):
        store.delete_encoder("e", "video", ROOT, "me")


def test_the_error_about_a_missing_encoder_states_what_its_job_does(engine: Engine, store: EncoderStore) -> None:
    job = queued(JobStore(engine), project="video", state="running").id
    with pytest.raises(NotFound, match=f"no encoder '{job}': that job's state is running, .* when it succeeds"):
        store.resolve(job, "video")
    probe = queued(JobStore(engine), project="video", kind="probe", state="running").id
    for name, project in ((job, "audio"), (probe, "video"), ("other", None)):
        with pytest.raises(NotFound, match=f"no encoder '{name}'$"):
            store.resolve(name, project)


def test_names_are_those_of_visible_aliases_and_of_the_jobs_with_the_same_ids(
    engine: Engine, store: EncoderStore
) -> None:
    named, unnamed = (queued(JobStore(engine), project="video", name=name).id for name in ("cats", None))
    for job in (named, unnamed):
        index_encoder(engine, job, "video", run=job)
    index_encoder(engine, "teacher", "video", run=named)
    store.move_alias("video", "production", named, "me")
    rows = store.list(EncoderFilter("video")).encoders
    assert store.names_of(rows, "video").of_jobs == {named: "cats"}
    assert [alias.name for alias in store.names_of(rows, "video").aliases] == ["production"]
    assert not store.names_of(rows, "audio").aliases


def test_paging_returns_every_matching_encoder_exactly_once(engine: Engine, store: EncoderStore) -> None:
    for number in range(7):
        index_encoder(engine, f"e{number}", "video", hours=number // 2)
    index_encoder(engine, "big", "audio", encoder={"size": "B"}, objective="mae", run="job-1")
    index_encoder(engine, "custom", "video", objective=None, run=None)
    store.move_alias("video", "production", "e3", "me")
    listed, cursor = list[str](), None
    while True:
        page = store.list(EncoderFilter("video"), cursor, 3)
        listed += [encoder.id for encoder in page.encoders]
        if (cursor := page.next_cursor) is None:
            break
    assert listed == ["e6", "e5", "e4", "e3", "e2", "e1", "e0", "custom"]

    def ids(**where: str) -> list[str]:
        return [encoder.id for encoder in store.list(EncoderFilter(**where)).encoders]

    assert ids(objective="mae") == ids(size="B") == ids(job="job-1") == ids(project="audio", objective="mae") == ["big"]
    assert ids(objective="imported") == ["custom"]
    assert ids(alias="production") == ["e3"]
    assert ids(alias="production", project="audio") == []
