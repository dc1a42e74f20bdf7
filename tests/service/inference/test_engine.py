"""Tests for the engine: results, errors, loading and shutdown."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from amd.artifacts.weights import encode, load_encoder, whole_clips
from amd.config import ConfigError, DataConfig, ViewsConfig
from amd.data.decoding.reader import SampleReader
from amd.downstream.embedding.features import cut_clips, embed_file, file_chooser
from amd.downstream.supervised.classification.metrics import probabilities
from amd.storage import write_bytes
from service.inference.engine import (
    Backlog,
    BacklogShare,
    Engine,
    EngineSettings,
    InferenceOptions,
    InferenceResult,
    Item,
    RequestLimits,
    output_bytes,
)
from service.inference.model import InferencePlan
from service.web.errors import Refusal
from tests.support.encoders.published_encoders import (
    VIDEO,
    decoding_processes,
    publish_classifier,
    run,
)
from tests.support.s3 import S3Server
from tests.support.service.engines import (
    DEADLINE_S,
    EMBEDDING,
    NO_TIME_LIMIT,
    embed_offline,
    infer,
    load_slots,
    reference,
    upload,
)


@pytest.mark.parametrize("encoder", ["image", "video", "normed"])
def test_embeddings_match_offline_embeddings_for_uploads_references_and_mixed_requests(
    engine: Engine, folder: Path, encoder: str
) -> None:
    load_slots(engine, main=folder / encoder)
    files = [folder / "1.png", folder / "1.mp4"]
    vectors = [embed_offline(folder / encoder, file) for file in files]

    async def infer_all() -> list[InferenceResult]:
        one_by_one = [
            engine.infer("main", [as_item(file)], EMBEDDING, DEADLINE_S)
            for as_item in (upload, reference)
            for file in files
        ]
        return await asyncio.gather(*one_by_one, engine.infer("main", [*map(upload, files)], EMBEDDING, DEADLINE_S))

    *single, together = run(infer_all())
    served = [result.items[0] for result in single] + together.items
    for item, expected in zip(served, vectors * 3, strict=True):
        assert item["embedding"].dtype == np.float32
        np.testing.assert_allclose(item["embedding"], expected, atol=1e-5)
    assert {result.encoder for result in (*single, together)} == {encoder}


def test_the_file_type_is_detected_from_the_content_rather_than_the_name(
    engine: Engine, folder: Path, tmp_path: Path
) -> None:
    load_slots(engine, main=folder / "image")
    for name, source in (("film.png", "0.mp4"), ("picture.mp4", "0.png"), ("no-extension", "0.png")):
        shutil.copy(folder / source, tmp_path / name)
        expected = embed_offline(folder / "image", folder / source)
        np.testing.assert_allclose(infer(engine, reference(tmp_path / name)).items[0]["embedding"], expected, atol=1e-5)
        np.testing.assert_array_equal(embed_file(str(folder / "image"), str(tmp_path / name)), expected)


def test_tokens_layers_and_the_normalized_embedding_match_direct_encoding(engine: Engine, folder: Path) -> None:
    load_slots(engine, main=folder / "video")
    encoder, card = load_encoder(str(folder / "video"))
    with closing(SampleReader(DataConfig(train=""))) as reader:
        clips = cut_clips(reader.read_file(str(folder / "1.mp4"), file_chooser(card)), card)
    with torch.inference_mode():
        expected = encoder(*whole_clips(encoder, card.clip, clips), intermediates=(1, 2))
    (item,) = infer(engine, upload(folder / "1.mp4"), tokens="patch", layers=(2, 1), normalize=True).items
    np.testing.assert_allclose(item["tokens"], expected.final[0], atol=1e-5)
    np.testing.assert_allclose(item["layers"]["1"], expected.intermediates[0][0], atol=1e-5)
    np.testing.assert_allclose(item["layers"]["2"], expected.intermediates[1][0], atol=1e-5)
    vector = encode(encoder, card.clip, clips)[0].detach().numpy()
    np.testing.assert_allclose(item["embedding"], vector / np.linalg.norm(vector), atol=1e-5)


@pytest.mark.parametrize("multi_label", [False, True])
def test_classification_averages_probabilities_over_views(
    engine: Engine, folder: Path, tmp_path: Path, multi_label: bool
) -> None:
    names = tuple("abcdefg") if not multi_label else None
    url, classifier = publish_classifier(tmp_path / "head", VIDEO, multi_label=multi_label, labels=names)
    load_slots(engine, main=Path(url))
    _, card = load_encoder(url)
    views = ViewsConfig(segments=2, crops=3)
    with closing(SampleReader(DataConfig(train=""))) as reader:
        clips = cut_clips(reader.read_file(str(folder / "0.mp4"), file_chooser(card, views)), card, views)
    assert clips.shape == (6, 3, 4, 16, 16)
    with torch.inference_mode():
        logits = classifier(*whole_clips(classifier.encoder, card.clip, clips)).numpy()
    expected = probabilities(logits, multi_label).mean(axis=0)
    (item,) = infer(engine, upload(folder / "0.mp4"), task="classification", views="2x3", top_k=4).items
    order = np.argsort(-expected)[:4]
    assert item["classes"] == order.tolist()
    assert item["labels"] == [names[number] if names else str(number) for number in order]
    np.testing.assert_allclose(item["scores"], expected[order], atol=1e-5)
    all_scores = infer(engine, upload(folder / "0.mp4"), task="classification", top_k=100).items[0]["scores"]
    assert len(all_scores) == 7
    assert multi_label or sum(all_scores) == pytest.approx(1)


def test_the_embedding_of_several_views_is_their_mean(engine: Engine, folder: Path) -> None:
    load_slots(engine, main=folder / "video")
    encoder, card = load_encoder(str(folder / "video"))
    views = ViewsConfig(segments=3, crops=1)
    with closing(SampleReader(DataConfig(train=""))) as reader:
        clips = cut_clips(reader.read_file(str(folder / "2.mp4"), file_chooser(card, views)), card, views)
    expected = encode(encoder, card.clip, clips).mean(dim=0).detach().numpy()
    (item,) = infer(engine, upload(folder / "2.mp4"), views="3x1").items
    np.testing.assert_allclose(item["embedding"], expected, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"task": "classification"}, "image cannot classify: it has no classifier"),
        ({"task": "reconstruction"}, "without its decoder"),
        ({"layers": (0,)}, "layers=0: image has 2 blocks"),
        ({"layers": (1, 3)}, "layers=3"),
        ({"views": "5by3"}, "segments x crops"),
        ({"views": "0x3"}, "segments x crops"),
        ({"views": "9x9"}, "81 views exceed the limit of 64"),
        ({"views": "1x11"}, "less than or equal to 9"),
        ({"views": "2x1", "tokens": "patch"}, "omit `views`"),
    ],
)
def test_unsupported_options_are_rejected_with_a_reason(
    engine: Engine, folder: Path, options: dict[str, object], reason: str
) -> None:
    load_slots(engine, main=folder / "image")
    with pytest.raises(Refusal, match=reason) as refused:
        infer(engine, upload(folder / "0.png"), **options)
    assert refused.value.code == "not_possible"


def test_a_bad_item_fails_only_its_own_request(engine: Engine, folder: Path) -> None:
    load_slots(engine, main=folder / "image")
    good, bad = upload(folder / "0.png"), Item(b"not a picture")

    async def infer_all() -> list[InferenceResult | BaseException]:
        requests = [[good, bad, good], [good], [Item(uri=str(folder / "missing.png"))], [Item()], []]
        requests = [engine.infer("main", items, EMBEDDING, DEADLINE_S) for items in requests]
        return await asyncio.gather(*requests, return_exceptions=True)

    mixed, alone, missing, nothing, empty = run(infer_all())
    assert isinstance(mixed, Refusal)
    assert str(mixed) == "input 1: is neither an image nor a video that can be opened; it contains text"
    assert (mixed.code, mixed.extra["index"]) == ("item_invalid", 1)
    assert str(mixed) == f"input 1: {mixed.extra['reason']}"
    assert isinstance(alone, InferenceResult)
    assert isinstance(missing, Refusal)
    assert str(missing) == "input 0: does not exist"
    assert isinstance(nothing, Refusal)
    assert nothing.code == "item_invalid"
    assert isinstance(empty, InferenceResult)
    assert empty.items == []
    assert engine.state()["in_flight"] == engine.state()["queued_tokens"] == engine.state()["queued_bytes"] == 0


def test_a_store_that_does_not_respond_is_not_blamed_on_the_item(
    folder: Path, s3_root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = S3Server()
    write_bytes(f"{s3_root}/0.png", (folder / "0.png").read_bytes())
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", server.url)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")  # botocore's pauses may be longer than the limit of 20 s
    engine = Engine(EngineSettings(device="cpu", threads=1, decoders=1, limits=NO_TIME_LIMIT))
    load_slots(engine, main=folder / "image")
    there, missing = Item(uri=f"{s3_root}/0.png"), Item(uri=f"{s3_root}/missing.png")
    assert len(infer(engine, there).items) == 1
    with pytest.raises(Refusal, match="input 0: does not exist") as refused:
        infer(engine, missing)
    assert refused.value.code == "item_invalid"
    server.stop()
    with pytest.raises(Refusal, match=rf"input 1: {s3_root}/0\.png could not be read after 2 attempts") as unreachable:
        infer(engine, upload(folder / "0.png"), there)
    assert (unreachable.value.code, unreachable.value.extra["index"]) == ("input_unavailable", 1)
    assert unreachable.value.extra["reason"].startswith(f"{s3_root}/0.png could not be read")
    run(engine.close())


def test_a_failed_load_keeps_the_previous_encoder(engine: Engine, folder: Path, tmp_path: Path) -> None:
    load_slots(engine, main=folder / "image")
    shutil.copytree(folder / "image", tmp_path / "torn")
    (tmp_path / "torn" / "encoder.safetensors").write_bytes(b"nothing")
    for url in (tmp_path / "torn", tmp_path / "absent"):
        with pytest.raises(ConfigError):
            run(engine.load("main", str(url)))
    assert infer(engine, upload(folder / "0.png")).encoder == "image"
    run(engine.unload("main"))
    with pytest.raises(Refusal, match="'main'") as refused:
        infer(engine, upload(folder / "0.png"))
    assert refused.value.code == "encoder_unavailable"


def test_swapping_encoders_under_load_neither_fails_requests_nor_mixes_results(engine: Engine, folder: Path) -> None:
    names, files = ("image", "other"), [folder / f"{seed}.png" for seed in (0, 1)]
    vectors = {name: [embed_offline(folder / name, file) for file in files] for name in names}
    items = [upload(file) for file in files]
    load_slots(engine, main=folder / "image")

    async def send(stop: asyncio.Event) -> list[InferenceResult]:
        results = []
        while not stop.is_set():
            results.append(await engine.infer("main", items, EMBEDDING, DEADLINE_S))
        return results

    async def swap() -> list[InferenceResult]:
        stop = asyncio.Event()
        clients = [asyncio.create_task(send(stop)) for _ in range(4)]
        for turn in range(20):
            await engine.load("main", str(folder / names[(turn + 1) % 2]))
            await asyncio.sleep(0.01)
        stop.set()
        return [result for client in clients for result in await client]

    results = run(swap())
    assert {result.encoder for result in results} == set(names)
    for result in results:
        for item, expected in zip(result.items, vectors[result.encoder], strict=True):
            np.testing.assert_allclose(item["embedding"], expected, atol=1e-5)


def test_slots_serve_requests_concurrently(engine: Engine, folder: Path) -> None:
    load_slots(engine, main=folder / "image", candidate=folder / "video")
    item = upload(folder / "0.png")

    async def infer_all() -> list[InferenceResult]:
        slots = ["main", "candidate"] * 8
        return await asyncio.gather(*(engine.infer(slot, [item], EMBEDDING, DEADLINE_S) for slot in slots))

    for number, result in enumerate(run(infer_all())):
        name = ("image", "video")[number % 2]
        assert result.encoder == name
        expected = embed_offline(folder / name, folder / "0.png")
        np.testing.assert_allclose(result.items[0]["embedding"], expected, atol=1e-5)
    run(engine.unload("candidate"))


def test_a_killed_decoder_loses_only_its_current_item(engine: Engine, folder: Path) -> None:
    load_slots(engine, main=folder / "image")
    items = [upload(folder / f"{seed}.mp4") for seed in range(3)]

    async def infer_all() -> list[InferenceResult | BaseException]:
        tasks = [asyncio.create_task(engine.infer("main", [items[n % 3]], EMBEDDING, DEADLINE_S)) for n in range(60)]
        for killed in range(2):
            while sum(task.done() for task in tasks) < 5 + 20 * killed:
                await asyncio.sleep(0)
            os.kill(decoding_processes()[0], signal.SIGKILL)
        return await asyncio.gather(*tasks, return_exceptions=True)

    outcomes = run(infer_all())
    lost = [outcome for outcome in outcomes if not isinstance(outcome, InferenceResult)]
    assert len(lost) <= 2
    assert all(str(error) == "input 0: crashed the decoder (SIGKILL)" for error in lost)
    assert len(decoding_processes()) == engine.settings.decoders


def test_bfloat16_embeddings_are_close_to_float32(folder: Path) -> None:
    engine = Engine(EngineSettings(device="cpu", dtype="bfloat16", threads=1, decoders=1, limits=NO_TIME_LIMIT))
    load_slots(engine, main=folder / "image")
    vector = infer(engine, upload(folder / "0.png")).items[0]["embedding"]
    expected = embed_offline(folder / "image", folder / "0.png")
    assert 1e-6 < np.abs(vector - expected).max() < 0.05
    run(engine.close())


def test_close_stops_processes_and_fails_requests_in_flight(folder: Path) -> None:
    before = decoding_processes()
    engine = Engine(EngineSettings(device="cpu", threads=1, decoders=1, limits=NO_TIME_LIMIT))
    load_slots(engine, main=folder / "image")

    async def close_under_load() -> None:
        tasks = [
            asyncio.create_task(engine.infer("main", [upload(folder / "0.mp4")], EMBEDDING, DEADLINE_S)) for _ in "ab"
        ]
        await asyncio.sleep(0)
        await engine.close()
        for outcome in await asyncio.gather(*tasks, return_exceptions=True):
            assert isinstance(outcome, Refusal)
            assert outcome.code == "encoder_unavailable"

    run(close_under_load())
    assert decoding_processes() == before


VIT_B: Any = SimpleNamespace(tokens=196, width=768, blocks=12)
VIT_B_VIDEO: Any = SimpleNamespace(tokens=1568, width=768, blocks=12)


def plan_of(encoder: Any, tokens: bool = True, layers: bool = True) -> InferencePlan:
    blocks = tuple(range(1, encoder.blocks + 1)) if layers else ()
    return InferencePlan(InferenceOptions(tokens="patch" if tokens else "none", layers=blocks), None, 1)


def test_an_oversized_output_is_rejected_with_its_size_and_a_remedy() -> None:
    limits = RequestLimits()
    for encoder, fits in ((VIT_B, "at most 8 items"), (VIT_B_VIDEO, "at most 1 items")):
        with pytest.raises(Refusal) as refused:
            output_bytes(encoder, plan_of(encoder), 256, limits, as_json=False)
        size = 256 * 13 * encoder.tokens * 768 * 4 / 2**20
        numbers = f"256 items x 13 outputs (tokens and layers) x {encoder.tokens} tokens x 768 values x 4 bytes"
        assert refused.value.code == "not_possible"
        assert refused.value.message.startswith(f"{numbers} are {size:.1f} MiB, more than the limit of 64 MiB; request")
        assert fits in refused.value.message
    assert output_bytes(VIT_B, plan_of(VIT_B), 8, limits, as_json=False) == 13 * 196 * 768 * 4
    assert output_bytes(VIT_B, plan_of(VIT_B, tokens=False, layers=False), 256, limits, as_json=True) == 0


def test_json_has_a_smaller_limit_and_the_error_suggests_the_binary_format() -> None:
    limits = RequestLimits()
    tokens = plan_of(VIT_B, layers=False)
    assert output_bytes(VIT_B, tokens, 6, limits, as_json=True) == 196 * 768 * 4
    with pytest.raises(Refusal, match=r"limit of 4 MiB for JSON; send Accept: application/vnd\.apache\.arrow"):
        output_bytes(VIT_B, tokens, 8, limits, as_json=True)
    assert output_bytes(VIT_B, tokens, 8, limits, as_json=False)
    with pytest.raises(Refusal, match=r"or request fewer layers$"):
        output_bytes(VIT_B, plan_of(VIT_B), 1, limits, as_json=True)


def test_a_request_with_an_oversized_output_never_reaches_the_encoder(engine: Engine, folder: Path) -> None:
    load_slots(engine, main=folder / "image")
    loaded = engine._slots["main"]
    before = engine.state()["counters"]
    small = RequestLimits(output_mib=1, items=10**6)
    engine.settings, settings = engine.settings.model_copy(update={"limits": small}), engine.settings
    items = [upload(folder / "0.png")] * (2**20 // (loaded.tokens * loaded.width * 4) + 1)
    try:
        with pytest.raises(Refusal, match="more than the limit of 1 MiB"):
            infer(engine, *items, tokens="patch")
    finally:
        engine.settings = settings
    assert engine.state()["counters"] == before


def test_the_total_output_of_admitted_requests_is_bounded() -> None:
    backlog = Backlog(max_tokens=100, max_bytes=100, max_output=100)
    first, second = [BacklogShare(1, 1, 60)], [BacklogShare(1, 1, 50)]
    assert backlog.admit(first)
    assert not backlog.admit(second)
    backlog.release(first[0], tokens=1, content=1)
    assert not backlog.admit(second)  # outputs are held until the request ends
    backlog.release_all(first[0])
    assert backlog.admit(second)
    backlog.release_all(second[0])
    assert (backlog.tokens, backlog.bytes, backlog.output) == (0, 0, 0)
    assert backlog.admit([BacklogShare(1, 1, 1000)])  # nothing else is queued; each request has its own limit
