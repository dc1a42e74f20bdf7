"""Tests for menus with forms in a real browser."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
from playwright.sync_api import Page, expect

from tests.support.browser import scenes
from tests.support.browser.console_service import PATIENCE_MS, ConsoleService

expect.set_options(timeout=PATIENCE_MS)
OpenPage = Callable[..., Page]


def path(service: ConsoleService, rest: str) -> str:
    return f"{service.server.url}/console{rest}"


def test_a_new_key_is_listed_and_its_menu_closes(open_page: OpenPage, service: ConsoleService) -> None:
    page = open_page()
    page.get_by_role("link", name="Keys").click()
    page.locator("summary", has_text="New key").click()
    page.get_by_label("Name of the person or program").fill("Katherine")
    page.get_by_role("button", name="Create").click()
    expect(page.locator("#keys")).to_contain_text("Katherine")
    expect(page.get_by_label("Name of the person or program")).to_be_hidden()
    page.locator("#new-key").get_by_role("button", name="Copy").click()
    expect(page.locator("#new-key button")).to_have_text(re.compile("Copied|Selected"))


@pytest.mark.parametrize(
    ("rest", "menu"),
    [
        ("/keys", "New key"),
        (f"/encoders/{scenes.ENCODER}", "Deploy"),
        (f"/encoders/{scenes.ENCODER}", "Move an alias here"),
        (f"/jobs/{scenes.SUCCEEDED}", "Edit"),
    ],
)
def test_menus_fit_a_narrow_screen(open_page: OpenPage, service: ConsoleService, rest: str, menu: str) -> None:
    page = open_page(width=390)
    page.goto(path(service, rest))
    page.locator("summary", has_text=menu).click()
    box = page.locator("details[open] > .sheet").bounding_box()
    assert box is not None
    assert box["x"] >= 0
    assert box["width"] > 300
    assert box["x"] + box["width"] <= 390
