"""Exit codes of the `amd` command, the same for every subcommand. Documented in docs/pre-training.md."""

from __future__ import annotations

from typing import Final

SUCCESS: Final = 0
"""The command succeeded, as did the job that it waited for, if any."""
FAILURE: Final = 1
"""The command or its job failed, or the service could not be reached."""
BAD_INPUT: Final = 2
"""The request is invalid; repeating it unchanged fails again."""
