"""Load third-party weights strictly into our models: one error lists all missing, unexpected and mismatched tensors.

Defines which parts of a file are optional. The key tables are in `official` and `huggingface`.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from amd.config import ConfigError, TrainConfig, listed
from amd.exchange.layouts import State, Translated
from amd.exchange.positions import TABLE_TOLERANCE, fixed_kind
from amd.exchange.source import SHOWN, config_mismatches, open_source, translated_state
from amd.models.encoder import Encoder
from amd.models.predictor import Predictor
from amd.models.student import Student
from amd.models.teachers.frozen import Teacher
from amd.models.teachers.timm import TIMM

logger = logging.getLogger(__name__)


def load_teacher(config: TrainConfig) -> Teacher:
    """Load a run's frozen teacher from `teacher.weights`: a file, folder or URI, `timm:NAME`, or an encoder ID.

    Raises ConfigError if the weights are missing, unreadable or of a different architecture.
    """
    assert config.teacher is not None, "called only for configs with a teacher"
    assert config.teacher.weights is not None, "a teacher preset has been replaced by its weights"
    weights, clip, section = config.teacher.weights, config.clip, "teacher.encoder"
    if weights.startswith(TIMM) and not clip.is_image:
        raise ConfigError(
            [f"teacher.weights={weights}: timm teachers take images, but clip.frames={clip.frames}; set clip.frames=1"]
        )
    encoder = Encoder(config.teacher.encoder, clip.grid, clip.token_values)
    source = open_source(weights, config.storage, clip, field="teacher.weights")
    problems = config_mismatches(encoder.config, source, clip, section)
    problems += match_position_grid(encoder, source.position_grid, section)
    _fill_encoder(encoder, source.weights, str(source), problems, intermediates_only=True, section=section)
    return Teacher(encoder, tuple(pair.teacher for pair in config.objective.layers))


def match_position_grid(encoder: Encoder, origin: tuple[int, int] | None, section: str) -> list[str]:
    """Interpolate the 2-D position table, as MAE does, if the weights were trained with another grid (`origin`).

    Returns a list of problems: one mismatch if the config specifies a position grid other than `origin`, otherwise
    empty.
    """
    config, own = encoder.config, (encoder.grid.height, encoder.grid.width)
    if origin is None or config.positions != "sincos_2d" or origin == (config.position_grid or own):
        return []
    if config.position_grid is not None:
        return [f"its position table covers {origin[0]}x{origin[1]} tokens: set {section}.position_grid={list(origin)}"]
    encoder.interpolate_positions(origin)
    return []


def load_encoder_state(
    encoder: Encoder,
    state: State,
    name: str,
    *,
    intermediates_only: bool = False,
    field: str = "weights",
    section: str = "encoder",
) -> None:
    """Load an encoder from a state dict of any known layout, in place; `name` identifies its source in error messages.

    `intermediates_only`: also accept a fine-tuned state without a final norm, because a teacher's features are taken
    between blocks, and accept a learned position table, which then replaces ours.
    Parts after the encoder (decoder, projections, heads) are ignored.
    `field`, `section`: config field of the weights and config section of the encoder, for error messages.
    Raises ConfigError listing every mismatch.
    """
    translated = translated_state(state, name, field=field)
    _fill_encoder(encoder, translated, f"{field}={name}", [], intermediates_only=intermediates_only, section=section)


def _fill_encoder(
    encoder: Encoder,
    translated: Translated,
    source: str,
    problems: list[str],
    *,
    intermediates_only: bool,
    section: str,
) -> None:
    part = "encoder."
    ours = {key.removeprefix(part): tensor for key, tensor in translated.state.items() if key.startswith(part)}
    table = ours.pop("positions", None)
    problems += [] if table is None else _take_positions(encoder, ours, table, intermediates_only, section)
    absent: set[str] = set()
    if "norm.weight" not in ours and "classifier.norm.weight" in translated.state:
        if intermediates_only:
            absent = {"norm.weight", "norm.bias"}  # not used: intermediates are taken before the final norm
        else:
            problems.append(
                "a fine-tuned file: it normalises pooled tokens (fc_norm) instead of each token, so its final features "
                "differ from an encoder's; use it as a teacher, or load the pre-trained file"
            )
            absent = {"norm.weight", "norm.bias"}
    fill(encoder, ours, translated.unknown, absent, problems, f"{source} ({translated.layout})", section)


def load_student_state(student: Student, state: State, name: str, *, field: str = "weights") -> None:
    """Load a whole student from a pre-training state of AMD, VideoMAE, MAE, Hugging Face, or this package, in place.

    Official AMD files contain no generator mask tokens; these keep their random initialisation, as when the official
    code resumes.
    Raises ConfigError listing every mismatch.
    """
    translated = translated_state(state, name, field=field)
    ours = {key: tensor for key, tensor in translated.state.items() if not key.startswith("classifier.")}
    problems = _check_table(student.encoder, ours, "encoder.positions")
    if student.decoder is not None:
        problems += _check_table(student.decoder, ours, "decoder.positions")
    tokens = {key for key in student.state_dict() if re.fullmatch(r"generators\.\d+\.mask_token", key)}
    absent = tokens - set(ours)
    if absent:
        logger.info("%s has no generator mask tokens, like all official files; they are initialised at random", name)
    fill(student, ours, translated.unknown, absent, problems, f"{field}={name} ({translated.layout})", "student")


def _take_positions(encoder: Encoder, state: State, table: Tensor, intermediates_only: bool, section: str) -> list[str]:
    """Compare the file's position table with ours, or use it if learned position embeddings are accepted."""
    table = table[0].float() if table.ndim == 3 else table.float()  # ([1 +] N, D)
    ours = encoder.positions
    if table.shape[0] == ours.shape[0] + 1 and table.shape[1] == ours.shape[1]:
        if "class_token" in state:  # only the sum of the class token and its position is used; MAE's is 0
            state["class_token"] = state["class_token"] + table[0].to(state["class_token"].dtype)
        table = table[1:]
    if encoder.config.positions == "learned" and table.shape == ours.shape:
        state["positions"] = table
        return []
    problems = _differences(ours, table, f"{section}.positions", "clip.size and clip.patch")
    if not problems or table.shape != ours.shape:
        return problems
    if kind := fixed_kind(table, encoder.grid, encoder.config.position_base):
        return [f"its position embeddings are {kind}, not {encoder.config.positions}: set {section}.positions={kind}"]
    if not intermediates_only:
        return [
            f"its position embeddings are learned, but {section}.positions={encoder.config.positions} is a fixed "
            "table: set "
            f"{section}.positions=learned"
        ]
    logger.info("the teacher's position embeddings are learned; they replace %s", encoder.config.positions)
    encoder.positions.copy_(table)
    return []


