"""Expressions over linear maps: `a >> b` in series, `a + b` in parallel, and their two readings.

`run` evaluates an expression literally, branch by branch: the training-time network in evaluation mode.
`squeeze` computes the one convolution it equals. OREPA (arXiv:2204.00826, section 3) calls this block squeezing.
Expressions are immutable and differentiable, in the dtype and on the device of their tensors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from functools import reduce
from typing import TYPE_CHECKING, Any, Self

from torch import Tensor

from repdeploy.algebra.geometry import Geometry, align
from repdeploy.errors import CannotSqueeze

if TYPE_CHECKING:
    from repdeploy.algebra.conv import Conv

FILL_TOLERANCE = 1e-12
"""How far two border values may differ, relative to the larger: float64 arithmetic on a stored checkpoint."""


@dataclasses.dataclass(frozen=True, slots=True, eq=False, repr=False)
class Linear:
    """An affine map on images (batch, channels, height, width) that commutes with translation.

    A subclass is a frozen dataclass whose fields are tensors, other expressions (or tuples of them), and plain values.
    """

    @property
    def geometry(self) -> Geometry:
        """The shape of the convolution this expression equals, from shapes alone; raises CannotSqueeze."""
        raise NotImplementedError

    @property
    def in_channels(self) -> int:
        return self.geometry.in_channels

    @property
    def out_channels(self) -> int:
        return self.geometry.out_channels

    def run(self, x: Tensor) -> Tensor:
        """Evaluate literally. x (batch, in_channels, height, width), in the dtype of the expression's tensors."""
        raise NotImplementedError

    def squeeze(self, tolerance: float = FILL_TOLERANCE) -> Conv:
        """The one convolution this expression equals; raises CannotSqueeze with the reason where there is none.

        `tolerance`: how far the border values that must agree may differ, relative to the larger.
        """
        raise NotImplementedError

    def __repr__(self) -> str:
        """The formula, as a paper writes it: `3x3-BN + 1x1-BN + BN`."""
        return type(self).__name__

    def __rshift__(self, after: Linear) -> Series:
        return Series(_flatten(self, Series) + _flatten(after, Series))

    def __add__(self, other: Linear) -> Parallel:
        return Parallel(_flatten(self, Parallel) + _flatten(other, Parallel))

    def __neg__(self) -> Series:
        from repdeploy.algebra.leaves import Scale

        tensor = next(self.tensors())[1]
        return self >> Scale(-tensor.new_ones(self.out_channels))

    def __sub__(self, other: Linear) -> Parallel:
        return self + (-other)

    def children(self) -> Iterator[Linear]:
        """The expressions this one is made of."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            yield from (item for item in (value if isinstance(value, tuple) else (value,)) if isinstance(item, Linear))

    def tensors(self, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
        """Every tensor below, with a dotted path that is unique in this expression."""
        for field in dataclasses.fields(self):
            value, path = getattr(self, field.name), f"{prefix}{field.name}"
            if isinstance(value, Tensor):
                yield path, value
            elif isinstance(value, Linear):
                yield from value.tensors(f"{path}.")
            elif isinstance(value, tuple):
                for index, item in enumerate(value):
                    if isinstance(item, Linear):
                        yield from item.tensors(f"{path}.{index}.")

    def map(self, change: Callable[[Tensor], Tensor]) -> Self:
        """The same expression over changed tensors (another dtype, another device), in the order of `tensors`."""

        def changed(value: Any) -> Any:
            if isinstance(value, Tensor):
                return change(value)
            if isinstance(value, Linear):
                return value.map(change)
            if isinstance(value, tuple):
                return tuple(changed(item) for item in value)
            return value

        return dataclasses.replace(
            self, **{field.name: changed(getattr(self, field.name)) for field in dataclasses.fields(self)}
        )


def _flatten(expression: Linear, kind: type[Series] | type[Parallel]) -> tuple[Linear, ...]:
    """The parts of a nested series or sum: `>>` and `+` are associative, so an expression has one form."""
    return expression.parts if isinstance(expression, kind) else (expression,)


@dataclasses.dataclass(frozen=True, slots=True, eq=False, repr=False)
class Series(Linear):
    """One after the other, from the input to the output. Raises ValueError when widths do not meet."""

    parts: tuple[Linear, ...]

    def __post_init__(self) -> None:
        for index, (before, after) in enumerate(zip(self.parts, self.parts[1:], strict=False)):
            if before.out_channels != after.in_channels:
                raise ValueError(
                    f"part {index} of a series gives {before.out_channels} channels, the next takes {after.in_channels}"
                )

    @property
    def geometry(self) -> Geometry:
        return reduce(Geometry.then, (part.geometry for part in self.parts))

    @property
    def in_channels(self) -> int:
        return self.parts[0].in_channels

    @property
    def out_channels(self) -> int:
        return self.parts[-1].out_channels

    def __repr__(self) -> str:
        return "-".join(f"({part})" if isinstance(part, Parallel) else repr(part) for part in self.parts)

    def run(self, x: Tensor) -> Tensor:
        for part in self.parts:
            x = part.run(x)
        return x

    def squeeze(self, tolerance: float = FILL_TOLERANCE) -> Conv:
        # from the input outwards: what a part may assume about its border is what came before it
        whole = self.parts[0].squeeze(tolerance)
        for part in self.parts[1:]:
            whole = whole.then(part.squeeze(tolerance), tolerance)
        return whole


@dataclasses.dataclass(frozen=True, slots=True, eq=False, repr=False)
class Parallel(Linear):
    """Branches on the same input, summed. Raises ValueError when widths differ."""

    parts: tuple[Linear, ...]

    def __post_init__(self) -> None:
        widths = {(part.in_channels, part.out_channels) for part in self.parts}
        if len(widths) != 1:
            raise ValueError(f"parallel branches need equal widths, these have {sorted(widths)} (in, out)")

    @property
    def geometry(self) -> Geometry:
        return align([part.geometry for part in self.parts]).geometry

    @property
    def in_channels(self) -> int:
        return self.parts[0].in_channels

    @property
    def out_channels(self) -> int:
        return self.parts[0].out_channels

    def __repr__(self) -> str:
        return " + ".join(map(repr, self.parts))

    def run(self, x: Tensor) -> Tensor:
        total = self.parts[0].run(x)
        for index, part in enumerate(self.parts[1:], 1):
            branch = part.run(x)
            if branch.shape != total.shape:
                raise CannotSqueeze(
                    f"branch {index} gives a map of {tuple(branch.shape[2:])}, the ones before it {tuple(total.shape[2:])}",
                    hint="the strides and paddings of parallel branches must agree",
                )
            total = total + branch
        return total

    def squeeze(self, tolerance: float = FILL_TOLERANCE) -> Conv:
        first, *others = (part.squeeze(tolerance) for part in self.parts)
        return first.plus(*others, tolerance=tolerance)
