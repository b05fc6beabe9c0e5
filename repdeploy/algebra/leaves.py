"""The linear maps that blocks are made of, beside the convolution itself: each runs as the layer it is named after."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from repdeploy.algebra.conv import Conv, pad_with
from repdeploy.algebra.geometry import Geometry, Pads, Pair
from repdeploy.algebra.linear import FILL_TOLERANCE, Linear
from repdeploy.errors import CannotSqueeze

NORM_EPS = 1e-5
"""torch's default. A checkpoint does not store eps; every report states the value used."""


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Channelwise(Linear):
    """A map of as many channels as it is given."""

    @property
    def channels(self) -> int:
        raise NotImplementedError

    @property
    def geometry(self) -> Geometry:
        return Geometry(self.channels, self.channels, groups=self.channels)

    def repeated(self, times: int) -> Self:
        """The same map where every channel stands for so many in a row."""
        return self.map(lambda tensor: tensor.repeat_interleave(times))


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Norm(Channelwise):
    """Batch norm in evaluation mode: y = (x - mean) / sqrt(var + eps) * gamma + beta.

    All tensors (channels,); gamma and beta None where the norm has no affine part; `eps` in the units of `var`.
    Raises ValueError where the shapes differ.
    Source: Ioffe and Szegedy 2015 (arXiv:1502.03167), algorithm 2.
    """

    mean: Tensor
    var: Tensor
    gamma: Tensor | None = None
    beta: Tensor | None = None
    eps: float = NORM_EPS

    def __post_init__(self) -> None:
        shapes = {tuple(tensor.shape) for tensor in (self.mean, self.var, self.gamma, self.beta) if tensor is not None}
        if shapes != {(self.mean.numel(),)}:
            raise ValueError(f"the tensors of a batch norm have different shapes: {sorted(shapes)}")

    @property
    def channels(self) -> int:
        return self.mean.shape[0]

    def __repr__(self) -> str:
        return "BN"

    def run(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.mean, self.var, self.gamma, self.beta, training=False, eps=self.eps)

    def squeeze(self, tolerance: float = FILL_TOLERANCE) -> Conv:
        """y = scale x + shift with scale = gamma / sqrt(var + eps), shift = beta - scale mean."""
        spread = self.var + self.eps
        if not bool((spread > 0).all()):
            worst = int(torch.argmin(spread))
            raise CannotSqueeze(f"the variance of channel {worst} is {float(self.var[worst]):.3g}: no square root exists")
        scale = spread.rsqrt() if self.gamma is None else self.gamma * spread.rsqrt()
        shift = -scale * self.mean if self.beta is None else self.beta - scale * self.mean
        return Conv(scale.view(-1, 1, 1, 1), shift, groups=self.channels)

    def of_zero(self) -> Tensor:
        """What the norm makes of zero: (channels,)."""
        shift = self.squeeze().bias
        assert shift is not None
        return shift


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Scale(Channelwise):
    """y = factor * x, one factor per channel: (channels,)."""

    factor: Tensor

    @property
    def channels(self) -> int:
        return self.factor.shape[0]

    def __repr__(self) -> str:
        return "SCALE"

    def run(self, x: Tensor) -> Tensor:
        return x * self.factor.view(-1, 1, 1)

    def squeeze(self, tolerance: float = FILL_TOLERANCE) -> Conv:
        return Conv(self.factor.view(-1, 1, 1, 1), groups=self.channels)


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Shift(Channelwise):
    """y = x + value, one value per channel: (channels,)."""

    value: Tensor

    @property
    def channels(self) -> int:
        return self.value.shape[0]

    def __repr__(self) -> str:
        return "SHIFT"

    def run(self, x: Tensor) -> Tensor:
        return x + self.value.view(-1, 1, 1)

    def squeeze(self, tolerance: float = FILL_TOLERANCE) -> Conv:
        return Conv(torch.ones_like(self.value).view(-1, 1, 1, 1), self.value, groups=self.channels)


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Identity(Channelwise):
    """y = x. `like` is any tensor of the expression's dtype and device; it has (channels,) entries and is not read."""

    like: Tensor

    @property
    def channels(self) -> int:
        return self.like.shape[0]

    def __repr__(self) -> str:
        return "ID"

    def run(self, x: Tensor) -> Tensor:
        return x

    def squeeze(self, tolerance: float = FILL_TOLERANCE) -> Conv:
        return Conv(torch.ones_like(self.like).view(-1, 1, 1, 1), groups=self.channels)


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Pad(Channelwise):
    """Grow (or, negative, crop) the image: `value` (channels,) stands outside. Source: BNAndPad of DBB, section 3.2."""

    value: Tensor
    pads: Pads

    @property
    def channels(self) -> int:
        return self.value.shape[0]

    @property
    def geometry(self) -> Geometry:
        return Geometry(self.channels, self.channels, pads=self.pads, groups=self.channels)

    def __repr__(self) -> str:
        return "PAD"

    def run(self, x: Tensor) -> Tensor:
        return pad_with(x, self.value, self.pads)

    def squeeze(self, tolerance: float = FILL_TOLERANCE) -> Conv:
        one = torch.ones_like(self.value).view(-1, 1, 1, 1)
        return Conv(one, pads=self.pads, groups=self.channels, fill=self.value)


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class AveragePool(Channelwise):
    """The mean over a window, the zeros of the padding counted. `like` as for Identity."""

    like: Tensor
    kernel_size: Pair
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)

    @property
    def channels(self) -> int:
        return self.like.shape[0]

    @property
    def geometry(self) -> Geometry:
        pads = self.padding + self.padding
        return Geometry(self.channels, self.channels, self.kernel_size, self.stride, pads, groups=self.channels)

    def __repr__(self) -> str:
        return "AVG"

    def run(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, self.kernel_size, self.stride, self.padding, count_include_pad=True)

    def squeeze(self, tolerance: float = FILL_TOLERANCE) -> Conv:
        height, width = self.kernel_size
        weight = self.like.new_full((self.channels, 1, height, width), 1.0 / (height * width))
        return Conv(weight, stride=self.stride, pads=self.padding + self.padding, groups=self.channels)
