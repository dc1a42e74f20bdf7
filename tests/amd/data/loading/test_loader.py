"""Tests for the clip loader with fake readers: a deterministic stream, unreadable samples and killed processes."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from amd.config import ClipConfig, ConfigError, DataConfig, ViewsConfig
from amd.data.loading import processes
from amd.data.loading.frame_sampling import dense_views, segment_views
from amd.data.loading.loader import Batch, ClipLoader, DataFault, LoaderCrash
from amd.data.loading.transforms import spatial_views
from tests.support.data.fake_reader import (
    FRAMES,
    BuggyReader,
    DyingReader,
    EnvironmentReader,
    FakeManifest,
    FakeReader,
    SlowReader,
    StarvedReader,
)

CLIP = ClipConfig(frames=4, size=16, patch=4, sampling_rate_frames=2)


def _loader(
    manifest: FakeManifest | None = None, *, data: dict[str, Any] | None = None, **arguments: Any
) -> ClipLoader:
    config = DataConfig(train="fake", **{"loader_workers": 0, "flip": True, **(data or {})})
    arguments = {"batch_size": 4, "seed": 3, "open_reader": FakeReader, **arguments}
    return ClipLoader(config, CLIP, FakeManifest(10) if manifest is None else manifest, **arguments)


def _stream(loader: ClipLoader, start: int, stop: int) -> list[list[Batch]]:
    with loader:
        return list(loader.steps(start, stop))


def _rows(steps: list[list[Batch]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    batches = [batch for step in steps for batch in step]
    return (
        torch.cat([batch.clips for batch in batches]),
        torch.cat([batch.labels for batch in batches]),
        torch.cat([batch.records for batch in batches]),
    )


def _same(a: list[list[Batch]], b: list[list[Batch]]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(_rows(a), _rows(b), strict=True))


def test_a_batch_contains_the_pixels_labels_and_record_indices_of_its_clips() -> None:
    (batch,) = _stream(_loader(data={"repeats": 3}), 0, 1)[0]
    assert batch.clips.shape == (12, 3, 4, 16, 16)
    assert batch.clips.dtype == torch.uint8
    assert batch.labels.dtype == batch.records.dtype == torch.int64
    assert batch.labels.tolist() == batch.records.tolist()  # guaranteed by the fake reader
    assert batch.records.reshape(4, 3).unique(dim=1).shape == (4, 1)  # the repeats of a sample are adjacent
    assert batch.bad == []


def test_repeats_of_a_sample_are_different_clips_from_a_single_read() -> None:
    reads: list[FakeReader] = []

    def open_reader(data: DataConfig) -> FakeReader:
        reads.append(FakeReader(data))
        return reads[-1]

    (batch,) = _stream(_loader(data={"repeats": 4}, open_reader=open_reader), 0, 1)[0]
    assert len(reads) == 1
    assert len(reads[0].reads) == 4
    assert not torch.equal(batch.clips[0], batch.clips[1])


@settings(deadline=None, max_examples=30)
@given(
    world=st.integers(1, 4),
    micro=st.integers(1, 5),
    repeats=st.integers(1, 2),
    start=st.integers(0, 6),
    seed=st.integers(0, 9),
)
def test_the_stream_does_not_depend_on_world_size_micro_batch_or_start(
    world: int, micro: int, repeats: int, start: int, seed: int
) -> None:
    manifest = FakeManifest(11, bad=frozenset({2, 3}))
    make = lambda **arguments: _loader(manifest, data={"repeats": repeats}, seed=seed, **arguments)  # noqa: E731
    whole = _stream(make(), 0, 8)
    ranks = [_stream(make(rank=rank, world=world, micro_batch=micro), start, 8) for rank in range(world)]
    joined = [[batch for rank in ranks for batch in rank[i]] for i in range(8 - start)]
    assert _same(joined, whole[start:])


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_the_stream_does_not_depend_on_loader_processes(workers: int) -> None:
    manifest = FakeManifest(23, bad=frozenset({1, 7, 8}))
    in_process = _stream(_loader(manifest, data={"repeats": 2}, micro_batch=3), 2, 14)
    in_workers = _stream(_loader(manifest, data={"repeats": 2, "loader_workers": workers}, micro_batch=3), 2, 14)
    assert _same(in_process, in_workers)
    assert [batch.bad for step in in_process for batch in step] == [batch.bad for step in in_workers for batch in step]


def test_the_stream_differs_between_epochs_and_between_seeds() -> None:
    first, second = _stream(_loader(), 0, 2), _stream(_loader(), 2, 4)
    assert not _same(first, second)
    assert not _same(first, _stream(_loader(seed=4), 0, 2))


def test_an_unreadable_sample_is_reported_and_replaced_by_the_next_record() -> None:
    good = [batch for step in _stream(_loader(FakeManifest(12)), 0, 3) for batch in step]
    order = torch.cat([batch.records for batch in good]).tolist()
    bad = order[5]
    steps = _stream(_loader(FakeManifest(12, bad=frozenset({bad}))), 0, 3)
    assert _rows(steps)[2].tolist() == [*order[:5], order[6], *order[6:]]
    assert [batch.bad for batch in steps[0] + steps[2]] == [[], []]
    assert steps[1][0].bad == [{"record": bad, "location": f"bad-{bad}", "reason": "truncated"}]


def test_data_without_readable_samples_raises_with_reasons() -> None:
    for workers in (0, 1):
        loader = _loader(FakeManifest(6, bad=frozenset(range(6))), data={"loader_workers": workers})
        with pytest.raises(DataFault, match="6 samples in a row cannot be read") as raised:
            _stream(loader, 0, 1)
        assert "truncated" in str(raised.value)
        assert "Traceback" not in str(raised.value)


def test_an_evaluation_skips_unreadable_samples_and_reads_all_others_once() -> None:
    manifest = FakeManifest(10, bad=frozenset({4}))
    loader = _loader(manifest, train=False, micro_batch=3)
    assert loader.steps_per_epoch == 3
    steps = _stream(loader, 0, 3)
    assert _rows(steps)[2].tolist() == [0, 1, 2, 3, 5, 6, 7, 8, 9]
    assert [bad["record"] for step in steps for batch in step for bad in batch.bad] == [4]
    again = _stream(_loader(manifest, train=False, seed=99), 0, 3)
    assert _same(steps, again)  # no randomness


def test_empty_data_and_an_oversized_batch_are_config_errors() -> None:
    with pytest.raises(ConfigError, match=r"data\.train=fake: has no samples"):
        _loader(FakeManifest(0))
    with pytest.raises(ConfigError, match=r"optim\.batch_size=11 is above the 10 samples of data.train=fake"):
        _loader(batch_size=11)


def test_too_little_shared_memory_is_a_config_error(monkeypatch: pytest.MonkeyPatch) -> None:
    data = {"loader_workers": 2, "prefetch_batches": 2, "repeats": 2}
    monkeypatch.setattr(processes.shutil, "disk_usage", lambda path: shutil_usage(20_000))
    with pytest.raises(ConfigError, match=r"data\.loader_workers=2 x data\.prefetch_batches=2 .* --shm-size"):
        _loader(data=data)


def test_shared_memory_must_hold_the_clips_of_all_ranks_on_a_node(monkeypatch: pytest.MonkeyPatch) -> None:
    data = {"loader_workers": 2, "prefetch_batches": 2}
    monkeypatch.setattr(processes.shutil, "disk_usage", lambda path: shutil_usage(120_000))
    _loader(data=data).close()
    with pytest.raises(ConfigError, match=r"for 8 training workers on this node, take \d+ MiB of shared memory"):
        _loader(data=data, node_ranks=8)


def shutil_usage(total: int) -> Any:
    return type("Usage", (), {"total": total})()


@pytest.mark.slow
def test_a_killed_loader_process_raises_instead_of_hanging() -> None:
    with pytest.raises(LoaderCrash, match=r"data\.train=fake"):
        _stream(_loader(data={"loader_workers": 2}, open_reader=DyingReader), 0, 4)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_decoding_process_that_cannot_start_raises_an_error_with_one_message(workers: int) -> None:
    with pytest.raises(LoaderCrash) as error:
        _stream(_loader(data={"loader_workers": workers}, open_reader=StarvedReader), 0, 1)
    assert str(error.value) == "no decoding process"


def test_an_unexpected_reader_error_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError, match="read_clip"):
        _stream(_loader(data={"loader_workers": 1}, open_reader=BuggyReader), 0, 1)


def _pids(loader: ClipLoader) -> list[int]:
    assert loader._loader is not None
    iterator: Any = loader._loader._iterator
    return [worker.pid for worker in iterator._workers]


def test_more_loader_processes_than_cpus_cause_no_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0}, raising=False)
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _stream(_loader(data={"loader_workers": 2}), 0, 1)
    assert [str(warning.message) for warning in caught if "DataLoader" in str(warning.message)] == []


def test_closing_leaves_no_process_behind() -> None:
    loader = _loader(data={"loader_workers": 2})
    steps = loader.steps(0, 1000)
    next(steps)
    pids = _pids(loader)
    assert len(pids) == 2
    loader.close()
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]
    loader.close()  # closing twice is harmless


@pytest.mark.slow
def test_leaving_the_loop_early_discards_prefetched_work() -> None:
    """Checks that the same processes can serve other steps, even though slow samples (0.2 s each) are still queued."""
    data = {"loader_workers": 1, "prefetch_batches": 5}
    with _loader(data=data, open_reader=SlowReader, micro_batch=2) as loader:
        steps = loader.steps(0, 1000)
        next(steps)
        pids = _pids(loader)
        steps.close()
        got = list(loader.steps(4, 6))
        assert _pids(loader) == pids
    assert _same(got, _stream(_loader(micro_batch=2), 4, 6))


def test_loader_processes_inherit_the_environment_of_the_training_process(monkeypatch: pytest.MonkeyPatch) -> None:
    _stream(_loader(data={"loader_workers": 1}), 0, 1)  # starts the fork server
    monkeypatch.setenv("AMD_TEST_CREDENTIAL", "secret")
    _stream(_loader(data={"loader_workers": 1}, open_reader=EnvironmentReader), 0, 1)


def test_reading_does_not_change_the_global_random_state() -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    for workers in (0, 1):
        torch.manual_seed(0)
        _stream(_loader(data={"loader_workers": workers}), 0, 2)
        assert torch.equal(torch.rand(3), expected)


def test_extras_returned_by_a_transform_stay_with_their_clips() -> None:
    (batch,) = _stream(_loader(FakeManifest(10, bad=frozenset({1})), transform=_crop_and_name, train=False), 0, 1)[0]
    assert batch.extras == ("clip-0", "clip-2", "clip-3")  # the unreadable record leaves no gap
    assert batch.records.tolist() == [0, 2, 3]


def _crop_and_name(frames: torch.Tensor, record: Any, draws: Any) -> tuple[torch.Tensor, str]:
    return frames[:, :16, :16], record.name


def _views_of(record: int, clip: ClipConfig, views: ViewsConfig) -> list[torch.Tensor]:
    """Return the expected views: the crops of each segment, computed from the reader's frames."""
    data = DataConfig(train="fake")
    if views.sampling == "dense":
        segments = dense_views(FRAMES, clip.frames, clip.sampling_rate_frames, views.segments)
    else:
        segments = segment_views(FRAMES, clip.frames, views.segments)
    found = []
    for segment in segments:
        frames = FakeReader(data).read_clip(FakeManifest(10)[record], lambda total, segment=segment: segment)  # type: ignore[misc]
        found += spatial_views(torch.from_numpy(frames), data, clip, views.crops)
    return [view.permute(3, 0, 1, 2) for view in found]


