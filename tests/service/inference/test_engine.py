from __future__ import annotations

import asyncio
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from amd.artifacts.weights import encode, load_encoder, whole_clips
from amd.config import ConfigError, DataConfig, ViewsConfig
from amd.data.decoding.reader import SampleReader
from amd.downstream.embedding.features import cut_clips, embed_file, file_chooser
from amd.downstream.supervised.classification.metrics import probabilities
from service.inference.engine import (
    Answer,
    DeadlineExceeded,
    Engine,
    EngineSettings,
    Item,
    ItemRefused,
    Limits,
    NotLoaded,
    NotPossible,
    QueueFull,
    Want,
)
from tests.support.service.published_encoders import (
    IMAGE,
    VIDEO,
    decoding_processes,
    film,
    picture,
    publish,
    publish_classifier,
    run,
)

PATIENT = Limits(decode_timeout_s=30)  # nothing here is about time, and the machine may be busy
ACTIVE_S = 120.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two image encoders, a video encoder, pictures and films."""
    folder = tmp_path_factory.mktemp("engine")
    publish(folder / "image", IMAGE, seed=1)
    publish(folder / "other", IMAGE, seed=2)
    publish(folder / "video", VIDEO, seed=3)
    publish(folder / "normed", IMAGE, seed=4, pooling="mean_then_norm", interpolation="bicubic")
    for seed in range(3):
        (folder / f"{seed}.png").write_bytes(picture(seed))
        film(folder / f"{seed}.mp4", seed)
    return folder


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    engine = Engine(EngineSettings(device="cpu", threads=1, limits=PATIENT))
    yield engine
    run(engine.close())


def loaded(engine: Engine, **urls: Path) -> Engine:
    async def load() -> None:
        for slot, url in urls.items():
            await engine.load(slot, str(url))

    run(load())
    return engine


def ask(engine: Engine, *items: Item, slot: str = "main", deadline_s: float = ACTIVE_S, **want: object) -> Answer:
    return run(engine.answer(slot, items, Want.model_validate(want), deadline_s))


@cache
def offline(encoder: Path, file: Path) -> np.ndarray:
    return embed_file(str(encoder), str(file))


def upload(path: Path) -> Item:
    return Item(path.read_bytes())


def lies(path: Path) -> Item:
    return Item(uri=str(path))


@pytest.mark.parametrize("encoder", ["image", "video", "normed"])
def test_vectors_are_those_of_the_file_offline_in_every_form_and_mixture(
    engine: Engine, folder: Path, encoder: str
) -> None:
    loaded(engine, main=folder / encoder)
    files = [folder / "1.png", folder / "1.mp4"]
    vectors = [offline(folder / encoder, file) for file in files]

    async def ask_all() -> list[Answer]:
        one_by_one = [
            engine.answer("main", [form(file)], Want(), ACTIVE_S) for form in (upload, lies) for file in files
        ]
        return await asyncio.gather(*one_by_one, engine.answer("main", [*map(upload, files)], Want(), ACTIVE_S))

    *single, together = run(ask_all())
    served = [answer.items[0] for answer in single] + together.items
    for item, expected in zip(served, vectors * 3, strict=True):
        assert item["embedding"].dtype == np.float32
        np.testing.assert_allclose(item["embedding"], expected, atol=1e-5)
    assert {answer.encoder for answer in (*single, together)} == {encoder}


def test_what_a_file_is_stands_in_its_content(engine: Engine, folder: Path, tmp_path: Path) -> None:
    loaded(engine, main=folder / "image")
    for name, source in (("film.png", "0.mp4"), ("picture.mp4", "0.png"), ("nothing", "0.png")):
        shutil.copy(folder / source, tmp_path / name)
        expected = offline(folder / "image", folder / source)
        np.testing.assert_allclose(ask(engine, lies(tmp_path / name)).items[0]["embedding"], expected, atol=1e-5)
        np.testing.assert_array_equal(embed_file(str(folder / "image"), str(tmp_path / name)), expected)


def test_tokens_layers_and_length_are_those_of_the_encoder(engine: Engine, folder: Path) -> None:
    loaded(engine, main=folder / "video")
    encoder, card = load_encoder(str(folder / "video"))
    with closing(SampleReader(DataConfig(train=""))) as reader:
        clips = cut_clips(reader.read_file(str(folder / "1.mp4"), file_chooser(card)), card)
    with torch.inference_mode():
        expected = encoder(*whole_clips(encoder, card.clip, clips), intermediates=(1, 2))
    (item,) = ask(engine, upload(folder / "1.mp4"), tokens="patch", layers=(2, 1), normalize=True).items
    np.testing.assert_allclose(item["tokens"], expected.final[0], atol=1e-5)
    np.testing.assert_allclose(item["layers"]["1"], expected.intermediates[0][0], atol=1e-5)
    np.testing.assert_allclose(item["layers"]["2"], expected.intermediates[1][0], atol=1e-5)
    vector = encode(encoder, card.clip, clips)[0].detach().numpy()
    np.testing.assert_allclose(item["embedding"], vector / np.linalg.norm(vector), atol=1e-5)


@pytest.mark.parametrize("several", [False, True])
def test_classes_are_the_mean_over_views_of_the_classifiers_probabilities(
    engine: Engine, folder: Path, tmp_path: Path, several: bool
) -> None:
    names = tuple("abcdefg") if not several else None
    url, classifier = publish_classifier(tmp_path / "head", VIDEO, multi_label=several, labels=names)
    loaded(engine, main=Path(url))
    _, card = load_encoder(url)
    views = ViewsConfig(segments=2, crops=3)
    with closing(SampleReader(DataConfig(train=""))) as reader:
        clips = cut_clips(reader.read_file(str(folder / "0.mp4"), file_chooser(card, views)), card, views)
    assert clips.shape == (6, 3, 4, 16, 16)
    with torch.inference_mode():
        logits = classifier(*whole_clips(classifier.encoder, card.clip, clips)).numpy()
    expected = probabilities(logits, several).mean(axis=0)
    (item,) = ask(engine, upload(folder / "0.mp4"), task="classification", views="2x3", top_k=4).items
    order = np.argsort(-expected)[:4]
    assert item["classes"] == order.tolist()
    assert item["labels"] == [names[number] if names else str(number) for number in order]
    np.testing.assert_allclose(item["scores"], expected[order], atol=1e-5)
    everything = ask(engine, upload(folder / "0.mp4"), task="classification", top_k=100).items[0]["scores"]
    assert len(everything) == 7
    assert several or sum(everything) == pytest.approx(1)


def test_the_embedding_of_several_views_is_their_mean(engine: Engine, folder: Path) -> None:
    loaded(engine, main=folder / "video")
    encoder, card = load_encoder(str(folder / "video"))
    views = ViewsConfig(segments=3, crops=1)
    with closing(SampleReader(DataConfig(train=""))) as reader:
        clips = cut_clips(reader.read_file(str(folder / "2.mp4"), file_chooser(card, views)), card, views)
    expected = encode(encoder, card.clip, clips).mean(dim=0).detach().numpy()
    (item,) = ask(engine, upload(folder / "2.mp4"), views="3x1").items
    np.testing.assert_allclose(item["embedding"], expected, atol=1e-5)


@pytest.mark.parametrize(
    ("want", "reason"),
    [
        ({"task": "classification"}, "image cannot classify: it has no classifier"),
        ({"task": "reconstruction"}, "without its decoder"),
        ({"layers": (0,)}, "layers=0: image has 2 blocks"),
        ({"layers": (1, 3)}, "layers=3"),
        ({"views": "5by3"}, "segments x crops"),
        ({"views": "0x3"}, "segments x crops"),
        ({"views": "9x9"}, "81 views are more than 64"),
        ({"views": "1x11"}, "less than or equal to 9"),
        ({"views": "2x1", "tokens": "patch"}, "ask for them without views"),
    ],
)
def test_what_an_encoder_cannot_do_is_told_in_a_sentence(
    engine: Engine, folder: Path, want: dict[str, object], reason: str
) -> None:
    loaded(engine, main=folder / "image")
    with pytest.raises(NotPossible, match=reason):
        ask(engine, upload(folder / "0.png"), **want)


def test_a_bad_item_is_named_and_the_good_ones_of_other_requests_are_answered(engine: Engine, folder: Path) -> None:
    loaded(engine, main=folder / "image")
    good, bad = upload(folder / "0.png"), Item(b"not a picture")

    async def ask_all() -> list[Answer | BaseException]:
        requests = [[good, bad, good], [good], [Item(uri=str(folder / "missing.png"))], [Item()], []]
        asked = [engine.answer("main", items, Want(), ACTIVE_S) for items in requests]
        return await asyncio.gather(*asked, return_exceptions=True)

    mixed, alone, missing, nothing, empty = run(ask_all())
    assert isinstance(mixed, ItemRefused)
    assert str(mixed) == "item 1 is neither an image nor a video that can be opened; it may be cut short"
    assert isinstance(alone, Answer)
    assert isinstance(missing, ItemRefused)
    assert missing.reason == "does not exist"
    assert isinstance(nothing, ItemRefused)
    assert isinstance(empty, Answer)
    assert empty.items == []
    assert engine.state()["in_flight"] == engine.state()["queued_tokens"] == engine.state()["queued_bytes"] == 0


def test_what_is_not_sound_leaves_the_encoder_that_was_there(engine: Engine, folder: Path, tmp_path: Path) -> None:
    loaded(engine, main=folder / "image")
    shutil.copytree(folder / "image", tmp_path / "torn")
    (tmp_path / "torn" / "encoder.safetensors").write_bytes(b"nothing")
    for url in (tmp_path / "torn", tmp_path / "absent"):
        with pytest.raises(ConfigError):
            run(engine.load("main", str(url)))
    assert ask(engine, upload(folder / "0.png")).encoder == "image"
    run(engine.unload("main"))
    with pytest.raises(NotLoaded, match="'main'"):
        ask(engine, upload(folder / "0.png"))


def test_twenty_swaps_under_load_fail_no_request_and_mix_no_answer(engine: Engine, folder: Path) -> None:
    names, files = ("image", "other"), [folder / f"{seed}.png" for seed in (0, 1)]
    vectors = {name: [offline(folder / name, file) for file in files] for name in names}
    items = [upload(file) for file in files]
    loaded(engine, main=folder / "image")

    async def send(stop: asyncio.Event) -> list[Answer]:
        answers = []
        while not stop.is_set():
            answers.append(await engine.answer("main", items, Want(), ACTIVE_S))
        return answers

    async def swap() -> list[Answer]:
        stop = asyncio.Event()
        clients = [asyncio.create_task(send(stop)) for _ in range(4)]
        for turn in range(20):
            await engine.load("main", str(folder / names[(turn + 1) % 2]))
            await asyncio.sleep(0.01)
        stop.set()
        return [answer for client in clients for answer in await client]

    answers = run(swap())
    assert {answer.encoder for answer in answers} == set(names)
    for answer in answers:
        for item, expected in zip(answer.items, vectors[answer.encoder], strict=True):
            np.testing.assert_allclose(item["embedding"], expected, atol=1e-5)


def test_slots_answer_side_by_side(engine: Engine, folder: Path) -> None:
    loaded(engine, main=folder / "image", candidate=folder / "video")
    item = upload(folder / "0.png")

    async def ask_all() -> list[Answer]:
        slots = ["main", "candidate"] * 8
        return await asyncio.gather(*(engine.answer(slot, [item], Want(), ACTIVE_S) for slot in slots))

    for number, answer in enumerate(run(ask_all())):
        name = ("image", "video")[number % 2]
        assert answer.encoder == name
        expected = offline(folder / name, folder / "0.png")
        np.testing.assert_allclose(answer.items[0]["embedding"], expected, atol=1e-5)
    run(engine.unload("candidate"))


def test_a_decoder_that_is_killed_costs_what_it_was_at_and_no_more(engine: Engine, folder: Path) -> None:
    loaded(engine, main=folder / "image")
    items = [upload(folder / f"{seed}.mp4") for seed in range(3)]

    async def ask_all() -> list[Answer | BaseException]:
        tasks = [asyncio.create_task(engine.answer("main", [items[n % 3]], Want(), ACTIVE_S)) for n in range(60)]
        for killed in range(2):
            while sum(task.done() for task in tasks) < 5 + 20 * killed:
                await asyncio.sleep(0)
            os.kill(decoding_processes()[0], signal.SIGKILL)
        return await asyncio.gather(*tasks, return_exceptions=True)

    outcomes = run(ask_all())
    lost = [outcome for outcome in outcomes if not isinstance(outcome, Answer)]
    assert len(lost) <= 2
    assert all(str(error) == "item 0 crashed the decoder (SIGKILL)" for error in lost)
    assert len(decoding_processes()) == engine.settings.decoders


class Stopped:
    """The model's thread held up, as by a long batch: what is asked meanwhile waits in the queue."""

    def __init__(self, engine: Engine) -> None:
        self._engine, self._go = engine, threading.Event()

    def __enter__(self) -> Stopped:
        self._held = self._engine._batcher.call(lambda: self._go.wait() and None)
        return self

    def __exit__(self, *_: object) -> None:
        self._go.set()
        self._held.result()


