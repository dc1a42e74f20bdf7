"""Exit codes and error messages of entry points: 2 for invalid input, 1 for other failures and interrupts.

Used by the modules that jobs run: `amd.training`, `amd.downstream`, `amd.tasks` and `tune_spaces`. Expected errors are
printed without a traceback.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

from amd.config import ConfigError
from amd.data.faults import DataFault
from amd.storage import StorageError


def run_entry_point(command: Callable[[], int], resume_note: str) -> int:
    """Run `command` and return its exit code.

    `resume_note`: what repeating the command after an interrupt does, such as "continues from the newest checkpoint".
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


def _print_errors(problems: list[str]) -> None:
    print("\n".join(f"error: {line}" for line in problems), file=sys.stderr)
