"""Every word of a sweep, one frozen tree like a run's: what is varied, how points are chosen, when a trial is stopped,
and what may be spent. Torch-free and Ray-free."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from amd.config import ConfigError, Section, TrainConfig, validate

SpaceName = Literal["masking", "alignment", "generator", "recipe"]
StudyName = Literal["asymmetry", "serial", "layers", "distance", "generator_depth", "reduction"]
Algorithm = Literal["grid", "random", "tpe", "pbt"]
Stopping = Literal["none", "asha", "hyperband"]
Metric = Literal["eval/knn_top1", "eval/knn_centred_top1", "eval/top1"]
Cost = Literal["teacher_gflops", "step_gflops"]

SHARE = 4  # of a population, one in so many is replaced and as many have children: Ray Tune's default
EARLIEST, LATEST = 0.2, 0.5  # of a trial's length, where the first rung is left to us
_EXPONENT = re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+")


def _number(value: Any) -> Any:
    """1e-3 as a number: YAML 1.1 reads it as text, and a JSON file may hold it."""
    if isinstance(value, list | tuple):
        return [_number(item) for item in value]
    return float(value) if isinstance(value, str) and _EXPONENT.fullmatch(value) else value


class Dimension(Section):
    """What one name of a space may be: one of `choices`, or a number from `low` to `high`."""

    choices: Annotated[tuple[Any, ...] | None, BeforeValidator(_number)] = Field(None, min_length=1)
    low: float | None = None
    high: float | None = None
    log: bool = False
    """Draw the logarithm evenly."""
    step: float | None = Field(None, gt=0)
    """Only low, low + step, …: what a grid needs of a range."""

    @model_validator(mode="after")
    def _one_form(self) -> Dimension:
        if self.choices is not None:
            if self.low is not None or self.high is not None or self.log or self.step is not None:
                raise ValueError("give choices, or low and high, not both")
            keys = [repr(choice) for choice in self.choices]
            if len(set(keys)) < len(keys):
                raise ValueError(f"choices={list(self.choices)} repeat; give each once")
            return self
        if self.low is None or self.high is None:
            raise ValueError("give choices: [a, b, …], or low and high")
        if not self.low < self.high:
            raise ValueError(f"low={self.low} must be below high={self.high}")
        if self.log and self.low <= 0:
            raise ValueError(f"low={self.low} must be above 0 where log=true")
        if self.log and self.step is not None:
            raise ValueError("step and log cannot be combined; list the values as choices")
        return self


def _named(values: object) -> object:
    """Dimensions from what a user writes. A dimension's rules do not know its name; here it is told."""
    if not isinstance(values, Mapping):
        return values
    made, problems = {}, []
    for name, value in values.items():
        try:
            made[name] = value if isinstance(value, Dimension) else _dimension(value)
        except ConfigError as error:
            problems += [f"dimensions.{name}: {line}" for line in error.problems]
    if problems:
        raise ValueError("\n".join(problems))
    return made


def _dimension(value: object) -> Dimension:
    if isinstance(value, list | tuple):
        return validate(Dimension, {"choices": value})
    if not isinstance(value, Mapping):
        raise ConfigError([f"{value!r} is no dimension; give choices: [a, b, …], or low and high"])
    return validate(Dimension, value)


class SpaceConfig(Section):
    """The union of named spaces and of dimensions of one's own; or a study: a few named variants, all of them run."""

    use: tuple[SpaceName, ...] = ()
    study: StudyName | None = None
    dimensions: Annotated[dict[str, Dimension], BeforeValidator(_named)] = Field(default_factory=dict)
    """By name: a word of the named spaces (masking.student_ratio, alignment.layers, …), or any key of a training
    config (optim.base_lr). A list is short for choices. A name that a used space has too replaces its dimension."""

    @model_validator(mode="after")
    def _something(self) -> SpaceConfig:
        if self.study is not None and (self.use or self.dimensions):
            raise ValueError("space.study is a space of its own; take space.use and space.dimensions out")
        if not (self.use or self.study or self.dimensions):
            raise ValueError("space: nothing is varied; give space.use, space.study or space.dimensions")
        if len(set(self.use)) < len(self.use):
            raise ValueError(f"space.use={list(self.use)} repeats; name each space once")
        return self


def changes_in_mid_run(name: str) -> bool:
    """Whether a run may go on with another value: it shapes neither networks nor batches."""
    return name.startswith(("recipe.", "optim.")) and name != "optim.batch_size"


class BudgetConfig(Section):
    """What ends a sweep; whichever is reached first. Trials that run then end at their next rung."""

    trials: int = Field(20, ge=1)
    """Points tried, the paper's default among them; for pbt the population, whose members live side by side."""
    hours: float | None = Field(None, gt=0)
    """Wall time, over restarts."""
    clips: int | None = Field(None, ge=1)
    """Clips learnt from, by all trials and seeds together."""


