"""Tests for the console in a real browser, from signing in to signing out."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect

from tests.support.browser import scenes
from tests.support.browser.console_service import PATIENCE_MS, ConsoleService
from tests.support.encoders.published_encoders import picture

expect.set_options(timeout=PATIENCE_MS)
OpenPage = Callable[..., Page]


def path(service: ConsoleService, rest: str) -> str:
    return f"{service.server.url}/console{rest}"


def job_of(page: Page) -> str:
    return page.url.rpartition("/")[2]


def test_a_job_can_be_submitted_watched_until_it_ends_and_cloned(open_page: OpenPage, service: ConsoleService) -> None:
    page = open_page()
    page.get_by_role("link", name="New job").click()
    page.get_by_label("mask.teacher_ratio").fill("0.95")
    expect(page.get_by_text("This job cannot run yet")).to_be_visible()
    expect(page.locator("#check")).to_contain_text("mask.teacher_ratio=0.95")
    page.get_by_label("mask.teacher_ratio").fill("0.4")
    page.get_by_label("Name", exact=True).fill("from the browser")
    expect(page.get_by_text("This job can be submitted")).to_be_visible()
    expect(page.locator("#check")).to_contain_text("--preset demo-image-amd mask.teacher_ratio=0.4 --submit")
    page.get_by_role("button", name="Submit").click()
    page.wait_for_url(re.compile("/console/jobs/train-"))
    job_id = job_of(page)
    assert service.api("GET", f"/jobs/{job_id}")["config"]["mask"]["teacher_ratio"] == 0.4

    scenes.write_metrics(service.root, job_id, 50)
    service.report(job_id)
    expect(page.locator("#job-head .state")).to_have_text("running")
    expect(page.locator("#job-head")).to_contain_text("30 %")
    expect(page.locator("#curves figure").first).to_be_visible()
    service.report(job_id, "succeeded")
    expect(page.locator("#job-head .state")).to_have_text("succeeded")
    expect(page.locator("#job-head").get_by_role("button", name="Pause")).to_have_count(0)

    page.get_by_role("link", name="Clone with changes").click()
    page.get_by_label("seed", exact=True).fill("7")
    expect(page.get_by_text("This job can be submitted")).to_be_visible()
    page.get_by_role("button", name="Submit the copy").click()
    page.wait_for_url(re.compile(f"/console/jobs/train-(?!{job_id[6:]})"))
    clone = service.api("GET", f"/jobs/{job_of(page)}")
    assert (clone["config"]["seed"], clone["config"]["mask"]["teacher_ratio"]) == (7, 0.4)
    page.get_by_role("button", name="Cancel").click()
    service.report(job_of(page), "cancelled")
    expect(page.locator("#job-head .state")).to_have_text("cancelled")


def test_a_job_can_be_cancelled_and_retried(open_page: OpenPage, service: ConsoleService) -> None:
    job_id = service.api("POST", "/jobs", json={"kind": "train", "preset": "demo-image-mae"})["id"]
    service.report(job_id)
    page = open_page()
    page.goto(path(service, f"/jobs/{job_id}"))
    page.get_by_role("button", name="Cancel").click()
    expect(page.locator("#job-head .state")).to_have_text(re.compile("cancelling|cancelled"))
    service.report(job_id, "cancelled")
    expect(page.locator("#job-head .state")).to_have_text("cancelled")
    page.get_by_role("button", name="Retry").click()
    expect(page.locator("#job-head .state")).to_have_text(re.compile("queued|starting|running"))
    page.get_by_role("link", name="History").click()
    for line in ("Submitted", "Cancellation requested", "Cancelled", "Retry requested"):
        expect(page.locator(".timeline")).to_contain_text(line)
    service.report(job_id, "succeeded")


def test_a_waiting_job_shows_what_it_is_waiting_for(open_page: OpenPage, service: ConsoleService) -> None:
    page = open_page()
    page.get_by_role("link", name="Digits, four workers").click()
    expect(page.locator("#job-head")).to_contain_text("1st of 1 waiting job")
    expect(page.locator("#job-head")).to_contain_text("to become free")


def test_the_list_can_be_searched_and_filtered_in_place(open_page: OpenPage, service: ConsoleService) -> None:
    page = open_page()
    page.get_by_label("Search jobs").fill("ablation 7")
    expect(page.locator("#jobs tbody tr")).to_have_count(1)
    assert "q=ablation+7" in page.url or "q=ablation%207" in page.url
    page.get_by_label("Search jobs").fill("")
    page.locator("label.chip", has_text="failed").click()
    expect(page.locator("#jobs tbody tr .state").first).to_have_text("failed")
    page.reload()
    expect(page.locator("label.chip input:checked")).to_have_count(1)


def test_the_log_is_coloured_and_search_results_open_in_context(open_page: OpenPage, service: ConsoleService) -> None:
    page = open_page()
    page.goto(path(service, f"/jobs/{scenes.RUNNING}/log"))
    expect(page.locator("#log .line .ansi-green-fg").first).to_have_text("INFO")
    expect(page.locator("#log")).to_contain_text("step 1995 of 2000")  # the end is shown
    page.get_by_label("Search the whole log").fill("cannot be read")
    page.get_by_role("button", name="Search").click()
    expect(page.locator("#matches-title")).to_have_text("1 of 400 lines")
    page.locator("#matches-list button").click()
    expect(page.locator("#log .line.current")).to_contain_text("a sample cannot be read")


def test_a_pinned_baseline_is_drawn_on_other_job_pages(open_page: OpenPage, service: ConsoleService) -> None:
    page = open_page()
    page.goto(path(service, f"/jobs/{scenes.SUCCEEDED}"))
    page.get_by_role("button", name="Pin as baseline").click()
    expect(page.locator("#baseline")).to_contain_text("This job is the baseline of its project.")
    page.goto(path(service, f"/jobs/{scenes.FAILED}"))
    expect(page.locator("#baseline")).to_contain_text("Baseline: Digits baseline without a teacher")
    expect(page.locator("#baseline-text")).to_have_attribute("title", scenes.SUCCEEDED)
    expect(page.locator("#curves figcaption").first).to_contain_text("loss/total of the baseline")
    page.get_by_label("Name or ID of a job to overlay").fill(scenes.RUNNING)
    page.get_by_label("Name or ID of a job to overlay").press("Enter")
    expect(page.locator("#curves figcaption").first).to_contain_text("loss/total of Digits, teacher ratio 0.6")
    expect(page.locator("#curves figcaption").first).to_contain_text("loss/total of the baseline")
    page.get_by_role("button", name="Unpin").click()
    expect(page.locator("#baseline")).to_be_hidden()
    expect(page.locator("#curves figcaption").first).not_to_contain_text("of the baseline")
    page.reload()
    expect(page.locator("#curves figure").first).to_be_visible()
    expect(page.locator("#baseline")).to_be_hidden()


def test_a_job_can_be_forked_from_a_checkpoint(open_page: OpenPage, service: ConsoleService) -> None:
    page = open_page()
    page.goto(path(service, f"/jobs/{scenes.RUNNING}/files"))
    page.locator("tr", has_text="step-00000500").get_by_role("link", name="Fork").click()
    expect(page.get_by_text("This job can be submitted")).to_be_visible()
    page.get_by_role("button", name="Submit the copy").click()
    page.wait_for_url(re.compile(f"/console/jobs/train-(?!{scenes.RUNNING[6:]})"))
    config = service.api("GET", f"/jobs/{job_of(page)}")["config"]
    assert config["start"].endswith(f"runs/{scenes.RUNNING}/checkpoints/step-00000500")
    service.api("POST", f"/jobs/{job_of(page)}/cancel")
    service.report(job_of(page), "cancelled")


def test_hostile_text_is_displayed_as_plain_text(open_page: OpenPage, service: ConsoleService) -> None:
    evil = "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'>"
    job_id = service.api("POST", "/jobs", json={"kind": "train", "preset": "demo-image-mae", "name": evil})["id"]
    service.report(job_id)
    link = "\x1b]8;;javascript:alert(1)\x07link\x1b]8;;\x07"
    log = f"{evil}\n{link}\n\x1b[1m\x1b[38;2;1;2;3m{evil}\x1b[0m\n" + "\x1b[31m" * 9000
    scenes.write_log(service.root, job_id, 2, log)
    page = open_page()
    page.goto(path(service, f"/jobs/{job_id}/log"))
    expect(page.locator("#log .line").first).to_have_text(evil)
    expect(page.locator("#log a")).to_have_count(0)
    expect(page.locator("h1")).to_have_text(evil)
    assert page.evaluate("window.hacked") is None
    service.report(job_id, "succeeded")


@pytest.mark.parametrize("job_id", [scenes.RUNNING, scenes.SWEEP])
def test_a_report_can_be_downloaded_and_opened_as_a_single_file(
    browser: Browser, open_page: OpenPage, service: ConsoleService, tmp_path: Path, job_id: str
) -> None:
    page = open_page()
    page.goto(f"{service.server.url}/console/jobs/{job_id}")
    with page.expect_download() as downloading:
        page.get_by_role("link", name="Download report").click()
    assert downloading.value.suggested_filename == f"{job_id}.html"
    downloading.value.save_as(tmp_path / "report.html")
    report = browser.new_page(viewport={"width": 390, "height": 800})
    requests: list[str] = []
    report.on("request", lambda request: requests.append(request.url))
    report.goto((tmp_path / "report.html").as_uri())
    expect(report.get_by_role("heading", name="How to reproduce")).to_be_visible()
    expect(report.locator("svg").first).to_be_visible()
    assert len(requests) == 1  # the file itself
    assert report.evaluate("document.documentElement.scrollWidth") <= 390
    report.close()


def test_one_slider_selects_the_step_for_the_pictures_of_all_layers(
    open_page: OpenPage, service: ConsoleService
) -> None:
    page = open_page()
    page.goto(path(service, f"/jobs/{scenes.RUNNING}"))
    page.get_by_role("link", name="Pictures").click()
    for step in (1000, 500):
        for layer in ("Input", "Student's view", "Rebuilt"):
            expect(page.get_by_role("img", name=f"{layer}, step {step}", exact=True)).to_be_visible()
        expect(page.locator("figure img")).to_have_count(3)
        page.get_by_role("slider").press("ArrowLeft")


def test_an_encoder_can_be_tried_out_and_deployed(open_page: OpenPage, service: ConsoleService, tmp_path: Path) -> None:
    (tmp_path / "three.png").write_bytes(picture())
    page = open_page()
    page.goto(path(service, f"/encoders/{scenes.OTHER_ENCODER}"))
    page.get_by_label("An image or a video").set_input_files(tmp_path / "three.png")
    page.get_by_role("button", name="Encode").click()
    expect(page.locator("#try-result")).to_contain_text("64 values")
    expect(page.locator("#try-result")).to_contain_text("91.0 %")
    page.locator("summary", has_text="Deploy").click()
    page.locator("#deploy-name").fill("from-the-browser")
    page.locator("form.sheet button", has_text="Deploy").click()
    page.wait_for_url("**/deployments/from-the-browser")
    assert service.api("GET", "/deployments/from-the-browser")["encoder"] == scenes.OTHER_ENCODER
    page.get_by_role("button", name="Delete").click()
    page.wait_for_url("**/deployments")


def test_a_candidate_can_be_promoted_and_its_alias_rolled_back(open_page: OpenPage, service: ConsoleService) -> None:
    page = open_page()
    page.goto(path(service, f"/deployments/{scenes.DEPLOYMENT}"))
    expect(page.locator("main")).to_contain_text("0.94")
    page.get_by_role("button", name="Promote").click()
    expect(page.get_by_role("button", name="Set the candidate")).to_be_visible()
    assert service.api("GET", "/encoders/aliases/production")["encoder"] == scenes.OTHER_ENCODER
    assert service.api("GET", f"/deployments/{scenes.DEPLOYMENT}")["candidate"] is None
    page.goto(path(service, f"/encoders/{scenes.OTHER_ENCODER}"))
    page.get_by_role("button", name="Roll back").click()
    page.wait_for_url(f"**/encoders/{scenes.ENCODER}")
    assert service.api("GET", "/encoders/aliases/production")["encoder"] == scenes.ENCODER


def test_a_deployment_can_be_rolled_back_to_a_revision(open_page: OpenPage, service: ConsoleService) -> None:
    for encoder in (scenes.ENCODER, scenes.OTHER_ENCODER):
        service.api("PUT", "/deployments/changed", json={"encoder": encoder})
    page = open_page()
    page.goto(path(service, "/deployments/changed"))
    page.get_by_role("button", name="Roll back").click()
    expect(page.locator("main")).to_contain_text("restores 1")
    assert service.api("GET", "/deployments/changed")["encoder"] == scenes.ENCODER
    service.api("DELETE", "/deployments/changed")


def test_a_read_only_key_hides_controls_that_make_changes(open_page: OpenPage, service: ConsoleService) -> None:
    page = open_page(key=service.key("read"))
    for rest in (
        "/jobs",
        f"/jobs/{scenes.RUNNING}",
        f"/encoders/{scenes.ENCODER}",
        f"/deployments/{scenes.DEPLOYMENT}",
        "/activity",
        "/usage",
    ):
        page.goto(path(service, rest))
        names = ("New job", "Cancel", "Pause", "Clone", "Edit", "Deploy", "Promote", "Withdraw", "Delete")
        names += ("Audit", "Keys", "Webhooks", "Retention", "Apply", "Send", "Roll back")
        for role in ("button", "link"):
            for name in names:
                expect(page.get_by_role(role, name=name)).to_have_count(1 if (role, name) == ("link", "Deploy") else 0)


def test_a_session_ends_on_sign_out_or_when_its_key_is_revoked(open_page: OpenPage, service: ConsoleService) -> None:
    page = open_page()
    page.get_by_role("button", name="Sign out").click()
    page.wait_for_url("**/sign-in")
    page.goto(path(service, "/jobs"))
    expect(page.get_by_role("heading", name="Sign in")).to_be_visible()
    key = service.key("read")
    other = open_page(key=key)
    service.api("DELETE", f"/keys/{key.split('_')[1]}")
    other.wait_for_url("**/sign-in*")  # at the next refresh of the list


def test_a_sign_in_link_opens_the_console(browser: object, open_page: OpenPage, service: ConsoleService) -> None:
    page = open_page()
    page.get_by_role("button", name="Sign out").click()
    page.wait_for_url("**/sign-in")
    link = service.api("POST", "/console-links")["path"]
    page.goto(service.server.url + link)
    page.wait_for_url("**/console/jobs")


def test_a_retention_policy_and_a_webhook_can_be_tried_out(open_page: OpenPage, service: ConsoleService) -> None:
    page = open_page()
    page.get_by_role("link", name="Retention").click()
    page.get_by_label("Checkpoints", exact=True).fill("36500")
    page.get_by_role("button", name="Dry run").click()
    expect(page.locator("#report")).to_contain_text("There is nothing to remove.")
    service.api("POST", "/webhooks", json={"url": "https://hooks.example.com"})
    page.get_by_role("link", name="Webhooks").click()
    page.get_by_role("button", name="Send a test").click()
    expect(page.locator("#webhooks tbody tr")).to_contain_text("ping")


PAGES = {
    "jobs": "/jobs",
    "job": f"/jobs/{scenes.RUNNING}",
    "failed job": f"/jobs/{scenes.FAILED}",
    "log": f"/jobs/{scenes.RUNNING}/log",
    "config": f"/jobs/{scenes.RUNNING}/config",
    "history": f"/jobs/{scenes.RUNNING}/history",
    "pictures": f"/jobs/{scenes.RUNNING}/pictures",
    "files": f"/jobs/{scenes.RUNNING}/files",
    "new job": "/new",
    "clone": f"/jobs/{scenes.RUNNING}/clone",
    "sweeps": "/sweeps",
    "sweep": f"/sweeps/{scenes.SWEEP}",
    "ended sweep": f"/sweeps/{scenes.ENDED_SWEEP}",
    "encoders": "/encoders",
    "encoder": f"/encoders/{scenes.ENCODER}",
    "compare": f"/compare?encoder={scenes.ENCODER}&encoder={scenes.OTHER_ENCODER}&encoder={scenes.CLASSIFIER}",
    "deployments": "/deployments",
    "deployment": f"/deployments/{scenes.DEPLOYMENT}",
    "lab": "/lab",
    "map": f"/jobs/{scenes.EMBEDDED}/map?other={scenes.OTHER_EMBEDDED}",
    "cluster": "/cluster",
    "activity": "/activity",
    "failures": "/failures",
    "usage": "/usage",
    "usage by job": "/usage?by=job",
    "audit": "/audit",
    "retention": "/retention",
    "keys": "/keys",
    "webhooks": "/webhooks",
}


@pytest.mark.timeout(1800)  # axe takes seconds per page, and minutes on a busy machine
@pytest.mark.parametrize("width", [1440, 390])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_pages_have_no_serious_accessibility_violations_and_fit_the_screen(
    open_page: OpenPage, service: ConsoleService, axe: str, theme: str, width: int
) -> None:
    problems = []
    page = open_page(theme, width)
    for name, rest in PAGES.items():
        page.goto(path(service, rest))
        page.wait_for_load_state("load")
        if page.locator("#curves").count():
            expect(page.locator("#curves figure").first).to_be_visible()
        if page.locator("#map-groups").count():
            page.locator("#map-groups button").first.click()
            page.locator("#map-selection button").first.click()
            expect(page.locator("#map-neighbours li").first).to_be_visible()
        overflow = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        if overflow > 0:
            problems.append(f"{name}, {width}: {overflow} px too wide")
        # The page's content security policy does not apply to code that the debugger evaluates.
        found = page.evaluate(f"() => {{ {axe}; return axe.run(document, {{resultTypes: ['violations']}}); }}")
        for rule in found["violations"]:
            if rule["impact"] in ("serious", "critical"):
                node, where = rule["nodes"][0], f"{name}, {theme}, {width}"
                problems.append(f"{where}: {rule['id']}: {node['html'][:160]} {node['failureSummary'][:200]}")
    assert not problems, "\n".join(problems)
