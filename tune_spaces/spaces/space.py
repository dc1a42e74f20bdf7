"""Search spaces: named spaces, studies and custom dimensions, and the mapping from points to configs.

A point assigns a value to each dimension. Points of named spaces are valid by construction. Imports neither torch
nor Ray.
"""

from __future__ import annotations

import difflib
import itertools
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from amd.config import ConfigError, TrainConfig, validate, with_overrides
from amd.presets.load import read_config_file
from tune_spaces.config import Dimension, SpaceConfig, SpaceName, StudyName
from tune_spaces.spaces import alignment, generator, masking, recipe
from tune_spaces.spaces.draft import config_keys, draft_config, is_key, value_at, value_problem
from tune_spaces.spaces.parameter import Parameter, Point, is_number, same
from tune_spaces.spaces.studies import STUDIES, VARIANT, variants

SPACES: dict[SpaceName, Callable[[TrainConfig], dict[str, Dimension]]] = {
    "masking": masking.dimensions,
    "alignment": alignment.dimensions,
    "generator": generator.dimensions,
    "recipe": recipe.dimensions,
}
PARAMETERS: dict[str, Parameter] = {
    **masking.PARAMETERS,
    **alignment.PARAMETERS,
    **generator.PARAMETERS,
    **recipe.PARAMETERS,
}
MAX_CHECKED_POINTS = 256  # points checked before a sweep starts


class Space(NamedTuple):
    """Dimensions by name, and the config they vary."""

    dimensions: dict[str, Dimension]
    base: TrainConfig


def read_space(text_or_url: str) -> SpaceConfig:
    """Parse a search space given as text.

    The text is a comma-separated list of space names ("masking,recipe"), the name of a study, or the path or fsspec URL
    of a YAML or JSON file with the fields of a space. Raises ConfigError for an unknown name, or for a file that cannot
    be read or contains no valid space.
    """
    names = [name.strip() for name in text_or_url.split(",")]
    known: list[str] = [*SPACES, *STUDIES]
    if names[0] in STUDIES and len(names) == 1:
        return validate(SpaceConfig, {"study": names[0]})
    if all(name in SPACES for name in names):
        return validate(SpaceConfig, {"use": names})
    if any(name in known for name in names) or not _is_file(text_or_url):
        raise ConfigError([_unknown_name(name, known) for name in names if name not in SPACES])
    values = read_config_file(text_or_url, "space", "the fields of a space (use, study, dimensions)")
    try:
        return validate(SpaceConfig, values)
    except ConfigError as error:
        raise ConfigError([line if line.startswith("space") else f"space.{line}" for line in error.problems]) from None


def _is_file(text: str) -> bool:
    return "/" in text or "\\" in text or text.lower().endswith((".yaml", ".yml", ".json"))


def _unknown_name(name: str, known: Sequence[str]) -> str:
    if name in STUDIES:
        return f"space={name}: a study defines its own space; use it without other spaces"
    close = difflib.get_close_matches(name, known, n=1)
    hint = (
        f"did you mean {close[0]}?"
        if close
        else f"the spaces are {', '.join(SPACES)}; the studies are {', '.join(STUDIES)}"
    )
    return f"space={name!r}: unknown; {hint} (a file must end in .yaml or .json)"


def build_space(config: SpaceConfig, base: TrainConfig) -> Space:
    """Build the search space for a base run.

    Raises ConfigError for unknown names or invalid values, or if the space contains fewer than two distinct runs.
    """
    if base.objective.kind != "amd":
        raise ConfigError(
            [
                "objective.kind=mae: this config has no teacher, but search spaces vary how a teacher is used; choose "
                "a config with a teacher"
            ]
        )
    if config.study is not None:
        space = _study(config.study, base)
    else:
        named = {name: dimension for use in config.use for name, dimension in SPACES[use](base).items()}
        space = Space({**named, **config.dimensions}, base)
        if problems := _problems(config, space):
            raise ConfigError(problems)
    _check_varied(config, space)
    return space


def _study(name: StudyName, base: TrainConfig) -> Space:
    """Build a study's space, dropping variants that produce the same config as an earlier one."""
    by_digest: dict[str, str] = {}
    points = STUDIES[name](base)
    space = Space({VARIANT: Dimension(choices=tuple(points))}, base)
    for variant in points:
        by_digest.setdefault(config_of(space, {VARIANT: variant}).digest(), variant)
    return Space({VARIANT: Dimension(choices=tuple(by_digest.values()))}, base)


