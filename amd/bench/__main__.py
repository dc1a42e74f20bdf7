"""`python -m amd.bench COMMAND …`: the measurements of `amd bench`, where only the training packages are installed.

    step [--config FILE_OR_URL | --preset NAME] key=value…   measure a training step
    data [--config FILE_OR_URL | --preset NAME] key=value…   measure reading, decoding and augmentation

Exit code 0: succeeded; 1: failed or stopped; 2: invalid input.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence

from amd.bench.commands import BATCH, HELP, SAMPLES, STEP_PRESET, STEPS, data_figures, step_figures
from amd.entry_point import run_entry_point


def step(args: Sequence[str]) -> int:
    parser = _parser("step")
    parser.add_argument("--preset", default=STEP_PRESET, help="named recipe instead of a config (default: %(default)s)")
    parser.add_argument("--batch", type=positive_int, default=BATCH, help=HELP["batch"])
    parser.add_argument("--steps", type=positive_int, default=STEPS, help=HELP["steps"])
    options = parser.parse_args(args)
    figures = step_figures(options.overrides, options.preset, options.config, batch=options.batch, steps=options.steps)
    if options.json:
        print(json.dumps(figures), flush=True)
        return 0
    from amd.bench.tables import step_table  # imports torch

    print(step_table(figures), flush=True)
    return 0


def data(args: Sequence[str]) -> int:
    parser = _parser("data")
    parser.add_argument("--preset", help="named recipe instead of a config")
    parser.add_argument("--samples", type=positive_int, default=SAMPLES, help=HELP["samples"])
    parser.add_argument("--target", type=float, help=HELP["target"])
    options = parser.parse_args(args)
    figures = data_figures(
        options.overrides, options.preset, options.config, samples=options.samples, target=options.target, log=_log
    )
    if options.json:
        print(json.dumps(figures), flush=True)
        return 0
    from amd.bench.tables import data_table  # imports torch

    print(data_table(figures), flush=True)
    return 0


def _parser(command: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"python -m amd.bench {command}")
    parser.add_argument("--config", help="config as a JSON or YAML file or URL")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON line on standard output")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    return parser


def positive_int(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} must be at least 1")
    return value


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {"step": step, "data": data}


def main(args: Sequence[str] | None = None) -> int:
    name, *rest = list(sys.argv[1:] if args is None else args) or [""]
    if name not in COMMANDS:
        print(f"error: unknown command {name!r}; use one of {', '.join(COMMANDS)}\n\n{__doc__}", file=sys.stderr)
        return 2
    return run_entry_point(lambda: COMMANDS[name](rest), "starts from the beginning")


def _log(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
