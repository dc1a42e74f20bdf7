"""Tests for the embedding map page, and for the data and images that it requests."""

from __future__ import annotations

import re
from typing import Any

import pytest
from sqlalchemy import Engine

from service.console.security import POLICY
from tests.service.console.conftest import new_app
from tests.support.browser.console_client import ConsoleClient
from tests.support.browser.embedded_digits import UNREADABLE, add_embedded_digits
from tests.support.service.fake_cluster import queued


@pytest.fixture(scope="module")
def app(database: Engine, folder: Any) -> Any:
    return new_app(database, folder)


@pytest.fixture(scope="module")
def embedded(app: Any) -> list[str]:
    """Return the IDs of two embed jobs on the same data."""
    root = app.state.settings.root
    return [add_embedded_digits(app.state.jobs, root, 20, seed, name=f"digits {seed}") for seed in range(2)]


def test_an_embed_job_links_to_its_map_and_offers_others_for_comparison(
    console: ConsoleClient, app: Any, embedded: list[str]
) -> None:
    first, second = embedded
    assert f'href="/console/jobs/{first}/map"' in console.get(f"/console/jobs/{first}").text
    training = queued(app.state.jobs).id
    assert f"/console/jobs/{training}/map" not in console.get(f"/console/jobs/{training}").text
    page = console.get(f"/console/jobs/{first}/map").text
    assert re.findall(r'<figure class="panel" data-url="([^"]+)"', page) == [f"/console/jobs/{first}/map"]
    assert f'<option value="{second}">digits 1</option>' in page
    compared = console.get(f"/console/jobs/{first}/map?other={second}").text
    assert re.findall(r'<figure class="panel" data-url="([^"]+)"', compared) == [
        f"/console/jobs/{first}/map",
        f"/console/jobs/{second}/map",
    ]
    assert console.get(f"/console/jobs/{first}/map?other=embed-never").status_code == 404


def test_the_page_requests_the_map_images_and_neighbours(console: ConsoleClient, embedded: list[str]) -> None:
    url = f"/console/jobs/{embedded[0]}/map"
    assert len(console.get(f"{url}.json").json()["records"]) == 19
    image = console.get(f"{url}/thumbnails/5")
    assert image.headers["content-type"] == "image/webp"
    assert image.headers["content-security-policy"] != POLICY
    assert "sandbox" in image.headers["content-security-policy"]
    assert image.headers["x-content-type-options"] == "nosniff"
    neighbours = console.get(f"{url}/neighbours.json?record=5&k=3").json()
    assert len(neighbours) == 3
    assert 5 not in [found["record"] for found in neighbours]
    for query in ("", "record=-1", "record=5&k=101", "record=x"):
        assert console.get(f"{url}/neighbours.json?{query}").status_code == 422


def test_errors_are_returned_as_page_fragments(console: ConsoleClient, app: Any, embedded: list[str]) -> None:
    training = queued(app.state.jobs).id
    for path in (f"{training}/map.json", f"{embedded[0]}/map/neighbours.json?record={UNREADABLE}"):
        response = console.get(f"/console/jobs/{path}", headers={"HX-Request": "true"})
        assert response.status_code == 422
        assert "<html" not in response.text
        assert "image/webp" not in response.headers["content-type"]
    assert console.get(f"/console/jobs/{embedded[0]}/map/thumbnails/{UNREADABLE}").status_code == 404
