"""Compact formatting of values, points and differences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from statistics import mean, stdev
from typing import Any


def title(point: Mapping[str, Any], names: Mapping[str, str]) -> str:
    """Return the title of a point; in a study, this is the name of its variant."""
    if set(point) == {"variant"}:
        return short(point["variant"])
    return ", ".join(f"{names[name]} {short(point[name])}" for name in names if name in point) or "as given"


def short(value: Any) -> str:
    """Format a value compactly, for example 0.0015, or 2→3 4→6 for layer pairs."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, Mapping):
        if set(value) == {"student", "teacher"}:
            return f"{value['student']}→{value['teacher']}"
        return " ".join(f"{name} {short(part)}" for name, part in value.items())
    if isinstance(value, list | tuple):
        return " ".join(short(part) for part in value) or "none"
    return str(value)


def share(fraction: float) -> str:
    """Format a fraction as 1/9 for 0.111…, otherwise in percent."""
    exact = Fraction(fraction).limit_denominator(1000)
    return str(exact) if abs(float(exact) - fraction) < 1e-9 else f"{100 * fraction:.2g} %"


def signed(value: float) -> str:
    """Format a number with its sign; 0.0 has no sign."""
    text = f"{value:+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Format a single value unchanged, and several values as mean ± sample standard deviation."""
    if not values:
        return "–"
    sd = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{sd}"
