"""Tests for bulk embedding: file contents, and resumption after interruptions."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from amd.config import ConfigError, EmbedConfig, validate
from amd.downstream.__main__ import main
from amd.downstream.embedding.bulk import EmbedResult, embed_all
from amd.downstream.embedding.features import embed_file
from amd.downstream.embedding.files import read_index, read_rows
from amd.storage import filesystem, listdir
from amd.training.reporting.progress import PROGRESS_FILE
from tests.amd.downstream.embedding.test_features import write_images
from tests.support.data.damage import overwrite_packets
from tests.support.encoders.published_encoders import VIDEO, film, publish

ENCODER = "small"


def config(folder: Path, **overrides: Any) -> EmbedConfig:
    """Return a config for the images in `folder` and the encoder published there."""
    if not (folder / "encoders").exists():
        publish(folder / "encoders" / ENCODER)
    values = {
        "encoder": ENCODER,
        "data": {"train": str(folder / "images"), "loader_workers": 0, "max_bad_fraction": 0.2},
        "output": str(folder / "out"),
        "rows_per_file": 4,
        "scaling": {"device": "cpu"},
        "storage": str(folder),
    }
    return validate(EmbedConfig, {**values, **overrides})


def rows_of(output: str) -> dict[str, list[Any]]:
    """Return the rows of all Parquet files, in file-name order."""
    fs, path = filesystem(output)
    found: dict[str, list[Any]] = {"record": [], "location": [], "label": [], "embedding": []}
    for name in listdir(f"{output}/embeddings"):
        with fs.open(f"{path}/embeddings/{name}", "rb") as file:
            table = pq.read_table(file)
        for column, values in found.items():
            values += table[column].to_pylist()
    return found


def assert_each_record_once(output: str) -> None:
    index = read_index(output)
    records = rows_of(output)["record"] + [bad["record"] for bad in index.bad]
    assert sorted(records) == list(range(index.samples))
    searched = np.concatenate([read_rows(output, file.span).records for file in index.files])
    assert searched.tolist() == rows_of(output)["record"]


def test_each_vector_belongs_to_its_file_and_bad_samples_are_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = sorted(write_images(tmp_path / "images", 10))
    Path(files[6]).write_bytes(b"not an image")
    monkeypatch.setenv(PROGRESS_FILE, str(tmp_path / "progress.json"))
    result = embed_all(config(tmp_path), local=True)
    assert (result.state, result.samples, result.bad) == ("succeeded", 9, 1)
    found = rows_of(result.output)
    assert found["location"] == [file for file in files if file != files[6]]
    assert found["label"] == [0] * 5 + [1] * 4
    for location, vector in zip(found["location"], found["embedding"], strict=True):
        expected = embed_file(str(tmp_path / "encoders" / ENCODER), location)
        np.testing.assert_allclose(vector, expected, rtol=0, atol=1e-5)
    index = read_index(result.output)
    assert (index.encoder, index.count, index.width, index.samples) == (ENCODER, 9, 24, 10)
    assert [(bad["record"], bad["location"]) for bad in index.bad] == [(6, files[6])]
    assert [(file.start, file.stop, file.rows) for file in index.files] == [(0, 4, 4), (4, 8, 3), (8, 10, 2)]
    assert_each_record_once(result.output)
    schema = pq.read_schema(tmp_path / "out" / index.files[0].file)
    assert str(schema.field("embedding").type) == "fixed_size_list<element: float>[24]"
    progress = json.loads((tmp_path / "progress.json").read_text())
    assert (progress["step"], progress["steps"]) == (10, 10)


def test_videos_are_embedded_as_unit_vectors(tmp_path: Path) -> None:
    publish(tmp_path / "encoders" / ENCODER, VIDEO)
    (tmp_path / "images").mkdir()
    files = [str(film(tmp_path / "images" / f"{number}.mp4", seed=number)) for number in range(3)]
    result = embed_all(config(tmp_path, normalize=True, output=None), local=True)
    assert result.output.startswith(str(tmp_path / "embeddings" / ENCODER))
    found = rows_of(result.output)
    assert found["label"] == [None] * 3
    for file, vector in zip(files, found["embedding"], strict=True):
        expected = embed_file(str(tmp_path / "encoders" / ENCODER), file)
        np.testing.assert_allclose(vector, expected / np.linalg.norm(expected), rtol=0, atol=1e-5)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["killed", "stopped"])
def test_an_interrupted_run_resumes_and_keeps_finished_files(tmp_path: Path, number: signal.Signals) -> None:
    files = sorted(write_images(tmp_path / "images", 6))
    Path(files[0]).write_bytes(b"not an image")
    bulk_config = config(tmp_path, rows_per_file=1)
    process, folder = start(tmp_path, bulk_config), tmp_path / "out" / "embeddings"
    deadline = time.monotonic() + 120
    while len(list(folder.glob("*.parquet"))) < 2:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(number)
    printed, _ = process.communicate(timeout=120)
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.glob("*.parquet")}
    assert 2 <= len(before) < 6, "the run finished before it was interrupted"
    assert not (tmp_path / "out" / "index.json").exists()
    if number == signal.SIGTERM:
        partial = EmbedResult.model_validate_json(printed)
        assert process.returncode == 1
        assert (partial.state, partial.reason, partial.bad) == ("cancelled", "cancelled_by_user", 1)
        assert partial.samples == len(before) - 1
    result = embed_all(bulk_config, local=True)
    assert (result.state, result.samples, result.bad) == ("succeeded", 5, 1)
    assert_each_record_once(result.output)
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in before} == before


def start(folder: Path, config: EmbedConfig, *args: str, local: bool = True) -> subprocess.Popen[str]:
    """Start the program as a job would."""
    file = folder / "embed.json"
    file.write_text(config.model_dump_json())
    command = [sys.executable, "-m", "amd.downstream", "embed", "--config", str(file), *args]
    return subprocess.Popen([*command, *(["--local"] if local else [])], stdout=subprocess.PIPE, text=True)


def test_an_interrupted_run_on_an_object_store_resumes(tmp_path: Path, s3_root: str) -> None:
    write_images(tmp_path / "images", 10)
    bulk_config = config(tmp_path, output=f"{s3_root}/out")
    embed_all(bulk_config, local=True)
    fs, path = filesystem(f"{s3_root}/out")
    for removed in ("index.json", "embeddings/0000000004-0000000008.parquet", "search/0000000008-0000000010.npz"):
        fs.rm_file(f"{path}/{removed}")
    fs.invalidate_cache()
    kept = fs.modified(f"{path}/embeddings/0000000000-0000000004.parquet")
    result = embed_all(bulk_config, local=True)
    assert (result.state, result.samples) == ("succeeded", 10)
    assert_each_record_once(result.output)
    assert fs.modified(f"{path}/embeddings/0000000000-0000000004.parquet") == kept


def test_damaged_videos_are_embedded_and_listed_even_after_a_resume(tmp_path: Path) -> None:
    publish(tmp_path / "encoders" / ENCODER, VIDEO)
    (tmp_path / "images").mkdir()
    videos = [film(tmp_path / "images" / f"{number}.mp4", seed=number, frames=48) for number in range(3)]
    overwrite_packets(videos[1], range(18, 26))  # around the middle, which is embedded
    resolved = config(tmp_path, rows_per_file=1)
    result = embed_all(resolved, local=True)
    assert (result.state, result.samples, result.bad, result.damaged) == ("succeeded", 3, 0, 1)
    (tmp_path / "out" / "index.json").unlink()  # as if the run had been killed before its last step
    resumed = embed_all(resolved, local=True)
    assert (resumed.samples, resumed.damaged) == (3, 1)
    assert [(video["record"], video["location"]) for video in read_index(result.output).damaged] == [
        (1, str(videos[1]))
    ]
    assert embed_all(resolved, local=True).damaged == 1, "read from the complete set"


def test_a_run_with_too_many_bad_samples_lists_them_and_fails_until_they_are_fixed(tmp_path: Path) -> None:
    pictures = write_images(tmp_path / "images", 10)
    files = sorted(pictures)
    good = Path(files[0]).read_bytes()
    for file in (files[0], files[5], files[9]):
        Path(file).write_bytes(b"not an image")
    result = embed_all(config(tmp_path), local=True)
    assert (result.state, result.reason, result.exit_code) == ("failed", "dataset_invalid", 1)
    assert "3 of 10 samples cannot be read" in result.message
    assert files[9] in result.message
    again = embed_all(config(tmp_path), local=True)  # not rejected because of existing files
    assert again.message == result.message
    Path(files[0]).write_bytes(good)
    fixed = embed_all(config(tmp_path), local=True)
    assert (fixed.state, fixed.samples, fixed.bad) == ("succeeded", 8, 2)
    assert_each_record_once(fixed.output)


def test_complete_output_is_unchanged_and_a_damaged_file_is_rewritten(tmp_path: Path) -> None:
    write_images(tmp_path / "images", 10)
    bulk_config = config(tmp_path)
    first = embed_all(bulk_config, local=True)
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.*")}
    logged: list[str] = []
    assert embed_all(bulk_config, local=True, log=logged.append).samples == first.samples
    assert logged == [f"{first.output} is complete"]
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    (tmp_path / "out" / "index.json").unlink()
    (tmp_path / "out" / "embeddings" / "0000000004-0000000008.parquet").write_bytes(b"PAR1")
    assert embed_all(bulk_config, local=True).state == "succeeded"
    assert_each_record_once(first.output)


def test_an_output_folder_with_other_embeddings_is_rejected(tmp_path: Path) -> None:
    write_images(tmp_path / "images", 10)
    embed_all(config(tmp_path), local=True)
    publish(tmp_path / "encoders" / "other", seed=1)
    with pytest.raises(ConfigError, match=r"index\.json \(encoder differ"):
        embed_all(config(tmp_path, encoder="other"), local=True)
    (tmp_path / "out" / "index.json").unlink()
    for changes in ({"encoder": "other"}, {"rows_per_file": 5}, {"normalize": True}):
        with pytest.raises(ConfigError, match="contains embeddings of another encoder, data set or config"):
            embed_all(config(tmp_path, **changes), local=True)


def test_the_command_prints_one_line_of_json(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write_images(tmp_path / "images", 6)
    file = tmp_path / "embed.json"
    file.write_text(config(tmp_path).model_dump_json())
    assert main(["embed", "--config", str(file), "--local", "normalize=true"]) == 0
    result = json.loads(capfd.readouterr().out)
    assert {name: result[name] for name in ("state", "output", "samples", "bad")} == {
        "state": "succeeded",
        "output": str(tmp_path / "out"),
        "samples": 6,
        "bad": 0,
    }
    assert os.listdir(tmp_path / "out" / "embeddings") != []
    assert main(["embed", "--config", str(file), "encoder=nowhere"]) == 2
    assert "nowhere: not a published encoder" in capfd.readouterr().err
