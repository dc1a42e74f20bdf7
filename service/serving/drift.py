"""Drift: compare a candidate's embeddings with those of the encoder it would replace, on the same items.

Cosine similarity requires equal widths, and means little if the encoders were trained differently. The share of nearest
neighbours common to both spaces measures the effect on search.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

MAX_PAIRS = 512  # enough for an estimate, few enough for a replica's memory
NEIGHBOURS = 5


class Drift:
    """Pairs of embeddings and their statistics."""

    def __init__(self) -> None:
        self._pairs: list[tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]] = []

    @property
    def needs_more(self) -> bool:
        return len(self._pairs) < MAX_PAIRS

    def add(self, main: npt.NDArray[np.float32], candidate: npt.NDArray[np.float32]) -> None:
        """Add the embeddings of one item, (D,) and (E,)."""
        self._pairs.append((main, candidate))

    def report(self) -> dict[str, Any]:
        """Return the number of items, the mean and minimum cosine similarity, and the share of nearest neighbours kept.

        The cosines are None if the widths differ. `neighbours_kept` is the average fraction of an item's
        nearest neighbours that are the same in both spaces; None until there are more items than neighbours.
        """
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
