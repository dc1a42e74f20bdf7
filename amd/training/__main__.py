"""`python -m amd.training --config FILE_OR_URL key=value…`: the entry point for `ray job submit`.

The config is a JSON or YAML file, or a named preset; override keys are dotted. Exit codes: 0 success, 1 failed or
stopped, 2 invalid input.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from amd.config import parse_overrides
from amd.entry_point import run_entry_point
from amd.presets.pretraining import load_config


def main(args: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m amd.training", description=__doc__)
    parser.add_argument("--config", help="config file in JSON or YAML, a path or URL")
    parser.add_argument("--preset", help="name of a preset to use instead of a config file")
    parser.add_argument("--local", action="store_true", help="train in this process, without Ray")
    parser.add_argument("--json", action="store_true", help="print the result as a line of JSON on standard output")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_args(args)

    def run() -> int:
        config = load_config(options.preset, options.config, parse_overrides(options.overrides))
        from amd.training.runs.launch import train  # imports torch, so import it after validation

        result = train(config, local=options.local)
        if options.json:
            print(result.model_dump_json(), flush=True)
        return result.exit_code

    return run_entry_point(run, "continues from the newest checkpoint")


if __name__ == "__main__":
    sys.exit(main())
