"""Linear maps on tiles of a fixed size, as matrices: where fully connected layers and convolutions meet (RepMLP)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from repdeploy.algebra.conv import Conv
from repdeploy.algebra.geometry import Geometry, Pair
from repdeploy.algebra.linear import FILL_TOLERANCE, Linear


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class AsMatrix(Linear):
    """What stands inside, on tiles of `size` (height, width) that are stored as channels: a 1x1 convolution.

    x (batch, channels * height * width, ...): every place holds one tile, channel by channel, row by row. Source: RepMLP
    (arXiv:2112.11081, section 3.3), locality injection; its border is zero at the edge of each tile.
    """

    inside: Linear
    size: Pair

    @property
    def geometry(self) -> Geometry:
        """Raises IllegalInput where a tile is too small for what stands inside."""
        inside, (height, width) = self.inside.geometry, self.size
        rows, columns = inside.output_size(height, width)
        return Geometry(inside.in_channels * height * width, inside.out_channels * rows * columns, groups=inside.groups)

    def __repr__(self) -> str:
        return f"MATRIX({self.inside})"

    def run(self, x: Tensor) -> Tensor:
        batch, _, *places = x.shape
        tiles = x.flatten(2).transpose(1, 2).reshape(-1, self.inside.in_channels, *self.size)
        rows: Tensor = self.inside.run(tiles).reshape(batch, -1, self.out_channels).transpose(1, 2)
        return rows.reshape(batch, -1, *places)

    def squeeze(self, tolerance: float = FILL_TOLERANCE) -> Conv:
        """One row per output number, one column per input number of its group: what the unit tiles give."""
        conv = self.inside.squeeze(tolerance).zero_filled(tolerance)
        within, positions = conv.weight.shape[1], self.size[0] * self.size[1]
        units = torch.eye(within * positions, dtype=conv.weight.dtype, device=conv.weight.device)
        units = units.view(-1, within, *self.size).repeat(1, conv.groups, 1, 1)
        answers: Tensor = Conv(conv.weight, None, conv.stride, conv.pads, conv.dilation, conv.groups).run(units)
        weight = answers.flatten(1).t().reshape(-1, within * positions, 1, 1)
        repeated = answers[0, 0].numel()
        return Conv(weight, None if conv.bias is None else conv.bias.repeat_interleave(repeated), groups=conv.groups)
