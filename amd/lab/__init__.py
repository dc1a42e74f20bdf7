"""The mask lab: what student and teacher see of a clip under given mask settings, its reconstruction, and the cost."""

from typing import Literal

Layer = Literal["input", "student", "teacher", "roles", "masked", "rebuilt", "error", "alignment"]
"""What a layer shows. Defined here because the control plane, which has no torch, describes layers too."""
