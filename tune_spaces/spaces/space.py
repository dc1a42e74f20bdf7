"""What a sweep varies: named spaces, studies and dimensions of one's own, and how their points become configs.

A point is a value for each dimension. Points of named spaces are valid by construction. Pure functions; knows nothing
of how points are chosen or run. No torch, no Ray.
"""

from __future__ import annotations

import difflib
import itertools
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from amd.config import ConfigError, TrainConfig, validate, with_overrides
from amd.presets.pretraining import read_config_file
from tune_spaces.config import Dimension, SpaceConfig, SpaceName, StudyName
from tune_spaces.spaces import alignment, generator, masking, recipe
from tune_spaces.spaces.draft import drafted, is_key, keys_of, look_up, wrong_value
from tune_spaces.spaces.parameter import Point, Word, same
from tune_spaces.spaces.studies import STUDIES, VARIANT, variants

SPACES: dict[SpaceName, Callable[[TrainConfig], dict[str, Dimension]]] = {
    "masking": masking.dimensions,
    "alignment": alignment.dimensions,
    "generator": generator.dimensions,
    "recipe": recipe.dimensions,
}
WORDS: dict[str, Word] = {**masking.WORDS, **alignment.WORDS, **generator.WORDS, **recipe.WORDS}
LOOKED_AT = 256  # points of a space, before it is begun


class Space(NamedTuple):
    dimensions: dict[str, Dimension]
    base: TrainConfig


def read_space(text_or_url: str) -> SpaceConfig:
    """Names of spaces with commas between ("masking,recipe"), the name of one study, or a YAML or JSON file with the
    fields of a space (path or fsspec URL). Raises ConfigError."""
    names = [name.strip() for name in text_or_url.split(",")]
    known: list[str] = [*SPACES, *STUDIES]
    if names[0] in STUDIES and len(names) == 1:
        return validate(SpaceConfig, {"study": names[0]})
    if all(name in SPACES for name in names):
        return validate(SpaceConfig, {"use": names})
    if any(name in known for name in names) or not _is_file(text_or_url):
        raise ConfigError([_unknown(name, known) for name in names if name not in SPACES])
    values = read_config_file(text_or_url, "space", "the fields use, study, dimensions of a space")
    try:
        return validate(SpaceConfig, values)
    except ConfigError as error:
        raise ConfigError([line if line.startswith("space") else f"space.{line}" for line in error.problems]) from None


def _is_file(text: str) -> bool:
    return "/" in text or "\\" in text or text.lower().endswith((".yaml", ".yml", ".json"))


def _unknown(name: str, known: Sequence[str]) -> str:
    if name in STUDIES:
        return f"space={name}: a study is a space of its own; give it alone"
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]}?" if close else f"spaces are {', '.join(SPACES)}, studies {', '.join(STUDIES)}"
    return f"space={name!r}: unknown; {hint} (a file ends in .yaml or .json)"


def build_space(config: SpaceConfig, base: TrainConfig) -> Space:
    """The dimensions that a config names, for the run that is varied.

    Raises ConfigError for names and values that no config has, and where no point, or only one config, is left.
    """
    if base.objective.kind != "amd":
        raise ConfigError(["objective.kind=mae: a space varies how a teacher is used; take a config with a teacher"])
    if config.study is not None:
        space = _study(config.study, base)
    else:
        named = {name: dimension for use in config.use for name, dimension in SPACES[use](base).items()}
        space = Space({**named, **config.dimensions}, base)
        if problems := _problems(config, space):
            raise ConfigError(problems)
    _check_worth(config, space)
    return space


def _study(name: StudyName, base: TrainConfig) -> Space:
    """Variants that are the same run as one before them, or as the base, are left out."""
    by_digest: dict[str, str] = {}
    points = STUDIES[name](base)
    space = Space({VARIANT: Dimension(choices=tuple(points))}, base)
    for variant in points:
        by_digest.setdefault(config_of(space, {VARIANT: variant}).digest(), variant)
    return Space({VARIANT: Dimension(choices=tuple(by_digest.values()))}, base)


