"""The shape of a convolution without its numbers, and both rules of the algebra as far as shapes decide them.

This is the third reading of an expression: recognition, file headers and cost estimates need no weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from repdeploy.errors import CannotSqueeze, IllegalInput

Pair = tuple[int, int]
"""(height, width)"""
Pads = tuple[int, int, int, int]
"""(top, left, bottom, right) rows and columns added around the image; a negative one is cropped."""
SIDES = ("top", "left", "bottom", "right")


@dataclass(frozen=True, slots=True)
class Geometry:
    """Channels, kernel, stride, pads, dilation and groups of a convolution. Raises ValueError where groups do not divide."""

    in_channels: int
    out_channels: int
    kernel_size: Pair = (1, 1)
    stride: Pair = (1, 1)
    pads: Pads = (0, 0, 0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1

    def __post_init__(self) -> None:
        if self.groups < 1 or self.out_channels % self.groups or self.in_channels % self.groups:
            raise ValueError(
                f"{self.in_channels} input and {self.out_channels} output channels do not divide into {self.groups} groups"
            )

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        return self.out_channels, self.in_channels // self.groups, *self.kernel_size

    @property
    def extent(self) -> Pair:
        """Rows and columns of the input that one output reads."""
        (height, width), (down, across) = self.kernel_size, self.dilation
        return (height - 1) * down + 1, (width - 1) * across + 1

    @property
    def is_padded(self) -> bool:
        return any(side > 0 for side in self.pads)

    @property
    def is_diagonal(self) -> bool:
        """One factor per channel: 1x1, as many groups as channels."""
        return self.kernel_size == (1, 1) and self.groups == self.in_channels == self.out_channels

    def output_size(self, height: int, width: int) -> Pair:
        """Raises IllegalInput where the kernel does not fit into the padded map."""
        top, left, bottom, right = self.pads
        rows, columns = height + top + bottom - self.extent[0], width + left + right - self.extent[1]
        if min(rows, columns) < 0:
            raise IllegalInput(
                f"a {self.extent[0]}x{self.extent[1]} kernel does not fit into a {height}x{width} map",
                hint="use a larger image",
            )
        return rows // self.stride[0] + 1, columns // self.stride[1] + 1

    def then(self, after: Geometry) -> Geometry:
        """Of `self >> after`. Raises CannotSqueeze where `after` pads beyond what this kernel sees of its own border."""
        if after.in_channels != self.out_channels:
            raise ValueError(f"{self.out_channels} channels meet a map of {after.in_channels}")
        for side, name in enumerate(SIDES):
            extent, stride = self.extent[side % 2], self.stride[side % 2]
            needed = extent - stride if side < 2 else extent - 1
            if after.pads[side] > 0 and self.pads[side] < needed:
                raise CannotSqueeze(
                    f"the second convolution pads {after.pads[side]} at the {name} of a map whose own border is padded by "
                    f"{self.pads[side]}, where the first kernel ({extent} wide) needs at least {needed}",
                    hint="pad once, in front of the first convolution; this block is kept as it is",
                )
        dilations, taps = zip(*(self._composed_axis(after, axis) for axis in (0, 1)), strict=True)
        return Geometry(
            self.in_channels,
            after.out_channels,
            kernel_size=(taps[0], taps[1]),
            stride=(self.stride[0] * after.stride[0], self.stride[1] * after.stride[1]),
            pads=_pads(own + self.stride[side % 2] * after.pads[side] for side, own in enumerate(self.pads)),
            dilation=(dilations[0], dilations[1]),
            groups=math.gcd(self.groups, after.groups),
        )

    def _composed_axis(self, after: Geometry, axis: int) -> tuple[int, int]:
        """Dilation and taps of the composed kernel along one axis."""
        step = self.stride[axis] * after.dilation[axis]  # of the second kernel, in pixels of the input
        first, second = self.kernel_size[axis], after.kernel_size[axis]
        steps = [own for own, taps in ((self.dilation[axis], first), (step, second)) if taps > 1]
        dilation = math.gcd(*steps) or 1
        return dilation, ((first - 1) * self.dilation[axis] + (second - 1) * step) // dilation + 1


@dataclass(frozen=True, slots=True)
class Alignment:
    """Parallel kernels on one grid: the geometry of their sum, and per term the taps it fills, (rows, columns)."""

    geometry: Geometry
    places: tuple[tuple[slice, slice], ...]


def align(terms: Sequence[Geometry]) -> Alignment:
    """Of a + b + ...: kernels are aligned by their padding, the offset of each is the largest padding minus its own.

    Raises CannotSqueeze when strides or output sizes differ.
    """
    if len({term.stride for term in terms}) > 1:
        raise CannotSqueeze(
            f"parallel branches have different strides: {[term.stride for term in terms]}",
            hint="where the network's convention is not this one's, state the block's stride with --set SCOPE.stride=1",
        )
    (rows, height), (columns, width) = (_aligned_axis(terms, axis) for axis in (0, 1))
    first = terms[0]
    geometry = Geometry(
        first.in_channels,
        first.out_channels,
        kernel_size=(height.taps, width.taps),
        stride=first.stride,
        pads=(height.before, width.before, height.after, width.after),
        dilation=(height.dilation, width.dilation),
        groups=math.gcd(*(term.groups for term in terms)),
    )
    return Alignment(geometry, tuple(zip(rows, columns, strict=True)))


@dataclass(frozen=True, slots=True)
class _Axis:
    taps: int
    dilation: int
    before: int
    after: int


def _aligned_axis(terms: Sequence[Geometry], axis: int) -> tuple[tuple[slice, ...], _Axis]:
    before, after = (max(term.pads[axis + end] for term in terms) for end in (0, 2))
    slack = [term.pads[axis] + term.pads[axis + 2] - term.extent[axis] for term in terms]
    if len(set(slack)) > 1:
        shapes = [(term.kernel_size[axis], term.pads[axis], term.pads[axis + 2]) for term in terms]
        raise CannotSqueeze(
            f"parallel branches give maps of different {'widths' if axis else 'heights'}: "
            f"(kernel, padding before, after) are {shapes}"
        )
    offsets = [before - term.pads[axis] for term in terms]
    dilation = math.gcd(*offsets, *(term.dilation[axis] for term in terms if term.kernel_size[axis] > 1)) or 1
    taps = max((offset + term.extent[axis] - 1) // dilation + 1 for offset, term in zip(offsets, terms, strict=True))
    places = []
    for offset, term in zip(offsets, terms, strict=True):
        start, step = offset // dilation, max(term.dilation[axis] // dilation, 1)
        places.append(slice(start, start + (term.kernel_size[axis] - 1) * step + 1, step))
    return tuple(places), _Axis(taps, dilation, before, after)


def _pads(sides: Iterable[int]) -> Pads:
    top, left, bottom, right = sides
    return top, left, bottom, right
