"""How an entry point ends: a user's mistake in its message and exit code 2, trouble and a stop in 1, never a traceback.

For `python -m amd.training`, `python -m amd.downstream` and `python -m tune_spaces`, which `ray job submit` runs.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

from amd.config import ConfigError
from amd.data.faults import DataFault
from amd.storage import StorageError


def ended(act: Callable[[], int], continues: str) -> int:
    """The exit code of `act`. `continues`: what the same command does after an interruption."""
    try:
        return act()
    except ConfigError as error:
        _complain(error.problems)
        return 2
    except StorageError as error:
        _complain([str(error)])
        return 2
    except DataFault as error:
        _complain([str(error)])
        return 1
    except KeyboardInterrupt:
        print(f"interrupted; the same command {continues}", file=sys.stderr)
        return 1


def _complain(problems: list[str]) -> None:
    print("\n".join(f"error: {line}" for line in problems), file=sys.stderr)
