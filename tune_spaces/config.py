"""Sweep configuration: search space, algorithm, early stopping and budget.

A frozen tree, like a run's config. Imports neither torch nor Ray.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from amd.config import ConfigError, Section, TrainConfig, validate
from amd.config.locations import KeyedByConfig, StorageLocation, check_fixed_fields
from amd.config.run import READER_FIELDS

SpaceName = Literal["masking", "alignment", "generator", "recipe"]
StudyName = Literal["asymmetry", "serial", "layers", "distance", "generator_depth", "reduction"]
Algorithm = Literal["grid", "random", "tpe", "pbt"]
Stopping = Literal["none", "asha", "hyperband"]
Metric = Literal["eval/knn_top1", "eval/knn_centred_top1", "eval/top1"]
Cost = Literal["teacher_gflops", "step_gflops"]

POPULATION_DIVISOR = 4  # a quarter is replaced by children of another quarter; Ray Tune's default
MIN_FIRST_RUNG, MAX_FIRST_RUNG = 0.2, 0.5  # as a fraction of a trial's length, when first_rung is unset
_EXPONENT = re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+")


def _parse_exponents(value: Any) -> Any:
    """Convert strings such as "1e-3" to floats: YAML 1.1 parses them as text, and a JSON file may contain them."""
    if isinstance(value, list | tuple):
        return [_parse_exponents(item) for item in value]
    return float(value) if isinstance(value, str) and _EXPONENT.fullmatch(value) else value


class Dimension(Section):
    """One dimension of a search space: either a list of choices, or a range of numbers from `low` to `high`."""

    choices: Annotated[tuple[Any, ...] | None, BeforeValidator(_parse_exponents)] = Field(None, min_length=1)
    low: float | None = None
    high: float | None = None
    log: bool = False
    """Whether to sample on a logarithmic scale."""
    step: float | None = Field(None, gt=0)
    """Spacing between values, starting at `low`. A range without a step cannot be used in a grid search."""

    @model_validator(mode="after")
    def _one_form(self) -> Dimension:
        if self.choices is not None:
            if self.low is not None or self.high is not None or self.log or self.step is not None:
                raise ValueError("choices cannot be combined with low and high; set one or the other")
            keys = [repr(choice) for choice in self.choices]
            if len(set(keys)) < len(keys):
                raise ValueError(f"choices={list(self.choices)} repeats a value; list each value once")
            return self
        if self.low is None or self.high is None:
            raise ValueError("set choices: [a, b, …], or low and high")
        if not self.low < self.high:
            raise ValueError(f"low={self.low} must be below high={self.high}")
        if self.log and self.low <= 0:
            raise ValueError(f"low={self.low} must be above 0 if log=true")
        if self.log and self.step is not None:
            raise ValueError("step and log cannot be combined; list the values as choices")
        return self


def _parse_dimensions(values: object) -> object:
    """Parse dimensions as written in the config; prefix each error with the dimension's name."""
    if not isinstance(values, Mapping):
        return values
    parsed, problems = {}, []
    for name, value in values.items():
        try:
            parsed[name] = value if isinstance(value, Dimension) else _parse_dimension(value)
        except ConfigError as error:
            problems += [f"dimensions.{name}: {line}" for line in error.problems]
    if problems:
        raise ValueError("\n".join(problems))
    return parsed


def _parse_dimension(value: object) -> Dimension:
    if isinstance(value, list | tuple):
        return validate(Dimension, {"choices": value})
    if not isinstance(value, Mapping):
        raise ConfigError([f"{value!r} is not a dimension; set choices: [a, b, …], or low and high"])
    return validate(Dimension, value)


class SpaceConfig(Section):
    """Search space: either named spaces and custom dimensions, or a study, which runs all of its variants."""

    use: tuple[SpaceName, ...] = ()
    """Named spaces to combine."""
    study: StudyName | None = None
    """Named study; cannot be combined with `use` or `dimensions`."""
    dimensions: Annotated[
        dict[str, Dimension], BeforeValidator(_parse_dimensions), KeyedByConfig(lambda: TrainConfig, choices=True)
    ] = Field(default_factory=dict)
    """Custom dimensions by name: a parameter of a named space (masking.student_ratio, alignment.layers, …) or any key
    of a training config (optim.base_lr). A list is shorthand for `choices`. A custom dimension replaces the dimension
    of the same name in a named space."""

    @field_validator("dimensions")
    @classmethod
    def _fixed(cls, dimensions: dict[str, Dimension]) -> dict[str, Dimension]:
        for name, dimension in dimensions.items():
            for choice in dimension.choices or (None,):
                check_fixed_fields(
                    TrainConfig,
                    "dimensions",
                    {name: choice},
                    "a sweep cannot vary where runs start and write (start, storage, output, tracking, name, caches); "
                    "remove the dimension, and set the field in the run's config",
                )
        return dimensions

    @model_validator(mode="after")
    def _not_empty(self) -> SpaceConfig:
        if self.study is not None and (self.use or self.dimensions):
            raise ValueError("space.study defines its own space; remove space.use and space.dimensions")
        if not (self.use or self.study or self.dimensions):
            raise ValueError("space: nothing varies; set space.use, space.study or space.dimensions")
        if len(set(self.use)) < len(self.use):
            raise ValueError(f"space.use={list(self.use)} repeats a space; list each once")
        return self


