"""Tests for error codes and their statuses, and for passing refusals between processes."""

from __future__ import annotations

import pickle
from typing import get_args

import pytest

from service.web.errors import ERROR_RESPONSES, Refusal, RefusalCode, ServiceError


def test_every_error_has_a_status() -> None:
    codes = [kind.code for kind in ServiceError.__subclasses__() if kind is not Refusal]
    assert len(codes) == len(set(codes))
    assert {*codes, *get_args(RefusalCode)} <= ERROR_RESPONSES.keys()
    assert not set(codes) & set(get_args(RefusalCode))


@pytest.mark.parametrize("code", get_args(RefusalCode))
def test_a_refusal_can_be_pickled(code: RefusalCode) -> None:
    refusal = Refusal(code, "why", index=0, retry_after=1.5, reason="w")
    copy = pickle.loads(pickle.dumps(refusal))
    assert type(copy) is Refusal
    assert (str(copy), copy.code, copy.message, copy.extra) == ("why", code, "why", refusal.extra)
    assert copy.extra == {"index": 0, "retry_after": 1.5, "reason": "w"}
    assert pickle.loads(pickle.dumps(Refusal(code, "why"))).extra == {}
