from __future__ import annotations

from amd.data.faults import BadSampleLedger, UnreadableSample


def _unreadable(number: int) -> UnreadableSample:
    return UnreadableSample(record=number, location=f"clip{number}.mp4", reason="truncated")


def test_a_sample_that_fails_repeatedly_is_counted_once() -> None:
    ledger = BadSampleLedger()
    assert ledger.add([_unreadable(3), _unreadable(5), _unreadable(3)]) == [_unreadable(3), _unreadable(5)]
    assert ledger.add([_unreadable(5), _unreadable(7)]) == [_unreadable(7)]
    assert list(ledger) == [_unreadable(3), _unreadable(5), _unreadable(7)]


def test_a_resumed_ledger_remembers_recorded_samples() -> None:
    assert BadSampleLedger([_unreadable(1)]).add([_unreadable(1)]) == []


def test_a_bad_fraction_equal_to_the_limit_is_allowed() -> None:
    ledger = BadSampleLedger([_unreadable(i) for i in range(5)])
    assert not ledger.exceeds(0.05, 100)
    assert ledger.exceeds(0.049, 100)
    assert ledger.exceeds(0.0, 100)
    assert not BadSampleLedger().exceeds(0.0, 100)


def test_the_error_lists_samples_and_the_limit() -> None:
    text = str(BadSampleLedger([_unreadable(i) for i in range(25)]).fault(0.01, 500))
    assert "25 of 500" in text
    assert "data.max_bad_fraction=0.01" in text
    assert "clip0.mp4: truncated" in text
    assert "and 5 more" in text
