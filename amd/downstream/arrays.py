"""NumPy types of features and labels.

Shapes: n samples, D features.
"""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

Array: TypeAlias = npt.NDArray[np.float32]
Labels: TypeAlias = npt.NDArray[np.int64]


class Features(NamedTuple):
    values: Array  # (n, D)
    labels: Labels  # (n,)
