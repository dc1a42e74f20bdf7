"""Replay of the official AMD model with our student, teacher, losses and optimizer, from recorded files.

The official generator mask tokens are not parameters (they are stored in a plain list), so the five steps keep them
fixed and exclude them from the clipped norm.
Shapes: B batch, N tokens, V student-visible, O teacher-only, M student-masked, P values per token, E teacher width.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from amd.config import ConfigError, Distance, PixelTarget, TrainConfig, with_overrides
from amd.distillation import distill, teacher_features
from amd.exchange.official import to_official
from amd.losses import LossTerms, pixel_targets
from amd.models.student import Student
from amd.parity.amd_case import DTYPE, FILES, META, TOLERANCE, AmdCase, read_case
from amd.parity.files import GoldenTensors, read_meta
from amd.parity.report import ParityReport
from amd.tokens import patchify, take_tokens
from amd.training.trainer.optimizer import build_optimizer, clip_gradients, set_lr

# Settings of the five official steps; `optimizer` in a meta file overrides them.
OPTIMIZER = {"lr": 1e-3, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.05, "clip_grad": 0.02}
LOSSES: dict[str, tuple[Distance, PixelTarget]] = {
    "": ("l2", "per_channel"),
    "_l1": ("l1", "per_channel"),
    "_sml1": ("smooth_l1", "per_channel"),
    "_unnorm": ("l2", "unit"),
}
GLOBAL_NORM = "grad_global_norm_without_generator_mask_tokens"


def replay(folder: Path, report: ParityReport) -> None:
    files = {name: GoldenTensors(folder, name, report) for name in FILES}
    meta = read_meta(folder, META, report)
    if meta is None or not all(files[name].readable for name in FILES[:4]):
        return
    try:
        case = read_case(meta, files, report)
        if case is None:
            return
        case.networks("f32")
    except ConfigError as error:
        for problem in error.problems:
            report.fail(META, "config", problem)
        return
    except (KeyError, TypeError, ValueError, IndexError) as error:
        report.fail(META, "config", f"cannot be parsed ({type(error).__name__}: {error})")
        return
    _check_meta(case, files, report)
    for precision in ("f32", "f64"):
        _check_features(case, precision, files[f"amd_outputs_{precision}"], report)
        gradients = _check_losses(case, precision, files[f"amd_outputs_{precision}"], report)
        _check_gradients(case, precision, gradients, files[f"amd_grads_{precision}"], report)
    _check_steps(case, files["amd_after5steps_f32"], report)
    for file in files.values():
        file.close()


def _check_meta(case: AmdCase, files: dict[str, GoldenTensors], report: ParityReport) -> None:
    """Compare shapes and counts in the meta file with the tensors."""
    meta, sets, grid = case.meta, case.sets, case.config.clip.grid
    states = {"student_keys": dict(files["student_state"].all()), "teacher_keys": case.teacher}
    for key, state in states.items():
        if key in meta:
            report.same(META, key, {name: list(tensor.shape) for name, tensor in state.items()}, meta[key])
    sizes = meta["config"]
    if "grid" in sizes:
        report.same(META, "config.grid", list(grid), sizes["grid"])
    if "batch" in sizes:
        report.same(META, "config.batch", case.video.shape[0], sizes["batch"])
    counts = {
        "visible_student": sets.student_visible.shape[1],
        "visible_teacher": sets.student_visible.shape[1] + sets.teacher_only.shape[1],
        "diff": sets.teacher_only.shape[1],
        "masked_student": sets.student_masked.shape[1],
    }
    if "counts" in meta:
        report.same(META, "counts", counts, meta["counts"])
    mask = case.config.mask
    for key, role in (("mask_ratio", "visible_student"), ("mask_ratio_teacher", "visible_teacher")):
        if key in sizes:
            visible = grid.per_frame - mask.hidden_cells(sizes[key], grid.per_frame)
            report.same(META, f"config.{key}", visible * grid.frames, counts[role])
    known = {"config", "student_keys", "teacher_keys", "counts", "losses_f32", "losses_f64", "grad_norms_f64"}
    for key in sorted(set(meta) - known - {"params_without_grad", "five_steps", "optimizer"}):
        report.note(META, key, "unknown to this command")


def _check_features(case: AmdCase, precision: str, stored: GoldenTensors, report: ParityReport) -> None:
    """Compare every intermediate tensor of the losses."""
    tolerance, config, sets = TOLERANCE[precision], case.config, case.sets
    student, teacher = case.networks(precision)
    pixels = patchify(case.video.to(DTYPE[precision]), config.clip.tubelet, config.clip.patch)  # (B, N, P)
    hidden = take_tokens(pixels, sets.student_masked)
    visible = take_tokens(pixels, sets.student_visible)
    with torch.no_grad():
        output = student(visible, sets)
        encoded = student.encoder(visible, sets.student_visible).final
        targets = teacher_features(teacher, pixels, sets, config)
    shared = sets.student_visible.shape[1]
    got: dict[str, Tensor | None] = {
        "labels_norm": pixel_targets(hidden, config.clip, "per_channel"),
        "recon": output.reconstructed,
    }
    if precision == "f32" or "labels_unnorm" in stored.names():
        got["labels_unnorm"] = pixel_targets(hidden, config.clip, "unit")
    if precision == "f32" or "encoder_out_normed" in stored.names():
        got["encoder_out_normed"] = encoded
    for i in range(len(config.objective.layers)):
        got[f"teacher_dir.{i}"] = targets[i][:, :shared]
        got[f"teacher_gen.{i}"] = targets[i][:, shared:]
        got[f"student_dir_proj.{i}"] = output.projected[i]
        got[f"student_gen_pred.{i}"] = output.generated[i] if output.generated else None
    for name, tensor in got.items():
        golden = stored.take(name)
        if golden is None:
            continue
        if tensor is None:
            report.fail(stored.name, name, "is not computed by our code for these masks")
        else:
            report.close(stored.name, name, tensor, golden, tolerance)


def _check_losses(case: AmdCase, precision: str, stored: GoldenTensors, report: ParityReport) -> dict[str, Tensor]:
    """Compare every loss.

    Returns the gradients of the official default loss (l2, normalised targets), keyed by official names.
    """
    tolerance, listed = TOLERANCE[precision], dict(case.meta.get(f"losses_{precision}", {}))
    video = case.video.to(DTYPE[precision])
    gradients: dict[str, Tensor] = {}
    got: dict[str, Tensor] = {}
    for suffix, (distance, pixels) in LOSSES.items():
        config = with_overrides(case.config, {"objective.distance": distance, "objective.pixels": pixels})
        student, teacher = case.networks(precision)
        terms = distill(student, teacher, video, case.sets, config)
        got |= _named(terms, suffix)
        if suffix == "":
            terms.total.backward()
            gradients = official_gradients(student, case.config)
            own = [gradient for name, gradient in gradients.items() if not name.startswith("generator_mask_tokens.")]
            got[GLOBAL_NORM] = torch.stack([gradient.norm() for gradient in own]).norm()
    for name, value in got.items():
        golden = stored.take(name)
        if golden is not None:
            report.close(stored.name, name, value, golden, tolerance)
        if name in listed:
            report.close(META, f"losses_{precision}.{name}", value, listed.pop(name), tolerance)
    for name in listed:
        report.fail(META, f"losses_{precision}.{name}", "cannot be checked: unknown loss in this layout")
    return gradients


def _named(terms: LossTerms, suffix: str) -> dict[str, Tensor]:
    total = {f"loss_total{suffix}": terms.total}
    if suffix == "_unnorm":  # the alignment terms are the same as in the plain case
        return total | {"loss_mae_unnorm": terms.reconstruction}
    aligned = {f"loss_dir{suffix}": terms.direct, f"loss_gen{suffix}": terms.generation}
    return total | aligned | ({"loss_mae": terms.reconstruction} if suffix == "" else {})


def official_gradients(student: Student, config: TrainConfig) -> dict[str, Tensor]:
    """Return gradients keyed by official name, omitting parameters that the official code never uses."""
    own = {name: parameter.grad for name, parameter in student.named_parameters() if parameter.grad is not None}
    renamed = to_official(own, config.clip)
    return {name: tensor for name, tensor in renamed.items() if not _is_unused(name)}


def _is_unused(name: str) -> bool:
    return name.startswith("generators.") and ".norm." in name


def _check_gradients(
    case: AmdCase, precision: str, gradients: dict[str, Tensor], stored: GoldenTensors, report: ParityReport
) -> None:
    tolerance = TOLERANCE[precision]
    found = 0
    for name, golden in stored.all():
        if name in gradients:
            found += 1
            report.close_l2(stored.name, name, gradients[name], golden, tolerance)
        else:
            report.fail(stored.name, name, "cannot be checked: none of our parameters gets this gradient")
    if stored.readable and not found:
        report.fail(stored.name, "gradients", "the file contains none")
    if precision == "f64":
        for name, norm in case.meta.get("grad_norms_f64", {}).items():
            if name in gradients:
                report.close(META, f"grad_norms_f64.{name}", gradients[name].norm(), norm, tolerance)
            else:
                report.fail(
                    META, f"grad_norms_f64.{name}", "cannot be checked: none of our parameters gets this gradient"
                )
        without = {name for name in case.student if name not in gradients}
        if "params_without_grad" in case.meta:
            report.same(META, "params_without_grad", without, set(case.meta["params_without_grad"]))


def _check_steps(case: AmdCase, stored: GoldenTensors, report: ParityReport) -> None:
    """Compare the optimizer with the official one on the same batch, step by step, in float32."""
    steps = case.meta.get("five_steps")
    if not steps:
        report.fail(META, "five_steps", "is missing")
        return
    settings: dict[str, Any] = OPTIMIZER | dict(case.meta.get("optimizer", {}))
    student, teacher = case.networks("f32")
    for generator in student.generators:
        generator.mask_token.requires_grad_(False)  # fixed in the official code
    config = with_overrides(
        case.config,
        {
            "optim.betas": settings["betas"],
            "optim.eps": settings["eps"],
            "optim.weight_decay": settings["weight_decay"],
        },
    )
    optimizer = build_optimizer(student, config.optim)
    set_lr(optimizer, settings["lr"])
    for number, golden in enumerate(steps, start=1):
        terms = distill(student, teacher, case.video, case.sets, config)
        optimizer.zero_grad()
        terms.total.backward()
        norm = clip_gradients(student.parameters(), settings["clip_grad"])
        optimizer.step()
        values = dict(zip(("loss", "mae", "dir", "gen"), terms, strict=True)) | {"gnorm": norm}
        for name, value in golden.items():
            if name in values:
                report.close(META, f"step {number}.{name}", values[name], value, TOLERANCE["f32"])
            else:
                report.fail(META, f"step {number}.{name}", "cannot be checked: unknown value in this layout")
    after = case.student | to_official(student.state_dict(), config.clip)
    after |= {name: tensor for name, tensor in case.student.items() if _is_unused(name)}  # neither updated nor decayed
    found = False
    for name, golden in stored.all():
        found = True
        if name in after:
            report.close(stored.name, name, after[name], golden, TOLERANCE["f32"])
        else:
            report.fail(stored.name, name, "cannot be checked: our model has no such parameter")
    if stored.readable and not found:
        report.fail(stored.name, "parameters", "the file contains none")