def can_change_mid_run(name: str) -> bool:
    """Whether a setting can change during a run, i.e. affects neither the models nor the batch size."""
    return name.startswith(("recipe.", "optim.")) and name != "optim.batch_size"


class BudgetConfig(Section):
    """Limits on a sweep. It ends when the first limit is reached; trials still running then stop at their next rung."""

    trials: int = Field(20, ge=1)
    """Maximum number of points to try, including the base config; for pbt, the population size."""
    hours: float | None = Field(None, gt=0)
    """Maximum wall time in hours, summed over restarts and excluding downtime."""
    clips: int | None = Field(None, ge=1)
    """Maximum number of training clips, summed over all trials and seeds."""
    gpu_hours: float | None = Field(None, gt=0)
    """Maximum GPU-hours: wall time times the number of GPUs that concurrent trials reserve. No limit without GPUs."""


class SearchConfig(Section):
    """Complete sweep configuration."""

    train: TrainConfig
    """Training config that trials vary. Its `probe` section defines the labelled data on which trials are compared;
    it is required, except for demo data, which includes a split for model selection."""
    space: SpaceConfig
    """Search space: parameters to vary, and their values."""
    algorithm: Algorithm = "random"
    """Search algorithm. grid: all points, in order. random: independent draws. tpe: Optuna's Tree-structured Parzen
    Estimator. pbt: population-based training over the `recipe` space; at each rung, children of the best trials replace
    the worst quarter and continue from their parents' weights."""
    stopping: Stopping = "asha"
    """Early stopping. asha: a trial stops at a rung unless it ranks in the top 1/`reduction` of the trials scored there
    so far. hyperband: the same rule, but some trials are first judged at a later rung. none: every trial runs to
    completion."""
    rungs: int = Field(3, ge=1, le=10)
    """Number of probes per trial: at its end, and after 1/`reduction`, 1/`reduction`², … of its length.
    The rungs are closer together if `first_rung` is later than the earliest of these, and evenly spaced for pbt."""
    reduction: int = Field(3, ge=2, le=10)
    """Reduction factor for early stopping: about one in this many trials continues past each rung."""
    first_rung: float | None = Field(None, gt=0, lt=1)
    """Position of the first rung, as a fraction of a trial's length. Default: a fifth, or twice the warm-up if that is
    longer, but at most half; earlier scores do not predict the final ranking."""
    metric: Metric = "eval/knn_top1"
    """Probe metric to maximise; never a loss, because losses at different mask ratios are not comparable."""
    against: Cost | None = None
    """Cost to minimise as a second objective (tpe only): GFLOPs per clip of the teacher or of the whole step."""
    seeds: int = Field(1, ge=1, le=100)
    """Number of runs per trial, with seeds train.seed, train.seed + 1, …; trials are compared by their mean score."""
    at_once: int | None = Field(None, ge=1)
    """Maximum number of concurrent trials. Default: as many as fit on the cluster."""
    budget: BudgetConfig = BudgetConfig()
    """Limits on trials, wall time and training clips."""
    retries: int = Field(2, ge=0)
    """Maximum number of times that a trial is restarted from its latest checkpoints after its processes are lost. A
    newer checkpoint resets the count."""
    storage: StorageLocation | None = None
    """Storage root for runs and encoders. Default: train.storage if set, else the environment variable AMD_STORAGE."""
    name: str | None = Field(None, pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,79}$")
    """ID of the sweep. Running a sweep again with the same name and config resumes it."""
    seed: int = Field(0, ge=0, lt=2**31)
    """Random seed for choosing points; training uses train.seed."""

    @model_validator(mode="before")
    @classmethod
    def _defaults(cls, values: Any) -> Any:
        """Set the defaults for studies, which run all variants to completion, and for pbt, which stops no trials."""
        if not isinstance(values, Mapping):
            return values
        space = values.get("space")
        study = space.get("study") if isinstance(space, Mapping) else getattr(space, "study", None)
        if study:
            return {"algorithm": "grid", "stopping": "none", "rungs": 1, **values}
        return {"stopping": "none", "rungs": 5, **values} if values.get("algorithm") == "pbt" else values

    @model_validator(mode="after")
    def _rules(self) -> SearchConfig:
        problems = []
        if self.train.objective.kind != "amd":
            problems.append(
                "train.objective.kind=mae: a sweep varies how a teacher is used; choose a config with a teacher"
            )
        minimum, maximum = self.train.scaling.workers
        if minimum != maximum:
            problems.append(
                f"train.scaling.workers={[minimum, maximum]}: trials need a fixed number of workers so that "
                "their speeds are comparable; set one number"
            )
        if self.against is not None and self.algorithm != "tpe":
            problems.append(
                f"against={self.against}: only algorithm=tpe supports two objectives; set algorithm=tpe or remove "
                "against"
            )
        if self.against is not None and self.stopping != "none":
            problems.append(
                f"against={self.against}: trials with two objectives cannot be ranked for early stopping; set "
                "stopping=none"
            )
        if self.algorithm == "pbt":
            problems += self._population_problems()
        if self.train.start is not None:
            problems.append(f"train.start={self.train.start}: sweep trials start from scratch; omit it")
        if self.space.study and (self.algorithm != "grid" or self.stopping != "none"):
            problems.append("space.study runs every variant to completion: set algorithm=grid, stopping=none")
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def _population_problems(self) -> list[str]:
        problems = []
        if self.stopping != "none":
            problems.append(
                f"stopping={self.stopping}: algorithm=pbt replaces its worst trials instead of stopping them; set "
                "stopping=none"
            )
        fixed = [f"space.use={[name]}" for name in self.space.use if name != "recipe"]
        fixed += [f"space.dimensions.{name}" for name in self.space.dimensions if not can_change_mid_run(name)]
        fixed += [f"space.study={self.space.study}"] * (self.space.study is not None)
        problems += [
            f"{field}: algorithm=pbt changes values during a run, which is possible only for a recipe; use "
            "space.use=[recipe] or dimensions of optim other than optim.batch_size"
            for field in fixed
        ]
        if self.rungs < 2:
            problems.append("rungs=1: algorithm=pbt replaces trials between rungs; set 2 or more")
        if self.seeds > 1:
            problems.append(f"seeds={self.seeds}: with algorithm=pbt, a child continues a single run; set seeds=1")
        if self.budget.trials < POPULATION_DIVISOR:
            problems.append(
                f"budget.trials={self.budget.trials}: with algorithm=pbt this is the population, a quarter of which is "
                f"replaced at each rung; set {POPULATION_DIVISOR} or more"
            )
        return problems

    def fractions(self) -> tuple[float, ...]:
        """Return the fraction of a trial's length at each rung, in ascending order, ending at 1."""
        if self.algorithm == "pbt":
            return tuple((rung + 1) / self.rungs for rung in range(self.rungs))
        gaps = self.rungs - 1
        first = self.first_rung or max(float(self.reduction) ** -gaps, self._default_first_rung())
        return (*(first ** ((gaps - rung) / gaps) for rung in range(gaps)), 1.0)

    def _default_first_rung(self) -> float:
        """Return the earliest fraction of a trial's length at which scores are informative."""
        schedule = self.train.schedule
        warmup = schedule.warmup_steps if schedule.epochs is None else schedule.warmup_epochs
        twice = 2 * (warmup or 0) / (schedule.epochs or schedule.steps or 1)
        return max(MIN_FIRST_RUNG, min(twice, MAX_FIRST_RUNG))

    def identity(self) -> dict[str, Any]:
        """Return the settings that determine points and scores; a sweep resumes only if they are unchanged.

        Storage, name, budget, retries and concurrency are excluded.
        """
        excluded = {"storage", "name", "budget", "at_once", "retries", "train"}
        probe = self.train.probe.model_dump(mode="json") if self.train.probe else None
        settings = {**self.model_dump(mode="json", exclude=excluded), "train": self.train.digest(), "probe": probe}
        return settings | ({"budget.trials": self.budget.trials} if self.algorithm == "pbt" else {})

    def differences(self, recorded: dict[str, Any]) -> list[str]:
        """Return the settings that differ from a recorded identity.

        Settings for reading samples are ignored: they do not affect scores, and their fields differ between versions.
        """
        ours, theirs = _without_reader_fields(self.identity()), _without_reader_fields(recorded)
        return sorted(key for key in ours if theirs.get(key) != ours[key])


def _without_reader_fields(identity: dict[str, Any]) -> dict[str, Any]:
    probe = identity.get("probe")
    if not probe:
        return identity
    data = {name: value for name, value in probe["data"].items() if name not in READER_FIELDS}
    return {**identity, "probe": {**probe, "data": data}}