class SearchConfig(Section):
    """One sweep, complete."""

    train: TrainConfig
    """The run that trials vary. Its section `probe` says on which labelled data they are compared: required, but for
    demo data, which brings a split for choosing settings."""
    space: SpaceConfig
    algorithm: Algorithm = "random"
    """grid: every point. random. tpe: Optuna's. pbt: population based training, for the space `recipe`: at each rung
    the worst quarter makes room for children of the best, which go on from their parents' weights."""
    stopping: Stopping = "asha"
    """asha: a trial that is worse at a rung than the best of those before it (1 in `reduction`) ends there.
    hyperband: the same, some trials starting from later rungs. none: every trial runs to its end."""
    rungs: int = Field(3, ge=1, le=10)
    """How often a trial is probed: at its end, at 1/reduction of its length, 1/reduction², …, closer together where
    `first_rung` is later than that; evenly spaced for pbt."""
    reduction: int = Field(3, ge=2, le=10)
    first_rung: float | None = Field(None, gt=0, lt=1)
    """How far a trial has come, of 1, when it may first be stopped. None: no earlier than a fifth of its length, and
    twice its warm-up: before that the learning rate has hardly been at work, and ASHA would decide nearly by lot."""
    metric: Metric = "eval/knn_top1"
    """What is maximised: a figure of the probe. Never a loss: losses of different mask ratios cannot be compared."""
    against: Cost | None = None
    """A cost to minimise at the same time (tpe): GFLOP of the teacher or of the whole step for each clip."""
    seeds: int = Field(1, ge=1, le=100)
    """Runs of each trial, with the seeds train.seed, train.seed + 1, …; the mean of their figures is compared."""
    at_once: int | None = Field(None, ge=1)
    """Trials side by side; none: as many as the cluster has room for."""
    budget: BudgetConfig = BudgetConfig()
    retries: int = Field(2, ge=0)
    """Times a trial whose processes were lost is begun again from its newest checkpoints."""
    storage: str | None = None
    """Root of runs and encoders; none: train.storage, else the environment's AMD_STORAGE."""
    name: str | None = Field(None, pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,79}$")
    """The sweep's id. The same name with the same config continues the sweep."""
    seed: int = Field(0, ge=0, lt=2**31)
    """Of the search; a run's own seed is train.seed."""

    @model_validator(mode="before")
    @classmethod
    def _defaults(cls, values: Any) -> Any:
        """A study runs all its variants to their end; a population has no other way to end its worst."""
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
            problems.append("train.objective.kind=mae: a sweep varies how a teacher is used; take a config with one")
        least, most = self.train.scaling.workers
        if least != most:
            problems.append(
                f"train.scaling.workers={[least, most]}: trials take a fixed number of workers, so that their speeds "
                "can be compared; give one number"
            )
        if self.against is not None and self.algorithm != "tpe":
            problems.append(f"against={self.against}: only algorithm=tpe searches two objectives")
        if self.against is not None and self.stopping != "none":
            problems.append(f"against={self.against}: two objectives have no order to stop by; set stopping=none")
        if self.algorithm == "pbt":
            problems += self._population_problems()
        if self.space.study and (self.algorithm != "grid" or self.stopping != "none"):
            problems.append("space.study runs all its variants to their end: take algorithm=grid, stopping=none")
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
        fixed += [f"space.dimensions.{name}" for name in self.space.dimensions if not changes_in_mid_run(name)]
        fixed += [f"space.study={self.space.study}"] * (self.space.study is not None)
        problems += [
            f"{what}: algorithm=pbt changes runs on their way, which only a recipe can bear; take space.use=[recipe] "
            "or dimensions of optim other than optim.batch_size"
            for what in fixed
        ]
        if self.rungs < 2:
            problems.append("rungs=1: algorithm=pbt replaces trials between rungs; take 2 or more")
        if self.seeds > 1:
            problems.append(f"seeds={self.seeds}: a child of algorithm=pbt goes on from one run; set seeds=1")
        if self.budget.trials < SHARE:
            problems.append(
                f"budget.trials={self.budget.trials}: is the population of algorithm=pbt, of which a quarter is "
                f"replaced at each rung; take {SHARE} or more"
            )
        return problems

    def fractions(self) -> tuple[float, ...]:
        """How far a trial has come at each rung, ascending to 1."""
        if self.algorithm == "pbt":
            return tuple((rung + 1) / self.rungs for rung in range(self.rungs))
        gaps = self.rungs - 1
        first = self.first_rung or max(float(self.reduction) ** -gaps, self._settled())
        return (*(first ** ((gaps - rung) / gaps) for rung in range(gaps)), 1.0)

    def _settled(self) -> float:
        """The least that a trial must have learnt before figures mean something."""
        schedule = self.train.schedule
        warmup = schedule.warmup_steps if schedule.epochs is None else schedule.warmup_epochs
        twice = 2 * (warmup or 0) / (schedule.epochs or schedule.steps or 1)
        return max(EARLIEST, min(twice, LATEST))

    def decides(self) -> dict[str, Any]:
        """What decides a sweep's points and figures: not its place, its name, its budget, or how many run at once."""
        means = {"storage", "name", "budget", "at_once", "retries", "train"}
        decides = {**self.model_dump(mode="json", exclude=means), "train": self.train.digest(), "probe": self._probe()}
        return decides | ({"budget.trials": self.budget.trials} if self.algorithm == "pbt" else {})

    def _probe(self) -> Any:
        return self.train.probe.model_dump(mode="json") if self.train.probe else None
