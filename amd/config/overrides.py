"""Validate plain values as configs, apply dotted overrides, and report validation errors with one line per problem.

Accesses neither files nor the command line; callers supply the values.
"""

from __future__ import annotations

import copy
import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from amd.config.locations import FixedFieldError
from amd.config.sections import EncoderSize, Section
from amd.config.training_sections import DataConfig


class ConfigError(ValueError):
    """Raised for an invalid config. `problems` has one line per broken rule, each naming the dotted field."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__(list(problems))  # plain arguments: the exception may cross Ray
        self.problems = list(problems)

    def __str__(self) -> str:
        return "\n".join(self.problems)


class LocationError(ConfigError):
    """Raised for a search dimension or teacher override that would change where a run writes."""

    def __init__(self, problems: Sequence[str], field: str) -> None:
        super().__init__(problems)
        self.field = field
        """Dotted field."""
        self.args = (self.problems, field)


S = TypeVar("S", bound=Section)


def validate(model: type[S], values: Mapping[str, Any]) -> S:
    """Build a config from plain values. Raises ConfigError with one line per problem, each naming the dotted field."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        lines = _lines(model, error)
        for problem in error.errors():
            if isinstance(cause := problem.get("ctx", {}).get("error"), FixedFieldError):
                raise LocationError(lines, ".".join([*map(str, problem["loc"][:-1]), cause.field])) from None
        raise ConfigError(lines) from None


def with_overrides(config: S, overrides: Mapping[str, Any]) -> S:
    """Return the config with dotted keys replaced: `with_overrides(config, {"mask.teacher_ratio": 0.6})`.

    Raises ConfigError if a key does not exist or the result breaks a rule.
    """
    return validate(type(config), overridden(config.model_dump(mode="json"), overrides))


