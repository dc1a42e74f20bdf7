"""Draw the pictures of the console in the documentation: screenshots, and a recording of the mask lab.

Run as `python -m tests.support.browser.screenshots [--only NAME]`, or `make docs-images`. Requires what `make
test-browser` installs. The first run trains the demo's student and its teacher, which takes minutes; its storage root
is kept in build/screenshots.
"""

from __future__ import annotations

import argparse
import io
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from PIL import Image, ImageDraw
from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright
from sqlalchemy import Engine

from amd.artifacts.discovery import encoder_folder
from amd.config import TrainConfig
from amd.presets.load import load_config
from amd.training.run_folder import run_folder
from amd.training.runs.launch import train
from service.jobs.store import JobStore
from service.registry.discovery import EncoderDiscovery
from service.registry.store import EncoderStore
from tests.browser.conftest import CHROMIUM
from tests.support.browser import scenes
from tests.support.browser.console_service import PATIENCE_MS, ConsoleService, console_service

IMAGES = Path("docs/images")
TRAINED_ROOT = Path("build/screenshots")
TRAINED = "train-20261129-060000-2c4e6a8b"
PICTURE_STEPS = 25  # between pictures of the run
WIDTH = 1440
RECORD = 2507  # a digit of the training data
QUALITY = 80
ANIMATION_MS = 1000  # duration of the charts' animations
POINTER = ((0, 0), (0, 17), (4, 13), (7, 19), (10, 18), (7, 12), (12, 12))


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the pictures of the console in docs/images.")
    parser.add_argument("--only", choices=sorted(PICTURES), help="picture to draw; default: all")
    only = parser.parse_args().only
    config = trained_config()
    train(config, local=True)  # returns at once if it has succeeded
    expect.set_options(timeout=PATIENCE_MS)
    with (
        tempfile.TemporaryDirectory() as folder,
        console_service(Path(folder), lambda engine, root: add_trained(engine, root, config)) as service,
        sync_playwright() as playwright,
    ):
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        for name in [only] if only else PICTURES:
            target = IMAGES / f"{name}.webp"
            PICTURES[name](browser, service, target)
            print(f"{target}: {target.stat().st_size / 1024:.0f} KiB")
        browser.close()


def trained_config() -> TrainConfig:
    values = {"media.every_steps": PICTURE_STEPS, "checkpoint.pin_steps": [25, 100, 250, 500]}
    return load_config(
        TrainConfig, "demo-image-amd", None, {**values, "name": TRAINED, "storage": str(TRAINED_ROOT.absolute())}
    )


def add_trained(engine: Engine, root: str, config: TrainConfig) -> None:
    """Add the trained run as a job that has succeeded."""
    store = JobStore(engine)
    at = store.get(scenes.RUNNING).created_at - 7200
    values = config.model_copy(update={"storage": root}).model_dump(mode="json")
    job = scenes.add_job(store, root, TRAINED, "Digits, distilled", at, config=values)
    scenes.start(store, job)
    scenes.finish(store, TRAINED, "succeeded", progress={"step": 500, "steps": 500})
    shutil.copytree(run_folder(str(TRAINED_ROOT), TRAINED), run_folder(root, TRAINED))
    shutil.copytree(encoder_folder(str(TRAINED_ROOT), TRAINED), encoder_folder(root, TRAINED))
    EncoderDiscovery(EncoderStore(engine), root).register(encoder_folder(root, TRAINED))


def open_page(browser: Browser, service: ConsoleService, path: str, height: int) -> Page:
    """Open a page of the console in a signed-in browser."""
    page = browser.new_page(viewport={"width": WIDTH, "height": height}, color_scheme="light")
    page.set_default_timeout(PATIENCE_MS)
    page.goto(service.server.url + service.api("POST", "/console-links")["path"])
    page.wait_for_url("**/console/jobs")
    page.goto(f"{service.server.url}/console{path}")
    return page


def hide_root(page: Page, root: str) -> None:
    """Replace the temporary storage root in the page's code."""
    page.evaluate(
        """(root) => {
            for (const code of document.querySelectorAll("pre")) {
                code.textContent = code.textContent.replace(root, "/storage");
            }
        }""",
        root,
    )


def shoot(page: Page) -> Image.Image:
    return Image.open(io.BytesIO(page.screenshot())).convert("RGB")


def screenshot(path: str, ready: str, height: int = 900) -> Callable[[Browser, ConsoleService, Path], None]:
    """Return a function that draws a page once the element `ready` is visible."""

    def draw(browser: Browser, service: ConsoleService, target: Path) -> None:
        page = open_page(browser, service, path, height)
        expect(page.locator(ready).last).to_be_visible()
        page.wait_for_timeout(ANIMATION_MS)
        hide_root(page, service.root)
        shoot(page).save(target, quality=QUALITY, method=6)
        page.close()

    return draw


