"""Tests for the form for a new job in a real browser."""

from __future__ import annotations

from collections.abc import Callable

from playwright.sync_api import Page, expect

from tests.support.browser.console_service import PATIENCE_MS, ConsoleService

expect.set_options(timeout=PATIENCE_MS)
OpenPage = Callable[..., Page]


def open_form(page: Page, service: ConsoleService, query: str = "") -> None:
    page.goto(f"{service.server.url}/console/new?{query}")


def test_a_field_search_opens_the_section_with_the_fields(open_page: OpenPage, service: ConsoleService) -> None:
    page = open_page()
    open_form(page, service)
    expect(page.get_by_label("checkpoint.pin_steps")).to_be_hidden()
    page.get_by_label("Search fields").fill("pin_steps")
    expect(page.get_by_label("checkpoint.pin_steps")).to_be_visible()
    expect(page.locator("#field-count")).to_contain_text("shown")
    page.get_by_label("Search fields").fill("")
    expect(page.get_by_label("checkpoint.pin_steps")).to_be_hidden()
    expect(page.locator("#field-count")).to_be_empty()


def test_fields_of_the_teacher_appear_with_the_objective_that_needs_them(
    open_page: OpenPage, service: ConsoleService
) -> None:
    page = open_page()
    open_form(page, service, "preset=demo-image-mae")
    page.locator("summary", has_text="Show the fields").click()
    weights, objective = page.get_by_label("teacher.weights", exact=True), page.get_by_label("objective.kind")
    expect(weights).to_be_hidden()
    page.get_by_label("Search fields").fill("teacher.weights")
    expect(weights).to_be_visible()
    expect(page.locator(".field", has=weights)).to_contain_text("Used only with objective.kind=amd.")
    page.get_by_label("Search fields").fill("")
    expect(weights).to_be_hidden()
    objective.select_option("amd")
    expect(weights).to_be_visible()
    expect(page.locator(".field", has=weights)).not_to_contain_text("Used only", use_inner_text=True)
    objective.select_option("mae")
    expect(weights).to_be_hidden()
    objective.select_option("amd")
    weights.fill("x")
    objective.select_option("")  # the preset's
    expect(weights).to_be_visible()  # because it has a value, which is a mistake


def test_another_preset_or_kind_keeps_what_the_user_has_typed(open_page: OpenPage, service: ConsoleService) -> None:
    page = open_page()
    open_form(page, service)
    typed = {"Name": "mine", "Labels": "team=vision", "Priority": "7", "Project": "films", "seed": "3"}
    for label, value in typed.items():
        page.get_by_label(label, exact=label != "Priority").fill(value)
    page.locator("#preset").select_option("demo-image-mae")
    page.wait_for_url("**preset=demo-image-mae**")
    for label, value in typed.items():
        expect(page.get_by_label(label, exact=label != "Priority")).to_have_value(value)
    page.locator("#kind").select_option("finetune")
    page.wait_for_url("**kind=finetune**")
    for label, value in typed.items():
        expect(page.get_by_label(label, exact=label != "Priority")).to_have_value(value)


def test_submit_stays_in_view_on_a_narrow_screen_and_never_covers_the_focus(
    open_page: OpenPage, service: ConsoleService
) -> None:
    page = open_page(width=390)
    open_form(page, service)
    expect(page.get_by_text("This job can be submitted")).to_be_attached()
    submit = page.get_by_role("button", name="Submit")
    page.locator("summary", has_text="Show the fields").click()
    for share in (0, 0.5, 1):
        page.evaluate("share => scrollTo(0, share * document.documentElement.scrollHeight)", share)
        expect(submit).to_be_in_viewport(ratio=1)
    page.evaluate("scrollTo(0, 0)")
    page.get_by_label("data.train", exact=True).focus()
    for key in ["Tab"] * 40 + ["Shift+Tab"] * 40:
        page.keyboard.press(key)
        assert page.evaluate(IS_COVERED) is False, page.evaluate("document.activeElement.id")


def test_submit_and_the_check_stay_in_view_on_a_wide_screen(open_page: OpenPage, service: ConsoleService) -> None:
    page = open_page()
    open_form(page, service)
    check = page.get_by_text("This job can be submitted")
    expect(check).to_be_visible()
    page.locator("summary", has_text="Show the fields").click()
    for share in (0, 0.5, 1):
        page.evaluate("share => scrollTo(0, share * document.documentElement.scrollHeight)", share)
        expect(page.get_by_role("button", name="Submit")).to_be_in_viewport(ratio=1)
        expect(check).to_be_in_viewport(ratio=1)
    commands = page.get_by_role("button", name="Copy").last
    commands.scroll_into_view_if_needed()
    expect(commands).to_be_in_viewport(ratio=1)
    expect(page.get_by_role("button", name="Submit")).to_be_in_viewport(ratio=1)


IS_COVERED = """() => {
    const focused = document.activeElement, bar = document.querySelector(".submit-bar");
    if (bar.contains(focused)) return false;
    const one = focused.getBoundingClientRect(), other = bar.getBoundingClientRect();
    return one.bottom > other.top && one.top < other.bottom;
}"""
