"""RepMLPNet (arXiv:2112.11081) and RepMLP's block of 2021 (arXiv:2105.01883), both forms, official key names."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from sample_models.backbones import ChannelGate

Size = tuple[int, int]
"""Height and width."""


class ConvNorm(nn.Sequential):
    """Keys `conv` (no bias) and `bn`."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, padding: int = 0, groups: int = 1) -> None:
        conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, groups=groups, bias=False)
        super().__init__(OrderedDict(conv=conv, bn=nn.BatchNorm2d(outputs)))


class LocalPerceptron(nn.Module):
    """What both blocks share: `repconv{k}`, convolutions inside the tiles, summed. There are none in the deploy form."""

    def add_convolutions(self, channels: int, groups: int, kernels: Sequence[int]) -> None:
        self.kernels = tuple(kernels)
        for kernel in kernels:
            self.add_module(f"repconv{kernel}", ConvNorm(channels, channels, kernel, 1, kernel // 2, groups))

    def plus_local(self, y: Tensor, tiles: Tensor) -> Tensor:
        """y and tiles (count, channels, height, width) -> their sum, as y."""
        for kernel in self.kernels:
            y = y + self.get_submodule(f"repconv{kernel}")(tiles)
        return y


class RepMLPBlock(LocalPerceptron):
    """A fully connected layer over the pixels of a tile, plus small convolutions inside it, times the global gate.

    x (batch, channels, height, width), same shape out; the map is cut into tiles of `tile`. Channel c uses weights c mod
    `share_sets`. `deploy`: `fc3` with a bias and nothing beside it.
    """

    def __init__(self, channels: int, tile: Size, share_sets: int, kernels: Sequence[int], reduce: int, deploy: bool) -> None:
        super().__init__()
        self.tile, self.share_sets = tile, share_sets
        pixels = share_sets * tile[0] * tile[1]
        self.gp = ChannelGate(channels, channels // reduce)
        self.fc3 = nn.Conv2d(pixels, pixels, 1, groups=share_sets, bias=deploy)
        self.fc3_bn: nn.Module = nn.Identity() if deploy else nn.BatchNorm2d(share_sets)
        self.add_convolutions(share_sets, share_sets, () if deploy else kernels)

    def forward(self, x: Tensor) -> Tensor:
        (batch, channels, height, width), (rows, columns), sets = x.shape, self.tile, self.share_sets
        down, right = height // rows, width // columns
        tiles = x.reshape(batch, channels, down, rows, right, columns).permute(0, 2, 4, 1, 3, 5)
        tiles = tiles.reshape(-1, sets, rows, columns)  # ordered (batch, down, right, channels / sets)
        y = self.fc3(tiles.reshape(-1, sets * rows * columns, 1, 1)).reshape(-1, sets, rows, columns)
        y = self.plus_local(self.fc3_bn(y), tiles)
        # read under another order, (batch, channels / sets, down, right): several tiles change places with channels
        y = y.reshape(-1, down, right, sets, rows, columns).permute(0, 3, 1, 4, 2, 5).reshape(x.shape)
        gated: Tensor = y * self.gp(x)
        return gated


class FeedForward(nn.Module):
    """1x1, exact GELU, 1x1 back."""

    def __init__(self, channels: int, inside: int) -> None:
        super().__init__()
        self.ffn_fc1 = ConvNorm(channels, inside, 1)
        self.ffn_fc2 = ConvNorm(inside, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.ffn_fc2(F.gelu(self.ffn_fc1(x)))
        return y


class RepMLPNetUnit(nn.Module):
    """Two residual blocks, each behind a norm of its own: the channels apart, then the pixels apart."""

    def __init__(
        self, channels: int, tile: Size, share_sets: int, kernels: Sequence[int], reduce: int, ffn_ratio: int, deploy: bool
    ) -> None:
        super().__init__()
        self.repmlp_block = RepMLPBlock(channels, tile, share_sets, kernels, reduce, deploy)
        self.ffn_block = FeedForward(channels, channels * ffn_ratio)
        self.prebn1, self.prebn2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.repmlp_block(self.prebn1(x))
        y: Tensor = self.ffn_block(self.prebn2(x))
        return x + y


class RepMLPNet(nn.Module):
    """Per stage: channels, units, the tile its maps are cut into (height, width) and the share sets.

    The embedding divides height and width by `patch`, every later stage by 2, both rounded down; `kernels`: of the local
    perceptrons. `deploy`: as the repository's converter leaves it, all norms but the perceptrons' still there.
    """

    def __init__(
        self, channels: Sequence[int], units: Sequence[int], tiles: Sequence[Size], share_sets: Sequence[int], classes: int,
        kernels: Sequence[int] = (1, 3), reduce: int = 4, ffn_ratio: int = 4, patch: int = 4, in_channels: int = 3,
        deploy: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.conv_embedding = ConvNorm(in_channels, channels[0], patch, patch)
        self.stages, self.embeds = nn.ModuleList(), nn.ModuleList()
        for width, count, tile, sets in zip(channels, units, tiles, share_sets, strict=True):
            rows = [RepMLPNetUnit(width, tile, sets, kernels, reduce, ffn_ratio, deploy) for _ in range(count)]
            self.stages.append(nn.ModuleList(rows))
        for inputs, outputs in pairwise(channels):
            self.embeds.append(ConvNorm(inputs, outputs, 2, 2))
        self.head_norm = nn.BatchNorm2d(channels[-1])
        self.head = nn.Linear(channels[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        """x (batch, in_channels, height, width) -> logits (batch, classes)."""
        for embed, stage in zip((self.conv_embedding, *self.embeds), self.stages, strict=True):
            x = F.relu(embed(x))
            for unit in stage:  # type: ignore[attr-defined]
                x = unit(x)
        logits: Tensor = self.head(self.head_norm(x).mean((2, 3)))
        return logits


class RepMLPBlock2021(LocalPerceptron):
    """The plug-in block: a global perceptron adds to every tile, then one fully connected layer over all of its numbers.

    x (batch, channels, *size), same shape out; `fc3` and the convolutions have `groups` groups. Where one tile is the whole
    map there is no global perceptron. `deploy`: the norms folded, the convolutions gone.
    """

    def __init__(
        self, channels: int, size: Size, tile: Size, kernels: Sequence[int] = (1, 3), reduction: int = 1, groups: int = 1,
        deploy: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.tile, self.tiles = tile, (size[0] // tile[0], size[1] // tile[1])
        features, pixels = channels * self.tiles[0] * self.tiles[1], channels * tile[0] * tile[1]
        self.fc1_fc2, self.avg = nn.Sequential(), nn.Sequential()
        if self.tiles != (1, 1):
            inside = features // reduction
            parts = OrderedDict(fc1=nn.Linear(features, inside), relu=nn.ReLU(), fc2=nn.Linear(inside, features))
            self.fc1_fc2 = nn.Sequential(parts)
            self.avg.add_module("avg", nn.AvgPool2d(tile))
            if not deploy:
                self.avg.add_module("bn", nn.BatchNorm2d(channels))
        self.fc3 = nn.Conv2d(pixels, pixels, 1, groups=groups, bias=deploy)
        self.fc3_bn: nn.Module = nn.Identity() if deploy else nn.BatchNorm1d(pixels)
        self.add_convolutions(channels, groups, () if deploy else kernels)

    def forward(self, x: Tensor) -> Tensor:
        (batch, channels), (rows, columns), (down, right) = x.shape[:2], self.tile, self.tiles
        tiles = x.reshape(batch, channels, down, rows, right, columns)
        if self.tiles != (1, 1):
            told: Tensor = self.fc1_fc2(self.avg(x).flatten(1))
            tiles = tiles + told.reshape(batch, channels, down, 1, right, 1)
        tiles = tiles.permute(0, 2, 4, 1, 3, 5).reshape(-1, channels, rows, columns)
        y = self.fc3_bn(self.fc3(tiles.reshape(len(tiles), -1, 1, 1)).flatten(1))
        y = self.plus_local(y.reshape(tiles.shape), tiles)
        return y.reshape(batch, down, right, channels, rows, columns).permute(0, 3, 1, 4, 2, 5).reshape(x.shape)
