"""The networks of ACNet, DBB, OREPA and ResRep, written once: their repositories differ in layers and names, not in topology.

A backbone asks a builder for every layer. The ReLU behind a layer is the backbone's, because it leaves no trace in the keys.
Every network maps (batch, channels, height, width) to logits (batch, classes).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Blocks = Sequence[Sequence[Sequence[int]]]
"""Per stage and block, the widths of its convolutions: two 3x3, or a bottleneck's 1x1, 3x3, 1x1."""


@dataclass(frozen=True, slots=True)
class Layer:
    """A square convolution; `border` is its padding where that is not half the kernel."""

    inputs: int
    outputs: int
    kernel: int
    stride: int = 1
    groups: int = 1
    border: int | None = None

    @property
    def padding(self) -> int:
        return self.kernel // 2 if self.border is None else self.border


class Builder(Protocol):
    """How a repository makes a convolution with its norm, and names the parts."""

    def activated(self, layer: Layer) -> nn.Module:
        """For a layer with a ReLU behind it, which some repositories name with one level more."""

    def normed(self, layer: Layer) -> nn.Module:
        """For a layer without one."""

    def shortcut(self, layer: Layer) -> nn.Module:
        """For the 1x1 beside two 3x3 convolutions, an ordinary one whatever the other layers are."""


class PreActivationBuilder(Builder, Protocol):
    def bare(self, layer: Layer) -> nn.Module:
        """A convolution for which the repository asks without a norm."""

    def preactivated(self, layer: Layer) -> nn.Module:
        """Norm, ReLU, convolution."""


def repeated(depths: Iterable[int], widths: Iterable[Sequence[int]]) -> Blocks:
    """Stages of equal blocks."""
    return [[block] * depth for depth, block in zip(depths, widths, strict=True)]


def averaged(x: Tensor, window: int | None, step: int | None = None) -> Tensor:
    """The mean over the whole map, or over fixed windows side by side (`step` apart), which leaves the rest of the map out."""
    return x.mean((2, 3)) if window is None else F.avg_pool2d(x, window, step or window).flatten(1)


class Branch(nn.Module):
    """Two 3x3 convolutions, or a bottleneck whose 3x3 has the stride and the groups; ReLU between them."""

    def __init__(self, builder: Builder, inputs: int, widths: Sequence[int], stride: int, groups: int = 1) -> None:
        super().__init__()
        self.depth = len(widths)
        if self.depth == 2:
            self.conv1 = builder.activated(Layer(inputs, widths[0], 3, stride, groups))
            self.conv2 = builder.normed(Layer(widths[0], widths[1], 3, groups=groups))
        else:
            self.conv1 = builder.activated(Layer(inputs, widths[0], 1))
            self.conv2 = builder.activated(Layer(widths[0], widths[1], 3, stride, groups))
            self.conv3 = builder.normed(Layer(widths[1], widths[2], 1))

    def forward(self, x: Tensor) -> Tensor:
        for index in range(1, self.depth):
            x = F.relu(self.get_submodule(f"conv{index}")(x))
        last: Tensor = self.get_submodule(f"conv{self.depth}")(x)
        return last


class Residual(Branch):
    """The branch beside a shortcut, which is a layer where the map changes; ReLU behind the sum."""

    def __init__(self, builder: Builder, inputs: int, widths: Sequence[int], stride: int, groups: int = 1) -> None:
        super().__init__(builder, inputs, widths, stride, groups)
        changes = stride != 1 or inputs != widths[-1]
        make = builder.shortcut if self.depth == 2 else builder.normed
        self.shortcut = make(Layer(inputs, widths[-1], 1, stride)) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(super().forward(x) + (x if self.shortcut is None else self.shortcut(x)))


