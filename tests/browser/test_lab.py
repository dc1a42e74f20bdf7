"""Tests for the mask lab in a real browser: uploads, every control, links that restore the view, and downloads."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from PIL import Image
from playwright.sync_api import Locator, Page, Route, expect

from amd.config import TrainConfig, validate, with_overrides
from amd.presets.teachers import teacher_recipe
from amd.training.runs.checks import check_data
from amd.training.runs.teachers import teacher_id
from tests.support.browser import scenes
from tests.support.browser.console_service import PATIENCE_MS, ConsoleService
from tests.support.encoders.published_encoders import film, picture
from tests.support.runs.published_students import publish_student, save_checkpoint

expect.set_options(timeout=PATIENCE_MS)
OpenPage = Callable[..., Page]


def layers(page: Page) -> Locator:
    return page.locator("#lab-layers figure")


def counts(page: Page) -> Locator:
    return page.locator("#lab-counts")


def move(page: Page, label: str, value: str) -> None:
    """Move a slider, as a user does with the keyboard."""
    page.get_by_label(label).evaluate(
        "(slider, value) => { slider.value = value; slider.dispatchEvent(new Event('input', { bubbles: true })); }",
        value,
    )


def pixels(page: Page, selector: str) -> str:
    return str(page.locator(selector).evaluate("(canvas) => canvas.toDataURL()"))


def test_a_config_without_a_teacher_has_no_teacher_ratio_and_no_token_roles(
    open_page: OpenPage, service: ConsoleService
) -> None:
    page = open_page()
    page.goto(f"{service.server.url}/console/lab?preset=demo-image-mae")
    expect(layers(page)).to_have_text(["Student's view", "Tokens to rebuild"])
    expect(page.get_by_label("Teacher ratio")).to_be_disabled()
    expect(page.locator("#lab-teacher-note")).to_have_text("This config has no teacher.")
    expect(page.locator("#lab-legend")).to_be_hidden()
    page.get_by_label("Settings of").select_option("demo-image-amd")
    expect(layers(page)).to_have_count(4)
    expect(page.get_by_label("Teacher ratio")).to_be_enabled()
    expect(page.locator("#lab-teacher-note")).to_be_empty()
    expect(page.locator("#lab-legend")).to_be_visible()


def test_an_image_is_masked_and_its_view_is_restored_from_the_link(
    open_page: OpenPage, service: ConsoleService, tmp_path: Path
) -> None:
    page = open_page()
    page.goto(f"{service.server.url}/console/lab?preset=demo-image-amd")
    expect(layers(page)).to_have_count(4)  # without an input
    (tmp_path / "picture.png").write_bytes(picture(size=(64, 64)))
    page.get_by_label("An image or a video").set_input_files(tmp_path / "picture.png")
    expect(layers(page)).to_have_count(5)
    expect(counts(page)).to_contain_text("1 × 4 × 4 = 16")
    move(page, "Teacher ratio", "0.25")
    expect(page.locator("#lab-relative")).to_contain_text(
        re.compile(r"1\.\d\d × the compute at student 0.75, teacher 0.5")
    )
    expect(counts(page)).to_contain_text("12 (75 %)")
    move(page, "Student ratio", "0.2")  # the teacher's ratio follows
    expect(page.locator("#lab-teacher-value")).to_have_text("0.20")
    move(page, "Student ratio", "0.8")
    page.get_by_label("Decoder tokens").select_option("running_cell")
    page.get_by_label("Excluded from the running cell").select_option("0.75")
    before = pixels(page, "#lab-layers figure:nth-child(2) canvas")
    page.get_by_label("Seed").fill("7")
    expect(page).to_have_url(re.compile("seed=7"))
    assert pixels(page, "#lab-layers figure:nth-child(2) canvas") != before
    page.get_by_label("Position").fill("99")  # the batch has 32 clips
    expect(page.locator("#lab-position:invalid")).to_have_count(1)
    page.get_by_label("Position").fill("3")
    expect(page).to_have_url(re.compile("position=3"))
    whole = pixels(page, "#lab-wipe-canvas")
    move(page, "Wipe", "20")
    assert pixels(page, "#lab-wipe-canvas") != whole

    with page.expect_download() as downloading:
        page.get_by_role("button", name="Download PNG").click()
    shown = Image.open(io.BytesIO(Path(downloading.value.path()).read_bytes()))
    assert (shown.format, shown.width > 5 * 200) == ("PNG", True)

    other = open_page()
    other.goto(page.url)
    expect(layers(other)).to_have_count(4)  # the link does not contain the file
    expect(other.get_by_label("Seed")).to_have_value("7")
    for label in ("Student ratio", "Teacher ratio", "Decoder tokens", "Position", "Wipe"):
        expect(other.get_by_label(label)).to_have_value(page.get_by_label(label).input_value())

    page.get_by_role("link", name="Train with these ratios").click()
    expect(page.get_by_label("mask.student_ratio")).to_have_value("0.8")
    other.get_by_role("link", name="Sweep around this point").click()
    dimensions = json.loads(parse_qs(urlsplit(other.url).query)["o.space.dimensions"][0])
    assert dimensions["masking.student_ratio"] == [0.7, 0.8, 0.9]


def test_the_numbers_beside_the_sliders_say_what_is_drawn(open_page: OpenPage, service: ConsoleService) -> None:
    page = open_page()
    page.goto(f"{service.server.url}/console/lab?preset=demo-image-amd")
    value = page.locator("#lab-student-value")
    expect(value).to_have_text("0.75")
    held: list[Route] = []
    page.route("**/lab/masks?*", lambda route: held.append(route), times=1)
    with page.expect_request("**/lab/masks?*"):
        move(page, "Student ratio", "0.9")
    expect(value).to_have_text("0.90, drawn: 0.75")
    page.evaluate("window.wait = setTimeout; window.setTimeout = (task, ...rest) => (window.task = task, 1)")
    move(page, "Student ratio", "0.6")  # while the picture of 0.9 is being drawn
    held[0].continue_()
    expect(value).to_have_text("0.60, drawn: 0.90")
    expect(page.get_by_label("Student ratio")).to_have_value("0.6")
    page.evaluate("window.setTimeout = window.wait; window.task()")
    expect(value).to_have_text("0.60")


def test_a_slider_that_moves_another_one_says_why(open_page: OpenPage, service: ConsoleService) -> None:
    page = open_page()
    page.goto(f"{service.server.url}/console/lab?preset=demo-image-amd")
    expect(page.locator("#lab-teacher-value")).to_have_text("0.50")
    student, teacher = page.locator("#lab-student-note"), page.locator("#lab-teacher-note")
    move(page, "Teacher ratio", "0.6")
    expect(student).to_be_hidden()
    move(page, "Teacher ratio", "0.85")
    expect(page.get_by_label("Student ratio")).to_have_value("0.85")
    expect(student).to_have_text("Set to the teacher's ratio: the teacher must not hide more than the student.")
    expect(teacher).to_be_hidden()
    move(page, "Student ratio", "0.84")
    expect(student).to_be_hidden()
    expect(teacher).to_have_text("Set to the student's ratio: the teacher must not hide more than the student.")
    move(page, "Student ratio", "0.86")
    expect(teacher).to_have_text(
        "Set to the student's ratio: ratios that hide the same number of the 16 cells must be equal."
    )
    page.get_by_role("button", name="Reset", exact=True).click()
    expect(teacher).to_be_hidden()


def test_the_percentages_of_visible_and_hidden_tokens_add_up(open_page: OpenPage, service: ConsoleService) -> None:
    page = open_page()
    page.goto(f"{service.server.url}/console/lab?preset=demo-image-amd&student_ratio=0.88")
    expect(counts(page)).to_contain_text(re.compile(r"Student sees\s*2 \(13 %\)"))
    expect(counts(page)).to_contain_text(re.compile(r"Teacher sees\s*8 \(50 %\)\s*Teacher only\s*6 \(37 %\)"))
    expect(counts(page)).to_contain_text(re.compile(r"Student masked\s*14 \(87 %\)"))


def test_two_clicks_from_the_printed_link_lead_to_a_drawn_sample(open_page: OpenPage, service: ConsoleService) -> None:
    page = open_page()
    page.goto(service.server.url + service.api("POST", "/console-links")["path"])  # the first click
    page.wait_for_url("**/console/jobs")
    page.get_by_role("link", name="Mask lab").click()
    expect(layers(page)).to_have_count(7)  # those of the newest distilled encoder, with a sample of its job
    expect(layers(page).first).to_contain_text("Input")
    expect(page.get_by_role("img", name="Rebuilt, step 200", exact=True)).to_be_visible()
    expect(page).to_have_url(re.compile(f"encoder={scenes.DISTILLED}&job={scenes.DISTILLED}&record=0"))


def test_the_pictures_of_a_run_appear_while_the_lab_starts(open_page: OpenPage, service: ConsoleService) -> None:
    page = open_page()
    service.lab.is_running = False
    page.goto(f"{service.server.url}/console/lab")
    expect(page.get_by_role("img", name="Rebuilt, step 200", exact=True)).to_be_visible()
    expect(page.locator("#lab-status")).to_contain_text("The lab is starting")
    expect(layers(page)).to_have_count(0)
    service.lab.is_running = True
    expect(layers(page)).to_have_count(7)


def test_one_slider_selects_the_step_for_the_pictures_that_a_run_wrote(
    open_page: OpenPage, service: ConsoleService
) -> None:
    page = open_page()
    page.goto(f"{service.server.url}/console/lab?job={scenes.DISTILLED}&record=0&wipe=30")
    expect(layers(page)).to_have_count(7)
    training = page.get_by_role("region", name="Training")
    for step in (200, 100):
        for layer in ("Input", "Student's view", "Rebuilt"):
            expect(training.get_by_role("img", name=f"{layer}, step {step}", exact=True)).to_be_visible()
        training.get_by_role("slider", name="Training step").press("ArrowLeft")
    page.get_by_label("Seed").fill("7")
    expect(page).to_have_url(re.compile("seed=7.*wipe=30.*picture_step=100"))
    page.reload()
    expect(training.get_by_role("img", name="Rebuilt, step 100", exact=True)).to_be_visible()
    page.goto(f"{service.server.url}/console/jobs/{scenes.DISTILLED}/pictures?picture_step=100")
    expect(page.get_by_role("img", name="Rebuilt, step 100", exact=True)).to_be_visible()


def test_the_frame_slider_changes_all_layers(open_page: OpenPage, service: ConsoleService, tmp_path: Path) -> None:
    page = open_page()
    page.goto(f"{service.server.url}/console/lab?preset=demo-video-amd")
    page.get_by_label("An image or a video").set_input_files(film(tmp_path / "film.mp4"))
    expect(layers(page)).to_have_count(5)
    expect(page.locator("#lab-frame-value")).to_have_text("1 / 8")
    canvases = ["#lab-wipe-canvas", *(f"#lab-layers figure:nth-child({number}) canvas" for number in (1, 2, 3, 4))]
    first = [pixels(page, canvas) for canvas in canvases]
    move(page, "Frame", "7")
    expect(page.locator("#lab-frame-value")).to_have_text("8 / 8")
    assert all(pixels(page, canvas) != before for canvas, before in zip(canvases, first, strict=True))


def test_the_lab_opens_from_a_job_with_one_of_its_samples_and_its_checkpoints(
    open_page: OpenPage, service: ConsoleService
) -> None:
    stored = validate(TrainConfig, service.server.app.state.jobs.get(scenes.SUCCEEDED).config)
    config = with_overrides(stored, {"checkpoint.pin_steps": [100, 200]})
    for step in (100, 200):
        save_checkpoint(config, Path(service.root), scenes.SUCCEEDED, step)
    page = open_page()
    page.goto(f"{service.server.url}/console/jobs/{scenes.SUCCEEDED}")
    page.locator("#open-lab").click()
    expect(layers(page)).to_have_count(5)
    expect(layers(page).first).to_contain_text("Input")
    expect(page.locator("#lab-relative")).to_have_text("1.00 × the compute at student 0.75")
    expect(page.locator("#lab-checkpoint-value")).to_have_text("200")
    rebuilt = pixels(page, "#lab-layers figure:nth-child(4) canvas")
    move(page, "Checkpoint", "0")
    expect(page).to_have_url(re.compile("checkpoint=100"))
    assert pixels(page, "#lab-layers figure:nth-child(4) canvas") != rebuilt
    page.get_by_label("Samples and pictures of").select_option(scenes.DISTILLED)
    page.wait_for_url(f"**/console/lab?job={scenes.DISTILLED}*")
    page.get_by_label("Samples and pictures of").select_option(scenes.SUCCEEDED)
    page.wait_for_url(f"**/console/lab?job={scenes.SUCCEEDED}*")
    expect(layers(page)).to_have_count(5)
    shown = pixels(page, "#lab-layers figure:first-child canvas")
    page.get_by_label("Record of").fill("5")
    expect(page).to_have_url(re.compile("record=5"))
    assert pixels(page, "#lab-layers figure:first-child canvas") != shown
    expect(page.get_by_role("link", name="Train with these ratios")).to_have_attribute(
        "href", re.compile(f"/jobs/{scenes.SUCCEEDED}/clone")
    )


def test_a_checkpoint_can_be_aligned_with_its_teacher(open_page: OpenPage, service: ConsoleService) -> None:
    config = validate(TrainConfig, service.server.app.state.jobs.get(scenes.FAILED).config)
    recipe = teacher_recipe(config)
    save_checkpoint(config, Path(service.root), scenes.FAILED)
    name = teacher_id("demo-image-teacher", recipe)
    publish_student(recipe, Path(service.root), name, check_data(recipe).digest)
    page = open_page()
    page.goto(f"{service.server.url}/console/lab?job={scenes.FAILED}&record=0")
    expect(layers(page)).to_have_count(7)
    page.get_by_label("Align with the teacher").check()
    expect(layers(page)).to_have_count(8)
    expect(layers(page).last).to_contain_text("Alignment loss per token")
    expect(counts(page)).to_contain_text("Generation loss")
    expect(page).to_have_url(re.compile("alignment=true"))
    page.reload()
    expect(layers(page)).to_have_count(8)
    page.get_by_label("Align with the teacher").uncheck()
    expect(layers(page)).to_have_count(7)
