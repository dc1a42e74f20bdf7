"""Typer groups: a group with a default command, and the root group, which sets the display order of its commands."""

from __future__ import annotations

from typing import Any

from typer.core import TyperGroup


def default_command(name: str) -> type[TyperGroup]:
    """Return a group class that runs the command `name` unless the first argument is a command.

    For example, `amd search --space masking` is short for `amd search run --space masking`.
    """

    class GroupWithDefault(TyperGroup):
        def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
            is_command = bool(args) and args[0] in (*self.commands, "-h", "--help")
            prints_help = not args and self.no_args_is_help
            return super().parse_args(ctx, args if is_command or prints_help else [name, *args])

    return GroupWithDefault


class RootGroup(TyperGroup):
    """Lists commands in the order given by `order`, and also accepts --context after a command."""

    order: tuple[str, ...] = ()
    """Names of all commands, in display order."""

    def list_commands(self, ctx: Any) -> list[str]:
        return [name for name in self.order if name in self.commands]

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, _context_first(args))


def _context_first(args: list[str]) -> list[str]:
    """Move `--context NAME` and `--context=NAME` to the front. Arguments after `--` are left unchanged."""
    end = args.index("--") if "--" in args else len(args)
    first: list[str] = []
    rest: list[str] = []
    remaining = iter(args[:end])
    for arg in remaining:
        if arg == "--context":
            first += [arg, *([value] if (value := next(remaining, None)) is not None else [])]
        elif arg.startswith("--context="):
            first.append(arg)
        else:
            rest.append(arg)
    return [*first, *rest, *args[end:]]
