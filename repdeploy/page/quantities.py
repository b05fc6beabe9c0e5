"""Numbers as a reader wants them: three significant digits and their unit."""

from __future__ import annotations

import math
from collections.abc import Iterable

DIGITS = 3
LEAST_SHARE = 0.001
"""Smaller parts of a whole are said to be below this."""
UNKNOWN = "-"


def number(value: float, digits: int = DIGITS) -> str:
    """Significant digits without an exponent: 0.0123, 12.3, 1,230."""
    if not math.isfinite(value):
        return UNKNOWN
    if value == 0:
        return "0"
    return f"{value:,.{max(0, digits - 1 - math.floor(math.log10(abs(value))))}f}"


def error(value: float) -> str:
    """A deviation: its order of magnitude is what counts."""
    return UNKNOWN if not math.isfinite(value) else f"{value:.1e}" if value else "0"


def seconds(value: float) -> str:
    return _scaled(value, ((1, "s"), (1e-3, "ms"), (1e-6, "µs")))


def size(count: float) -> str:
    """Bytes, in powers of ten."""
    return f"{count:.0f} B" if count < 1e3 else _scaled(count, ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")))


def flops(count: float) -> str:
    """Operations, not operations per second."""
    return _scaled(count, ((1e9, "GFLOP"), (1e6, "MFLOP"), (1e3, "kFLOP")))


def percent(part: float) -> str:
    """A part of 1."""
    if not math.isfinite(part):
        return UNKNOWN
    if 0 < part < LEAST_SHARE:
        return f"< {LEAST_SHARE:.1%}"
    return f"{part:.1%}" if round(part, 3) < 1 else f"{part:.0%}"


def change(before: float, after: float) -> str:
    """What became of a number: -11.4%."""
    return f"{after / before - 1:+.1%}" if before else UNKNOWN


def times(factor: float) -> str:
    return f"{factor:.2f}x"


def sizes(shape: Iterable[object]) -> str:
    """1x3x224x224."""
    return "x".join(map(str, shape))


def plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _scaled(value: float, units: tuple[tuple[float, str], ...]) -> str:
    """In the largest unit of which there is a whole one, else in the smallest."""
    least, name = next((unit for unit in units if value >= unit[0]), units[-1])
    return f"{number(value / least)} {name}"