class ResNet(nn.Module):
    """ResNet-18 to 101 of DBB and OREPA (global pooling), sres18 and sres34 of ACNet (`stem` conv1, a fixed 7x7 window).

    `widths`: of the stem and behind each stage; `inner`: of each stage's bottlenecks, where its blocks are some; `groups`: of
    their 3x3 (ResNeXt).
    """

    def __init__(
        self, builder: Builder, depths: Sequence[int], widths: Sequence[int], classes: int, *,
        inner: Sequence[int] | None = None, groups: int = 1, channels: int = 3, window: int | None = None,
        stem: Literal["conv1", "stage0.conv1"] = "stage0.conv1",
    ) -> None:  # fmt: skip
        super().__init__()
        self.stem, self.window, self.stages = stem, window, len(depths)
        first = builder.activated(Layer(channels, widths[0], 7, 2))
        if stem == "conv1":
            self.conv1 = first
        else:
            self.stage0 = nn.Sequential(OrderedDict(conv1=first))
        inputs = widths[0]
        for stage, (depth, outputs) in enumerate(zip(depths, widths[1:], strict=True), 1):
            inside = (outputs,) if inner is None else (inner[stage - 1],) * 2
            rows = nn.Sequential()
            for index in range(depth):
                stride = 2 if index == 0 and stage > 1 else 1
                rows.append(Residual(builder, inputs, (*inside, outputs), stride, groups))
                inputs = outputs
            self.add_module(f"stage{stage}", rows)
        self.linear = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.get_submodule(self.stem)(x)), 3, 2, 1)
        for stage in range(1, self.stages + 1):
            x = self.get_submodule(f"stage{stage}")(x)
        logits: Tensor = self.linear(averaged(x, self.window))
        return logits


class Stage(nn.Module):
    """Blocks whose first has the stage's projection for a shortcut, or stands behind the stage's own 3x3 convolution."""

    def __init__(
        self, builder: Builder, inputs: int, blocks: Sequence[Sequence[int]], stride: int, *, is_first: bool = False
    ) -> None:
        super().__init__()
        self.is_first, self.depth = is_first, len(blocks)
        outputs = blocks[0][-1]
        if is_first:
            self.conv1 = builder.normed(Layer(inputs, outputs, 3, stride))
        else:
            self.projection = builder.normed(Layer(inputs, outputs, 1, stride))
        for index, widths in enumerate(blocks):
            starts = index == 0 and not is_first
            self.add_module(f"block{index}", Branch(builder, inputs if starts else outputs, widths, stride if starts else 1))

    def forward(self, x: Tensor) -> Tensor:
        if self.is_first:
            x = F.relu(self.conv1(x))
        for index in range(self.depth):
            shortcut = self.projection(x) if index == 0 and not self.is_first else x
            x = F.relu(shortcut + self.get_submodule(f"block{index}")(x))
        return x


class BottleneckResNet(nn.Module):
    """sres50, sres101 and sres152 of ACNet and ResRep. `width`: of the stem; `blocks`: of four stages."""

    def __init__(
        self, builder: Builder, width: int, blocks: Blocks, classes: int, *, channels: int = 3, window: int = 7
    ) -> None:
        super().__init__()
        self.window, self.stages = window, len(blocks)
        self.conv1 = builder.activated(Layer(channels, width, 7, 2))
        for index, stage in enumerate(blocks, 1):
            self.add_module(f"stage{index}", Stage(builder, width, stage, 1 if index == 1 else 2))
            width = stage[-1][-1]
        self.fc = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), 3, 2, 1)
        for stage in range(1, self.stages + 1):
            x = self.get_submodule(f"stage{stage}")(x)
        logits: Tensor = self.fc(averaged(x, self.window))
        return logits


class CifarResNet(nn.Module):
    """src20 to src164 of ACNet and ResRep, for 32x32 images. `blocks`: of three stages."""

    def __init__(self, builder: Builder, blocks: Blocks, classes: int, *, channels: int = 3, window: int = 8) -> None:
        super().__init__()
        self.window, self.stages = window, len(blocks)
        inputs = channels
        for index, stage in enumerate(blocks, 1):
            self.add_module(f"stage{index}", Stage(builder, inputs, stage, 1 if index == 1 else 2, is_first=index == 1))
            inputs = stage[-1][-1]
        self.linear = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        for stage in range(1, self.stages + 1):
            x = self.get_submodule(f"stage{stage}")(x)
        logits: Tensor = self.linear(averaged(x, self.window))
        return logits


