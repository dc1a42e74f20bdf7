from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from amd.config import ConfigError
from amd.parity import ParityReport, run
from amd.parity.amd_case import FILES as AMD_FILES
from tests.support.official_reference import make_amd, make_mae

CASE: dict[str, Any] = {
    "img_size": 8,
    "patch_size": 2,
    "num_frames": 1,
    "tubelet_size": 1,
    "batch": 2,
    "mask_ratio": 0.75,
    "mask_ratio_teacher": 0.5,
    "mlp_ratio": 4.0,
    "teacher": {"embed_dim": 64, "depth": 3, "num_heads": 4, "layers": [2]},
    "student": {
        "embed_dim": 36,
        "depth": 3,
        "num_heads": 3,
        "layers": [3],
        "decoder_embed_dim": 20,
        "decoder_depth": 1,
        "decoder_num_heads": 2,
        "generator_depth": 1,
        "generator_num_heads": 1,
    },
}
THREE_PAIRS: dict[str, Any] = CASE | {
    "img_size": [12, 20],
    "patch_size": 4,
    "num_frames": 6,
    "tubelet_size": 2,
    "batch": 3,
    "mask_ratio": 0.8,
    "teacher": {"embed_dim": 128, "depth": 6, "num_heads": 4, "layers": [2, 4, 6]},
    "student": CASE["student"] | {"depth": 5, "layers": [1, 3, 5], "decoder_depth": 3, "generator_num_heads": 2},
}
MAE: dict[str, Any] = {
    "img_size": [12, 20],
    "patch_size": 4,
    "in_chans": 3,
    "embed_dim": 40,
    "depth": 3,
    "num_heads": 5,
    "decoder_embed_dim": 24,
    "decoder_depth": 2,
    "decoder_num_heads": 3,
    "mlp_ratio": 4.0,
    "norm_pix_loss": True,
}