async def decoded(engine: Engine, clips: int) -> None:
    """Wait until so many clips wait for the model."""
    while sum(map(len, engine._batcher._lanes.values())) < clips:
        await asyncio.sleep(0.005)


def test_a_full_queue_refuses_and_says_when_to_come_back(folder: Path) -> None:
    tokens = IMAGE.grid.tokens
    engine = Engine(EngineSettings(device="cpu", threads=1, decoders=1, max_queued_tokens=3 * tokens, limits=PATIENT))
    loaded(engine, main=folder / "image")
    item = upload(folder / "0.png")

    async def fill() -> None:
        with Stopped(engine):
            waiting = [asyncio.create_task(engine.answer("main", [item], Want(), ACTIVE_S)) for _ in range(3)]
            await asyncio.sleep(0)
            with pytest.raises(QueueFull) as full:
                await engine.answer("main", [item], Want(), ACTIVE_S)
            assert 0 < full.value.retry_after_s <= 60
            with pytest.raises(NotPossible, match="more than the queue holds"):
                await engine.answer("main", [item] * 4, Want(), ACTIVE_S)
            assert engine.state()["queued_tokens"] == 3 * tokens
            waiting[0].cancel()
            await asyncio.sleep(0.01)
            waiting.append(asyncio.create_task(engine.answer("main", [item], Want(), ACTIVE_S)))  # there is room again
            await asyncio.sleep(0)
        answers = await asyncio.gather(*waiting[1:])
        assert len(answers) == 3

    run(fill())
    assert engine.state()["counters"]["full"] == 1
    run(engine.close())


