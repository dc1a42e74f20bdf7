"""Tests for the sweep pages in a real browser."""

from __future__ import annotations

from collections.abc import Callable

from playwright.sync_api import Page, expect

from amd.storage import join, read_json, remove, write_json
from amd.training.run_folder import run_folder
from tests.support.browser import scenes
from tests.support.browser.console_service import PATIENCE_MS, ConsoleService

expect.set_options(timeout=PATIENCE_MS)
OpenPage = Callable[..., Page]


def path(service: ConsoleService, rest: str) -> str:
    return f"{service.server.url}/console{rest}"


def test_a_sweep_page_shows_its_map_and_the_trials_in_a_cell(open_page: OpenPage, service: ConsoleService) -> None:
    page = open_page()
    page.get_by_role("link", name="Sweeps").click()
    page.get_by_role("link", name="Mask ratios of the digits").click()
    expect(page.locator("#map canvas").last).to_be_visible()
    expect(page.locator("#parallel canvas").last).to_be_visible()
    (label, order) = page.evaluate(
        """() => {
        const axis = echarts.getInstanceByDom(document.getElementById("parallel")).getOption().parallelAxis[0];
        return [axis.axisLabel.backgroundColor, axis.z];
    }"""
    )
    assert label == page.evaluate("amdColours().surface"), "lines must not cross the tick labels"
    assert order > 2, "the lines of a series have z=2"
    expect(page.locator(".notice").first).to_contain_text("Best so far")
    rows = page.locator("#trials tbody tr:visible")
    before = rows.count()
    found = page.evaluate(
        """() => {
        const chart = echarts.getInstanceByDom(document.getElementById("map"));
        return chart.convertToPixel({seriesIndex: 0}, chart.getOption().series[0].data[0].value.slice(0, 2));
    }"""
    )
    page.locator("#map canvas").last.click(position={"x": found[0], "y": found[1]})
    expect(rows).to_have_count(1)
    page.get_by_role("button", name="Show all trials").click()
    expect(rows).to_have_count(before)


def test_trials_are_sorted_by_a_heading_and_stay_so_when_the_page_is_refreshed(
    open_page: OpenPage, service: ConsoleService
) -> None:
    page = open_page()
    page.goto(path(service, f"/sweeps/{scenes.SWEEP}"))
    first, heading = page.locator("#trials tbody tr").first, page.locator("#trials th[aria-sort]")
    expect(first).to_have_attribute("data-trial", "8")
    page.get_by_role("button", name="Clips/s").click()
    expect(first).to_have_attribute("data-trial", "9")
    page.get_by_role("button", name="Trial", exact=True).click()
    expect(first).to_have_attribute("data-trial", "0")
    record = read_json(join(run_folder(service.root, scenes.SWEEP), "trials", "0017.json"))
    added = join(run_folder(service.root, scenes.SWEEP), "trials", "0019.json")
    write_json(added, {**record, "number": 19})
    page.evaluate("htmx.trigger('#sweep-summary', 'refresh')")
    expect(page.locator("#trials tbody tr[data-trial='19']")).to_be_visible()
    expect(heading).to_have_text("Trial")
    expect(first).to_have_attribute("data-trial", "0")
    remove(added)


def test_a_running_trial_can_be_stopped_from_its_sweep_page(open_page: OpenPage, service: ConsoleService) -> None:
    page = open_page()
    page.goto(path(service, f"/sweeps/{scenes.SWEEP}"))
    page.locator("#trials tbody tr[data-trial='17']").get_by_role("button", name="Stop").click()
    expect(page.locator("#trials tbody tr[data-trial='17']")).to_contain_text("saving a checkpoint")
    assert [
        trial["number"] for trial in service.api("GET", f"/jobs/{scenes.SWEEP}/trials") if trial["stop_requested"]
    ] == [17]
