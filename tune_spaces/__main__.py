"""Entry point for `ray job submit` and other programs: `python -m tune_spaces --config FILE [key=value …]`.

Exit codes: 0 success, 1 failed or stopped, 2 invalid input.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from amd.commands import AS_JSON, CONFIG, PRESET, SWEEP_OVERRIDES
from amd.config import parse_overrides
from amd.entry_point import argument_parser, run_entry_point
from tune_spaces.load_config import load_search


def main(args: Sequence[str] | None = None) -> int:
    parser = argument_parser(
        "tune_spaces",
        CONFIG,
        PRESET,
        AS_JSON,
        overrides=SWEEP_OVERRIDES,
        description="Run a sweep over distillation settings.",
    )
    options = parser.parse_args(args)

    def run() -> int:
        config = load_search(options.preset, options.config, parse_overrides(options.overrides))
        from tune_spaces.search.run import search  # imports torch, so only after the config is validated

        result = search(config)
        if options.json:
            print(result.model_dump_json(), flush=True)
        return result.exit_code

    return run_entry_point(run, "resumes from the latest checkpoints")


if __name__ == "__main__":
    sys.exit(main())