def overrides_of(space: Space, point: Mapping[str, Any]) -> dict[str, Any]:
    """Return the overrides that turn the base config into a point's config, sorted by key; empty for the base point.

    Parameters missing from the point keep the base's values. Raises ConfigError for invalid values.
    """
    base = space.base
    if VARIANT in point:
        return overrides_of(space, _variant(point[VARIANT], base))
    found = {name: value for name, value in point.items() if name not in PARAMETERS and name not in masking.CONFIG_KEYS}
    plain = draft_config(base, found)
    found |= masking.overrides(point, plain)
    found |= alignment.overrides(point, draft_config(base, found))
    found |= generator.overrides(point, draft_config(base, found), base)
    found |= recipe.overrides(point, plain)
    before, after = base.model_dump(mode="json"), draft_config(base, found).model_dump(mode="json")
    return {key: value_at(after, key) for key in sorted(found) if value_at(after, key) != value_at(before, key)}


def _variant(name: str, base: TrainConfig) -> Point:
    known = variants(base)
    if name not in known:
        raise ConfigError([f"variant={name!r}: unknown; must be one of {', '.join(known)}"])
    return known[name]


def config_of(space: Space, point: Mapping[str, Any]) -> TrainConfig:
    """Return the config of a point. Raises ConfigError for an invalid point, which can occur only with custom
    dimensions."""
    return with_overrides(space.base, overrides_of(space, point))


def baseline(space: Space) -> Point | None:
    """Return the point that equals the base config, or None if the space does not contain it."""
    point: Point = {}
    for name, dimension in space.dimensions.items():
        current = _current_value(name, space.base)
        for value in (current, *values_of(dimension)):
            if contains(dimension, value) and not _changes(space, {name: value}):
                point[name] = value
                break
        else:
            return None
    return None if _changes(space, point) else point


def config_keys_of(name: str) -> tuple[str, ...]:
    """Return the config keys that a dimension sets."""
    return PARAMETERS[name].keys if name in PARAMETERS else (name,)


def _current_value(name: str, base: TrainConfig) -> Any:
    return PARAMETERS[name].current(base) if name in PARAMETERS else value_at(base.model_dump(mode="json"), name)


def _changes(space: Space, point: Point) -> bool:
    try:
        return bool(overrides_of(space, point))
    except ConfigError:
        return True


def values_of(dimension: Dimension) -> tuple[Any, ...]:
    """Return all values in order; empty for a range without a step."""
    if dimension.choices is not None:
        return dimension.choices
    (low, high), step = _bounds(dimension), dimension.step
    if step is None:
        return ()
    count = math.floor((high - low) / step + 1e-9) + 1
    return tuple(round(low + number * step, 12) for number in range(count))  # 0.1 + 2 x 0.1 is 0.3


def index_of(dimension: Dimension, value: Any) -> int | None:
    """Return the index of a value in a dimension, or None if the dimension does not contain it."""
    if dimension.choices is None and not is_number(value):
        return None
    equal = same if dimension.choices is not None else lambda other, value: other == value  # 1 equals 1.0
    return next((index for index, other in enumerate(values_of(dimension)) if equal(other, value)), None)


def contains(dimension: Dimension, value: Any) -> bool:
    """Whether a dimension includes a value."""
    if values_of(dimension):
        return index_of(dimension, value) is not None
    low, high = _bounds(dimension)
    return is_number(value) and low <= value <= high


def _bounds(dimension: Dimension) -> tuple[float, float]:
    assert dimension.low is not None, "validated: a range has both bounds"
    assert dimension.high is not None, "validated: a range has both bounds"
    return dimension.low, dimension.high


def grid(space: Space) -> Iterator[Point]:
    """Iterate over all points; the last dimension varies fastest. Raises ConfigError for a range without a step."""
    continuous = [name for name, dimension in space.dimensions.items() if not values_of(dimension)]
    if continuous:
        raise ConfigError(
            [f"space.dimensions.{name}: a range without a step has no grid; set step or choices" for name in continuous]
        )
    values = [values_of(dimension) for dimension in space.dimensions.values()]
    return (dict(zip(space.dimensions, chosen, strict=True)) for chosen in itertools.product(*values))


def grid_size(space: Space) -> int | None:
    """Return the number of grid points, or None if a range has no step. Several points may produce the same config."""
    counts = [len(values_of(dimension)) for dimension in space.dimensions.values()]
    return math.prod(counts) or None


