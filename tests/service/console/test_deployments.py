"""Tests for a deployment's page: its revisions, and the form that rolls back to one of them."""

from __future__ import annotations

import html
import re
from typing import Any

import pytest
from sqlalchemy import Engine

from service.serving.deployments import new_deployment
from service.serving.schemas import ServingSettings
from tests.support.browser.console_client import ConsoleClient, plain_text_of
from tests.support.encoders.encoder_cards import index_encoder

PAGE = "/console/deployments/digits"


@pytest.fixture
def deployed(app: Any, database: Engine) -> Any:
    """Create a deployment with two revisions, and return its store."""
    store = app.state.deployments
    if not app.state.encoders.stamps():
        index_encoder(database, "first")
        index_encoder(database, "second")
    for name, encoder, threads in (("production", "first", None), ("second", "second", 4)):
        settings = ServingSettings(threads=threads)
        desired = new_deployment(
            "digits", "default", "alice", encoder=name, candidate=None, share=0.0, settings=settings
        )
        store.put(desired, resolved={"main": encoder})
    app.state.encoders.move_alias("default", "production", "first", "test")
    yield store
    store.delete("digits", None, "test")


def test_the_page_lists_revisions_with_their_changes(deployed: Any, console: ConsoleClient) -> None:
    text = plain_text_of(console.get(PAGE).text)
    assert "2 second – encoder, threads alice" in text
    assert "1 production first – – alice" in text
    assert text.count("Roll back") == 1, "not for the newest revision"
    assert text.count("current settings") == 1


def test_a_revision_with_the_current_settings_cannot_be_restored(deployed: Any, console: ConsoleClient) -> None:
    assert console.submit(f"{PAGE}/roll-back", revision="1").status_code == 204
    text = plain_text_of(console.get(PAGE).text)
    assert (text.count("Roll back"), text.count("current settings")) == (1, 2)
    assert 'name="revision" value="2"' in console.get(PAGE).text


def test_the_question_names_the_encoder_that_a_moved_alias_serves(
    app: Any, deployed: Any, console: ConsoleClient
) -> None:
    app.state.encoders.move_alias("default", "production", "second", "test")
    page = plain_text_of(html.unescape(console.get(PAGE).text).replace('hx-confirm="', ">"))
    assert (
        "Restore the settings of revision 1? production is now second; revision 1 served first. "
        "To serve first, move the alias back."
    ) in page


def test_a_revision_whose_candidate_was_promoted_cannot_be_restored(
    app: Any, deployed: Any, console: ConsoleClient
) -> None:
    plain: dict[str, Any] = {"encoder": "production", "settings": ServingSettings()}
    for candidate, resolved in (("second", {"main": "first", "candidate": "second"}), (None, {"main": "second"})):
        desired = new_deployment("digits", "default", "test", candidate=candidate, share=0.0, **plain)
        deployed.put(desired, resolved=resolved)
    app.state.encoders.move_alias("default", "production", "second", "test")
    page = console.get(PAGE).text
    assert "production is now its candidate; move the alias back first" in page
    assert 'name="revision" value="3"' not in page


def test_the_form_restores_a_revision_unless_the_settings_have_changed(deployed: Any, console: ConsoleClient) -> None:
    page = console.get(PAGE).text
    etag = page.partition('name="etag" value="')[2].partition('"')[0].replace("&#34;", '"')
    response = console.submit(f"{PAGE}/roll-back", revision="1", etag=etag)
    assert (response.status_code, response.headers["hx-redirect"]) == (204, PAGE)
    assert deployed.get("digits", None).encoder == "production"
    assert "restores 1" in console.get(PAGE).text
    response = console.submit(f"{PAGE}/roll-back", revision="2", etag=etag)
    assert response.status_code == 412
    assert "has changed" in response.text
    assert deployed.get("digits", None).encoder == "production"


@pytest.mark.parametrize("revision", ["", "x", "0", "1e3", str(10**16)])
def test_an_invalid_revision_is_rejected(deployed: Any, console: ConsoleClient, revision: str) -> None:
    assert console.submit(f"{PAGE}/roll-back", revision=revision).status_code == 422
    assert deployed.get("digits", None).encoder == "second"


def test_a_reader_sees_revisions_without_the_form(deployed: Any, reader: ConsoleClient) -> None:
    page = reader.get(PAGE).text
    assert "Revisions" in page
    assert "roll-back" not in page
    assert reader.submit(f"{PAGE}/roll-back", revision="1").status_code == 403


