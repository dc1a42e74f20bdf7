"""Read and validate the values of HTML forms."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, TypeVar

from fastapi import Depends, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError
from starlette.datastructures import FormData

M = TypeVar("M", bound=BaseModel)


class FormValues:
    """The fields of a submitted form."""

    def __init__(self, form: FormData) -> None:
        self._form = form

    def text(self, name: str) -> str:
        """Return a field's value without surrounding whitespace, or an empty string if it was not sent."""
        value = self._form.get(name, "")
        return value.strip() if isinstance(value, str) else ""

    def texts(self, name: str) -> list[str]:
        """Return all values of a field that may occur more than once."""
        return [value for value in self._form.getlist(name) if isinstance(value, str)]

    def below(self, prefix: str) -> dict[str, str]:
        """Return the fields whose names start with a prefix, with the prefix removed."""
        names = [name for name in self._form if name.startswith(prefix)]
        return {name.removeprefix(prefix): self.text(name) for name in names}


def parse(model: type[M], values: Mapping[str, Any]) -> M:
    """Validate form values. Raises RequestValidationError, which lists the invalid fields."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        problems = [{**found, "loc": ("body", *found["loc"])} for found in error.errors()]
        raise RequestValidationError(problems) from None


def parse_labels(parts: Iterable[str]) -> dict[str, str]:
    """Parse `key=value` parts, and ignore empty ones. Raises RequestValidationError for a part without `=`."""
    labels = {}
    for part in filter(None, map(str.strip, parts)):
        key, separator, value = part.partition("=")
        if not separator:
            message = f"{part!r} is not a label; write key=value"
            raise RequestValidationError([{"type": "value_error", "loc": ("body", "labels"), "msg": message}])
        labels[key.strip()] = value.strip()
    return labels


async def _read_form(request: Request) -> FormValues:
    return FormValues(await request.form())


FormDep = Annotated[FormValues, Depends(_read_form)]
