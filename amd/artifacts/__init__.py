"""Published encoders: weights, JSON card, README model card, and storage layout.

Public functions: `from amd.artifacts import encode, load_encoder`. Both are imported on first use, so cards and
discovery work without torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from amd.artifacts.weights import encode, load_encoder

__all__ = ["encode", "load_encoder"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from amd.artifacts import weights

    return getattr(weights, name)
