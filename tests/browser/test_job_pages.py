"""Tests for job pages in a real browser: live parts, charts, the form for a new job, and error messages."""

from __future__ import annotations

import json
import re
from collections.abc import Callable

import pytest
from playwright.sync_api import Page, expect

from amd.artifacts.discovery import encoder_folder
from amd.storage import join, write_bytes
from amd.training.run_folder import run_folder
from service.web.formats import number
from tests.support.browser import scenes
from tests.support.browser.console_service import PATIENCE_MS, ConsoleService

expect.set_options(timeout=PATIENCE_MS)
OpenPage = Callable[..., Page]
RECORD_DRAWN_TEXTS = """
    window.drawnTexts = [];
    const fillText = CanvasRenderingContext2D.prototype.fillText;
    CanvasRenderingContext2D.prototype.fillText = function (text, ...rest) {
        window.drawnTexts.push(text);
        fillText.call(this, text, ...rest);
    };
"""


def path(service: ConsoleService, rest: str) -> str:
    return f"{service.server.url}/console{rest}"


def started_job(service: ConsoleService, name: str) -> str:
    body = {"kind": "train", "preset": "demo-image-mae", "name": name}
    job_id = str(service.api("POST", "/jobs", json=body)["id"])
    service.report(job_id)
    return job_id


def open_overview(page: Page, service: ConsoleService, job_id: str) -> None:
    page.goto(path(service, f"/jobs/{job_id}"))
    expect(page.locator("#curves figure").first).to_be_visible()


def test_the_overview_shows_result_attempts_and_encoder_once_the_job_has_ended(
    open_page: OpenPage, service: ConsoleService
) -> None:
    job_id = started_job(service, "watched")
    page = open_page()
    page.goto(path(service, f"/jobs/{job_id}"))
    expect(page.locator("#outcome .state")).to_have_text("running")
    expect(page.locator("#published .notice")).to_have_count(0)
    folder = encoder_folder(service.root, scenes.ENCODER)
    service.report(job_id, "succeeded", result={"figures": {"loss/total": 0.25}, "encoder_folder": folder})
    expect(page.locator("#outcome .state")).to_have_text("succeeded")
    expect(page.locator("#outcome")).to_contain_text("Result")
    expect(page.locator("#published")).to_contain_text(f"This job published the encoder {scenes.ENCODER}")


def test_the_duration_of_a_running_job_counts_up_between_updates(open_page: OpenPage, service: ConsoleService) -> None:
    page = open_page()
    page.goto(path(service, f"/jobs/{scenes.RUNNING}"))
    for place in ("#job-head", "#outcome"):
        expect(page.locator(f"{place} [data-elapsed]")).to_have_text(re.compile(r"^\d+ min( \d+ s)?$"))
    for seconds, text in ((58, r"^1 min( 1?\d s)?$"), (3598, "^1 h$"), (186000, "^2 d 3 h$")):
        page.evaluate("seconds => { document.querySelector('#curves-title').dataset.elapsed = seconds; }", seconds)
        expect(page.locator("#curves-title")).to_have_text(re.compile(text))


def test_a_problem_disappears_with_the_next_request_of_the_user(open_page: OpenPage, service: ConsoleService) -> None:
    page = open_page(expected_error="status of 422")
    page.goto(path(service, f"/jobs/{scenes.SUCCEEDED}"))
    page.locator("#job-head summary", has_text="Edit").click()
    page.locator("#edit-labels").fill("key=" + "x" * 300)
    page.locator("#job-head form button").click()
    expect(page.locator("#toasts")).to_contain_text("Invalid input")
    page.evaluate("htmx.trigger('#job-head', 'refresh')")  # a background request keeps it
    page.wait_for_timeout(300)
    expect(page.locator("#toasts")).to_contain_text("Invalid input")
    page.locator("#edit-labels").fill("key=value")
    page.locator("#job-head form button").click()
    page.wait_for_load_state("load")
    expect(page.locator("#toasts .notice")).to_have_count(0)