def sample_point(space: Space, rng: random.Random) -> Point:
    """Sample every dimension independently."""
    return {name: sample_value(dimension, rng) for name, dimension in space.dimensions.items()}


def sample_value(dimension: Dimension, rng: random.Random) -> Any:
    """Sample a value of a dimension, uniformly or log-uniformly."""
    if values := values_of(dimension):
        return rng.choice(values)
    low, high = _bounds(dimension)
    if dimension.log:
        return min(max(math.exp(rng.uniform(math.log(low), math.log(high))), low), high)
    return rng.uniform(low, high)


def _problems(config: SpaceConfig, space: Space) -> list[str]:
    """Return the problems with custom dimensions, individually and in combination."""
    problems = []
    for name, dimension in config.dimensions.items():
        where = f"space.dimensions.{name}"
        if name not in PARAMETERS and not is_key(name):
            problems.append(f"{where}: unknown{_suggestion(name)}")
        elif conflict := next((other for other in space.dimensions if _conflicts(name, other)), None):
            problems.append(f"{where}: sets the same config key as {conflict}; remove one of them")
        else:
            problems += _value_problems(name, dimension, space.base)
    return problems


def _suggestion(name: str) -> str:
    close = difflib.get_close_matches(name, [*PARAMETERS, *config_keys()], n=1)
    known = f"; must be one of {', '.join(PARAMETERS)} or a key of a training config (optim.base_lr)"
    return f"; did you mean {close[0]}?" if close else known


def _conflicts(name: str, other: str) -> bool:
    """Whether two dimensions set the same config key; parameters of named spaces are designed to combine."""
    if name == other or (name in PARAMETERS and other in PARAMETERS):
        return False
    keys, other_keys = config_keys_of(name), config_keys_of(other)
    if "recipe.lr_scale" in (name, other):
        return False  # it multiplies the values of other dimensions
    return any(f"{a}.".startswith(f"{b}.") or f"{b}.".startswith(f"{a}.") for a in keys for b in other_keys)


def _value_problems(name: str, dimension: Dimension, base: TrainConfig) -> list[str]:
    where, space = f"space.dimensions.{name}", Space({name: dimension}, base)
    for value in _representative_values(dimension):
        if name in PARAMETERS:
            try:
                overrides_of(space, {name: value})
            except ConfigError as error:
                return [f"{where}: {line}" for line in error.problems]
        elif reason := value_problem(name, value):
            remedy = "; set step=1, or choices" if "integer" in reason and dimension.choices is None else ""
            return [f"{where}={value!r}: {reason}{remedy}"]
    values = _representative_values(dimension)
    # A digest is None if the value is valid only in combination with others.
    digests = {_digest(base, name, value) for value in values}
    if name not in PARAMETERS and len(values) > 1 and digests == {base.digest()}:
        return [f"{where}: does not affect training; remove it, and set it in the run's config"]
    return []


def _representative_values(dimension: Dimension) -> tuple[Any, ...]:
    """Return all values, or for a range both bounds and a non-round value between them."""
    if values := values_of(dimension):
        return values[:MAX_CHECKED_POINTS]
    low, high = _bounds(dimension)
    return (low, low + (high - low) * (math.sqrt(5) - 1) / 2, high)


def _digest(base: TrainConfig, key: str, value: Any) -> str | None:
    try:
        return draft_config(base, {key: value}).digest()
    except ConfigError:
        return None


def _check_varied(config: SpaceConfig, space: Space) -> None:
    """Raise ConfigError unless the space contains at least two different valid runs."""
    points = grid_size(space)
    candidates: Iterator[Point] = grid(space) if points and points <= MAX_CHECKED_POINTS else _sampled_points(space)
    checked, first_error, digests = 0, "", set()
    for point in candidates:
        checked += 1
        try:
            digests.add(config_of(space, point).digest())
        except ConfigError as error:
            first_error = first_error or str(error)
        if len(digests) > 1:
            return
    if not digests:
        raise ConfigError([f"space: none of {checked} points is a valid config; first error: {first_error}"])
    subject = f"space.study={config.study}: its variants" if config.study else "space: its points"
    reason = "" if space.base.has_generation else " (this config has no generation alignment)"
    raise ConfigError([f"{subject} all produce the same run{reason}; vary a parameter that affects this config"])


def _sampled_points(space: Space) -> Iterator[Point]:
    rng = random.Random(0)
    return (sample_point(space, rng) for _ in range(MAX_CHECKED_POINTS))
