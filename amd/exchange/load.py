"""Foreign weights into our networks, strictly: what is missing, unexpected or of another shape is told, all at once.

Knows which parts of a file a network may do without; the key tables stand in `official` and `huggingface`.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from amd.config import ConfigError, TrainConfig
from amd.exchange.layouts import State, Translated
from amd.exchange.positions import TABLE_TOLERANCE, fixed_kind
from amd.exchange.read import read_state
from amd.exchange.source import listed, open_source, other_network, translated_state
from amd.models.encoder import Encoder
from amd.models.predictor import Predictor
from amd.models.student import Student
from amd.models.teachers.frozen import Teacher
from amd.models.teachers.timm import TIMM

logger = logging.getLogger(__name__)


def load_teacher(config: TrainConfig) -> Teacher:
    """The frozen teacher of a run, from `teacher.weights`: a file, folder or URI, `timm:NAME`, or an encoder's id.

    Raises ConfigError when the weights are missing, unreadable or of another architecture.
    """
    assert config.teacher is not None, "only a config with a teacher comes here"
    assert config.teacher.weights is not None, "a teacher preset is trained first and gives its weights"
    weights, clip, field = config.teacher.weights, config.clip, "teacher.encoder"
    if weights.startswith(TIMM) and not clip.is_image:
        raise ConfigError([f"teacher.weights={weights}: timm's teachers see images, and clip.frames={clip.frames}"])
    encoder = Encoder(config.teacher.encoder, clip.grid, clip.token_values)
    source = open_source(weights, config.storage, clip, field="teacher.weights")
    problems = other_network(encoder.config, source, clip, field)
    _fill_encoder(encoder, source.weights, weights, problems, taps_only=True, field=field)
    return Teacher(encoder, tuple(pair.teacher for pair in config.objective.layers))


def load_encoder_weights(encoder: Encoder, url: str, *, taps_only: bool = False, field: str = "encoder") -> None:
    """Load an encoder from a file of any known layout, in place.

    With `taps_only` (a teacher: features are taken between blocks, before the final norm) a fine-tuned file that has no
    final norm is accepted, and so is a learned position table, which then replaces ours. Parts after the encoder
    (decoder, projections, heads) are known and left out.
    `field`: the config's section that the messages name. Raises ConfigError.
    """
    load_encoder_state(encoder, read_state(url), url, taps_only=taps_only, field=field)


def load_encoder_state(
    encoder: Encoder, state: State, name: str, *, taps_only: bool = False, field: str = "encoder"
) -> None:
    """The same from a state dict in memory; `name` tells in messages where it came from."""
    _fill_encoder(encoder, translated_state(state, name), name, [], taps_only=taps_only, field=field)


def _fill_encoder(
    encoder: Encoder, translated: Translated, name: str, problems: list[str], *, taps_only: bool, field: str
) -> None:
    part = "encoder."
    ours = {key.removeprefix(part): tensor for key, tensor in translated.state.items() if key.startswith(part)}
    table = ours.pop("positions", None)
    problems += [] if table is None else _take_positions(encoder, ours, table, taps_only, field)
    absent: set[str] = set()
    if "norm.weight" not in ours and "classifier.norm.weight" in translated.state:
        if taps_only:
            absent = {"norm.weight", "norm.bias"}  # never read: taps come before it
        else:
            problems.append(
                "a fine-tuned file: it normalises pooled tokens (fc_norm) and has no norm of single tokens, so its "
                "final features are not an encoder's; it can serve as a teacher, or take the pre-trained file"
            )
            absent = {"norm.weight", "norm.bias"}
    fill(encoder, ours, translated.unknown, absent, problems, f"weights {name} ({translated.layout})", field)


def load_student_weights(student: Student, url: str) -> None:
    """Load a whole student (pre-training files of AMD, VideoMAE, MAE, Hugging Face, or ours), in place.

    Official AMD files hold no generator mask tokens; those keep their random start, as on every official resume.
    Raises ConfigError.
    """
    load_student_state(student, read_state(url), url)


def load_student_state(student: Student, state: State, name: str) -> None:
    """The same from a state dict in memory."""
    translated = translated_state(state, name)
    ours = {key: tensor for key, tensor in translated.state.items() if not key.startswith("classifier.")}
    problems = _check_table(student.encoder, ours, "encoder.positions")
    if student.decoder is not None:
        problems += _check_table(student.decoder, ours, "decoder.positions")
    tokens = {key for key in student.state_dict() if re.fullmatch(r"generators\.\d+\.mask_token", key)}
    absent = tokens - set(ours)
    if absent:
        logger.info("%s has no generator mask tokens (official files never do); they start at random", name)
    fill(student, ours, translated.unknown, absent, problems, f"weights {name} ({translated.layout})", "student")


def _take_positions(encoder: Encoder, state: State, table: Tensor, taps_only: bool, field: str) -> list[str]:
    """Compare the file's position table with ours, or take it if it is learned and may be."""
    table = table[0].float() if table.ndim == 3 else table.float()  # ([1 +] N, D)
    ours = encoder.positions
    if table.shape[0] == ours.shape[0] + 1 and table.shape[1] == ours.shape[1]:
        if "class_token" in state:  # the class token and its position are only ever added; MAE's position is zero
            state["class_token"] = state["class_token"] + table[0].to(state["class_token"].dtype)
        table = table[1:]
    if encoder.config.positions == "learned" and table.shape == ours.shape:
        state["positions"] = table
        return []
    problems = _differences(ours, table, f"{field}.positions", "clip.size and clip.patch")
    if not problems or table.shape != ours.shape:
        return problems
    if kind := fixed_kind(table, encoder.grid, encoder.config.position_base):
        return [f"its positions are {kind}, not {encoder.config.positions}: set {field}.positions={kind}"]
    if not taps_only:
        return [
            f"its positions are learned, and {field}.positions={encoder.config.positions} are fixed: set "
            f"{field}.positions=learned"
        ]
    logger.info("the teacher's positions are learned; they replace %s", encoder.config.positions)
    encoder.positions.copy_(table)
    return []