def draw_map(browser: Browser, service: ConsoleService, target: Path) -> None:
    """Draw two linked maps with a selected group and a sample with its neighbours."""
    page = open_page(browser, service, f"/jobs/{scenes.EMBEDDED}/map?other={scenes.OTHER_EMBEDDED}", 1060)
    page.locator("#map-groups button").first.click()
    page.locator("#map-selection button").nth(2).click()
    expect(page.locator("#map-neighbours img").last).to_be_visible()
    page.evaluate("scrollTo(0, 0)")
    page.wait_for_timeout(ANIMATION_MS)
    shoot(page).save(target, quality=QUALITY, method=6)
    page.close()


class PageRecording:
    """Frames of a page, with a drawn mouse pointer."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.frames: list[Image.Image] = []
        self.durations: list[int] = []

    def add(self, duration_ms: int, slider: Locator | None = None) -> None:
        """Add a frame. Draws the pointer on the slider's thumb."""
        frame = shoot(self.page)
        if slider is not None:
            x, y = slider.evaluate(
                """(one) => {
                    const box = one.getBoundingClientRect(), share = (one.value - one.min) / (one.max - one.min);
                    return [box.left + 8 + share * (box.width - 16), box.top + box.height / 2];
                }"""
            )
            corners = [(x + across, y + down) for across, down in POINTER]
            ImageDraw.Draw(frame).polygon(corners, fill="black", outline="white")
        self.frames.append(frame)
        self.durations.append(duration_ms)

    def drag(self, slider: Locator, values: list[float], ready: Callable[[float], None], duration_ms: int) -> None:
        """Move a slider through `values`, and add a frame for each once `ready` returns."""
        for value in values:
            slider.evaluate(
                """(one, value) => {
                    one.value = value;
                    for (const type of ["input", "change"]) one.dispatchEvent(new Event(type, { bubbles: true }));
                }""",
                value,
            )
            ready(value)
            self.add(duration_ms, slider)
        self.durations[-1] += 900

    def save(self, target: Path) -> None:
        first, *rest = self.frames
        options = {"quality": 70, "method": 6, "minimize_size": True, "loop": 0}
        first.save(target, save_all=True, append_images=rest, duration=self.durations, **options)


def record_lab(browser: Browser, service: ConsoleService, target: Path) -> None:
    """Record the mask lab: the ratios, the wipe, and the pictures of the run."""
    path = f"/lab?job={TRAINED}&record={RECORD}&before=input&after=rebuilt"
    page = open_page(browser, service, path, 1000)
    layers = page.locator("#lab-layers figure")
    expect(layers).to_have_count(7)
    expect(page.locator("#pictures img")).to_have_count(3)
    recording = PageRecording(page)
    recording.add(1500)

    def applied(name: str) -> Callable[[float], None]:
        return lambda value: page.wait_for_function(
            "([name, value]) => new URLSearchParams(location.search).get(name) === value", arg=[name, f"{value:g}"]
        )

    shares = [42, 34, 26, 18, 26, 38, 50, 62, 74, 86, 74, 62, 50]
    recording.drag(page.get_by_label("Wipe"), shares, applied("wipe"), 110)
    recording.drag(page.get_by_label("Teacher ratio"), [0.44, 0.38, 0.31, 0.25], applied("teacher_ratio"), 350)
    recording.drag(page.get_by_label("Student ratio"), [0.69, 0.62, 0.56, 0.5], applied("student_ratio"), 350)
    training = page.get_by_label("Training step")
    for share in (0.25, 0.5, 0.75, 1):
        page.evaluate("(share) => scrollTo(0, share * (document.documentElement.scrollHeight - innerHeight))", share)
        recording.add(60)

    def loaded(value: float) -> None:
        rebuilt = page.get_by_role("img", name=f"Rebuilt, step {PICTURE_STEPS * int(value + 1)}", exact=True)
        expect(rebuilt).to_be_visible()

    recording.drag(training, [0, 1, 2, 3, 5, 7, 9, 12, 15, 19], loaded, 350)
    recording.save(target)
    page.close()


PICTURES: dict[str, Callable[[Browser, ConsoleService, Path], None]] = {
    "console-jobs": screenshot("/jobs", "#jobs tbody tr"),
    "console-job": screenshot(f"/jobs/{scenes.RUNNING}", "#curves figure canvas"),
    "console-sweep": screenshot(f"/sweeps/{scenes.SWEEP}", "#rungs canvas", 1235),
    "console-encoder": screenshot(f"/encoders/{scenes.ENCODER}", "main section", 968),
    "console-lab": record_lab,
    "console-map": draw_map,
}


if __name__ == "__main__":
    main()