@pytest.fixture(scope="module")
def amd_case(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("amd")
    make_amd(folder, CASE)
    return folder


@pytest.fixture(scope="module")
def mae_case(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mae")
    make_mae(folder, MAE, mask_ratio=0.6)
    return folder


@pytest.fixture
def copy(tmp_path: Path) -> Callable[[Path], Path]:
    return lambda folder: Path(shutil.copytree(folder, tmp_path / "copy"))


def failed(report: ParityReport) -> set[str]:
    return {f"{row.source} {row.name}" for row in report.failures}


def change(path: Path, edit: Callable[[dict[str, Tensor]], None]) -> None:
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)


def test_the_official_reference_values_are_reproduced(golden: Path) -> None:
    report = run(str(golden))
    assert report.ok, str(report)
    compared = {f"{row.source} {row.name}" for row in report.rows if row.verdict == "ok"}
    for source in (*AMD_FILES[4:], "mae_golden", "finetune", "sinusoid"):
        names = [name for name in load_file(golden / f"{source}.safetensors") if ".state." not in name]
        index = {"noise", "n1568_d768_rows", "n1568_d768_cols"}  # inputs of comparisons, not compared themselves
        assert {f"{source} {name}" for name in names if name not in index} <= compared
    for number in range(1, 6):
        for value in ("loss", "mae", "dir", "gen", "gnorm"):
            assert f"amd_meta.json step {number}.{value}" in compared
    assert {"multiview_merge top1", "multiview_merge top5"} <= compared
    assert any(row.startswith("param_groups finetune_depth3_layer_decay_0p75, blocks.1.") for row in compared)


def _shift_a_probability(found: Any) -> None:
    found["per_video"]["vid3"]["prob"][0] += 1e-6


def _shift_a_scale(found: Any) -> None:
    group = next(g for g in found["finetune_depth3_layer_decay_0p75"] if "blocks.2.attn.q_bias" in g["names"])
    group["lr_scale"] *= 1.001


@pytest.mark.parametrize(
    ("name", "change", "row"),
    [
        ("multiview_merge", _shift_a_probability, "vid3"),
        ("param_groups", _shift_a_scale, "finetune_depth3_layer_decay_0p75, blocks.2.attn.q_bias"),
    ],
)
def test_a_changed_fine_tuning_value_is_detected(
    tmp_path: Path, golden: Path, name: str, change: Callable[[Any], None], row: str
) -> None:
    found = json.loads((golden / f"{name}.json").read_text())
    change(found)
    (tmp_path / f"{name}.json").write_text(json.dumps(found))
    report = run(str(tmp_path))
    assert row in [failed.name for failed in report.failures]


def test_parity_holds_for_one_layer_pair_on_images(amd_case: Path) -> None:
    report = run(str(amd_case))
    assert report.ok, str(report)


def test_parity_holds_for_three_layer_pairs_on_non_square_videos(tmp_path: Path) -> None:
    make_amd(tmp_path, THREE_PAIRS, seed=1)
    report = run(str(tmp_path))
    assert report.ok, str(report)
    assert "amd_outputs_f64 student_gen_pred.2" in {f"{row.source} {row.name}" for row in report.rows}


def test_parity_holds_for_mae_on_non_square_images(mae_case: Path) -> None:
    report = run(str(mae_case))
    assert report.ok, str(report)


@pytest.mark.parametrize("name", AMD_FILES[4:])
def test_a_change_to_any_value_in_an_amd_case_is_detected(copy: Any, amd_case: Path, name: str) -> None:
    folder = copy(amd_case)

    def nudge(tensors: dict[str, Tensor]) -> None:
        for tensor in tensors.values():
            tensor.view(-1)[0] += 1e-2

    change(folder / f"{name}.safetensors", nudge)
    expected = {f"{name} {key}" for key in load_file(folder / f"{name}.safetensors")}
    assert expected <= failed(run(str(folder)))


def test_a_change_to_any_value_in_a_mae_case_is_detected(copy: Any, mae_case: Path) -> None:
    folder = copy(mae_case)
    path = folder / "mae_golden.safetensors"

    def nudge(tensors: dict[str, Tensor]) -> None:
        for key, tensor in tensors.items():
            if key.startswith(("f32.", "f64.")):
                tensor.view(-1)[0] += 1e-2

    change(path, nudge)
    expected = {f"mae_golden {key}" for key in load_file(path) if key.startswith(("f32.", "f64."))}
    assert expected <= failed(run(str(folder)))


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("student_state", "encoder.blocks.1.attn.v_bias"),
        ("student_state", "decoder.head.weight"),
        ("student_extra", "generator_mask_tokens.0"),
        ("teacher_state", "blocks.1.mlp.fc1.weight"),
        ("amd_inputs", "video"),
    ],
)
def test_a_changed_weight_or_input_is_detected(copy: Any, amd_case: Path, name: str, key: str) -> None:
    folder = copy(amd_case)
    change(folder / f"{name}.safetensors", lambda tensors: tensors[key].view(-1)[0].add_(0.1))
    assert not run(str(folder)).ok


def test_contradictory_masks_are_detected(copy: Any, amd_case: Path) -> None:
    folder = copy(amd_case)
    change(folder / "amd_inputs.safetensors", lambda tensors: tensors["mask_teacher"][0].fill_(1))
    assert "amd_inputs mask_teacher" in failed(run(str(folder)))


@pytest.mark.parametrize("name", [*AMD_FILES, "mae_state", "mae_golden"])
def test_an_unknown_tensor_is_a_failure(copy: Any, amd_case: Path, mae_case: Path, name: str) -> None:
    folder = copy(mae_case if name.startswith("mae") else amd_case)
    change(folder / f"{name}.safetensors", lambda tensors: tensors.update({"something.else": torch.zeros(2)}))
    assert "something.else" in str(run(str(folder)).failures)


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("teacher_state", "blocks.0.attn.v_bias"),
        ("student_state", "mask_token"),
        ("amd_inputs", "mask_diff"),
        ("amd_outputs_f32", "labels_unnorm"),
        ("amd_outputs_f64", "student_gen_pred.0"),
        ("mae_state", "pos_embed"),
        ("mae_golden", "f64.pred"),
        ("mae_golden", "f32.latent_unmasked"),
    ],
)
def test_a_missing_tensor_is_a_failure(copy: Any, amd_case: Path, mae_case: Path, name: str, key: str) -> None:
    folder = copy(mae_case if name.startswith("mae") else amd_case)
    change(folder / f"{name}.safetensors", lambda tensors: tensors.pop(key))
    assert key in str(run(str(folder)).failures)


