"""`python -m tune_spaces --config FILE [key=value …]`: a sweep as a job, for `ray job submit` and for programs.

Exit codes: 0 done, 1 failed or stopped, 2 bad input.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from amd.config import parse_overrides
from amd.entry_point import ended
from tune_spaces.load_config import load_search


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tune_spaces", description="Search over how a student is distilled."
    )
    parser.add_argument("--config", help="a sweep as JSON or YAML, file or URL")
    parser.add_argument("--preset", help="a named recipe to vary, where the file names none")
    parser.add_argument("--json", action="store_true", help="end with one JSON line on standard output")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_args(words)

    def work() -> int:
        config = load_search(options.preset, options.config, parse_overrides(options.overrides))
        from tune_spaces.search.run import search  # torch: only once the config is known to be good

        result = search(config)
        if options.json:
            print(result.model_dump_json(), flush=True)
        return result.exit_code

    return ended(work, "goes on from the newest checkpoints")


if __name__ == "__main__":
    sys.exit(main())
