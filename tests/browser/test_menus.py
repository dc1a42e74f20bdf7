"""Tests for menus with forms in a real browser."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
from playwright.sync_api import Page, Route, expect

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


def running_job(service: ConsoleService) -> str:
    job_id = str(service.api("POST", "/jobs", json={"kind": "train", "preset": "demo-image-mae"})["id"])
    service.report(job_id)
    return job_id


def test_a_resized_field_does_not_violate_the_policy_when_its_menu_is_refreshed(
    open_page: OpenPage, service: ConsoleService
) -> None:
    job_id = running_job(service)
    page = open_page()
    page.goto(path(service, f"/jobs/{job_id}"))
    page.locator("#edit-labels").evaluate("(field) => { field.style.height = '200px'; }")  # as dragging its corner does
    service.api("PATCH", f"/jobs/{job_id}", json={"name": "renamed"})
    page.evaluate("htmx.trigger('#job-head', 'refresh')")
    expect(page.locator("#job-head h1")).to_have_text("renamed")
    expect(page.locator("#job-head .htmx-settling")).to_have_count(0)


def test_a_refresh_keeps_open_menus_and_typed_text(open_page: OpenPage, service: ConsoleService) -> None:
    job_id = running_job(service)
    page = open_page()
    page.goto(path(service, f"/jobs/{job_id}"))
    head = page.locator("#job-head")
    expect(head.locator(".state")).to_have_text("running")
    menus = head.locator("details.menu")
    assert menus.count() > 0
    for number in range(menus.count()):
        menu = menus.nth(number)
        menu.locator("summary").click()
        field = menu.locator("input, textarea").first
        field.fill("typed")
        page.evaluate("htmx.trigger('#job-head', 'refresh')")
        expect(menu).to_have_attribute("open", "")
        expect(field).to_be_focused()
        page.keyboard.press("Escape")
        expect(field).to_be_hidden()
    menus.first.locator("summary").click()
    head.get_by_label("Name").fill("typed")
    service.report(job_id, "succeeded")
    expect(page.locator("#outcome .state")).to_have_text("succeeded")  # another part that the same event refreshes
    expect(head.get_by_label("Name")).to_have_value("typed")
    expect(head.get_by_label("Name")).to_be_focused()
    expect(head.locator(".state")).to_have_text("running")
    page.keyboard.press("Escape")
    expect(head.locator(".state")).to_have_text("succeeded")


def test_a_menu_that_opens_during_a_refresh_stays_open(open_page: OpenPage, service: ConsoleService) -> None:
    page = open_page()
    page.goto(path(service, f"/jobs/{scenes.SUCCEEDED}"))
    held: list[Route] = []
    page.route("**/head", lambda route: held.append(route), times=1)
    with page.expect_request("**/head"):
        page.evaluate("htmx.trigger('#job-head', 'refresh')")
    page.locator("#job-head summary", has_text="Edit").click()
    page.get_by_label("Name", exact=True).fill("typed")
    with page.expect_response("**/head"):
        held[0].continue_()
    page.evaluate("new Promise((resolve) => setTimeout(resolve))")  # after the response has been handled
    expect(page.get_by_label("Name", exact=True)).to_have_value("typed")
    with page.expect_response("**/head"):
        page.keyboard.press("Escape")
    expect(page.get_by_label("Name", exact=True)).not_to_have_value("typed")


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
