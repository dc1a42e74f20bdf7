from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from amd.data.loading.order import (
    EpochPlan,
    SampleRange,
    epoch_order,
    micro_batches,
    sample_draws,
    share,
    with_following,
)


def _plan(records: int, batch: int, rank: int, world: int, micro: int, train: bool = True) -> EpochPlan:
    return EpochPlan(records, batch, rank=rank, world=world, micro_batch=micro, seed=7, train=train)


def _records_by_position(sample_ranges: list[SampleRange]) -> dict[tuple[int, int], int]:
    """Map (epoch, position) to the record read at that position."""
    return {(r.epoch, r.position + i): r.numbers[i] for r in sample_ranges for i in range(r.size)}


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 30), st.integers(1, 12), st.integers(1, 5), st.integers(1, 7), st.integers(0, 30))
def test_ranks_and_micro_batches_read_each_position_exactly_once(
    records: int, batch: int, world: int, micro: int, start: int
) -> None:
    batch = min(batch, records)
    stop = start + 2 * (records // batch)
    read: dict[tuple[int, int], int] = {}
    count = 0
    for rank in range(world):
        sample_ranges = list(_plan(records, batch, rank, world, micro).sample_ranges(start, stop))
        assert all(1 <= r.size <= micro for r in sample_ranges)
        read |= _records_by_position(sample_ranges)
        count += sum(r.size for r in sample_ranges)
    assert count == len(read) == (stop - start) * batch  # no position is read twice or skipped
    # A single rank reads the same record at each position: the stream does not depend on sharding.
    assert read == _records_by_position(list(_plan(records, batch, 0, 1, batch).sample_ranges(start, stop)))


@given(st.integers(1, 60), st.integers(1, 20))
def test_no_record_repeats_within_an_epoch(records: int, batch: int) -> None:
    batch = min(batch, records)
    plan = _plan(records, batch, 0, 1, batch)
    for epoch in range(2):
        steps = plan.steps_per_epoch
        read = _records_by_position(list(plan.sample_ranges(epoch * steps, (epoch + 1) * steps)))
        assert {position[0] for position in read} == {epoch}
        assert len(set(read.values())) == len(read) == steps * batch


def test_a_run_resumed_mid_epoch_continues_the_stream() -> None:
    whole = list(_plan(50, 8, 0, 1, 3).sample_ranges(0, 20))
    assert list(_plan(50, 8, 0, 1, 3).sample_ranges(0, 7)) + list(_plan(50, 8, 0, 1, 3).sample_ranges(7, 20)) == whole


def test_substitutes_are_the_next_records_in_order() -> None:
    plan = _plan(10, 5, 1, 2, 3)
    order = epoch_order(10, seed=7, epoch=0)
    first = next(iter(plan.sample_ranges(0, 1)))
    assert (first.position, first.size) == (2, 3)
    assert first.numbers == np.take(order, np.arange(2, 2 + 3 + 9), mode="wrap").tolist()


@given(st.integers(1, 40), st.integers(1, 20), st.integers(1, 4), st.integers(1, 5))
def test_an_evaluation_reads_every_record_once_in_order(records: int, batch: int, world: int, micro: int) -> None:
    numbers: list[int] = []
    for rank in range(world):
        plan = _plan(records, batch, rank, world, micro, train=False)
        sample_ranges = list(plan.sample_ranges(0, plan.steps_per_epoch))
        assert all(len(r.numbers) == r.size for r in sample_ranges)
        numbers += [number for r in sample_ranges for number in r.numbers]
    assert sorted(numbers) == list(range(records))


def test_the_order_for_a_given_seed_and_epoch_never_changes() -> None:
    assert epoch_order(8, 0, 0).tolist() == epoch_order(8, 0, 0).tolist()
    assert epoch_order(100, 0, 0).tolist() != epoch_order(100, 0, 1).tolist()
    assert epoch_order(100, 0, 0).tolist() != epoch_order(100, 1, 0).tolist()
    # A change here would make resumed runs read different samples.
    assert epoch_order(8, 0, 0).tolist() == [6, 3, 5, 0, 7, 2, 1, 4]
    assert sample_draws(1, 2, 3).randrange(1000) == 24


def test_rank_shares_are_equal_and_micro_batches_are_consecutive() -> None:
    assert [share(10, rank, 4) for rank in range(4)] == [range(2), range(2, 5), range(5, 7), range(7, 10)]
    assert micro_batches(range(4, 11), 3) == [range(4, 7), range(7, 10), range(10, 11)]


@given(st.integers(0, 60), st.integers(1, 4), st.integers(1, 9))
def test_few_lists_give_each_process_its_next_items(items: int, processes: int, distance: int) -> None:
    known: dict[int, list[int]] = {}
    lists = 0
    for number, (item, following) in enumerate(with_following(range(items), processes, distance)):
        assert item == number
        process = number % processes
        if following is None:
            assert known[process].pop(0) == item
        else:
            known[process] = list(following)
            lists += 1
        next_items = list(range(number + processes, items, processes))
        assert known[process][:distance] == next_items[:distance]
    assert lists <= processes * (1 + items // processes // max(1, distance // 2))
    assert number + 1 == items if items else not known