def test_what_is_cancelled_or_late_never_reaches_the_model(engine: Engine, folder: Path) -> None:
    loaded(engine, main=folder / "image")
    item = upload(folder / "0.png")

    async def give_up() -> None:
        before = engine.state()["counters"]["clips"]
        with Stopped(engine):
            given_up = asyncio.create_task(engine.answer("main", [item, item], Want(), ACTIVE_S))
            stays = asyncio.create_task(engine.answer("main", [item], Want(), ACTIVE_S))
            late = asyncio.create_task(engine.answer("main", [item], Want(), 0.2))
            await decoded(engine, 3)
            given_up.cancel()
            with pytest.raises(DeadlineExceeded, match=r"its deadline of 0\.2 s"):
                await late
            assert engine.state()["queued_tokens"] == IMAGE.grid.tokens
        assert len((await stays).items) == 1
        assert engine.state()["counters"]["clips"] == before + 1
        with pytest.raises(asyncio.CancelledError):
            await given_up

    run(give_up())


def test_clips_that_wait_go_through_the_model_together_within_the_budget(folder: Path) -> None:
    budget = 4 * IMAGE.grid.tokens
    engine = Engine(EngineSettings(device="cpu", threads=1, decoders=1, max_batch_tokens=budget, limits=PATIENT))
    loaded(engine, main=folder / "image", candidate=folder / "other")
    item = upload(folder / "0.png")

    async def pile_up() -> int:
        before = engine.state()["counters"]["batches"]
        with Stopped(engine):
            slots = ["main"] * 5 + ["candidate"] * 3 + ["main"] * 2
            asked = [asyncio.create_task(engine.answer(slot, [item], Want(), ACTIVE_S)) for slot in slots]
            await decoded(engine, len(slots))
        await asyncio.gather(*asked)
        return int(engine.state()["counters"]["batches"] - before)

    assert run(pile_up()) == 3  # 4 of main, 3 of candidate, 3 of main: no encoder in another's batch
    run(engine.close())