def test_the_legend_shows_the_values_at_the_cursor(open_page: OpenPage, service: ConsoleService) -> None:
    page = open_page()
    open_overview(page, service, scenes.SUCCEEDED)
    figure = page.locator("#curves figure").first
    last = figure.locator("figcaption").text_content() or ""
    figure.locator(".u-over").hover(position={"x": 5, "y": 40})
    expect(figure.locator("figcaption")).not_to_have_text(last)
    plot = figure.locator(".u-over")
    plot.hover(position={"x": 0.8 * plot.evaluate("plot => plot.clientWidth"), "y": 40})
    expect(figure.locator("header")).to_contain_text("step 1")
    assert re.search(r"step 1\u202f\d{3}$", figure.locator("header").text_content() or "")
    page.mouse.move(1, 1)
    expect(figure.locator("figcaption")).to_have_text(last)


@pytest.mark.parametrize("value", [0, 7, 999, 1320, 1234567, -20000])
def test_scripts_and_pages_separate_thousands_alike(open_page: OpenPage, service: ConsoleService, value: int) -> None:
    page = open_page()
    assert page.evaluate("value => amdNumber(value)", value) == number(value)


def test_smoothed_values_are_marked_as_such(open_page: OpenPage, service: ConsoleService) -> None:
    page = open_page()
    open_overview(page, service, scenes.SUCCEEDED)
    headers = page.locator("#curves figure header")
    expect(headers.first).not_to_contain_text("smoothed")
    page.get_by_label("Smoothing").fill("0.9")
    expect(headers.filter(has_text="smoothed")).to_have_count(headers.count())
    page.get_by_label("Smoothing").fill("0")
    expect(headers.filter(has_text="smoothed")).to_have_count(0)


def test_a_job_is_overlaid_by_its_name_or_the_start_of_its_id(open_page: OpenPage, service: ConsoleService) -> None:
    page = open_page()
    open_overview(page, service, scenes.SUCCEEDED)
    field, note = page.get_by_label("Name or ID of a job to overlay"), page.locator("#overlay-note")
    legend = page.locator("#curves figcaption").first
    name = "Digits, teacher ratio 0.6"
    failed = "Learning rate times four"
    for text, job_id, shown in ((name.upper(), scenes.RUNNING, name), (scenes.FAILED[:-4], scenes.FAILED, failed)):
        field.fill(text)
        field.press("Enter")
        expect(legend).to_contain_text(f"loss/total of {shown}")
        expect(legend.get_by_title(job_id).locator("i.dashed").first).to_be_visible()
        expect(note).to_be_empty()
    field.fill("no such job")
    field.press("Enter")
    expect(note).to_have_text("No job matches “no such job”.")
    expect(legend).not_to_contain_text("loss/total of")
    field.fill("Ablation")
    field.press("Enter")
    expect(note).to_contain_text("Several jobs match “Ablation”.")


@pytest.mark.parametrize("value", [0.0, 0.2368])
def test_charts_of_fractions_are_in_percent_and_zeros_have_a_small_axis(
    open_page: OpenPage, service: ConsoleService, value: float
) -> None:
    job_id = started_job(service, "utilisation")
    lines = [json.dumps({"step": step, "time": 1.0 * step, "speed/mfu": value}) for step in range(10)]
    write_bytes(join(run_folder(service.root, job_id), "metrics", "000000.jsonl"), "\n".join(lines).encode() + b"\n")
    page = open_page()
    page.add_init_script(RECORD_DRAWN_TEXTS)
    open_overview(page, service, job_id)
    expect(page.locator("#curves figure header")).to_contain_text("0 %" if value == 0.0 else "23.7 %")
    ticks = {text for text in page.evaluate("drawnTexts") if text.endswith(" %")}
    assert max(float(text.removesuffix(" %")) for text in ticks) <= 100
    service.report(job_id, "succeeded")


def metrics_of_steps(service: ConsoleService, job_id: str, steps: range) -> None:
    """Write a chunk with two metrics that equal the step."""
    lines = [json.dumps({"step": step, "time": 1.0, "loss/total": step, "optim/lr": step}) for step in steps]
    name = f"{steps.start:06d}.jsonl"
    write_bytes(join(run_folder(service.root, job_id), "metrics", name), "\n".join(lines).encode() + b"\n")


