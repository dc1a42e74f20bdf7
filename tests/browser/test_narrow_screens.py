"""Tests for parts of the console that scroll sideways on narrow screens, in a real browser."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
from playwright.sync_api import Page, expect

from tests.support.browser import scenes
from tests.support.browser.console_service import PATIENCE_MS, ConsoleService

expect.set_options(timeout=PATIENCE_MS)
OpenPage = Callable[..., Page]


@pytest.mark.parametrize(("selector", "width"), [(".nav", 390), (".tabs", 320)])
def test_what_scrolls_sideways_fades_where_more_follows(
    open_page: OpenPage, service: ConsoleService, selector: str, width: int
) -> None:
    page = open_page(width=width)
    page.goto(f"{service.server.url}/console/jobs/{scenes.SUCCEEDED}")
    part = page.locator(selector)
    for position, left, right in ((0, False, True), (40, True, True), (100_000, True, False)):
        part.evaluate("(one, position) => { one.scrollLeft = position; }", position)
        for name, is_set in (("more-left", left), ("more-right", right)):
            check = expect(part).to_have_class if is_set else expect(part).not_to_have_class
            check(re.compile(rf"\b{name}\b"))
    expect(part).to_have_css("mask-image", re.compile("gradient"))


def test_nothing_fades_on_a_wide_screen(open_page: OpenPage, service: ConsoleService) -> None:
    page = open_page()
    page.goto(f"{service.server.url}/console/jobs/{scenes.SUCCEEDED}")
    for selector in (".nav", ".tabs"):
        expect(page.locator(selector)).not_to_have_class(re.compile("more-"))
        expect(page.locator(selector)).to_have_css("mask-image", "none")
