"""Tests for the map of 2,000 embeddings in a real browser: colours, a lasso, neighbours and two linked maps."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from playwright.sync_api import Page, expect

from tests.support.browser import scenes
from tests.support.browser.console_service import EMBEDDED_SAMPLES, PATIENCE_MS, ConsoleService
from tests.support.browser.embedded_digits import HOSTILE

expect.set_options(timeout=PATIENCE_MS)
OpenPage = Callable[..., Page]


def open_map(page: Page, service: ConsoleService, job_id: str, other: str = "") -> None:
    page.goto(f"{service.server.url}/console/jobs/{job_id}/map?other={other}")
    expect(page.locator("#map-charts canvas").last).to_be_visible()
    expect(page.locator("#map-groups button").first).to_be_visible()


def position_of(page: Page, location: str, chart: int = 0) -> tuple[float, float]:
    """Return a sample's position in the browser window, in pixels."""
    found = page.evaluate(
        """async ([location, number]) => {
        const figure = document.querySelectorAll("#map-charts figure")[number];
        const data = await (await fetch(`${figure.dataset.url}.json`)).json();
        const element = figure.querySelector(".chart"), row = data.locations.indexOf(location);
        const chart = echarts.getInstanceByDom(element), box = element.getBoundingClientRect();
        const [x, y] = chart.convertToPixel("grid", [data.x[row], data.y[row]]);
        return [box.left + x, box.top + y];
    }""",
        [location, chart],
    )
    return found[0], found[1]


def drag_around(page: Page, chart: int, corners: list[tuple[float, float]]) -> None:
    """Drag the mouse around an area, whose corners are fractions of the chart's size."""
    box = page.locator("#map-charts .chart").nth(chart).bounding_box()
    assert box is not None
    points = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in corners]
    page.mouse.move(*points[0])
    page.mouse.down()
    for point in [*points[1:], points[0]]:
        page.mouse.move(*point, steps=4)
    page.mouse.up()


def drawn(page: Page, chart: int = 0) -> str:
    """Return the pixels of a chart as a data URL."""
    return str(
        page.locator("#map-charts .chart").nth(chart).evaluate("(one) => echarts.getInstanceByDom(one).getDataURL()")
    )


def test_samples_are_coloured_selected_with_a_lasso_and_listed(open_page: OpenPage, service: ConsoleService) -> None:
    page = open_page()
    page.get_by_role("link", name="Digits, embedded by encoder A").click()  # two clicks from the list
    page.get_by_role("link", name="Map", exact=True).click()
    expect(page.locator("#map-charts header")).to_contain_text("digits-0: 1\u202f999 samples, PCA")
    expect(page.locator("#map-charts header")).to_contain_text("; 1 sample could not be read")
    expect(page.locator("#map-selection-panel")).to_be_hidden()
    expect(page.locator("#map-groups button")).to_have_count(10)
    expect(page.locator("#map-groups button").first).to_contain_text("label 0")
    by_label = drawn(page)
    page.get_by_label("Colour by").select_option("cluster")
    expect(page.locator("#map-groups button").first).to_contain_text("cluster 0")
    by_cluster = drawn(page)
    page.get_by_label("Colour by").select_option("score")
    expect(page.locator("#map-groups button").first).to_contain_text(" to ")
    assert len({by_label, by_cluster, drawn(page)}) == 3

    drag_around(page, 0, [(0.02, 0.02), (0.5, 0.02), (0.5, 0.98), (0.02, 0.98)])
    expect(page.locator("#map-selection-title")).to_have_text(
        re.compile(r"^[1-9][\d\s]* selected, the first 60 shown$")
    )
    expect(page.locator("#map-selection li")).to_have_count(60)
    expect(page.locator("#map-selection img").first).to_be_visible()
    with page.expect_download() as downloading:
        page.get_by_role("button", name="Download locations").click()
    title = page.locator("#map-selection-title").inner_text()
    lines = Path(downloading.value.path()).read_text().splitlines()
    assert len(lines) == int("".join(title.partition(" selected")[0].split())) < EMBEDDED_SAMPLES
    page.get_by_role("button", name="Clear").click()
    expect(page.locator("#map-selection-panel")).to_be_hidden()
    page.locator("#map-groups button").first.click()  # without a mouse
    expect(page.locator("#map-selection li").first).to_be_visible()


def test_hovering_shows_a_picture_and_clicking_shows_neighbours(open_page: OpenPage, service: ConsoleService) -> None:
    page = open_page()
    open_map(page, service, scenes.EMBEDDED)
    page.locator("#map-charts").scroll_into_view_if_needed()
    x, y = position_of(page, "/data/digits/000005.png")
    page.mouse.move(x, y)
    expect(page.locator("#map-tip")).to_be_visible()
    expect(page.locator("#map-tip img")).to_be_visible()
    page.mouse.down()
    page.mouse.up()
    expect(page.locator("#map-neighbours li")).to_have_count(12)
    expect(page.locator("#map-sample dl")).to_contain_text("Similarity to center")
    shown = page.locator("#map-sample p").inner_text()
    page.locator("#map-neighbours li button").first.click()
    expect(page.locator("#map-sample p")).not_to_have_text(shown)
    expect(page.locator("#map-sample img")).to_be_visible()


def test_a_selection_is_shown_in_both_maps(open_page: OpenPage, service: ConsoleService) -> None:
    page = open_page()
    open_map(page, service, scenes.EMBEDDED)
    page.get_by_label("Compare with").select_option(label="Digits, embedded by encoder B")
    page.wait_for_url(f"**/map?other={scenes.OTHER_EMBEDDED}")
    expect(page.locator("#map-charts canvas")).to_have_count(2)
    expect(page.locator("#map-groups button").first).to_be_visible()
    before = drawn(page, 0), drawn(page, 1)
    drag_around(page, 1, [(0.3, 0.3), (0.7, 0.3), (0.7, 0.7), (0.3, 0.7)])
    expect(page.locator("#map-selection-title")).to_contain_text("selected")
    assert drawn(page, 0) != before[0]
    assert drawn(page, 1) != before[1]
    page.locator("#map-selection li button").first.click()
    expect(page.locator("#map-neighbours h3")).to_have_text(["digits-0", "digits-1"])
    expect(page.locator("#map-neighbours li")).to_have_count(24)


def test_hostile_locations_are_displayed_as_plain_text(open_page: OpenPage, service: ConsoleService) -> None:
    page = open_page()
    open_map(page, service, scenes.EMBEDDED)
    page.locator("#map-groups button").first.click()
    page.locator("#map-selection li button").first.click()  # record 0
    expect(page.locator("#map-sample p")).to_have_text(HOSTILE)
    expect(page.locator("#map-neighbours li")).to_have_count(12)
    assert page.evaluate("window.hacked") is None
    assert page.evaluate("[...document.images].every((one) => one.src.includes('/map/thumbnails/'))")
