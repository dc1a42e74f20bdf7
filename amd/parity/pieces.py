"""Checks for the smaller golden files: position tables, schedules, parameter groups, masks, sampling, crops, views.

Each check reads one file and adds rows to the report. Official random draws come from NumPy's and Python's generators
and are regenerated here from their seeds.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from amd.config import ConfigError, EncoderConfig, MaskConfig, TokenGrid, TrainConfig, validate
from amd.data.loading import frame_sampling
from amd.data.loading.transforms import Box, multi_scale_box
from amd.downstream.supervised.classification import metrics
from amd.exchange.official import to_official
from amd.masks import sample_token_sets
from amd.models.classifier import Classifier
from amd.models.student import Student
from amd.parity.amd_case import TOLERANCE
from amd.parity.files import GoldenTensors
from amd.parity.report import ParityReport
from amd.tokens import position_table
from amd.training.trainer.optimizer import cosine_lr, layer_scale, parameter_groups

Check = Callable[[Path, ParityReport], None]


def guarded(name: str, check: Check, folder: Path, report: ParityReport) -> None:
    """Run a check; report a file with an invalid layout as a failure instead of raising."""
    try:
        check(folder, report)
    except ConfigError as error:
        report.fail(name, "file", str(error))
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError, RuntimeError) as error:
        report.fail(name, "file", f"cannot be parsed ({type(error).__name__}: {error})")


def _json(folder: Path, name: str) -> Any:
    return json.loads((folder / name).read_text())


def check_sinusoid(folder: Path, report: ParityReport) -> None:
    stored = GoldenTensors(folder, "sinusoid", report)
    for name in stored.names():
        found = re.fullmatch(r"n(\d+)_d(\d+)(_sub|_rows|_cols)?", name)
        if found is None or found[3] in ("_rows", "_cols"):
            continue
        table = position_table("sincos_1d", TokenGrid(1, 1, int(found[1])), int(found[2]))
        golden = stored.take(name)
        if found[3]:
            rows, columns = (stored.take(name.removesuffix("_sub") + part) for part in ("_rows", "_cols"))
            if rows is None or columns is None:
                continue
            table = table[rows][:, columns]
        elif golden is not None and golden.ndim == 3:
            table = table[None]
        report.close("sinusoid", name, table, golden, TOLERANCE["f32"])
    stored.close()


def check_schedule(folder: Path, report: ParityReport) -> None:
    for number, case in enumerate(_json(folder, "cosine_scheduler.json")["cases"], start=1):
        args, golden = case["args"], case["values"]
        epoch = args["niter_per_ep"]
        warmup = args["warmup_steps"] if args["warmup_steps"] > 0 else args["warmup_epochs"] * epoch
        total = args["epochs"] * epoch
        got = [
            cosine_lr(
                step,
                peak=args["base_value"],
                final=args["final_value"],
                steps=total,
                warmup=warmup,
                start=args["start_warmup_value"],
            )
            for step in range(total)
        ]
        report.close("cosine_scheduler", f"case {number}", got, golden, 1e-12)


def check_groups(folder: Path, report: ParityReport) -> None:
    """Compare which parameters have weight decay. The order within a group does not affect AdamW and is ignored."""
    for key, groups in _json(folder, "param_groups.json").items():
        if not (isinstance(groups, list) and all(isinstance(group, dict) for group in groups)):
            continue  # an official skip list, which the groups make redundant
        if key.startswith("pretrain"):
            _check_pretrain_groups(key, groups, report)
            continue
        _check_finetune_groups(key, groups, report)


def _check_finetune_groups(key: str, groups: list[dict[str, Any]], report: ParityReport) -> None:
    """Compare the learning-rate scale and weight decay of every classifier parameter.

    The layer decay is inferred from block 0.
    """
    golden = {name: (group["lr_scale"], group["weight_decay"]) for group in groups for name in group["names"]}
    depth = 1 + max(int(found[1]) for name in golden if (found := re.match(r"blocks\.(\d+)\.", name)))
    decay = golden["blocks.0.norm1.weight"][0] ** (1 / depth)
    config = validate(EncoderConfig, {"width": 8, "depth": depth, "heads": 2})
    classifier = Classifier(config, TokenGrid(1, 2, 2), 12, classes=2)
    weight_decay = max(value for _, value in golden.values())
    got: dict[str, tuple[float, float]] = {}
    for group in parameter_groups(classifier, weight_decay, lambda name: layer_scale(name, depth, decay)):
        for name in cast("list[str]", group["names"]):
            got[_official_name(name)] = cast("tuple[float, float]", (group["lr_scale"], group["weight_decay"]))
    report.same("param_groups", f"{key}, names", sorted(got), sorted(golden))
    for name in sorted(golden.keys() & got.keys()):
        report.close("param_groups", f"{key}, {name}", list(got[name]), list(golden[name]), 1e-9)


def _official_name(name: str) -> str:
    """Return the name of a classifier parameter in the official fine-tuning code."""
    name = re.sub(r"^encoder\.norm\.", "fc_norm.", name)
    return re.sub(r"^patch_embed\.", "patch_embed.proj.", name.removeprefix("encoder."))


def _check_pretrain_groups(key: str, groups: list[dict[str, Any]], report: ParityReport) -> None:
    names = [name for group in groups for name in group["names"]]
    depth, decoder, generator = (
        1 + max(int(found[1]) for name in names if (found := re.match(pattern, name)))
        for pattern in (r"encoder\.blocks\.(\d+)", r"decoder\.blocks\.(\d+)", r"generators\.0\.blocks\.(\d+)")
    )
    pairs = sum(".projection_heads." in name for name in names)
    config = validate(
        TrainConfig,
        {
            "clip": {"frames": 2, "tubelet": 2, "size": 8, "patch": 2},
            "student": {
                "encoder": {"width": 8, "depth": depth, "heads": 2},
                "decoder": {"width": 8, "depth": decoder, "heads": 2},
                "generator": {"depth": generator, "heads": 1},
            },
            "teacher": {"encoder": {"width": 8, "depth": pairs, "heads": 2}, "weights": "none"},
            "mask": {"strategy": "tube", "student_ratio": 0.75, "teacher_ratio": 0.5},
            "objective": {"layers": [{"student": i + 1, "teacher": i + 1} for i in range(pairs)]},
            "data": {"train": "golden"},
            "optim": {"batch_size": 1},
            "schedule": {"steps": 1},
        },
    )
    student = Student(config)
    decay = max(group["weight_decay"] for group in groups)
    for golden in groups:
        got: set[str] = set()
        for group in parameter_groups(student, decay):
            if group["weight_decay"] == golden["weight_decay"]:
                own = {name: student.get_parameter(name).detach() for name in group["names"]}  # type: ignore[attr-defined]
                got |= set(to_official(own, config.clip))
        # Excluded: tensors that are not parameters in the official code, and parameters that it never uses.
        got = {name for name in got if not name.startswith("generator_mask_tokens") and not _unused(name)}
        named = {name for name in golden["names"] if not _unused(name)}
        report.same("param_groups", f"{key}, weight decay {golden['weight_decay']}", got, named)


def _unused(name: str) -> bool:
    return re.match(r"generators\.\d+\.norm\.", name) is not None


def official_codes(cells: int, student_ratio: float, teacher_ratio: float, draws: np.random.RandomState) -> list[int]:
    """Sample as the official mask generator does: 0 visible to both, 1 teacher-only, 2 hidden from both."""
    student, teacher = int(student_ratio * cells), int(teacher_ratio * cells)
    codes = np.concatenate([np.zeros(cells - student), np.ones(student - teacher), np.full(teacher, 2)])
    draws.shuffle(codes)
    return [int(code) for code in codes]


def check_masks(folder: Path, report: ParityReport) -> None:
    """Compare official draws, regenerated from their seeds, and the per-frame counts of our sampler."""
    for number, case in enumerate(_json(folder, "masks.json"), start=1):
        grid, name = TokenGrid(*case["grid"]), f"case {number}"
        ratios = case["mask_ratio"], case["mask_ratio_teacher"]
        draws = np.random.RandomState(case["np_seed"])
        for draw, golden in enumerate(case["draws"], start=1):
            codes = official_codes(grid.per_frame, *ratios, draws)
            report.same("masks", f"{name}, draw {draw}", "".join(map(str, codes)), golden)
        mask = MaskConfig(strategy="tube", student_ratio=ratios[0], teacher_ratio=ratios[1])
        sets = sample_token_sets(mask, grid, 2, torch.Generator().manual_seed(case["np_seed"]))
        hidden = sets.student_masked.shape[1] - sets.teacher_only.shape[1]
        counts = {"visible": sets.student_visible.shape[1], "diff": sets.teacher_only.shape[1], "hidden": hidden}
        per_frame = {key: count // grid.frames for key, count in counts.items()}
        report.same("masks", f"{name}, per_frame_counts", per_frame, case["per_frame_counts"])


class _NumpyDraws:
    """Draws the same numbers as np.random.seed followed by np.random.randint."""

    def __init__(self, seed: int) -> None:
        self._state = np.random.RandomState(seed)

    def randrange(self, stop: int, /) -> int:
        return int(self._state.randint(stop))


def _clips(case: dict[str, Any]) -> int:
    return len(case["clips"][0])


SAMPLERS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "pretrain_k400": lambda case: frame_sampling.strided(
        case["num_frames"], len(case["frames"]), case["step"], _NumpyDraws(case["np_seed"])
    ).tolist(),
    "finetune_train": lambda case: frame_sampling.window(
        case["num_frames"], len(case["frames"]), case["step"], _NumpyDraws(case["np_seed"])
    ).tolist(),
    "ssv2_raw_pretrain": lambda case: frame_sampling.window(
        case["num_frames"], len(case["frames"]), case["step"], _NumpyDraws(case["np_seed"])
    ).tolist(),
    "ssv2_raw_finetune_train": lambda case: frame_sampling.segments(
        case["num_frames"], len(case["frames"]), _NumpyDraws(case["np_seed"])
    ).tolist(),
    "finetune_test": lambda case: [
        view.tolist()
        for view in frame_sampling.dense_views(case["num_frames"], _clips(case), case["step"], case["num_segment"])
    ],
    "ssv2_raw_finetune_test": lambda case: [
        view.tolist() for view in frame_sampling.segment_views(case["num_frames"], _clips(case), len(case["clips"]))
    ],
}


def check_sampling(folder: Path, report: ParityReport) -> None:
    for group, cases in _json(folder, "frame_sampling.json").items():
        if group not in SAMPLERS:
            report.fail("frame_sampling", group, "cannot be checked: unknown sampler")
            continue
        for number, case in enumerate(cases, start=1):
            name = f"{group} {number} ({case['num_frames']} frames)"
            if case.get("error"):
                report.note("frame_sampling", name, f"the official sampler fails here: {case['error']}")
            else:
                report.same("frame_sampling", name, SAMPLERS[group](case), case.get("clips", case.get("frames")))


def check_crops(folder: Path, report: ParityReport) -> None:
    for case in _json(folder, "multiscale_crop.json"):
        width, height = case["size"]
        draws = random.Random(case["py_seed"])
        for number, (w, h, x, y) in enumerate(case["draws_w_h_x_y"], start=1):
            got = multi_scale_box((height, width), (224, 224), draws)
            report.same("multiscale_crop", f"{width}x{height}, draw {number}", got, Box(y, x, h, w))


def check_merge(folder: Path, report: ParityReport) -> None:
    """Compare the views merged across ranks in a test: probabilities, predictions, top-1 and top-5."""
    golden = _json(folder, "multiview_merge.json")
    rows = [row for rank in golden["ranks"] for row in rank]
    ids = sorted({row["id"] for row in rows})
    views = sorted({(row["chunk"], row["split"]) for row in rows})
    merged = metrics.merge(
        np.array([ids.index(row["id"]) for row in rows]),
        np.array([views.index((row["chunk"], row["split"])) for row in rows]),
        np.array([row["logits"] for row in rows]),
    )
    report.same("multiview_merge", "videos", ids, sorted(golden["per_video"]))
    for name, probabilities in zip(ids, merged.probabilities, strict=True):
        wanted = golden["per_video"].get(name)
        if wanted is not None:
            report.close("multiview_merge", name, probabilities.tolist(), wanted["prob"], 1e-9)
            report.same("multiview_merge", f"{name}, prediction", int(probabilities.argmax()), wanted["pred"])
    labels = {row["id"]: row["label"] for row in rows}
    figures = metrics.single_label(merged.probabilities, np.array([labels[name] for name in ids]), len(ids))
    for name in ("top1", "top5"):
        report.close("multiview_merge", name, [figures[f"eval/{name}"]], [golden[name]], 1e-9)


CHECKS: dict[str, Check] = {
    "sinusoid.safetensors": check_sinusoid,
    "cosine_scheduler.json": check_schedule,
    "param_groups.json": check_groups,
    "masks.json": check_masks,
    "frame_sampling.json": check_sampling,
    "multiscale_crop.json": check_crops,
    "multiview_merge.json": check_merge,
}
