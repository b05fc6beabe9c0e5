"""Kernels that are generated: combinators whose `run` computes one kernel first and convolves with it once.

That is how such networks train: OREPA (arXiv:2204.00826, section 3) squeezes its branches at every training step.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import reduce

from torch import Tensor

from repdeploy.algebra.conv import Conv
from repdeploy.algebra.geometry import Geometry
from repdeploy.algebra.linear import FILL_TOLERANCE, Linear, Parallel, Series


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Online(Linear):
    """The branches inside, squeezed at every step: `run` squeezes, then convolves once."""

    inside: Linear

    @property
    def geometry(self) -> Geometry:
        return self.inside.geometry

    def __repr__(self) -> str:
        return f"({self.inside})"

    def run(self, x: Tensor) -> Tensor:
        return self.squeeze().run(x)

    def squeeze(self, tolerance: float = FILL_TOLERANCE) -> Conv:
        return self.inside.squeeze(tolerance)


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Flip(Linear):
    """The convolution inside with its kernel turned by 180 degrees, pads and stride as they are.

    `a >> Flip(b)` has the cross-correlation of both kernels, which is how OREPA's stem composes its 3x3 kernels.
    """

    inside: Linear

    @property
    def geometry(self) -> Geometry:
        return self.inside.geometry

    def __repr__(self) -> str:
        height, width = self.geometry.kernel_size
        return f"FLIP{height}x{width}"

    def run(self, x: Tensor) -> Tensor:
        return self.squeeze().run(x)

    def squeeze(self, tolerance: float = FILL_TOLERANCE) -> Conv:
        squeezed = self.inside.squeeze(tolerance)
        return replace(squeezed, weight=squeezed.weight.flip(2, 3))


def fixed(expression: Linear) -> Linear:
    """The same map with every generated kernel computed once: what a static graph of a training-time network can hold."""
    if isinstance(expression, Online | Flip):
        return expression.squeeze()
    if isinstance(expression, Series):
        return reduce(Linear.__rshift__, map(fixed, expression.parts))
    if isinstance(expression, Parallel):
        return reduce(Linear.__add__, map(fixed, expression.parts))
    return expression


def generated(expression: Linear) -> Iterator[Linear]:
    """Every expression inside an Online or a Flip, outermost first: what `run` alone does not evaluate branch by branch."""
    for part in expression.children():
        if isinstance(expression, Online | Flip):
            yield part
        yield from generated(part)