def test_an_idle_model_waits_for_clips_that_are_being_decoded_but_not_for_others(folder: Path) -> None:
    settings = EngineSettings(device="cpu", threads=1, decoders=1, max_wait_ms=60_000, limits=PATIENT)
    engine = Engine(settings)
    loaded(engine, main=folder / "image")
    item = upload(folder / "0.png")

    async def ask_all() -> None:
        before = engine.state()["counters"]["batches"]
        await engine.answer("main", [item], Want(), ACTIVE_S)  # alone: nothing to wait for
        await engine.answer("main", [item] * 5, Want(), ACTIVE_S)
        assert engine.state()["counters"]["batches"] == before + 2

    began = time.monotonic()
    run(ask_all())
    assert time.monotonic() - began < 60  # it did not wait out max_wait_ms
    run(engine.close())


def test_the_model_computes_with_its_own_number_of_threads(folder: Path) -> None:
    engine = Engine(EngineSettings(device="cpu", threads=3, decoders=2, limits=PATIENT))
    loaded(engine, main=folder / "image")
    ask(engine, *[upload(folder / "0.png")] * 4)
    found: list[int] = []
    engine._batcher.call(lambda: found.append(torch.get_num_threads())).result()
    assert found == [3]  # though decoding threads have set one each
    run(engine.close())


def test_half_precision_gives_nearly_the_same(folder: Path) -> None:
    engine = Engine(EngineSettings(device="cpu", dtype="bfloat16", threads=1, decoders=1, limits=PATIENT))
    loaded(engine, main=folder / "image")
    vector = ask(engine, upload(folder / "0.png")).items[0]["embedding"]
    expected = offline(folder / "image", folder / "0.png")
    assert 1e-6 < np.abs(vector - expected).max() < 0.05
    run(engine.close())


def test_closing_ends_processes_and_refuses_what_is_in_flight(folder: Path) -> None:
    before = decoding_processes()
    engine = Engine(EngineSettings(device="cpu", threads=1, decoders=1, limits=PATIENT))
    loaded(engine, main=folder / "image")

    async def close_under_load() -> None:
        tasks = [asyncio.create_task(engine.answer("main", [upload(folder / "0.mp4")], Want(), ACTIVE_S)) for _ in "ab"]
        await asyncio.sleep(0)
        await engine.close()
        for outcome in await asyncio.gather(*tasks, return_exceptions=True):
            assert isinstance(outcome, NotLoaded)

    run(close_under_load())
    assert decoding_processes() == before
