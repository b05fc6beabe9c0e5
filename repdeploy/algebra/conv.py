"""The one value of the algebra: a two-dimensional convolution, leaf and result alike, and its two rules.

Both rules are exact for every input size, including the border, or refuse with the numbers that stand in the way.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from repdeploy.algebra.geometry import Geometry, Pads, Pair, align
from repdeploy.algebra.linear import FILL_TOLERANCE, Linear
from repdeploy.errors import CannotSqueeze


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Conv(Linear):
    """y[o] = bias[o] + sum over i, k of weight[o, i, k] * x[i, stride * position + dilation * k - pads], per group.

    weight (out, in / groups, kernel height, kernel width); bias (out,), None for zero; fill (in,): the value of
    each input channel outside the image, None for zero. So the bias is what a border of `fill` = zero gives.
    Raises ValueError when the shapes contradict each other.
    """

    weight: Tensor
    bias: Tensor | None = None
    stride: Pair = (1, 1)
    pads: Pads = (0, 0, 0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1
    fill: Tensor | None = None

    def __post_init__(self) -> None:
        if self.weight.dim() != 4:
            raise ValueError(f"a kernel has 4 dimensions, this one has shape {tuple(self.weight.shape)}")
        geometry = self.geometry
        for name, tensor, width in (("bias", self.bias, geometry.out_channels), ("fill", self.fill, geometry.in_channels)):
            if tensor is not None and tensor.shape != (width,):
                raise ValueError(f"the {name} should have shape ({width},), it has {tuple(tensor.shape)}")

    @property
    def geometry(self) -> Geometry:
        out, within, height, width = self.weight.shape
        return Geometry(within * self.groups, out, (height, width), self.stride, self.pads, self.dilation, self.groups)

    def __repr__(self) -> str:
        """1x1, 3x3, ...; DW in front of one filter per channel."""
        height, width = self.weight.shape[2:]
        return f"DW{height}x{width}" if self.weight.shape[1] == 1 and self.groups > 1 else f"{height}x{width}"

    def run(self, x: Tensor) -> Tensor:
        top, left, bottom, right = self.pads
        padding = (top, left)
        filled = self.fill if self.geometry.is_padded else None
        if (top, left) != (bottom, right) or min(self.pads) < 0 or filled is not None:
            sides, padding = (left, right, top, bottom), (0, 0)
            x = F.pad(x, sides) if filled is None else pad_with(x, filled, self.pads)
        return F.conv2d(x, self.weight, self.bias, self.stride, padding, self.dilation, self.groups)

    def squeeze(self, tolerance: float = FILL_TOLERANCE) -> Conv:
        return self

    def bias_or_zero(self) -> Tensor:
        return self.weight.new_zeros(self.out_channels) if self.bias is None else self.bias

    def zero_filled(self, tolerance: float = FILL_TOLERANCE) -> Conv:
        """The same map as a convolution whose border is zero, which is all that a runtime offers.

        Raises CannotSqueeze when it pads with another value.
        """
        if self.fill is None:
            return self
        if self.geometry.is_padded and not _agree(self.fill, None, tolerance):
            raise CannotSqueeze(
                f"the squeezed convolution pads its input with {_largest(self.fill):.3g}, not with zero",
                hint="keep this block as it is, or give it the padding convention it was trained with",
            )
        return replace(self, fill=None)

    def then(self, after: Conv, tolerance: float = FILL_TOLERANCE) -> Conv:
        """`self >> after`: first this convolution, then that one, as one convolution.

        Raises CannotSqueeze where `after` pads with a value that this convolution does not give outside the image.
        """
        mine, its = self.geometry, after.geometry
        if its.is_padded:
            outside = _add(self.bias, None if self.fill is None else self._response(self.fill))
            if not _agree(after.fill, outside, tolerance):
                raise CannotSqueeze(
                    f"the second convolution pads with {_largest(after.fill):.6g}, but the first gives {_largest(outside):.6g} "
                    "outside the image (largest values)",
                    hint="a zero-padded convolution after a biased map equals no single convolution",
                )
        whole = mine.then(its)
        if its.is_diagonal:
            weight = self.weight * after.weight
        elif mine.is_diagonal:
            per_group = self.weight.view(after.groups, 1, -1, 1, 1)
            weight = (after.weight.view(after.groups, -1, *after.weight.shape[1:]) * per_group).view_as(after.weight)
        else:
            weight = _compose(self, after, whole)
        bias = _add(after.bias, None if self.bias is None else after._response(self.bias))
        return _conv(whole, weight, bias, self.fill)

    def plus(self, *others: Conv, tolerance: float = FILL_TOLERANCE) -> Conv:
        """The sum of parallel convolutions as one convolution.

        Raises CannotSqueeze when strides, border values or output sizes differ.
        """
        terms = (self, *others)
        alignment = align([term.geometry for term in terms])
        padded = [term for term in terms if term.geometry.is_padded]
        fill = padded[0].fill if padded else None
        for term in padded:
            if not _agree(term.fill, fill, tolerance):
                raise CannotSqueeze(
                    f"parallel branches pad with different values (up to {_largest(term.fill):.6g} and {_largest(fill):.6g})"
                )
        whole = alignment.geometry
        # start from a branch that fills the whole kernel, where there is one: the sum is written once less
        shape = whole.weight_shape, whole.groups
        fitting = (index for index, term in enumerate(terms) if (term.weight.shape, term.groups) == shape)
        start = next(fitting, None)
        weight = self.weight.new_zeros(whole.weight_shape) if start is None else terms[start].weight.clone()
        bias: Tensor | None = None
        for index, (term, (rows, columns)) in enumerate(zip(terms, alignment.places, strict=True)):
            if index != start:
                _group_view(weight[:, :, rows, columns], whole.groups, term.groups).add_(_grouped(term, whole.groups))
            bias = _add(bias, term.bias)
        return _conv(whole, weight, bias, fill)

    def _response(self, constant: Tensor) -> Tensor:
        """What an image of one value per input channel gives, without the bias: (in,) -> (out,)."""
        if self.geometry.is_diagonal:
            return self.weight.view(-1) * constant
        taps = self.weight.sum((2, 3)).view(self.groups, -1, self.weight.shape[1])
        return torch.bmm(taps, constant.view(self.groups, -1, 1)).reshape(-1)


def pad_with(x: Tensor, value: Tensor, pads: Pads) -> Tensor:
    """x with `value` (channels,) around it; negative pads crop. The image itself keeps every bit."""
    top, left, bottom, right = pads
    sides = (left, right, top, bottom)
    outside = 1.0 - F.pad(torch.ones_like(x[:1, :1]), sides)
    return F.pad(x, sides) + outside * value.view(1, -1, 1, 1)


def _conv(geometry: Geometry, weight: Tensor, bias: Tensor | None, fill: Tensor | None) -> Conv:
    return Conv(weight, bias, geometry.stride, geometry.pads, geometry.dilation, geometry.groups, fill)


def _compose(first: Conv, second: Conv, whole: Geometry) -> Tensor:
    """The kernel of `first >> second`: the transposed convolution of the second kernel by the first.

    One group of the finer factor at a time, so that nothing is expanded where one grouping divides the other.
    """
    kernels, second_groups = second.weight, second.groups
    if first.groups % second.groups and second.groups % first.groups:
        second_groups = math.gcd(first.groups, second.groups)
        out, within = second.weight.shape[0], second.weight.shape[1] * second.groups // second_groups
        kernels = kernels.new_zeros(out, within, *second.weight.shape[2:])
        _group_view(kernels, second_groups, second.groups).add_(_grouped(second, second_groups))
    # every row of the second kernel beside the channels it reads: (out / its groups, all middle channels, ...)
    rows = kernels.unflatten(0, (second_groups, -1)).transpose(0, 1).flatten(1, 2)
    if first.weight.shape[2:] == (1, 1) and second_groups == first.groups == 1:
        return torch.einsum("omhw,mi->oihw", kernels, first.weight[:, :, 0, 0])  # one matrix product, twice as fast
    # where a kernel has one tap along an axis, its step there means nothing
    (down, across), step = whole.dilation, (first.stride[0] * second.dilation[0], first.stride[1] * second.dilation[1])
    composed = F.conv_transpose2d(
        rows,
        first.weight,
        stride=(max(step[0] // down, 1), max(step[1] // across, 1)),
        dilation=(max(first.dilation[0] // down, 1), max(first.dilation[1] // across, 1)),
        groups=max(first.groups, second_groups),
    )
    by_group: Tensor = composed.unflatten(1, (second_groups, -1))
    return by_group.transpose(0, 1).flatten(0, 1)


def _group_view(weight: Tensor, coarse: int, fine: int) -> Tensor:
    """The places of a kernel of `coarse` groups that a kernel of `fine` groups fills.

    weight (out, in / coarse, height, width) -> a view (coarse, out / fine, in / fine, height, width, fine / coarse).
    """
    ratio = fine // coarse
    split: Tensor = weight.unflatten(0, (coarse, ratio, -1)).unflatten(3, (ratio, -1))
    return split.diagonal(dim1=1, dim2=3)


def _grouped(conv: Conv, coarse: int) -> Tensor:
    """A kernel in the order of `_group_view`."""
    split: Tensor = conv.weight.unflatten(0, (coarse, conv.groups // coarse, -1))
    return split.movedim(1, -1)


def _add(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    return a + b


def _largest(values: Tensor | None) -> float:
    return 0.0 if values is None or values.numel() == 0 else float(values.detach().abs().max())


def _agree(a: Tensor | None, b: Tensor | None, tolerance: float) -> bool:
    """Whether two border values are one; None is zero. Measured against the larger, or against 1 where both are small."""
    known = a if a is not None else b
    if known is None:
        return True
    difference = known if a is None or b is None else a - b
    tolerance = max(tolerance, 8 * torch.finfo(known.dtype).eps)
    return _largest(difference) <= tolerance * max(1.0, _largest(a), _largest(b))
