"""How far a candidate's vectors lie from those of the encoder that it would replace, seen on the same items.

Cosines compare only where both spaces have one width, and mean little where they were not trained alike; whether the
same items stay each other's nearest neighbours says what a search would notice.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

MOST = 512  # items kept: enough for a figure, few enough for a replica
NEIGHBOURS = 5


class Drift:
    def __init__(self) -> None:
        self._pairs: list[tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]] = []

    @property
    def wants_more(self) -> bool:
        return len(self._pairs) < MOST

    def add(self, main: npt.NDArray[np.float32], candidate: npt.NDArray[np.float32]) -> None:
        """Vectors of one item, (D,) and (E,)."""
        self._pairs.append((main, candidate))

    def report(self) -> dict[str, Any]:
        """items; cosine: mean and lowest over them, where the widths agree; neighbours_kept: of each item's nearest
        the share that is the same in both spaces, 0 to 1; none until there are more items than neighbours."""
        found: dict[str, Any] = {"items": len(self._pairs), "cosine_mean": None, "cosine_min": None}
        found |= {"neighbours": NEIGHBOURS, "neighbours_kept": None}
        if not self._pairs:
            return found
        main, candidate = (_unit(np.stack(side)) for side in zip(*self._pairs, strict=True))
        if main.shape == candidate.shape:
            cosine = (main * candidate).sum(axis=1)
            found |= {"cosine_mean": float(cosine.mean()), "cosine_min": float(cosine.min())}
        if len(self._pairs) > NEIGHBOURS:
            both = zip(_nearest(main), _nearest(candidate), strict=True)
            kept = [len(set(ours) & set(theirs)) / NEIGHBOURS for ours, theirs in both]
            found["neighbours_kept"] = float(np.mean(kept))
        return found


def _unit(vectors: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    lengths = np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    unit: npt.NDArray[np.float32] = (vectors / lengths).astype(np.float32)
    return unit


def _nearest(unit: npt.NDArray[np.float32]) -> list[list[int]]:
    cosine = unit @ unit.T
    np.fill_diagonal(cosine, -np.inf)
    return np.argsort(-cosine, axis=1)[:, :NEIGHBOURS].tolist()  # type: ignore[no-any-return]
