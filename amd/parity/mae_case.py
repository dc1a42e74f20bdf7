"""Replay of the official MAE with our student, without a teacher.

The official decoder predicts all tokens and computes the loss on the masked ones. Our decoder normally predicts only
masked tokens; here it also predicts the visible ones, so that the whole golden prediction is compared.
Shapes: B batch, N tokens, V visible tokens, P pixel values per token, D width.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from amd.config import ConfigError, TokenGrid, TrainConfig, validate, with_overrides
from amd.distillation import distill
from amd.exchange.load import load_student_state
from amd.exchange.official import to_mae
from amd.models.student import Student
from amd.parity.amd_case import DTYPE, TOLERANCE
from amd.parity.files import GoldenTensors, read_meta
from amd.parity.report import ParityReport
from amd.tokens import TokenSets, patchify, position_table, take_tokens

META = "mae_meta.json"
FILES = ("mae_state", "mae_golden")


class MaeCase(NamedTuple):
    config: TrainConfig
    images: Tensor  # (B, 3, 1, H, W), normalised
    sets: TokenSets  # student-visible in MAE's shuffled order
    state: dict[str, Tensor]

    def student(self, precision: str) -> Student:
        student = Student(self.config)
        load_student_state(student, self.state, "mae_state")
        return student.to(DTYPE[precision])


def replay(folder: Path, report: ParityReport) -> None:
    state, golden = (GoldenTensors(folder, name, report) for name in FILES)
    meta = read_meta(folder, META, report)
    if meta is None or not state.readable or not golden.readable:
        return
    try:
        case = _read_case(meta, state, golden, report)
        if case is None:
            return
        case.student("f32")
    except ConfigError as error:
        for problem in error.problems:
            report.fail(META, "config", problem)
        return
    except (KeyError, TypeError, ValueError, IndexError) as error:
        report.fail(META, "config", f"cannot be parsed ({type(error).__name__}: {error})")
        return
    if "keys" in meta:
        report.same(META, "keys", {name: list(tensor.shape) for name, tensor in case.state.items()}, meta["keys"])
    for name, table in (("pos_embed", "encoder.positions"), ("decoder_pos_embed", "decoder.positions")):
        if name in case.state:  # includes a row of zeros for the class token
            own = case.student("f32").get_buffer(table)
            whole = torch.cat([torch.zeros(1, own.shape[1]), own])[None]
            report.close("mae_state", name, whole, case.state[name], TOLERANCE["f32"])
        else:
            report.fail("mae_state", name, "is missing from the file")
    losses: dict[str, Tensor] = {}
    for precision in ("f32", "f64"):
        _check_features(case, precision, golden, report)
        losses |= _check_losses(case, precision, golden, report)
    _check_info(case, dict(meta.get("info", {})), losses, report)
    _check_tables(golden, report)
    for name in sorted(set(meta) - {"config", "mask_ratio", "info", "keys"}):
        report.note(META, name, "unknown to this command")
    state.close()
    golden.close()


def _read_case(
    meta: dict[str, Any], state: GoldenTensors, golden: GoldenTensors, report: ParityReport
) -> MaeCase | None:
    images, noise, mask, restore = (golden.take(name) for name in ("imgs", "noise", "mask", "ids_restore"))
    if images is None or noise is None or mask is None or restore is None:
        return None
    before = len(report.failures)
    hidden = mask.bool()
    if len(set(hidden.sum(dim=1).tolist())) > 1:
        report.fail("mae_golden", "mask", "has rows with different counts")
        return None
    tokens, kept = hidden.shape[1], int((~hidden[0]).sum())
    order = noise.argsort(dim=1, stable=True)  # tokens with the smallest noise are kept
    report.same("mae_golden", "ids_restore", order.argsort(dim=1), restore.long())
    report.same("mae_golden", "mask", torch.ones_like(hidden).scatter(1, order[:, :kept], False), hidden)
    if "mask_ratio" in meta:
        report.same(META, "mask_ratio", int(tokens * (1 - meta["mask_ratio"])), kept)
    config = _config(meta["config"], tokens, tokens - kept)
    report.same("mae_golden", "imgs", list(images.shape[1:]), [3, *config.clip.size])
    report.same("mae_golden", "tokens", tokens, config.clip.grid.tokens)
    if len(report.failures) > before:
        return None
    empty = order[:, :0]
    sets = TokenSets(order[:, :kept], empty, order[:, kept:], order[:, kept:])
    return MaeCase(config, images[:, :, None], sets, dict(state.all()))


def _config(sizes: dict[str, Any], tokens: int, hidden: int) -> TrainConfig:
    if sizes.get("in_chans", 3) != 3:
        raise ConfigError([f"in_chans={sizes['in_chans']}: must be 3, because our clips have 3 colour channels"])
    values = {
        "clip": {"frames": 1, "tubelet": 1, "size": sizes["img_size"], "patch": sizes["patch_size"]},
        "student": {
            "encoder": {
                "width": sizes["embed_dim"],
                "depth": sizes["depth"],
                "heads": sizes["num_heads"],
                "mlp_ratio": sizes.get("mlp_ratio", 4.0),
                "class_token": True,
                "positions": "sincos_2d",
            },
            "decoder": {
                "width": sizes["decoder_embed_dim"],
                "depth": sizes["decoder_depth"],
                "heads": sizes["decoder_num_heads"],
                "input_bias": True,
            },
        },
        "mask": {"strategy": "random", "student_ratio": (hidden + 0.5) / tokens, "teacher_ratio": 0.0},
        "objective": {"kind": "mae", "pixels": "per_patch"},
        "data": {"train": "golden"},
        "optim": {"batch_size": 1},
        "schedule": {"steps": 1},
    }
    return validate(TrainConfig, values)


def _check_features(case: MaeCase, precision: str, golden: GoldenTensors, report: ParityReport) -> None:
    tolerance, clip, sets = TOLERANCE[precision], case.config.clip, case.sets
    student = case.student(precision)
    assert student.decoder is not None, "an MAE student has a decoder"
    pixels = patchify(case.images.to(DTYPE[precision]), clip.tubelet, clip.patch)  # (B, N, P)
    everything = torch.arange(pixels.shape[1]).expand(pixels.shape[0], -1)  # (B, N)
    order = torch.cat([sets.student_visible, sets.student_masked], dim=1)  # (B, N)
    with torch.no_grad():
        latent = student.encoder(take_tokens(pixels, sets.student_visible), sets.student_visible).final  # (B, 1 + V, D)
        reconstructed = student.decoder(latent, sets.student_visible, sets.student_masked, return_visible=True)[:, 1:]
        unmasked = student.encoder(pixels, everything).final
    got = {"patchify": pixels, "latent": latent, "pred": take_tokens(reconstructed, order.argsort(dim=1))}
    if precision == "f32" or f"{precision}.latent_unmasked" in golden.names():
        got["latent_unmasked"] = unmasked
    for name, tensor in got.items():
        stored = golden.take(f"{precision}.{name}")
        if stored is not None:
            report.close("mae_golden", f"{precision}.{name}", tensor, stored, tolerance)


def _check_losses(case: MaeCase, precision: str, golden: GoldenTensors, report: ParityReport) -> dict[str, Tensor]:
    """Compare both losses, and the gradients of the normalised loss, keyed by official names."""
    tolerance = TOLERANCE[precision]
    losses: dict[str, Tensor] = {}
    for flag, pixels in ((1, "per_patch"), (0, "normalized")):
        config = with_overrides(case.config, {"objective.pixels": pixels})
        student = case.student(precision)
        terms = distill(student, None, case.images.to(DTYPE[precision]), case.sets, config)
        losses[f"{precision}.norm_pix_{bool(flag)}.loss"] = terms.total.detach()
        stored = golden.take(f"{precision}.loss.norm_pix_{flag}")
        if stored is not None:
            report.close("mae_golden", f"{precision}.loss.norm_pix_{flag}", terms.total, stored, tolerance)
        if flag:
            terms.total.backward()
            own = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
            # The gradient of the attention keys' bias is only rounding error; ours is absent and counts as zero.
            _check_gradients(to_mae(own, config.clip), precision, golden, report)
    return losses


def _check_gradients(gradients: dict[str, Tensor], precision: str, golden: GoldenTensors, report: ParityReport) -> None:
    prefix = f"{precision}.grad."
    if not golden.names(prefix):
        report.fail("mae_golden", f"{prefix}*", "the file contains none")
    for name, stored in golden.all(prefix):
        if name in gradients:
            report.close_l2("mae_golden", prefix + name, gradients[name], stored, TOLERANCE[precision])
        else:
            report.fail("mae_golden", prefix + name, "cannot be checked: none of our parameters gets this gradient")


def _check_info(case: MaeCase, info: dict[str, Any], losses: dict[str, Tensor], report: ParityReport) -> None:
    for name, value in info.items():
        if name in losses:
            report.close(META, f"info.{name}", losses[name], value, TOLERANCE[name.split(".")[0]])
        elif name == "no_grad":
            tables = {key for key in case.state if key.endswith("pos_embed")}  # buffers in our code
            report.same(META, "info.no_grad", tables, set(value))
        else:
            report.note(META, f"info.{name}", "unknown to this command")


def _check_tables(golden: GoldenTensors, report: ParityReport) -> None:
    """Compare position tables; our tables are computed in float64 and stored in float32."""
    for rest, stored in list(golden.all("pos2d.")):
        name = f"pos2d.{rest}"
        found = re.fullmatch(r"d(\d+)_g(\d+)(?:x(\d+))?(_cls)?", rest)
        if found is None:
            report.fail("mae_golden", name, "cannot be checked: its name contains no size")
            continue
        width, height = int(found[1]), int(found[2])
        table = position_table("sincos_2d", TokenGrid(1, height, int(found[3] or height)), width)
        if found[4]:
            table = torch.cat([torch.zeros(1, width), table])  # the class token has no position
        report.close("mae_golden", name, table, stored, TOLERANCE["f32"])