@pytest.mark.parametrize("name", AMD_FILES)
def test_a_missing_file_is_a_failure(copy: Any, amd_case: Path, name: str) -> None:
    folder = copy(amd_case)
    (folder / f"{name}.safetensors").unlink()
    report = run(str(folder))
    assert f"{name} file" in failed(report)


def test_an_unknown_tensor_file_is_a_failure(copy: Any, mae_case: Path) -> None:
    folder = copy(mae_case)
    save_file({"x": torch.zeros(1)}, folder / "more.safetensors")
    assert "more.safetensors file" in failed(run(str(folder)))


def test_broken_files_are_reported_as_failures_without_a_traceback(copy: Any, amd_case: Path) -> None:
    folder = copy(amd_case)
    content = (folder / "amd_grads_f32.safetensors").read_bytes()
    (folder / "amd_grads_f32.safetensors").write_bytes(content[:-5])
    assert "amd_grads_f32 file" in failed(run(str(folder)))
    (folder / "amd_meta.json").write_text('{"config": {"img_size": 8}}')
    assert "amd_meta.json config" in failed(run(str(folder)))
    (folder / "amd_meta.json").write_text("{")
    assert "amd_meta.json file" in failed(run(str(folder)))


@pytest.mark.parametrize(
    ("where", "row"),
    [
        (("five_steps", 3, "gnorm"), "step 4.gnorm"),
        (("five_steps", 0, "dir"), "step 1.dir"),
        (("losses_f64", "loss_gen_l1"), "losses_f64.loss_gen_l1"),
        (("grad_norms_f64", "mask_token"), "grad_norms_f64.mask_token"),
        (("counts", "diff"), "counts"),
        (("config", "mask_ratio"), "config.mask_ratio"),
    ],
    ids=lambda value: ".".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_a_changed_value_in_the_meta_file_is_detected(copy: Any, amd_case: Path, where: tuple, row: str) -> None:
    folder = copy(amd_case)
    meta = json.loads((folder / "amd_meta.json").read_text())
    *parents, last = where
    node = meta
    for part in parents:
        node = node[part]
    node[last] *= 1.2 if isinstance(node[last], float) else 2
    (folder / "amd_meta.json").write_text(json.dumps(meta))
    assert f"amd_meta.json {row}" in failed(run(str(folder)))


def test_an_unsupported_architecture_is_reported(copy: Any, amd_case: Path) -> None:
    for key, value in (("ln_eps", 1e-5), ("qkv_bias", False)):
        folder = copy(amd_case)
        meta = json.loads((folder / "amd_meta.json").read_text())
        meta["config"][key] = value
        (folder / "amd_meta.json").write_text(json.dumps(meta))
        report = run(str(folder))
        assert key in str(report.failures)
        shutil.rmtree(folder)


def test_a_folder_without_golden_files_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no golden files"):
        run(str(tmp_path))
    with pytest.raises(ConfigError, match=r"no such folder"):
        run(str(tmp_path / "nowhere"))


def test_the_report_is_available_as_text_and_as_json(copy: Any, mae_case: Path) -> None:
    folder = copy(mae_case)

    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors["f32.pred"].fill_(float("nan"))

    change(folder / "mae_golden.safetensors", spoil)
    report = run(str(folder))
    assert [row.name for row in report.failures] == ["f32.pred"]
    values = json.loads(report.as_json())
    assert values["ok"] is False
    assert values["failed"] == 1
    assert "nan" in str(report).lower()
    assert "FAIL  mae_golden f32.pred" in str(report)
