"""Tests for complete in-process runs, from a config to a published encoder, with stops, failures and rejections."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from safetensors import safe_open

from amd.artifacts.weights import load_decoder, load_encoder
from amd.config import ConfigError, TrainConfig, with_overrides
from amd.storage import join, listdir, read_bytes, read_json
from amd.training.checkpoints.listing import newest_step
from amd.training.lease import Lease
from amd.training.process_group import ProcessGroup
from amd.training.reporting.metrics_reader import read_metrics
from amd.training.reporting.progress import Event, LineWatcher, NullWatcher
from amd.training.run_folder import RunResult, RunSpec, run_folder
from amd.training.runs import launch
from amd.training.runs.kinds import PRETRAINING
from amd.training.trainer.pretraining import work
from amd.training.trainer.run_hooks import LoopResult, RunHooks
from tests.support.runs.tiny_runs import assert_same_bits, final_state, tiny_run


def train(config: TrainConfig) -> RunResult:
    return launch.train(config, local=True, quiet=True)


@pytest.fixture(scope="module")
def reference_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TrainConfig, RunResult]:
    """Return an uninterrupted run as the reference for other runs."""
    folder = tmp_path_factory.mktemp("reference")
    config = tiny_run(folder, name="reference", teacher__weights_license="CC-BY-NC-4.0", tracking__tensorboard=True)
    return folder, config, train(config)


class CallbackAtStep(NullWatcher):
    """Calls a function once, when a step is reached."""

    def __init__(self, step: int, callback: Callable[[], None]) -> None:
        self._step, self._callback = step, callback

    def on_event(self, event: Event) -> None:
        if event["kind"] == "step" and event["step"] >= self._step and self._callback is not None:
            callback, self._callback = self._callback, None
            callback()


def send_signal_at_step(monkeypatch: pytest.MonkeyPatch, step: int, number: int = signal.SIGTERM) -> None:
    monkeypatch.setattr(
        launch, "choose_watcher", lambda quiet: CallbackAtStep(step, lambda: os.kill(os.getpid(), number))
    )


def test_a_finished_run_publishes_its_encoder_and_reports_metrics(
    reference_run: tuple[Path, TrainConfig, RunResult],
) -> None:
    _, config, result = reference_run
    assert (result.state, result.steps, result.exit_code) == ("succeeded", 12, 0)
    assert result.encoder_folder is not None
    encoder, card = load_encoder(result.encoder_folder)
    assert encoder.config == config.student.encoder
    assert (card.run, card.weights_license, card.steps) == ("reference", "CC-BY-NC-4.0", 12)
    assert card.data["samples"] == 24
    trained = final_state(result.run_folder, config)
    for part, weights in (("encoder", encoder), ("decoder", load_decoder(result.encoder_folder, card))):
        named = {f"model/{part}.{name}": value for name, value in weights.state_dict().items()}
        assert_same_bits(named, {name: trained[name] for name in named})
    assert card.decoder is not None
    assert (card.decoder.mask_strategy, card.decoder.mask_ratio, card.decoder.pixels) == ("random", 0.75, "per_patch")
    assert read_json(join(result.run_folder, "result.json")) == result.model_dump(mode="json")
    lines = read_metrics(result.run_folder)
    assert [line["step"] for line in lines] == [2, 4, 6, 8, 10, 12]
    assert lines[-1]["epoch"] == 4
    names = {"loss/total", "loss/reconstruction", "loss/direct", "loss/generation", "optim/lr", "optim/grad_norm"}
    names |= {"time/step_s", "time/data_s", "speed/samples_per_s", "speed/mfu"}
    names |= {"data/bad_samples", "data/damaged_samples"}
    assert names <= set(lines[-1])
    assert result.figures.keys() == names
    assert listdir(join(result.run_folder, "tensorboard"))


def test_checkpoints_exclude_the_teacher_and_old_ones_are_removed(
    reference_run: tuple[Path, TrainConfig, RunResult],
) -> None:
    _, _, result = reference_run
    folder = join(result.run_folder, "checkpoints")
    assert listdir(folder) == ["step-00000008", "step-00000012"]
    assert listdir(join(folder, "step-00000012")) == [
        "manifest.json",
        "model.safetensors",
        "optimizer.safetensors",
        "state.json",
    ]
    for file in ("model", "optimizer"):
        with safe_open(join(folder, "step-00000012", f"{file}.safetensors"), "pt") as tensors:
            parts = {name.partition(".")[0] for name in tensors.keys()}  # noqa: SIM118
        assert parts == {"encoder", "projections", "generators", "decoder"}


def test_a_run_stopped_by_a_signal_resumes_bit_for_bit(
    reference_run: tuple[Path, TrainConfig, RunResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, config, uninterrupted = reference_run
    stopped = with_overrides(config, {"name": "stopped", "checkpoint.every_steps": None})
    for after, number in ((2, signal.SIGTERM), (6, signal.SIGINT)):  # in the middle of an epoch of 3 steps
        with monkeypatch.context() as patched:
            send_signal_at_step(patched, after, number)
            result = launch.train(stopped, local=True)
        assert (result.state, result.reason, result.exit_code) == ("cancelled", "cancelled_by_user", 1)
        assert after <= result.steps < 12
        assert read_json(join(result.run_folder, "result.json"))["state"] == "cancelled"
    result = train(stopped)
    assert (result.state, result.steps) == ("succeeded", 12)
    assert_same_bits(final_state(result.run_folder, stopped), final_state(uninterrupted.run_folder, config))
    assert [line["step"] for line in read_metrics(result.run_folder)][-1] == 12


def test_a_stopped_run_on_s3_resumes_bit_for_bit(
    reference_run: tuple[Path, TrainConfig, RunResult], s3_root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, config, uninterrupted = reference_run
    fs = fsspec.filesystem("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL_S3"])
    fs.put(str(folder / "images"), f"{s3_root}/images", recursive=True)
    fs.put(str(folder / "teacher.safetensors"), f"{s3_root}/teacher.safetensors")
    remote = with_overrides(
        config,
        {
            "storage": f"{s3_root}/storage",
            "data.train": f"{s3_root}/images",
            "teacher.weights": f"{s3_root}/teacher.safetensors",
        },
    )
    with monkeypatch.context() as patched:
        send_signal_at_step(patched, 6)
        assert launch.train(remote, local=True).state == "cancelled"
    # A writer that died before its commit, and a damaged newest checkpoint.
    checkpoints = join(remote.storage, "runs", "reference", "checkpoints")
    newest = listdir(checkpoints)[-1]
    fs.pipe_file(f"{checkpoints}/step-00000011/model.safetensors", b"half of it")
    fs.pipe_file(f"{checkpoints}/{newest}/optimizer.safetensors", b"damaged")
    result = train(remote)
    assert result.state == "succeeded"
    assert_same_bits(final_state(result.run_folder, remote), final_state(uninterrupted.run_folder, config))
    assert listdir(checkpoints) == ["step-00000008", "step-00000012"]


def test_a_finished_run_returns_its_result_without_training_again(
    reference_run: tuple[Path, TrainConfig, RunResult],
) -> None:
    _, config, result = reference_run
    assert train(config) == result
    assert train(with_overrides(config, {"tracking.log_every_steps": 7, "data.loader_workers": 1})) == result


def test_a_name_used_by_a_different_config_is_rejected_with_the_fields_that_differ(
    reference_run: tuple[Path, TrainConfig, RunResult],
) -> None:
    _, config, _ = reference_run
    with pytest.raises(ConfigError, match=r"name=reference: .*optim\.weight_decay was 0\.05, now 0\.1.*another name"):
        train(with_overrides(config, {"optim.weight_decay": 0.1}))


def test_a_run_whose_data_has_changed_is_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_run(tmp_path, name="changed-data")
    with monkeypatch.context() as patched:
        send_signal_at_step(patched, 2)
        launch.train(config, local=True)
    (tmp_path / "images" / "a" / "new.png").write_bytes((tmp_path / "images" / "a" / "000.png").read_bytes())
    with pytest.raises(ConfigError, match=r"data\.train has changed since the run started \(24 samples then, 25 now\)"):
        train(config)


def test_a_run_that_another_process_is_training_is_rejected(tmp_path: Path) -> None:
    config = tiny_run(tmp_path, name="busy")
    lease = Lease(join(run_folder(config.storage, "busy"), "lease.json"))
    assert lease.acquire()
    with lease, pytest.raises(ConfigError, match=f"name=busy: process {os.getpid()} on .* is training this run"):
        train(config)
    assert train(config).state == "succeeded"


def test_a_non_finite_loss_fails_the_run_and_reports_step_and_samples(tmp_path: Path) -> None:
    config = tiny_run(
        tmp_path, name="non-finite", optim__base_lr=1e30, checkpoint__every_steps=1, optim__weight_decay=0
    )
    result = train(config)
    assert (result.state, result.reason, result.exit_code) == ("failed", "nan_loss", 1)
    assert "step 3: the loss or its gradient is not finite" in result.message  # step 1 has lr 0, step 2 explodes
    assert result.message.count(str(tmp_path / "images")) == 8
    assert len(listdir(join(result.run_folder, "errors"))) == 1  # one attempt, no retries


def test_too_many_bad_samples_fail_the_run_and_are_listed(tmp_path: Path) -> None:
    config = tiny_run(tmp_path, name="bad-samples", data__max_bad_fraction=0.1)
    bad = sorted((tmp_path / "images").rglob("*.png"))[:4]
    for path in bad:
        path.write_bytes(b"not an image")
    result = train(config)
    assert (result.state, result.reason, result.exit_code) == ("failed", "dataset_invalid", 1)
    named = [path for path in bad if str(path) in result.message]
    assert len(named) >= 3
    recorded = [json.loads(line) for line in read_bytes(join(result.run_folder, "bad_samples.jsonl")).splitlines()]
    assert {bad["location"] for bad in recorded} >= set(map(str, named))
    assert len(listdir(join(result.run_folder, "errors"))) == 1
    # With a higher limit, the same run continues to its end.
    result = train(with_overrides(config, {"data.max_bad_fraction": 0.5}))
    assert result.state == "succeeded"
    assert result.figures["data/bad_samples"] == 4


def test_the_log_ends_with_the_number_of_unreadable_samples_and_their_list(tmp_path: Path) -> None:
    log = io.StringIO()
    config = tiny_run(tmp_path, name="all-good", data__max_bad_fraction=0.5)
    assert launch.train(config, local=True, watcher=LineWatcher(log)).state == "succeeded"
    assert "could not be read" not in log.getvalue()
    for number in ("000", "002"):
        (tmp_path / "images" / "a" / f"{number}.png").write_bytes(b"not an image")
    result = launch.train(with_overrides(config, {"name": "two-bad"}), local=True, watcher=LineWatcher(log))
    assert log.getvalue().splitlines()[-1] == (
        f"2 of 24 samples could not be read and are listed in {result.run_folder}/bad_samples.jsonl"
    )


def dotted(**overrides: Any) -> dict[str, Any]:
    return {key.replace("__", "."): value for key, value in overrides.items()}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (dotted(mask__student_ratio=0.5, mask__teacher_ratio=0.75), "must not be above mask.student_ratio=0.5"),
        (dotted(objective__layers=[{"student": 2, "teacher": 9}]), "objective.layers.0.teacher=9 is out of range"),
        (dotted(clip__size=18), "multiple of clip.patch=4"),
        (dotted(optim__learning_rate=1), "optim.learning_rate: unknown key"),
        (dotted(teacher__weights="nowhere.safetensors"), "nowhere.safetensors: no such file"),
        (dotted(teacher__encoder={"width": 32, "depth": 4, "heads": 2}), "teacher.encoder"),
        (dotted(teacher__preset="vit-giant", teacher__weights=None), "vit-giant"),
        (dotted(storage="/proc/amd"), "storage=/proc/amd cannot be written"),
        (dotted(data__train="empty"), "empty"),
        (dotted(data__train="missing"), "missing does not exist"),
        (dotted(optim__batch_size=32), "optim.batch_size=32 is above the 24 samples"),
        (dotted(name="../../x"), "name"),
        (dotted(schedule__warmup_epochs=5, schedule__warmup_steps=None), "is 15 steps long, but the run has only 12"),
        (dotted(scaling__device="cuda"), "no CUDA device"),
    ],
)
def test_each_invalid_config_raises_an_error_with_one_clear_message(
    overrides: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    config = tiny_run(tmp_path)
    with pytest.raises(ConfigError) as caught:
        train(with_overrides(config, overrides))
    assert message in str(caught.value)
    assert "Traceback" not in str(caught.value)


def test_a_decoder_that_is_not_installed_is_rejected_before_the_run_is_created(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "decord", None)
    config = tiny_run(tmp_path, data__decoder="decord")
    with pytest.raises(ConfigError, match=r"data\.decoder=decord: decord is not installed"):
        train(config)
    assert not (tmp_path / "storage" / "runs").exists()


def test_a_collapsing_student_triggers_warnings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    warnings: list[str] = []

    class WarningRecorder(NullWatcher):
        def on_event(self, event: Event) -> None:
            if event["kind"] == "warning":
                warnings.append(event["text"])

    monkeypatch.setattr(launch, "choose_watcher", lambda quiet: WarningRecorder())
    config = tiny_run(tmp_path, name="guarded", tracking__guard_every_steps=6, tracking__guard_min_rank=1.0)
    result = launch.train(config, local=True)
    assert [text.partition(":")[0] for text in warnings] == ["step 6", "step 12"]
    assert "lower optim.base_lr" in warnings[0]
    last = read_metrics(result.run_folder)[-1]
    assert 0 < last["guard/feature_rank"] < 1
    assert last["guard/feature_spread"] > 0


def test_a_run_that_exhausts_gpu_memory_continues_with_half_the_micro_batch(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The batch stays the same, no retry budget is charged, and each restart continues from the checkpoint."""
    forwards: list[tuple[int, int]] = []  # (first step, samples per forward pass) of each attempt

    def limited_work(spec: RunSpec, group: ProcessGroup, hooks: RunHooks) -> LoopResult:
        samples = spec.parsed(TrainConfig).micro_batch
        forwards.append((newest_step(spec.folder), samples))
        if samples > 2:
            work(dataclasses.replace(spec, until=4 * len(forwards)), group, hooks)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return work(spec, group, hooks)

    config = tiny_run(tmp_path, name="limited")
    result = launch.launch(config, PRETRAINING._replace(work=limited_work), local=True, watcher=LineWatcher(sys.stdout))
    assert (result.state, result.steps, result.restarts) == ("succeeded", 12, {"oom_gpu": 2})
    assert forwards == [(0, 8), (4, 4), (8, 2)]
    assert "retrying from the newest checkpoint with at most 4 samples per forward pass" in capfd.readouterr().out

    whole = train(tiny_run(tmp_path, name="whole"))
    final, expected = (final_state(run.run_folder, config) for run in (result, whole))
    for name, value in expected.items():
        torch.testing.assert_close(final[name], value, atol=1e-4, rtol=1e-3, msg=name)


def test_a_run_that_exhausts_gpu_memory_with_a_single_sample_fails(tmp_path: Path) -> None:
    def failing_work(spec: RunSpec, group: ProcessGroup, hooks: RunHooks) -> LoopResult:
        raise torch.OutOfMemoryError("CUDA out of memory")

    config = tiny_run(tmp_path, optim__batch_size=8)
    result = launch.launch(config, PRETRAINING._replace(work=failing_work), local=True, quiet=True)
    assert (result.state, result.reason, result.restarts) == ("failed", "oom_gpu", {"oom_gpu": 3})
