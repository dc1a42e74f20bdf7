"""`python -m amd.training --config FILE_OR_URL key=value…`: the entry point for `ray job submit`.

The config is a JSON or YAML file, or a preset; override keys are dotted. Exit codes: 0 success, 1 failed or stopped, 2
invalid input.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from amd.entry_point import run_entry_point, run_training


def main(args: Sequence[str] | None = None) -> int:
    return run_entry_point(
        lambda: run_training("train", "amd.training", args, __doc__), "continues from the newest checkpoint"
    )


if __name__ == "__main__":
    sys.exit(main())