def _check_table(module: Encoder | Predictor, state: State, key: str) -> list[str]:
    """Remove the position table from `state` and list how it differs from the module's."""
    if isinstance(module, Encoder) and module.config.positions == "learned":
        return []  # learned position embeddings are an ordinary parameter
    table = state.pop(key, None)
    if table is None:
        return []
    table = table[0] if table.ndim == 3 else table  # ([1 +] N, D)
    if len(table) == len(module.positions) + 1:
        if table[0].any():
            return [f"{key}: the class token has a learned position embedding, but this encoder uses fixed ones"]
        table = table[1:]
    return _differences(module.positions, table, key, "student.encoder.positions, clip.size and clip.patch")


def _differences(ours: Tensor, table: Tensor, name: str, remedy: str) -> list[str]:
    if table.shape != ours.shape:
        return [f"{name}: the file has {_shape(table)}, the config {_shape(ours)} (tokens, width); check {remedy}"]
    if not table.any():
        # This is the case for a newly created ViTMAE in transformers 5; published files are filled.
        return [f"{name}: the file's table is all zeros because it was never initialised; initialise it before saving"]
    off = float((ours.float() - table.float()).abs().max())
    return [f"{name}: the file's table differs by up to {off:.2g}"] if off > TABLE_TOLERANCE else []


def fill(
    module: nn.Module,
    state: State,
    unknown: Iterable[str],
    absent: set[str],
    problems: list[str],
    origin: str,
    section: str,
) -> None:
    """Copy `state` into `module`; keys in `absent` may be missing. Raises ConfigError that lists every mismatch.

    `origin`: field, value and layout of the weights, used as a prefix of every message. `section`: config section that
    describes the module.
    """
    own = module.state_dict()
    missing = sorted(set(own) - set(state) - absent)
    unexpected = sorted({*(set(state) - set(own)), *unknown})
    other = [key for key in own if key in state and state[key].shape != own[key].shape]
    problems = list(problems)
    if other:
        shapes = [f"{key} {_shape(state[key])} in the file, {_shape(own[key])} in the config" for key in other]
        fields = ", ".join(_fields(other, state, own, section))
        problems.append(f"weights of a different architecture: {listed(shapes, most=3)}; check {fields}")
    if missing:
        problems.append(f"missing {len(missing)}: {listed(missing, SHOWN)}{_hint(missing, section, 'fewer')}")
    if unexpected:
        problems.append(
            f"unexpected {len(unexpected)}: {listed(unexpected, SHOWN)}{_hint(unexpected, section, 'more')}"
        )
    if problems:
        raise ConfigError([f"{origin}: {problem}" for problem in problems])
    with torch.no_grad():
        for key, tensor in own.items():  # state_dict shares memory with the parameters
            if key in state:
                tensor.copy_(state[key])


def _fields(keys: list[str], theirs: State, ours: Mapping[str, Tensor], section: str) -> list[str]:
    """Return the config fields that determine the shapes of `keys`; if any are matrices, ignore biases and norms."""
    matrices = [key for key in keys if ours[key].ndim == 2] or keys
    return sorted({_field(key, theirs[key].shape, ours[key].shape, section) for key in matrices})


def _field(key: str, theirs: torch.Size, ours: torch.Size, section: str) -> str:
    half = len(theirs) == 2 and (theirs[0] == ours[0]) != (theirs[-1] == ours[-1])  # one dimension matches
    if half and (key.endswith("head.weight") or (key.endswith("patch_embed.weight") and theirs[0] == ours[0])):
        return "clip.patch and clip.tubelet"
    encoder = "student.encoder" if section == "student" else section
    if half and ".mlp." in key:
        return f"{encoder}.mlp_ratio"
    if key.startswith(("projections.", "generators.")):
        return "teacher.encoder.width"
    return "student.decoder.width" if key.startswith("decoder.") else f"{encoder}.width"


def _hint(keys: list[str], section: str, count: str) -> str:
    if all(re.search(r"(^|\.)blocks\.\d+\.", key) for key in keys):
        blocks = len({match[1] for key in keys if (match := re.search(r"(?:^|\.)blocks\.(\d+)\.", key))})
        return f" (the file has {blocks} block{'s' * (blocks != 1)} {count} than {section}.depth)"
    if any(key.endswith("class_token") for key in keys):
        return f" (set {section}.class_token={'false' if count == 'fewer' else 'true'})"
    return ""


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "scalar"