def overrides_of(space: Space, point: Mapping[str, Any]) -> dict[str, Any]:
    """What a point changes in the base config, dotted keys in order; empty where it is the base. Words left out are
    as the base has them. Raises ConfigError for a value that none may have."""
    base = space.base
    if VARIANT in point:
        return overrides_of(space, _variant(point[VARIANT], base))
    found = {name: value for name, value in point.items() if name not in WORDS and name not in masking.KEYS}
    plain = drafted(base, found)
    found |= masking.overrides(point, plain)
    found |= alignment.overrides(point, drafted(base, found))
    found |= generator.overrides(point, drafted(base, found), base)
    found |= recipe.overrides(point, plain)
    before, after = base.model_dump(mode="json"), drafted(base, found).model_dump(mode="json")
    return {key: look_up(after, key) for key in sorted(found) if look_up(after, key) != look_up(before, key)}


def _variant(name: str, base: TrainConfig) -> Point:
    known = variants(base)
    if name not in known:
        raise ConfigError([f"variant={name!r}: unknown; there are {', '.join(known)}"])
    return known[name]


def config_of(space: Space, point: Mapping[str, Any]) -> TrainConfig:
    """Raises ConfigError where a point breaks a rule: only dimensions of one's own can."""
    return with_overrides(space.base, overrides_of(space, point))


def baseline(space: Space) -> Point | None:
    """The point that is the base config itself; None where the space has none."""
    point: Point = {}
    for name, dimension in space.dimensions.items():
        own = _own(name, space.base)
        for value in (own, *values_of(dimension)):
            if has(dimension, value) and not _changes(space, {name: value}):
                point[name] = value
                break
        else:
            return None
    return None if _changes(space, point) else point


def sets(name: str) -> tuple[str, ...]:
    """The keys of a config that a dimension decides."""
    return WORDS[name].sets if name in WORDS else (name,)


def _own(name: str, base: TrainConfig) -> Any:
    return WORDS[name].own(base) if name in WORDS else look_up(base.model_dump(mode="json"), name)


def _changes(space: Space, point: Point) -> bool:
    try:
        return bool(overrides_of(space, point))
    except ConfigError:
        return True


def values_of(dimension: Dimension) -> tuple[Any, ...]:
    """All values in order; empty for a range without step."""
    if dimension.choices is not None:
        return dimension.choices
    (low, high), step = _ends(dimension), dimension.step
    if step is None:
        return ()
    count = math.floor((high - low) / step + 1e-9) + 1
    return tuple(round(low + number * step, 12) for number in range(count))  # 0.1 + 2 x 0.1 is 0.3


def place(dimension: Dimension, value: Any) -> int | None:
    """Where a value stands among those of a dimension; None where it does not."""
    if dimension.choices is None and not _is_number(value):
        return None
    alike = same if dimension.choices is not None else lambda other, value: other == value  # 1 and 1.0 are one number
    return next((at for at, other in enumerate(values_of(dimension)) if alike(other, value)), None)


def has(dimension: Dimension, value: Any) -> bool:
    if values_of(dimension):
        return place(dimension, value) is not None
    low, high = _ends(dimension)
    return _is_number(value) and low <= value <= high


def _ends(dimension: Dimension) -> tuple[float, float]:
    assert dimension.low is not None, "validated: a range has both ends"
    assert dimension.high is not None, "validated: a range has both ends"
    return dimension.low, dimension.high


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def grid(space: Space) -> Iterator[Point]:
    """All points in order, the last dimension fastest. Raises ConfigError for a range without step."""
    endless = [name for name, dimension in space.dimensions.items() if not values_of(dimension)]
    if endless:
        raise ConfigError(
            [f"space.dimensions.{name}: a range has no end of values; give step, or choices" for name in endless]
        )
    values = [values_of(dimension) for dimension in space.dimensions.values()]
    return (dict(zip(space.dimensions, chosen, strict=True)) for chosen in itertools.product(*values))


def size(space: Space) -> int | None:
    """Points of the grid, of which several may be one config; None where a range has no step."""
    counts = [len(values_of(dimension)) for dimension in space.dimensions.values()]
    return math.prod(counts) or None


