from __future__ import annotations

from amd.data.faults import Bad, BadSampleLedger


def _bad(number: int) -> Bad:
    return Bad(record=number, location=f"clip{number}.mp4", reason="truncated")


def test_a_bad_sample_met_again_is_counted_once() -> None:
    ledger = BadSampleLedger()
    assert ledger.add([_bad(3), _bad(5), _bad(3)]) == [_bad(3), _bad(5)]
    assert ledger.add([_bad(5), _bad(7)]) == [_bad(7)]
    assert list(ledger) == [_bad(3), _bad(5), _bad(7)]


def test_a_resumed_ledger_knows_what_was_written_before() -> None:
    assert BadSampleLedger([_bad(1)]).add([_bad(1)]) == []


def test_the_limit_is_passed_not_reached() -> None:
    ledger = BadSampleLedger([_bad(i) for i in range(5)])
    assert not ledger.over(0.05, 100)
    assert ledger.over(0.049, 100)
    assert ledger.over(0.0, 100)
    assert not BadSampleLedger().over(0.0, 100)


def test_the_fault_lists_samples_and_the_remedy() -> None:
    text = str(BadSampleLedger([_bad(i) for i in range(25)]).fault(0.01, 500))
    assert "25 of 500" in text
    assert "data.max_bad_fraction=0.01" in text
    assert "clip0.mp4: truncated" in text
    assert "and 5 more" in text
