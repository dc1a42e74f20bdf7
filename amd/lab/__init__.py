"""The mask lab: what student and teacher see of one clip at given mask settings, what is rebuilt, and what it costs."""

from typing import Literal

Layer = Literal["input", "student", "teacher", "roles", "masked", "rebuilt", "error", "alignment"]
"""What a layer shows. Defined here because the control plane, which has no torch, describes layers too."""
