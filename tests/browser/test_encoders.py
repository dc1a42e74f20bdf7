"""Tests for the pages of encoders and deployments in a real browser."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from playwright.sync_api import Page, expect

from tests.support.browser import scenes
from tests.support.browser.console_service import PATIENCE_MS, ConsoleService
from tests.support.encoders.published_encoders import picture

expect.set_options(timeout=PATIENCE_MS)
OpenPage = Callable[..., Page]


def path(service: ConsoleService, rest: str) -> str:
    return f"{service.server.url}/console{rest}"


def test_a_result_can_be_copied_and_is_cleared_for_another_file(
    open_page: OpenPage, service: ConsoleService, tmp_path: Path
) -> None:
    (tmp_path / "three.png").write_bytes(picture())
    page = open_page()
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.goto(path(service, f"/encoders/{scenes.OTHER_ENCODER}"))
    page.get_by_label("An image or a video").set_input_files(tmp_path / "three.png")
    page.get_by_role("button", name="Encode").click()
    page.get_by_role("button", name="Copy all 64 values").click()
    expect(page.get_by_role("button", name="Copied")).to_be_visible()
    assert len(json.loads(page.evaluate("navigator.clipboard.readText()"))) == 64
    (tmp_path / "other.png").write_bytes(picture())
    page.get_by_label("An image or a video").set_input_files(tmp_path / "other.png")
    expect(page.locator("#try-result")).to_be_empty()


def test_an_encoder_without_a_deployment_offers_to_deploy_it(open_page: OpenPage, service: ConsoleService) -> None:
    page = open_page()
    page.goto(path(service, f"/encoders/{scenes.CLASSIFIER}"))
    expect(page.get_by_role("button", name="Encode")).to_be_disabled()
    page.locator("p", has_text="Deploy this encoder to try it.").get_by_role("button", name="Deploy").click()
    expect(page.locator("#deploy-name")).to_be_focused()


def test_a_deployment_page_follows_the_state(open_page: OpenPage, service: ConsoleService) -> None:
    service.api("PUT", "/deployments/followed", json={"encoder": scenes.ENCODER})
    page = open_page()
    page.goto(path(service, "/deployments/followed"))
    expect(page.locator("#state")).to_have_text("deploying")
    page.evaluate("window.marked = true")
    store = service.server.app.state.deployments
    store.record_status(store.get("followed", None), "healthy", "", {"main": scenes.OTHER_ENCODER})
    expect(page.locator("#state")).to_have_text("healthy")
    expect(page.locator("#main-encoder")).to_contain_text(scenes.OTHER_ENCODER)
    assert page.evaluate("window.marked")
    service.api("DELETE", "/deployments/followed")


def test_selected_encoders_are_compared_and_one_can_be_removed(open_page: OpenPage, service: ConsoleService) -> None:
    page = open_page()
    page.goto(path(service, "/encoders"))
    compare = page.locator("#compare")
    expect(compare).to_be_disabled()
    for name in (scenes.ENCODER, scenes.OTHER_ENCODER, scenes.CLASSIFIER):
        page.get_by_label(f"Compare {name}").check()
    expect(compare).to_have_text("Compare (3)")
    compare.click()
    expect(page.locator("table.compare").first.locator("thead a")).to_have_count(3)
    page.get_by_role("link", name=f"Remove {scenes.CLASSIFIER}").click()
    expect(page.locator("table.compare").first.locator("thead a")).to_have_count(2)
    page.get_by_label("Encoder to add").select_option(scenes.CLASSIFIER)
    page.get_by_role("button", name="Add").click()
    expect(page.locator("table.compare").first.locator("thead a")).to_have_count(3)


def test_encoders_are_sorted_by_a_score_with_missing_scores_last(open_page: OpenPage, service: ConsoleService) -> None:
    page = open_page()
    page.goto(path(service, "/encoders"))
    names, knn = page.locator("#encoders .job-name"), page.locator("#encoders .sort", has_text="knn")
    scored = [scenes.ENCODER, scenes.OTHER_ENCODER]
    for expected in (scored, scored[::-1]):
        knn.click()
        expect(names.nth(0)).to_have_text(expected[0])
        expect(names.nth(1)).to_have_text(expected[1])
    expect(page.locator("#encoders th[aria-sort]")).to_contain_text("knn")
    page.get_by_label("Score").select_option("linear, eval/top1, demo:digits")
    page.get_by_role("button", name="Show").click()
    expect(names.first).to_have_text(scenes.ENCODER)
    expect(page.locator("#encoders th[aria-sort=descending]")).to_contain_text("linear")


def test_all_scores_are_visible_on_a_narrow_screen(open_page: OpenPage, service: ConsoleService) -> None:
    page = open_page(width=390)
    page.goto(path(service, "/encoders"))
    for cell in page.locator("#encoders td:visible").all():
        box = cell.bounding_box()
        assert box is not None
        assert 0 <= box["x"] <= box["x"] + box["width"] <= 390


def test_all_compared_values_are_visible_on_a_narrow_screen(open_page: OpenPage, service: ConsoleService) -> None:
    page = open_page(width=390)
    names = (scenes.ENCODER, scenes.OTHER_ENCODER, scenes.CLASSIFIER)
    page.goto(path(service, f"/compare?{'&'.join(f'encoder={name}' for name in names)}"))
    for value in page.locator("table.compare td[data-label]").all():
        box = value.bounding_box()
        assert box is not None
        assert 0 <= box["x"] <= box["x"] + box["width"] <= 390
