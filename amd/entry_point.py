"""Arguments, exit codes and error messages for entry points.

Exit code 2 means invalid input; 1 means any other failure or an interrupt. Expected errors are printed without a
traceback. Used by `amd.bench` and by the modules that jobs run: `amd.training`, `amd.downstream`, `amd.tasks` and
`tune_spaces`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence

from amd.commands import AS_JSON, CONFIG, DISTRIBUTED, LOCAL, OVERRIDES, PRESET, TRAINING_COMMANDS, CommandOption
from amd.config import ConfigError, parse_overrides
from amd.data.faults import DataFault
from amd.storage import StorageError


def argument_parser(
    program: str, *options: CommandOption, overrides: str = OVERRIDES, description: str | None = None
) -> argparse.ArgumentParser:
    """Return the argument parser for `python -m PROGRAM`, with its options and overrides."""
    parser = argparse.ArgumentParser(prog=f"python -m {program}", description=description)
    for option in options:
        parser.add_argument(option.flags[0], action="store_true" if option.is_switch else "store", help=option.help)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=overrides)
    return parser


def run_training(name: str, program: str, args: Sequence[str] | None, description: str | None = None) -> int:
    """Run the training command `name` with the arguments passed to `python -m PROGRAM`; return the exit code."""
    command = TRAINING_COMMANDS[name]
    parser = argument_parser(
        program, CONFIG, PRESET, LOCAL, DISTRIBUTED, AS_JSON, overrides=command.overrides, description=description
    )
    options = parser.parse_args(args)
    overrides = parse_overrides(options.overrides)
    result = command.run(
        options.preset, options.config, overrides, local=options.local, distributed=options.distributed
    )
    if options.json:
        print(result.model_dump_json(), flush=True)
    return int(result.exit_code)


def run_named_command(
    commands: Mapping[str, Callable[[Sequence[str]], int]],
    args: Sequence[str] | None,
    usage: str | None,
    resume_note: str,
) -> int:
    """Run the command selected by the first argument, with error handling as in `run_entry_point`.

    `args`: arguments; default: the process's own arguments. `usage`: text printed if the command does not exist.
    """
    name, *rest = list(sys.argv[1:] if args is None else args) or [""]
    if name not in commands:
        print(f"error: unknown command {name!r}; use one of {', '.join(commands)}\n\n{usage}", file=sys.stderr)
        return 2
    return run_entry_point(lambda: commands[name](rest), resume_note)


def run_entry_point(command: Callable[[], int], resume_note: str) -> int:
    """Run `command` and return its exit code.

    `resume_note`: effect of running the command again after an interrupt, such as "continues from the newest
    checkpoint".
    """
    try:
        return command()
    except ConfigError as error:
        _print_errors(error.problems)
        return 2
    except StorageError as error:
        _print_errors([str(error)])
        return 2
    except DataFault as error:
        _print_errors([str(error)])
        return 1
    except KeyboardInterrupt:
        print(f"interrupted; running the same command again {resume_note}", file=sys.stderr)
        return 1


def print_progress(line: str) -> None:
    """Print to standard error, so that standard output contains only results."""
    print(line, file=sys.stderr, flush=True)


def _print_errors(problems: list[str]) -> None:
    print("\n".join(f"error: {line}" for line in problems), file=sys.stderr)
