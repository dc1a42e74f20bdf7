from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from amd.artifacts.weights import Card, encode, save_encoder, whole_clips
from amd.config import ConfigError, DataConfig, ScalingConfig
from amd.data.dataset.open import open_manifest
from amd.data.faults import DataFault
from amd.downstream.embedding.features import (
    Embedder,
    LabelledClips,
    augmented,
    embed,
    embed_file,
    embed_spans,
    gather,
    read_labelled,
)
from amd.models.encoder import Encoder
from tests.support.runs.configs import tiny_image_config

CONFIG = tiny_image_config()


def write_images(folder: Path, count: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Write dark images of class `a` and bright images of class `b` at the clip's size."""
    rng = np.random.default_rng(seed)
    written = {}
    for i in range(count):
        label = "ab"[i % 2]
        pixels = rng.integers(0, 60, (16, 16, 3), np.uint8) + np.uint8(0 if label == "a" else 180)
        path = folder / label / f"{i:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
        written[str(path)] = pixels
    return written


def data(folder: Path, **changes: object) -> DataConfig:
    return DataConfig(train=str(folder), loader_workers=0).model_copy(update=changes)


def encoder() -> Encoder:
    torch.manual_seed(0)
    return Encoder(CONFIG.student.encoder, CONFIG.clip.grid, CONFIG.clip.token_values).eval()


def embedder(**scaling: object) -> Embedder:
    return Embedder(encoder(), CONFIG.clip, "mean", ScalingConfig.model_validate({"device": "cpu", **scaling}))


def published(folder: Path) -> str:
    save_encoder(str(folder), encoder(), Card(id="tiny", encoder=CONFIG.student.encoder, clip=CONFIG.clip))
    return str(folder)


def test_clips_and_labels_are_returned_in_manifest_order(tmp_path: Path) -> None:
    written = write_images(tmp_path, 10)
    found = read_labelled(data(tmp_path, repeats=4), CONFIG.clip)  # a probe reads every sample once
    assert found.clips.shape == (10, 3, 1, 16, 16)
    assert found.labels.tolist() == [0] * 5 + [1] * 5
    for clip, path in zip(found.clips, sorted(written), strict=True):
        np.testing.assert_array_equal(clip[:, 0].permute(1, 2, 0).numpy(), written[path])


def test_unreadable_samples_are_skipped_and_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_images(tmp_path, 10)
    (tmp_path / "a" / "000.png").write_bytes(b"not an image")
    with caplog.at_level(logging.WARNING):
        found = read_labelled(data(tmp_path, max_bad_fraction=0.1), CONFIG.clip)
    assert len(found.labels) == len(found.clips) == 9
    assert "000.png" in caplog.text
    with pytest.raises(DataFault, match=r"000\.png"):
        read_labelled(data(tmp_path, max_bad_fraction=0.05), CONFIG.clip)


def test_a_probe_requires_labels(tmp_path: Path) -> None:
    write_images(tmp_path, 4)
    with pytest.raises(ConfigError, match="2 samples have no label"):
        read_labelled(data(tmp_path / "a"), CONFIG.clip)


def test_features_do_not_depend_on_how_samples_are_batched() -> None:
    clips = torch.randint(0, 256, (300, 3, 1, 16, 16), dtype=torch.uint8)
    found = embed(encoder(), CONFIG.clip, LabelledClips(clips, np.zeros(300, np.int64)))
    assert found.values.shape == (300, CONFIG.student.encoder.width)
    with torch.inference_mode():
        one_by_one = torch.cat([encode(encoder(), CONFIG.clip, clip[None]) for clip in clips[::37]])
    np.testing.assert_allclose(found.values[::37], one_by_one.numpy(), atol=1e-5)


def test_embedding_a_single_file_returns_the_features_of_its_pixels(tmp_path: Path) -> None:
    written = write_images(tmp_path, 2)
    url = published(tmp_path / "encoder")
    path, pixels = next(iter(written.items()))
    clip = torch.from_numpy(pixels).permute(2, 0, 1)[None, :, None]
    with torch.inference_mode():
        expected = encode(encoder(), CONFIG.clip, clip)[0].numpy()
    np.testing.assert_allclose(embed_file(url, path), expected, atol=1e-5)


def test_features_computed_span_by_span_match_a_single_pass(tmp_path: Path) -> None:
    write_images(tmp_path, 23)
    found = embed(encoder(), CONFIG.clip, read_labelled(data(tmp_path), CONFIG.clip))
    manifest = open_manifest(data(tmp_path))
    spans = [range(16, 23), range(8), range(8, 16)]  # in any order
    parts = list(embed_spans(embedder(micro_batch=3), data(tmp_path, repeats=4), manifest, spans))
    assert [len(part.values) for part in parts] == [7, 8, 8]
    streamed = gather(parts, len(manifest), 0.0)
    np.testing.assert_allclose(streamed.values, found.values, atol=1e-5)
    assert streamed.records.tolist() == list(range(23))


def test_unreadable_samples_in_any_span_are_listed_by_record_number(tmp_path: Path) -> None:
    written = sorted(write_images(tmp_path, 12))
    for number in (0, 5, 6, 7):  # includes one whole batch
        Path(written[number]).write_bytes(b"not an image")
    manifest = open_manifest(data(tmp_path))

    def parts() -> object:
        return embed_spans(embedder(micro_batch=3), data(tmp_path), manifest, [range(6), range(6, 12)])

    found = gather(parts(), 12, max_bad_fraction=0.4)
    assert found.records.tolist() == [1, 2, 3, 4, 8, 9, 10, 11]
    assert [(bad["record"], bad["location"]) for bad in found.bad] == [(n, written[n]) for n in (0, 5, 6, 7)]
    alone = embed_spans(embedder(), data(tmp_path), manifest, [range(8, 12)])
    np.testing.assert_allclose(found.values[4:], next(iter(alone)).values, atol=1e-5)
    with pytest.raises(DataFault, match="4 of 12 samples cannot be read"):
        gather(parts(), 12, max_bad_fraction=0.3)


def test_class_token_pooling_returns_the_class_token_or_raises_without_one(tmp_path: Path) -> None:
    clips = torch.randint(0, 256, (2, 3, 1, 16, 16), dtype=torch.uint8)
    network = encoder()
    token = Embedder(network, CONFIG.clip, "class_token", ScalingConfig(device="cpu"))(clips)
    final = network(*whole_clips(network, CONFIG.clip, clips)).final
    assert final is not None
    torch.testing.assert_close(token, final[:, 0])
    assert not torch.allclose(token, embedder()(clips))
    tokenless = CONFIG.student.encoder.model_copy(update={"class_token": False})
    without = Encoder(tokenless, CONFIG.clip.grid, CONFIG.clip.token_values)
    with pytest.raises(ConfigError, match="no class token"):
        Embedder(without, CONFIG.clip, "class_token", ScalingConfig(device="cpu"))


def test_augmented_features_differ_between_epochs_and_are_reproducible_from_the_seed(tmp_path: Path) -> None:
    write_images(tmp_path, 12)
    config = data(tmp_path, crop="random_resized", crop_scale=(0.08, 1.0))

    def read(seed: int) -> list[torch.Tensor]:
        manifest = open_manifest(config)
        steps = augmented(embedder(micro_batch=2), config, manifest, batch=6, epochs=2, seed=seed)
        return [torch.cat([features, labels[:, None].float()], dim=1) for features, labels in steps]

    first, again, other = read(0), read(0), read(1)
    assert [len(step) for step in first] == [6, 6, 6, 6]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])
    rows = torch.cat(first)
    assert len(torch.unique(rows, dim=0)) == 24
    assert sorted(rows[:12, -1].tolist()) == sorted(rows[12:, -1].tolist()) == [0.0] * 6 + [1.0] * 6
