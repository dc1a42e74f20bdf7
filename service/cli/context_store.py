"""Named contexts: services that the user has logged in to, stored in a file that only the user can read.

The file's path is AMD_CONFIG, or else `contexts.yaml` in the user's configuration directory. It may contain API keys.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import yaml
from platformdirs import user_config_path
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from amd.config import ConfigError

FILE_NAME = "contexts.yaml"


class ServiceContext(BaseModel):
    """A service, and how to authenticate with it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    url: str
    key: str | None = Field(None, repr=False)
    key_file: str | None = None
    """File that contains the key, read for each command."""
    project: str | None = None
    """Default value of `--project`."""


class ContextFile(BaseModel):
    """Contents of the context file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    current: str | None = None
    """Context that commands use by default."""
    contexts: dict[str, ServiceContext] = Field(default_factory=dict)

    def get(self, name: str) -> ServiceContext:
        """Return a context. Raises ConfigError if no context has this name."""
        if name not in self.contexts:
            known = ", ".join(self.contexts) or "none"
            raise ConfigError(
                [f"context {name!r}: does not exist; existing contexts: {known}. Add one with `amd login`"]
            )
        return self.contexts[name]

    def with_context(self, name: str, context: ServiceContext) -> ContextFile:
        """Return a copy in which this context is added or replaced, and is the current one."""
        return ContextFile(current=name, contexts={**self.contexts, name: context})

    def without(self, name: str) -> ContextFile:
        """Return a copy without this context. If it was the current one, the copy has no current context."""
        self.get(name)
        rest = {other: context for other, context in self.contexts.items() if other != name}
        return ContextFile(current=None if self.current == name else self.current, contexts=rest)

    def with_current(self, name: str) -> ContextFile:
        self.get(name)
        return ContextFile(current=name, contexts=self.contexts)


def contexts_path() -> Path:
    chosen = os.environ.get("AMD_CONFIG")
    return Path(chosen).expanduser() if chosen else user_config_path("amd") / FILE_NAME


def read_contexts() -> ContextFile:
    """Read the context file, or return no contexts if it does not exist. Raises ConfigError if it is invalid."""
    path = contexts_path()
    try:
        return ContextFile.model_validate(yaml.safe_load(path.read_text()) or {})
    except FileNotFoundError:
        return ContextFile()
    except ValidationError as error:  # its text may contain keys
        fields = ", ".join(".".join(map(str, found["loc"])) for found in error.errors())
        raise ConfigError([f"{path}: invalid fields: {fields}; correct them or delete the file"]) from None
    except yaml.YAMLError:
        raise ConfigError([f"{path}: not valid YAML; correct or delete the file"]) from None
    except OSError as error:
        raise ConfigError([f"{path}: cannot be read ({error.strerror})"]) from None


def write_contexts(contexts: ContextFile) -> None:
    """Replace the context file atomically, with mode 0600. Raises ConfigError if the file cannot be written."""
    path = contexts_path()
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)  # has mode 0600
        try:
            with os.fdopen(descriptor, "w") as file:
                yaml.safe_dump(contexts.model_dump(exclude_none=True), file, sort_keys=False)
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as error:
        raise ConfigError([f"{path}: cannot be written ({error.strerror}); set AMD_CONFIG to another file"]) from None
