"""The `alignment` space: layer pairs, alignment branches, loss weights and distance.

Layer pairs are fractions of depth, so they suit encoders of any depth. A weight applies only if its branch is enabled.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any, get_args

from amd.config import ConfigError, Distance, LossWeights, TargetNorm, TrainConfig
from tune_spaces.config import Dimension
from tune_spaces.spaces.parameter import Parameter

THIRD, TWO_THIRDS = 1 / 3, 2 / 3

LAYERS: dict[str, tuple[tuple[float, float], ...]] = {
    "last": ((1, 1),),
    "middle": ((0.5, 0.5),),
    "middle+last": ((0.5, 0.5), (1, 1)),
    "thirds": ((THIRD, THIRD), (TWO_THIRDS, TWO_THIRDS), (1, 1)),
    "quarters": ((0.25, 0.25), (0.5, 0.5), (0.75, 0.75), (1, 1)),
    "last to 3/4": ((1, 0.75),),
    "middle+last to 1/3+1/2": ((0.5, THIRD), (1, 0.5)),
}
"""Pairs (student, teacher) as fractions of depth. `A to B`: student blocks A align with earlier teacher blocks B."""
BASE_LAYERS = "base"
"""Name of the layer pairs of the base config."""
BRANCHES = ("direct", "generation", "both")

PARAMETERS = {
    "alignment.layers": Parameter(("objective.layers",), lambda config: current_layers(config)),
    "alignment.branches": Parameter(
        ("objective.weights.direct", "objective.weights.generation"),
        lambda config: branches_of(config.objective.weights),
    ),
    "alignment.direct_weight": Parameter(
        ("objective.weights.direct",), lambda config: config.objective.weights.direct or _weight(config)
    ),
    "alignment.generation_weight": Parameter(
        ("objective.weights.generation",), lambda config: config.objective.weights.generation or _weight(config)
    ),
}


def dimensions(base: TrainConfig) -> dict[str, Dimension]:
    weights = {
        name: Dimension(low=PARAMETERS[name].current(base) / 10, high=PARAMETERS[name].current(base) * 10, log=True)
        for name in ("alignment.direct_weight", "alignment.generation_weight")
    }
    return {
        "alignment.layers": Dimension(choices=layer_sets(base)),
        "alignment.branches": Dimension(choices=BRANCHES),
        **weights,
        "objective.distance": Dimension(choices=get_args(Distance)),
        "objective.target_norm": Dimension(choices=get_args(TargetNorm)),
    }


def layer_sets(base: TrainConfig) -> tuple[str, ...]:
    """Return the names of the layer sets that differ at the depths of `base`, including the set that `base` uses."""
    by_pairs: dict[tuple[tuple[int, int], ...], str] = {}
    for name in (current_layers(base), *LAYERS):
        by_pairs.setdefault(tuple(_pairs(name, base)), name)
    return (*by_pairs.values(),)


def current_layers(base: TrainConfig) -> str:
    """Return the name of the base's layer pairs, or `base` if no named set matches."""
    current = _pairs(BASE_LAYERS, base)
    return next((name for name in LAYERS if _pairs(name, base) == current), BASE_LAYERS)


def branches_of(weights: LossWeights) -> str:
    if weights.direct and weights.generation:
        return "both"
    return "generation" if weights.generation else "direct"


def overrides(point: Mapping[str, Any], config: TrainConfig) -> dict[str, Any]:
    """Return the alignment overrides for a point.

    `config` must already include the point's masks, because there is no generation alignment without teacher-only
    tokens. Raises ConfigError for invalid values.
    """
    found: dict[str, Any] = {}
    if config.teacher is None or config.objective.kind != "amd":
        return found  # removed by a custom dimension; config validation reports that
    if "alignment.layers" in point:
        pairs = _pairs(point["alignment.layers"], config)
        if pairs != _pairs(BASE_LAYERS, config):  # equal pairs keep the config's order
            found["objective.layers"] = [{"student": student, "teacher": teacher} for student, teacher in pairs]
    return found | _weights(point, config)


def _weights(point: Mapping[str, Any], config: TrainConfig) -> dict[str, Any]:
    """Return the weights of both branches.

    If the teacher sees no more than the student, only direct alignment exists: it is used for every value of
    `alignment.branches`, and the generation weight stays unchanged, so that identical runs have identical configs.
    """
    chosen = {name for name in PARAMETERS if name in point and name != "alignment.layers"}
    branches = point.get("alignment.branches", branches_of(config.objective.weights))
    if branches not in BRANCHES:
        raise ConfigError([f"alignment.branches={branches!r}: must be one of {', '.join(BRANCHES)}"])
    direct, generation = (
        point.get(f"alignment.{branch}_weight", PARAMETERS[f"alignment.{branch}_weight"].current(config))
        for branch in ("direct", "generation")
    )
    if config.teacher_hidden_cells >= config.student_hidden_cells:
        missing = not config.objective.weights.direct and "objective.weights.direct" not in point
        return {"objective.weights.direct": direct} if chosen or missing else {}
    if not chosen:
        return {}
    return {
        "objective.weights.direct": direct if branches != "generation" else 0.0,
        "objective.weights.generation": generation if branches != "direct" else 0.0,
    }


def _weight(config: TrainConfig) -> float:
    """Return the weight of the enabled branch in `config`, which is also the default weight of the disabled branch."""
    return config.objective.weights.direct or config.objective.weights.generation or 1.0


def _pairs(chosen: Any, config: TrainConfig) -> list[tuple[int, int]]:
    """Return pairs of blocks (student, teacher), ascending, one per student block.

    In shallow encoders several fractions can map to one student block; the pair with the deepest teacher block wins.
    Without reconstruction the student's last block would get no gradient, so it is aligned with the teacher's last
    block.
    """
    if chosen == BASE_LAYERS:
        return sorted((pair.student, pair.teacher) for pair in config.objective.layers)
    assert config.teacher is not None, "a sweep has a teacher"
    depths = config.student.encoder.depth, config.teacher.encoder.depth
    pairs = {_block(student, depths[0]): _block(teacher, depths[1]) for student, teacher in _fractions(chosen)}
    if not config.objective.weights.reconstruction:
        pairs.setdefault(*depths)
    return sorted(pairs.items())


def _block(fraction: float, depth: int) -> int:
    """Return the block at a fraction of depth, numbered from 1, rounding halves up."""
    return max(1, int(fraction * depth + 0.5))


def _fractions(chosen: Any) -> list[tuple[float, float]]:
    if isinstance(chosen, str):
        if chosen not in LAYERS:
            close = difflib.get_close_matches(chosen, LAYERS, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"must be one of {', '.join([BASE_LAYERS, *LAYERS])}"
            raise ConfigError([f"alignment.layers={chosen!r}: unknown; {hint}"])
        return sorted(LAYERS[chosen])
    pairs = chosen if isinstance(chosen, list | tuple) else ()
    if not pairs or not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs):
        raise ConfigError(
            [
                f"alignment.layers={chosen!r}: must be a name ({', '.join([BASE_LAYERS, *LAYERS])}) or pairs "
                "[student, teacher] of fractions of depth, for example [[0.5, 0.5], [1, 1]]"
            ]
        )
    for number in (number for pair in pairs for number in pair):
        if isinstance(number, bool) or not isinstance(number, int | float) or not 0 < number <= 1:
            raise ConfigError(
                [f"alignment.layers={chosen!r}: {number!r} must be a fraction of depth, above 0 and at most 1"]
            )
    return sorted((student, teacher) for student, teacher in pairs)
