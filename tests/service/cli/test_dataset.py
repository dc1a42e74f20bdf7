"""Tests for `amd dataset`: the list of data sets, the files that it writes, and error messages."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from amd.data.packaged.catalog import CATALOG
from tests.support.service.command import amd


@pytest.fixture
def films(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the package for the data set `films` with a folder that contains one file."""
    source = tmp_path / "package" / "datasets" / "data"
    source.mkdir(parents=True)
    (source / "a.mp4").write_bytes(b"video")
    monkeypatch.setitem(CATALOG, "films", CATALOG["films"]._replace(locate=lambda: tmp_path / "package"))


def test_data_sets_are_listed_with_their_licences(
    films: None, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = amd(monkeypatch, capfd, "dataset", "--json")
    assert code == 0
    rows = {row["name"]: row for row in json.loads(out)}
    assert set(rows) == set(CATALOG)
    assert rows["films"]["installed"]
    assert rows["solar-cells"]["licence"].startswith("CC-BY-NC-SA-4.0")
    code, out, _ = amd(monkeypatch, capfd, "dataset")
    assert code == 0
    assert all(name in out for name in CATALOG)
    assert max(len(line) for line in out.splitlines()) <= 80


def test_a_data_set_is_written_and_its_licence_is_printed(
    films: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = amd(monkeypatch, capfd, "dataset", "films", str(tmp_path / "out"))
    assert code == 0
    assert "licence: BSD" in out
    assert (tmp_path / "out" / "a.mp4").read_bytes() == b"video"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["cats"], "dataset cats does not exist; choose one of fashion-mnist, "),
        (["films"], "specify the folder to write to"),
        (["ego-motion", "x"], "the package vizdoom is not installed; run `pip install vizdoom`"),
    ],
)
def test_bad_input_exits_with_code_2(
    args: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(CATALOG, "ego-motion", CATALOG["ego-motion"]._replace(locate=lambda: None))
    code, _, err = amd(monkeypatch, capfd, "dataset", *args)
    assert code == 2
    assert message in err