def draw(space: Space, numbers: random.Random) -> Point:
    """A point at random, every dimension by itself."""
    return {name: drawn(dimension, numbers) for name, dimension in space.dimensions.items()}


def drawn(dimension: Dimension, numbers: random.Random) -> Any:
    if values := values_of(dimension):
        return numbers.choice(values)
    low, high = _ends(dimension)
    if dimension.log:
        return min(max(math.exp(numbers.uniform(math.log(low), math.log(high))), low), high)
    return numbers.uniform(low, high)


def _problems(config: SpaceConfig, space: Space) -> list[str]:
    """Of dimensions of one's own, each by itself and against the others."""
    problems = []
    for name, dimension in config.dimensions.items():
        where = f"space.dimensions.{name}"
        if name not in WORDS and not is_key(name):
            problems.append(f"{where}: unknown{_meant(name)}")
        elif rival := next((other for other in space.dimensions if _rivals(name, other)), None):
            problems.append(f"{where}: sets the same as {rival}; take one of them out")
        else:
            problems += _wrong_values(name, dimension, space.base)
    return problems


def _meant(name: str) -> str:
    close = difflib.get_close_matches(name, [*WORDS, *keys_of()], n=1)
    words = f"; words are {', '.join(WORDS)}, and every key of a training config is one (optim.base_lr)"
    return f"; did you mean {close[0]}?" if close else words


def _rivals(name: str, other: str) -> bool:
    """Whether two dimensions set the same key; words of one space know of each other."""
    if name == other or (name in WORDS and other in WORDS):
        return False
    mine, theirs = sets(name), sets(other)
    if "recipe.lr_scale" in (name, other):
        return False  # it multiplies what the others set
    return any(f"{a}.".startswith(f"{b}.") or f"{b}.".startswith(f"{a}.") for a in mine for b in theirs)


def _wrong_values(name: str, dimension: Dimension, base: TrainConfig) -> list[str]:
    where, space = f"space.dimensions.{name}", Space({name: dimension}, base)
    for value in _typical(dimension):
        if name in WORDS:
            try:
                overrides_of(space, {name: value})
            except ConfigError as error:
                return [f"{where}: {line}" for line in error.problems]
        elif reason := wrong_value(name, value):
            whole = "; give step=1, or choices" if "integer" in reason and dimension.choices is None else ""
            return [f"{where}={value!r}: {reason}{whole}"]
    digests = {_digest(base, name, value) for value in _typical(dimension)}  # None: only other values make it valid
    if name not in WORDS and len(_typical(dimension)) > 1 and digests == {base.digest()}:
        return [f"{where}: decides nothing of what is learnt; take it out, and give it in the run's config"]
    return []


def _typical(dimension: Dimension) -> tuple[Any, ...]:
    """All values, or both ends of a range and one between, not a round one."""
    if values := values_of(dimension):
        return values[:LOOKED_AT]
    low, high = _ends(dimension)
    return (low, low + (high - low) * (math.sqrt(5) - 1) / 2, high)


def _digest(base: TrainConfig, key: str, value: Any) -> str | None:
    try:
        return drafted(base, {key: value}).digest()
    except ConfigError:
        return None


def _check_worth(config: SpaceConfig, space: Space) -> None:
    """Raise ConfigError where no point can be run, or all points are one run."""
    points = size(space)
    some: Iterator[Point] = grid(space) if points and points <= LOOKED_AT else _drawn_points(space)
    looked, first, digests = 0, "", set()
    for point in some:
        looked += 1
        try:
            digests.add(config_of(space, point).digest())
        except ConfigError as error:
            first = first or str(error)
        if len(digests) > 1:
            return
    if not digests:
        raise ConfigError([f"space: none of {looked} points is a valid config; the first says: {first}"])
    what = f"space.study={config.study}: its variants" if config.study else "space: its points"
    without = "" if space.base.has_generation else " (this config has no generation alignment)"
    raise ConfigError(
        [f"{what} are all the same run{without}; give a dimension two values that make a difference in this config"]
    )


def _drawn_points(space: Space) -> Iterator[Point]:
    numbers = random.Random(0)
    return (draw(space, numbers) for _ in range(LOOKED_AT))
