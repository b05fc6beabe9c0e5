"""Axes on which equal factors are equal distances, and round numbers along them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

EVEN_RANGE = 3.0
"""Axes that span a smaller factor have equally distant ticks."""
STEPS = ((1, 1.5, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,))
"""Ticks within a power of ten, the densest first."""
SPARE_ZEROS = re.compile(r"\.?0+(?=\D*$)")


def logarithmic(axes: Axes, name: Literal["x", "y"], low: float, high: float, most: int, words: Callable[[float], str]) -> None:
    """Make one axis logarithmic between two limits, with about so many ticks, each in words."""
    axes.set(**{f"{name}scale": "log", f"{name}lim": (low, high)})
    axis = axes.xaxis if name == "x" else axes.yaxis
    axis.set_major_locator(FixedLocator(ticks(low, high, most)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: _shortest(words(value))))


def _shortest(text: str) -> str:
    """A tick without decimals that say nothing: 20 ms, not 20.0 ms."""
    return SPARE_ZEROS.sub("", text) if "." in text else text


def ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers from low to high, not many more than asked for."""
    if high / low < EVEN_RANGE:
        even = MaxNLocator(most, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
        return [float(tick) for tick in even if low <= tick <= high]
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    tried = [[tick for power in powers for step in steps if low <= (tick := step * 10.0**power) <= high] for steps in STEPS]
    return next((found for found in tried if len(found) <= most), tried[-1])