def _check_table(module: Encoder | Predictor, state: State, key: str) -> list[str]:
    """Take a position table out of `state` and say how it differs from the module's."""
    if isinstance(module, Encoder) and module.config.positions == "learned":
        return []  # a parameter like others
    table = state.pop(key, None)
    if table is None:
        return []
    table = table[0] if table.ndim == 3 else table  # ([1 +] N, D)
    if len(table) == len(module.positions) + 1:
        if table[0].any():
            return [f"{key}: the class token has a learned position, and an encoder here has fixed ones"]
        table = table[1:]
    return _differences(module.positions, table, key, "student.encoder.positions, clip.size and clip.patch")


def _differences(ours: Tensor, table: Tensor, name: str, field: str) -> list[str]:
    if table.shape != ours.shape:
        return [f"{name}: the file has {_shape(table)}, here it is {_shape(ours)} (tokens, width): look at {field}"]
    if not table.any():
        # A ViTMAE made afresh by transformers 5 is in this state; published files are not.
        return [f"{name}: the file's table is all zeros, it was never filled; fill it before saving"]
    off = float((ours.float() - table.float()).abs().max())
    return [f"{name}: the file's table is another one (by up to {off:.2g})"] if off > TABLE_TOLERANCE else []


def fill(
    module: nn.Module,
    state: State,
    unknown: Iterable[str],
    absent: set[str],
    problems: list[str],
    what: str,
    field: str,
) -> None:
    """Copy `state` into `module`, or raise ConfigError with everything that does not fit. `absent` may be missing."""
    own = module.state_dict()
    missing = sorted(set(own) - set(state) - absent)
    unexpected = sorted({*(set(state) - set(own)), *unknown})
    other = [key for key in own if key in state and state[key].shape != own[key].shape]
    problems = list(problems)
    if other:
        shapes = ", ".join(f"{key} {_shape(state[key])} in the file, {_shape(own[key])} here" for key in other[:3])
        more = f" and {len(other) - 3} more" if len(other) > 3 else ""
        fields = ", ".join(_fields(other, state, own, field))
        problems.append(f"weights of another architecture: {shapes}{more}; look at {fields}")
    if missing:
        problems.append(f"missing {len(missing)}: {listed(missing)}{_hint(missing, field, 'fewer')}")
    if unexpected:
        problems.append(f"unexpected {len(unexpected)}: {listed(unexpected)}{_hint(unexpected, field, 'more')}")
    if problems:
        raise ConfigError([f"{what}: {problem}" for problem in problems])
    with torch.no_grad():
        for key, tensor in own.items():  # state_dict shares memory with the parameters
            if key in state:
                tensor.copy_(state[key])


def _fields(keys: list[str], theirs: State, ours: Mapping[str, Tensor], field: str) -> list[str]:
    """The config fields that decide the shapes of `keys`; biases and norms follow the matrices."""
    matrices = [key for key in keys if ours[key].ndim == 2] or keys
    return sorted({_field(key, theirs[key].shape, ours[key].shape, field) for key in matrices})


def _field(key: str, theirs: torch.Size, ours: torch.Size, field: str) -> str:
    half = len(theirs) == 2 and (theirs[0] == ours[0]) != (theirs[-1] == ours[-1])  # one side fits
    if half and (key.endswith("head.weight") or (key.endswith("patch_embed.weight") and theirs[0] == ours[0])):
        return "clip.patch and clip.tubelet"
    encoder = "student.encoder" if field == "student" else field
    if half and ".mlp." in key:
        return f"{encoder}.mlp_ratio"
    if key.startswith(("projections.", "generators.")):
        return "teacher.encoder.width"
    return "student.decoder.width" if key.startswith("decoder.") else f"{encoder}.width"


def _hint(keys: list[str], field: str, count: str) -> str:
    if all(re.search(r"(^|\.)blocks\.\d+\.", key) for key in keys):
        blocks = len({match[1] for key in keys if (match := re.search(r"(?:^|\.)blocks\.(\d+)\.", key))})
        return f" (the file has {blocks} block{'s' * (blocks != 1)} {count} than {field}.depth says)"
    if any(key.endswith("class_token") for key in keys):
        return f" (set {field}.class_token={'false' if count == 'fewer' else 'true'})"
    return ""


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "scalar"
