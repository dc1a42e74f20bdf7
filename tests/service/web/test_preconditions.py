"""Tests for conditional changes with `If-Match`."""

from __future__ import annotations

import pytest

from service.web.errors import PreconditionFailed
from service.web.preconditions import check_match


@pytest.mark.parametrize("if_match", [None, "*", '"1"', '"0", "1"', ' "1" '])
def test_a_change_is_allowed_if_if_match_is_absent_a_star_or_the_current_tag(if_match: str | None) -> None:
    check_match(if_match, '"1"')


@pytest.mark.parametrize("if_match", ['"0"', 'W/"1"', "1", ""])
def test_weak_and_outdated_tags_do_not_match(if_match: str) -> None:
    with pytest.raises(PreconditionFailed, match="has changed") as raised:
        check_match(if_match, '"1"')
    assert raised.value.extra == {"current": '"1"'}


def test_only_a_request_without_the_header_can_create_an_object() -> None:
    check_match(None, None)
    with pytest.raises(PreconditionFailed, match="does not exist"):
        check_match("*", None)