def test_the_page_polls_until_the_deployment_is_healthy(deployed: Any, console: ConsoleClient) -> None:
    polling = f'hx-get="{PAGE}" hx-trigger="every 2s" hx-select="#state" hx-select-oob="#message,#main-encoder"'
    stored = deployed.get("digits", None)
    for state in ("deploying", "unhealthy"):
        deployed.record_status(stored, state, "starting replicas", {})
        page = console.get(PAGE).text
        assert polling in page
        assert f"{state}</span></span>" in page
        assert '<div id="message"><div' in page
        assert '<section id="main-encoder"' in page
    for state in ("healthy", "failed"):
        deployed.record_status(stored, state, "", {})
        assert "hx-trigger" not in console.get(PAGE).text


def test_the_list_links_to_the_encoders(deployed: Any, console: ConsoleClient) -> None:
    page = console.get("/console/deployments").text
    assert '<a class="button" href="/console/encoders">Deploy an encoder</a>' in page


def test_the_list_names_the_aliases_of_what_is_served(
    app: Any, console: ConsoleClient, database: Engine, deployed: Any
) -> None:
    plain: dict[str, Any] = {"share": 0.25, "settings": ServingSettings()}
    for name, encoder, main, candidate in (
        ("digits", "production", "first", "second"),
        ("plain", "first", "first", None),
    ):
        desired = new_deployment(name, "default", "test", encoder=encoder, candidate=candidate, **plain)
        serving = {"main": main} | ({"candidate": candidate} if candidate else {})
        stored, _ = deployed.put(desired, resolved=serving)
        deployed.record_status(stored, "healthy", "", serving)
    text = plain_text_of(console.get("/console/deployments").text)
    assert "digits first follows production second 25 % 1 " in text
    assert "plain first production – 1 " in text
    deployed.delete("plain", None, "test")


def test_the_page_says_which_encoder_serves_until_the_target_is_deployed(
    app: Any, console: ConsoleClient, deployed: Any
) -> None:
    desired = new_deployment(
        "digits", "default", "test", encoder="production", candidate=None, share=0.0, settings=ServingSettings()
    )
    stored, _ = deployed.put(desired, resolved={"main": "first"})
    deployed.record_status(stored, "healthy", "", {"main": "first"})
    page = console.get(PAGE).text
    assert "Serves first Requests" in plain_text_of(page)
    assert "hx-trigger" not in page
    app.state.encoders.move_alias("default", "production", "second", "test")
    page = console.get(PAGE).text
    assert "Serves first , deploying second Requests" in plain_text_of(page)
    assert 'hx-trigger="every 2s"' in page
    deployed.record_status(stored, "deploying", "", {"main": "second"})
    assert "Deploying second Requests" in plain_text_of(console.get(PAGE).text)
    app.state.encoders.delete_alias("default", "production", "test")
    deployed.record_status(stored, "healthy", "", {"main": "first"})
    assert "Serves first Requests" in plain_text_of(console.get(PAGE).text), "no other encoder is deployed"


@pytest.mark.parametrize(
    ("resources", "text"),
    [({}, "idle CPUs , float32"), ({"cpus": 1.0}, "1 CPU, float32"), ({"cpus": 2, "gpus": 0.5}, "2 CPUs, 0.5 GPUs")],
)
def test_the_page_shows_the_resources_of_a_replica(
    app: Any, console: ConsoleClient, deployed: Any, resources: dict[str, Any], text: str
) -> None:
    settings = ServingSettings(**resources)
    desired = new_deployment("digits", "default", "test", encoder="first", candidate=None, share=0.0, settings=settings)
    deployed.put(desired, resolved={"main": "first"})
    assert f"Per replica {text}" in plain_text_of(console.get(PAGE).text)


def test_the_page_links_to_the_form_that_tries_the_encoder_that_serves(deployed: Any, console: ConsoleClient) -> None:
    link = '<a class="button" href="/console/encoders/second#try-title">Try it</a>'
    assert link not in console.get(PAGE).text, "nothing serves yet"
    deployed.record_status(deployed.get("digits", None), "healthy", "", {"main": "second"})
    assert link in console.get(PAGE).text
    assert 'id="try-title"' in console.get("/console/encoders/second").text


def test_the_form_for_a_candidate_offers_aliases_and_encoders(deployed: Any, console: ConsoleClient) -> None:
    page = console.get(PAGE).text
    options = re.findall(r'<option value="([^"]*)">([^<]*)</option>', page.partition('<datalist id="candidates">')[2])
    assert options == [("production", "alias of first"), ("second", "second"), ("first", "first, production")]