class ChannelGate(nn.Module):
    """A factor per channel from the mean over the whole map, `inside` channels wide inside: 1x1 convolutions with biases.

    x (batch, channels, height, width) -> (batch, channels, 1, 1)
    """

    def __init__(self, channels: int, inside: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(channels, inside, 1)
        self.fc2 = nn.Conv2d(inside, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate: Tensor = self.fc2(F.relu(self.fc1(x.mean((2, 3), keepdim=True))))
        return gate.sigmoid()


class MobileNet(nn.Module):
    """MobileNet-v1 of DBB (global pooling), smi1 of ACNet and ResRep (a fixed 7x7 window).

    `widths`: of the stem and behind each block; `strided`: the blocks that halve the resolution.
    """

    def __init__(
        self, builder: Builder, widths: Sequence[int], classes: int, *, channels: int = 3, window: int | None = None,
        strided: Sequence[int] = (1, 3, 5, 11),
    ) -> None:  # fmt: skip
        super().__init__()
        self.window = window
        self.conv1 = builder.activated(Layer(channels, widths[0], 3, 2))
        self.stem = nn.Sequential()
        for index, (inputs, outputs) in enumerate(pairwise(widths)):
            depthwise = builder.activated(Layer(inputs, inputs, 3, 2 if index in strided else 1, inputs))
            pointwise = builder.activated(Layer(inputs, outputs, 1))
            self.stem.append(nn.ModuleDict({"depthwise": depthwise, "pointwise": pointwise}))
        self.linear = nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv1(x))
        for block in self.stem:
            for layer in block.children():
                x = F.relu(layer(x))
        logits: Tensor = self.linear(averaged(x, self.window))
        return logits


class Plain(nn.Module):
    """Convolutions in a row under `stem`, with 2x2 max pooling behind some, then linear1, ReLU and linear2."""

    def __init__(
        self, builder: Builder, layers: Sequence[Layer], pooled: Sequence[int], side: int, hidden: int, classes: int
    ) -> None:
        """`pooled`: the layers, counted from 1, with a pooling behind them; `side`: of the last map."""
        super().__init__()
        self.pooled = tuple(pooled)
        self.stem = nn.Sequential(
            OrderedDict((f"conv{index}", builder.activated(layer)) for index, layer in enumerate(layers, 1))
        )
        self.linear1 = nn.Linear(layers[-1].outputs * side**2, hidden)
        self.linear2 = nn.Linear(hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        for index, layer in enumerate(self.stem, 1):
            x = F.relu(layer(x))
            if index in self.pooled:
                x = F.max_pool2d(x, 2)
        logits: Tensor = self.linear2(F.relu(self.linear1(x.flatten(1))))
        return logits


def vgg(builder: Builder, widths: Sequence[int], classes: int, *, channels: int = 3, hidden: int = 512) -> Plain:
    """vc: VGG-16 for 32x32 images; 13 widths."""
    layers = [Layer(inputs, outputs, 3) for inputs, outputs in pairwise((channels, *widths))]
    return Plain(builder, layers, (2, 4, 7, 10, 13), 1, hidden, classes)


def lenet(builder: Builder, widths: Sequence[int], classes: int, *, channels: int = 1, hidden: int = 500) -> Plain:
    """lenet5bn: two 5x5 convolutions without padding, for 28x28 images."""
    layers = [Layer(inputs, outputs, 5, border=0) for inputs, outputs in pairwise((channels, *widths))]
    return Plain(builder, layers, (1, 2), 4, hidden, classes)


class CifarQuick(nn.Module):
    """cfqkbnc: three 5x5 convolutions, max and average pooling 3x3 in steps of 2, for 32x32 images."""

    def __init__(self, builder: Builder, widths: Sequence[int], classes: int, *, channels: int = 3, hidden: int = 64) -> None:
        super().__init__()
        self.conv1, self.conv2, self.conv3 = (
            builder.activated(Layer(inputs, outputs, 5)) for inputs, outputs in pairwise((channels, *widths))
        )
        self.fc1 = nn.Linear(widths[-1] * 9, hidden)
        self.fc2 = nn.Linear(hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), 3, 2)
        x = F.avg_pool2d(F.relu(self.conv2(x)), 3, 2)
        x = F.avg_pool2d(F.relu(self.conv3(x)), 3, 2)
        logits: Tensor = self.fc2(F.relu(self.fc1(x.flatten(1))))
        return logits


class WideBlock(nn.Module):
    """Two pre-activated convolutions; a stage's first block has a pre-activated 1x1 for a shortcut. No ReLU behind the sum."""

    def __init__(self, builder: PreActivationBuilder, inputs: int, outputs: int, stride: int, *, is_first: bool) -> None:
        super().__init__()
        self.proj = builder.preactivated(Layer(inputs, outputs, 1, stride)) if is_first else None
        self.conv1 = builder.preactivated(Layer(inputs, outputs, 3, stride))
        self.conv2 = builder.preactivated(Layer(outputs, outputs, 3))

    def forward(self, x: Tensor) -> Tensor:
        branch: Tensor = self.conv2(self.conv1(x))
        return branch + (x if self.proj is None else self.proj(x))


class WideResNet(nn.Module):
    """wrnc16plain, for 32x32 images: the norm behind the last stage has no ReLU. `widths`: of the stem and three stages."""

    def __init__(
        self, builder: PreActivationBuilder, widths: Sequence[int], classes: int, *, depth: int = 2, channels: int = 3,
        window: int = 8,
    ) -> None:  # fmt: skip
        super().__init__()
        self.window, self.stages = window, len(widths) - 1
        self.conv1 = builder.bare(Layer(channels, widths[0], 3))
        for stage, (before, width) in enumerate(pairwise(widths), 1):
            rows: OrderedDict[str, nn.Module] = OrderedDict()
            for index in range(depth):
                inputs, stride = (width, 1) if index else (before, 1 if stage == 1 else 2)
                rows[f"block{index + 1}"] = WideBlock(builder, inputs, width, stride, is_first=index == 0)
            self.add_module(f"stage{stage}", nn.Sequential(rows))
        self.last_bn = nn.BatchNorm2d(widths[-1])
        self.linear = nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        for stage in range(1, self.stages + 1):
            x = self.get_submodule(f"stage{stage}")(x)
        logits: Tensor = self.linear(averaged(self.last_bn(x), self.window, 1))
        return logits


def settled(model: nn.Module, channels: int, side: int | tuple[int, int], seed: int = 0) -> nn.Module:
    """Bring every norm's statistics near what its layer sees, in place: a deep network of random ones forgets its input.

    Means are off by half a deviation, variances by factors from 0.3 to 3, as if the weights had moved on since. `side`: of
    square images, or height and width.
    """
    generator = torch.Generator().manual_seed(seed)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    usual = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        size = side if isinstance(side, tuple) else (side, side)
        model.train()(torch.randn(4, channels, *size, generator=generator))
        for norm, momentum in zip(norms, usual, strict=True):
            assert norm.running_mean is not None
            assert norm.running_var is not None
            norm.momentum = momentum
            off = torch.randn(norm.num_features, generator=generator) * 0.5
            norm.running_mean += off * norm.running_var.sqrt()
            norm.running_var *= torch.rand(norm.num_features, generator=generator) * 2.7 + 0.3
            norm.running_var += 1e-3  # a channel that is always zero
    return model.eval()
