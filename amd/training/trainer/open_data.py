"""Open a run's data on rank 0 and send it to all ranks, so that storage is listed once and all ranks agree.

Rank 0 loads the manifests that the launch stored in the run's folder; without them, it lists the data itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from amd.config import DataConfig
from amd.data.dataset.manifest_cache import keep_manifests
from amd.data.dataset.open import is_generated
from amd.storage import join
from amd.training.process_group import ProcessGroup

MANIFESTS = "manifests"  # subfolder of the run's folder

T = TypeVar("T")
D = TypeVar("D", bound=DataConfig)


def open_on_main(group: ProcessGroup, data: D, run_folder: str, open_data: Callable[[D], T]) -> T:
    """Call `open_data(data)` on rank 0; return its result, or raise its error, on all ranks."""
    if any(is_generated(getattr(data, field, None) or "") for field in ("train", "val", "test")):
        return open_data(data)  # every node generates its own files

    def open_stored() -> T:
        with keep_manifests(join(run_folder, MANIFESTS)):
            return open_data(data)

    return group.broadcast_from_main(open_stored)
