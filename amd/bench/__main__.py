"""`python -m amd.bench COMMAND …`: run the measurements of `amd bench` with only the training packages installed.

    step [--config FILE_OR_URL | --preset NAME] key=value…   measure a training step; default preset: k400-vit-b
    data [--config FILE_OR_URL | --preset NAME] key=value…   measure reading, decoding and augmentation

Exit codes: 0 success, 1 failed or interrupted, 2 invalid input.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence

from amd.bench.commands import BATCH, HELP, SAMPLES, STEP_PRESET, STEPS, data_figures, step_figures
from amd.bench.tables import data_table, step_table
from amd.commands import AS_JSON, CONFIG, PRESET
from amd.entry_point import argument_parser, print_progress, run_named_command


def step(args: Sequence[str]) -> int:
    preset = PRESET._replace(help=with_default(PRESET.help))
    parser = argument_parser("amd.bench step", CONFIG, preset, AS_JSON)
    parser.set_defaults(preset=STEP_PRESET)
    parser.add_argument("--batch", type=positive_int, default=BATCH, help=with_default(HELP["batch"]))
    parser.add_argument("--steps", type=positive_int, default=STEPS, help=with_default(HELP["steps"]))
    options = parser.parse_args(args)
    figures = step_figures(options.overrides, options.preset, options.config, batch=options.batch, steps=options.steps)
    print(json.dumps(figures) if options.json else step_table(figures), flush=True)
    return 0


def data(args: Sequence[str]) -> int:
    parser = argument_parser("amd.bench data", CONFIG, PRESET, AS_JSON)
    parser.add_argument("--samples", type=positive_int, default=SAMPLES, help=with_default(HELP["samples"]))
    parser.add_argument("--target", type=float, help=HELP["target"])
    options = parser.parse_args(args)
    figures = data_figures(
        options.overrides,
        options.preset,
        options.config,
        samples=options.samples,
        target=options.target,
        log=print_progress,
    )
    print(json.dumps(figures) if options.json else data_table(figures), flush=True)
    return 0


def with_default(text: str) -> str:
    """Append the option's default to its help text; argparse fills in the value."""
    return f"{text} Default: %(default)s."


def positive_int(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} must be at least 1")
    return value


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {"step": step, "data": data}


def main(args: Sequence[str] | None = None) -> int:
    return run_named_command(COMMANDS, args, __doc__, "starts from the beginning")


if __name__ == "__main__":
    sys.exit(main())