IMAGE = ClipConfig(frames=1, size=16, patch=4, tubelet=1)


@pytest.mark.parametrize(("segments", "crops"), [(1, 1), (2, 3), (3, 1), (1, 3)])
@pytest.mark.parametrize("sampling", ["dense", "segments"])
@pytest.mark.parametrize("clip", [CLIP, IMAGE], ids=["video", "image"])
def test_views_of_a_sample_are_ordered_by_segment_then_crop(
    clip: ClipConfig, sampling: Any, segments: int, crops: int
) -> None:
    views = ViewsConfig(segments=segments, crops=crops, sampling=sampling)
    count = segments * crops
    manifest, data = FakeManifest(10, bad=frozenset({3})), DataConfig(train="fake", loader_workers=0, repeats=2)
    loader = ClipLoader(
        data, clip, manifest, batch_size=4, micro_batch=3, train=False, views=views, open_reader=FakeReader
    )
    clips, labels, records = _rows(_stream(loader, 0, loader.steps_per_epoch))
    readable = [record for record in range(10) if record != 3]
    assert records.tolist() == [record for record in readable for _ in range(count)]
    assert labels.tolist() == records.tolist()
    expected = [view for record in readable for view in _views_of(record, clip, views)]
    assert torch.equal(clips, torch.stack(expected))


def test_views_that_exceed_shared_memory_are_rejected() -> None:
    data = DataConfig(train="fake", loader_workers=2)
    large = ClipConfig(frames=64, size=4096, patch=16)
    with pytest.raises(ConfigError, match=r"micro-batches of 1 samples x 15 clips of each .* --shm-size"):
        ClipLoader(data, large, FakeManifest(4), batch_size=1, train=False, views=ViewsConfig(segments=5, crops=3))
