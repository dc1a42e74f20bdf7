from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from amd.data.loading.order import Plan, Span, epoch_order, micro_batches, sample_draws, share


def _plan(records: int, batch: int, rank: int, world: int, micro: int, train: bool = True) -> Plan:
    return Plan(records, batch, rank=rank, world=world, micro_batch=micro, seed=7, train=train)


def _places(spans: list[Span]) -> dict[tuple[int, int], int]:
    """(epoch, position) -> record."""
    return {(s.epoch, s.position + i): s.numbers[i] for s in spans for i in range(s.places)}


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 30), st.integers(1, 12), st.integers(1, 5), st.integers(1, 7), st.integers(0, 30))
def test_ranks_and_micro_batches_share_an_epoch_exactly(
    records: int, batch: int, world: int, micro: int, start: int
) -> None:
    batch = min(batch, records)
    stop = start + 2 * (records // batch)
    read: dict[tuple[int, int], int] = {}
    count = 0
    for rank in range(world):
        spans = list(_plan(records, batch, rank, world, micro).spans(start, stop))
        assert all(1 <= span.places <= micro for span in spans)
        read |= _places(spans)
        count += sum(span.places for span in spans)
    assert count == len(read) == (stop - start) * batch  # no place is read twice, none is left out
    # One rank that reads whole steps meets the same record in each place: the stream does not know of the sharding.
    assert read == _places(list(_plan(records, batch, 0, 1, batch).spans(start, stop)))


@given(st.integers(1, 60), st.integers(1, 20))
def test_no_record_comes_twice_in_an_epoch(records: int, batch: int) -> None:
    batch = min(batch, records)
    plan = _plan(records, batch, 0, 1, batch)
    for epoch in range(2):
        steps = plan.steps_per_epoch
        read = _places(list(plan.spans(epoch * steps, (epoch + 1) * steps)))
        assert {place[0] for place in read} == {epoch}
        assert len(set(read.values())) == len(read) == steps * batch


def test_a_run_taken_up_in_mid_epoch_reads_on_where_it_stopped() -> None:
    whole = list(_plan(50, 8, 0, 1, 3).spans(0, 20))
    assert list(_plan(50, 8, 0, 1, 3).spans(0, 7)) + list(_plan(50, 8, 0, 1, 3).spans(7, 20)) == whole


def test_stand_ins_are_the_next_records_of_the_order() -> None:
    plan = _plan(10, 5, 1, 2, 3)
    order = epoch_order(10, seed=7, epoch=0)
    first = next(iter(plan.spans(0, 1)))
    assert (first.position, first.places) == (2, 3)
    assert first.numbers == np.take(order, np.arange(2, 2 + 3 + 9), mode="wrap").tolist()


@given(st.integers(1, 40), st.integers(1, 20), st.integers(1, 4), st.integers(1, 5))
def test_an_evaluation_reads_every_record_once_in_order(records: int, batch: int, world: int, micro: int) -> None:
    numbers: list[int] = []
    for rank in range(world):
        plan = _plan(records, batch, rank, world, micro, train=False)
        spans = list(plan.spans(0, plan.steps_per_epoch))
        assert all(len(span.numbers) == span.places for span in spans)
        numbers += [number for span in spans for number in span.numbers]
    assert sorted(numbers) == list(range(records))


def test_the_order_follows_from_seed_and_epoch_and_has_not_moved() -> None:
    assert epoch_order(8, 0, 0).tolist() == epoch_order(8, 0, 0).tolist()
    assert epoch_order(100, 0, 0).tolist() != epoch_order(100, 0, 1).tolist()
    assert epoch_order(100, 0, 0).tolist() != epoch_order(100, 1, 0).tolist()
    # A change here would make resumed runs read other samples than they would have.
    assert epoch_order(8, 0, 0).tolist() == [6, 3, 5, 0, 7, 2, 1, 4]
    assert sample_draws(1, 2, 3).randrange(1000) == 24


def test_shares_are_equal_and_micro_batches_consecutive() -> None:
    assert [share(10, rank, 4) for rank in range(4)] == [range(2), range(2, 5), range(5, 7), range(7, 10)]
    assert micro_batches(range(4, 11), 3) == [range(4, 7), range(7, 10), range(10, 11)]