def steps_shown(page: Page, number: int) -> tuple[int, int]:
    """Return the first and the last step that a chart shows, read from its header while the pointer is at its sides."""
    chart = page.locator("#curves figure").nth(number)
    over = chart.locator(".u-over")
    over.scroll_into_view_if_needed()
    box = over.bounding_box()
    assert box is not None
    found = []
    for x in (1, box["width"] - 2):
        text = ""
        while "step" not in text:  # new points draw the chart again, and it shows the last step until the pointer moves
            over.hover(position={"x": x, "y": box["height"] / 2})
            over.hover(position={"x": x, "y": box["height"] / 2 + 1})
            text = chart.locator("header").text_content() or ""
        found.append(int(re.findall(r"step (\d+)", text)[0]))
    page.mouse.move(1, 1)
    return found[0], found[1]


def drag_across(page: Page, number: int, start: float, end: float) -> None:
    """Drag across a chart, from one fraction of its width to another."""
    over = page.locator("#curves figure").nth(number).locator(".u-over")
    over.scroll_into_view_if_needed()
    box = over.bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + start * box["width"], box["y"] + 20)
    page.mouse.down()
    page.mouse.move(box["x"] + end * box["width"], box["y"] + 60, steps=5)
    page.mouse.up()


def test_dragging_zooms_all_charts_until_the_zoom_is_reset(open_page: OpenPage, service: ConsoleService) -> None:
    job_id = started_job(service, "zoomed")
    metrics_of_steps(service, job_id, range(0, 101, 10))
    page = open_page()
    open_overview(page, service, job_id)
    reset = page.get_by_role("button", name="Reset zoom")
    expect(reset).to_be_hidden()
    assert steps_shown(page, 1) == (0, 100)
    drag_across(page, 0, 0.6, 0.2)  # in either direction
    expect(page.get_by_label("First step shown")).to_have_value(re.compile("19|20"))
    expect(page.get_by_label("Last step shown")).to_have_value(re.compile("60|61"))
    assert steps_shown(page, 0) == steps_shown(page, 1) == (20, 60)

    metrics_of_steps(service, job_id, range(110, 151, 10))
    service.report(job_id, "succeeded")
    expect(page.locator("#curves figure").first.locator("header")).to_contain_text("150")
    assert steps_shown(page, 0) == steps_shown(page, 1) == (20, 60)
    page.get_by_label("Log scale").check()
    assert steps_shown(page, 0) == steps_shown(page, 1) == (20, 60)

    drag_across(page, 1, 0.25, 0.75)
    assert steps_shown(page, 0) == steps_shown(page, 1) == (30, 50)
    reset.focus()
    page.keyboard.press("Enter")
    expect(reset).to_be_hidden()
    expect(page.get_by_label("First step shown")).to_be_focused()
    assert steps_shown(page, 0) == steps_shown(page, 1) == (0, 150)


def test_the_zoom_can_be_typed_and_follows_the_last_step(open_page: OpenPage, service: ConsoleService) -> None:
    job_id = started_job(service, "typed zoom")
    metrics_of_steps(service, job_id, range(0, 101, 10))
    page = open_page(width=390)
    open_overview(page, service, job_id)
    first, last = page.get_by_label("First step shown"), page.get_by_label("Last step shown")
    first.fill("50")
    first.press("Enter")
    assert steps_shown(page, 0) == steps_shown(page, 1) == (50, 100)
    metrics_of_steps(service, job_id, range(110, 151, 10))
    service.report(job_id, "succeeded")
    expect(page.locator("#curves figure").first.locator("header")).to_contain_text("150")
    assert steps_shown(page, 0) == steps_shown(page, 1) == (50, 150)
    last.fill("40")
    last.press("Enter")
    expect(page.locator("#zoom-to:invalid")).to_have_count(1)
    assert steps_shown(page, 0) == (50, 150)
    last.fill("90")
    last.press("Enter")
    assert steps_shown(page, 0) == steps_shown(page, 1) == (50, 90)
    first.fill("")
    first.press("Enter")
    last.fill("")
    last.press("Enter")
    expect(page.get_by_role("button", name="Reset zoom")).to_be_hidden()
    assert steps_shown(page, 0) == (0, 150)