def overridden(values: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return plain values with dotted keys replaced, without validation.

    Raises ConfigError if a key refers to a field inside a plain value.
    """
    result: dict[str, Any] = copy.deepcopy(dict(values))
    for key, value in {**_reset_alternatives(overrides), **overrides}.items():
        node: Any = result
        *parents, last = key.split(".")
        for depth, part in enumerate(parents):
            child = _step(node, part)
            if child is None:
                # An absent section (teacher=null) starts from its defaults; validation reports unknown names.
                if not isinstance(node, dict):
                    raise ConfigError([f"{key}: {'.'.join(parents[:depth])} has no field {part!r}"])
                child = node[part] = {}
            node = child
        if isinstance(node, list) and last.isdigit() and int(last) < len(node):
            node[int(last)] = value
        elif isinstance(node, dict):
            if key.endswith("encoder.size") and value is not None:
                for field in EncoderSize._fields:  # a named size sets these fields itself
                    if f"{key.removesuffix('size')}{field}" not in overrides:
                        node.pop(field, None)
            node[last] = value
        else:
            raise ConfigError([f"{key}: {'.'.join(parents)} is a value, not a section"])
    return result


def flatten(values: Mapping[str, Any]) -> dict[str, Any]:
    """Flatten nested sections to dotted keys; the inverse of `overridden`. Empty sections are preserved."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= {f"{key}.{name}": item for name, item in flatten(value).items()}
        else:
            flat[key] = value
    return flat


# Pairs of mutually exclusive fields: setting one resets the other.
_EXCLUSIVE = (
    ("teacher.weights", "teacher.preset"),
    ("schedule.epochs", "schedule.steps"),
    ("schedule.warmup_epochs", "schedule.warmup_steps"),
)


def _reset_alternatives(overrides: Mapping[str, Any]) -> dict[str, None]:
    return {
        other: None
        for pair in _EXCLUSIVE
        for chosen, other in (pair, pair[::-1])
        if overrides.get(chosen) is not None and other not in overrides
    }


def _step(node: Any, part: str) -> Any:
    if isinstance(node, dict):
        return node.get(part)
    if isinstance(node, list) and part.isdigit() and int(part) < len(node):
        return node[int(part)]
    return None


def parse_overrides(args: Sequence[str], example: str = "mask.teacher_ratio=0.6") -> dict[str, Any]:
    """Parse `["mask.teacher_ratio=0.6", "scaling.workers=[2,4]"]` into a dict.

    Values are parsed as YAML, except that 1e-3 is parsed as a number. Raises ConfigError, which shows `example`, for an
    argument that is not `key=value`.
    """
    overrides: dict[str, Any] = {}
    for arg in args:
        key, equals, text = arg.partition("=")
        if not equals or not key.strip():
            raise ConfigError([f"{arg!r} is not an override: use key=value, for example {example}"])
        overrides[key.strip()] = _value(text)
    return overrides


class _DataOnly(Section):
    data: DataConfig


def data_config(overrides: Mapping[str, Any]) -> DataConfig:
    """Build a DataConfig from `data=…` or `data.train=… data.crop=…`. Raises ConfigError, also for other keys."""
    values = {"data.train" if key == "data" else key: value for key, value in overrides.items()}
    unknown = [key for key in values if not key.startswith("data.")]
    if unknown:
        raise ConfigError([f"{key}: only data.… keys are accepted without --preset or --config" for key in unknown])
    if "data.train" not in values:
        raise ConfigError(["data: required, but not set; use data=<folder, list file or tar shards>"])
    return validate(_DataOnly, overridden({}, values)).data


def _value(text: str) -> Any:
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return text
    if isinstance(value, str):
        try:
            return float(value)  # YAML 1.1 reads 1e-3 as a string
        except ValueError:
            return text
    return text if value is None and text.strip() not in ("null", "~", "") else value


def listed(items: Sequence[object], most: int = 5) -> str:
    """Join the first few items for a message, followed by the number of omitted items."""
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(map(str, items[:most])) + more


def _lines(model: type[BaseModel], error: ValidationError) -> list[str]:
    lines: list[str] = []
    for problem in error.errors():
        where = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            lines.append(f"{where}: unknown key{_suggestion(model, problem['loc'])}")
        elif problem["type"] == "model_type" and (fields := _fields_at(model, problem["loc"])):
            lines.append(f"{where}={problem['input']!r}: is a section; {_field_of_section(where, fields, problem)}")
        elif problem["type"] == "missing":
            lines.append(f"{where}: {broken_rule(problem)}")
        elif problem["type"] == "value_error":
            text = str(problem["ctx"]["error"])
            # Rules name fields relative to their section; prefix the path of that section.
            prefix = ".".join(str(part) for part in problem["loc"][:-1])
            lines += [f"{prefix}.{line}" if prefix else line for line in text.split("\n")]
        else:
            lines.append(f"{where}={problem['input']!r}: {broken_rule(problem)}")
    return lines


def broken_rule(problem: Mapping[str, Any]) -> str:
    """Return the rule that a value breaks, such as `must be less than 1`, for a problem that pydantic found."""
    if problem["type"] == "missing":
        return "required, but not set"
    if problem["type"] == "extra_forbidden":
        return "unknown field"
    return re.sub(r"^\w+ should ", "must ", problem["msg"].removeprefix("Value error, "))


def _field_of_section(section: str, fields: Mapping[str, FieldInfo], problem: ErrorDetails) -> str:
    required = next((name for name, field in fields.items() if field.is_required()), None)
    if required is None:
        return f"set one of its fields: {', '.join(fields)}"
    return f"did you mean {section}.{required}={problem['input']}?"


def _fields_at(model: type[BaseModel], loc: Sequence[int | str]) -> Mapping[str, FieldInfo]:
    """Return the fields of the section at `loc`, or none if there is no section."""
    current: Any = model
    for part in loc:
        field = getattr(current, "model_fields", {}).get(part)
        if field is None:
            return {}
        current = next(
            (t for t in (field.annotation, *getattr(field.annotation, "__args__", ())) if hasattr(t, "model_fields")),
            None,
        )
    return getattr(current, "model_fields", {})


def _suggestion(model: type[BaseModel], loc: tuple[int | str, ...]) -> str:
    names = list(_fields_at(model, loc[:-1]))
    if not names:
        return ""
    close = difflib.get_close_matches(str(loc[-1]), names, n=1)
    if not close:
        return f"; known fields: {', '.join(names)}"
    return f"; did you mean {'.'.join(map(str, (*loc[:-1], close[0])))}?"
