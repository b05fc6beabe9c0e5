"""RepGhostNet with the official key names (arXiv:2211.06088, section 3.4), in training and in deploy form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

Fusion = Literal["none", "bn", "identity", "bn+identity"]
"""What a module adds to its depthwise branch: its input normalised, its input, both or neither."""


class Row(NamedTuple):
    """One bottleneck. `kernel`: of the strided convolution and the projection shortcut; `middle`: channels between its
    two modules."""

    kernel: int
    middle: int
    outputs: int
    squeeze_excite: bool
    stride: int


STAGES = (
    (Row(3, 8, 16, False, 1),),
    (Row(3, 24, 24, False, 2),),
    (Row(3, 36, 24, False, 1),),
    (Row(5, 36, 40, True, 2),),
    (Row(5, 60, 40, True, 1),),
    (Row(3, 120, 80, False, 2),),
    (
        *(Row(3, 100, 80, False, 1), Row(3, 120, 80, False, 1), Row(3, 120, 80, False, 1)),
        *(Row(3, 240, 112, True, 1), Row(3, 336, 112, True, 1)),
    ),
    (Row(5, 336, 160, True, 2),),
    tuple(Row(5, 480, 160, gated, 1) for gated in (False, True, False, True)),
)
"""Table 3 at width 1."""


def multiple_of_four(width: float) -> int:
    """The nearest, at least 4 and never more than a tenth down."""
    nearest = max(4, int(width / 4 + 0.5) * 4)
    return nearest + 4 if nearest < 0.9 * width else nearest


class ConvNorm(nn.Sequential):
    """Keys 0 (the convolution) and 1 (its norm)."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
        super().__init__(conv, nn.BatchNorm2d(outputs))


class RepGhostModule(nn.Module):
    """A 1x1 convolution, then a depthwise 3x3 and what is added to it; a ReLU behind each if `activated`.

    x (batch, inputs, height, width) -> (batch, outputs, height, width). `deploy`: the depthwise 3x3, with a bias, is all
    that is left of the second part.
    """

    def __init__(self, inputs: int, outputs: int, activated: bool, fusion: Fusion, deploy: bool) -> None:
        super().__init__()
        self.activated, self.identity = activated, "identity" in fusion and not deploy
        self.primary_conv = ConvNorm(inputs, outputs, 1)
        self.cheap_operation: nn.Module = (
            nn.Conv2d(outputs, outputs, 3, padding=1, groups=outputs) if deploy else ConvNorm(outputs, outputs, 3, 1, outputs)
        )
        self.fusion_bn = nn.ModuleList([nn.BatchNorm2d(outputs)] if "bn" in fusion and not deploy else [])

    def forward(self, x: Tensor) -> Tensor:
        x = self.primary_conv(x)
        x = F.relu(x) if self.activated else x
        total: Tensor = self.cheap_operation(x)
        for norm in self.fusion_bn:
            total = total + norm(x)
        total = total + x if self.identity else total
        return F.relu(total) if self.activated else total


class SqueezeExcite(nn.Module):
    """A gate per channel from the mean over the whole map, a quarter as wide inside."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        inside = multiple_of_four(channels / 4)
        self.conv_reduce = nn.Conv2d(channels, inside, 1)
        self.conv_expand = nn.Conv2d(inside, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate: Tensor = self.conv_expand(F.relu(self.conv_reduce(x.mean((2, 3), keepdim=True))))
        return x * F.relu6(gate + 3) / 6


class Bottleneck(nn.Module):
    """Two modules, between them a strided depthwise convolution and squeeze-excite where the row asks for them.

    x (batch, inputs, height, width) -> (batch, row.outputs, height / stride, width / stride). `shortcut`: add the input
    itself where shapes allow; where they do not, a projection of it is added in any case.
    """

    def __init__(self, inputs: int, row: Row, fusion: Fusion, shortcut: bool, deploy: bool) -> None:
        super().__init__()
        kernel, middle, outputs, gated, stride = row
        self.ghost1 = RepGhostModule(inputs, middle, True, fusion, deploy)
        self.ghost2 = RepGhostModule(middle, outputs, False, fusion, deploy)
        if stride == 2:
            self.conv_dw, self.bn_dw = ConvNorm(middle, middle, kernel, stride, middle).children()
        if gated:
            self.se = SqueezeExcite(middle)
        self.strided, self.gated, self.adds_input = stride == 2, gated, shortcut and stride == 1 and inputs == outputs
        if stride == 2 or inputs != outputs:
            self.shortcut = nn.Sequential(*ConvNorm(inputs, inputs, kernel, stride, inputs), *ConvNorm(inputs, outputs, 1))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.ghost1(x)
        y = self.bn_dw(self.conv_dw(y)) if self.strided else y
        y = self.ghost2(self.se(y) if self.gated else y)
        if hasattr(self, "shortcut"):
            y = y + self.shortcut(x)
        return y + x if self.adds_input else y


class Pointwise(nn.Module):
    """The last stage: a 1x1 convolution and its norm, then ReLU."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv, self.bn1 = ConvNorm(inputs, outputs, 1).children()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn1(self.conv(x)))


class RepGhostNet(nn.Module):
    """`stages`: rows of bottlenecks, whose widths are taken as they are; `last`: width of the final 1x1; `hidden`: of the
    layer in front of the classifier."""

    def __init__(
        self, stages: Sequence[Sequence[Row]], stem: int, last: int, hidden: int, classes: int, channels: int = 3,
        fusion: Fusion = "bn", shortcut: bool = True, deploy: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.conv_stem, self.bn1 = ConvNorm(channels, stem, 3, 2).children()
        self.blocks, inputs = nn.Sequential(), stem
        for rows in stages:
            stage = nn.Sequential()
            for row in rows:
                stage.append(Bottleneck(inputs, Row(*row), fusion, shortcut, deploy))
                inputs = row[2]
            self.blocks.append(stage)
        self.blocks.append(nn.Sequential(Pointwise(inputs, last)))
        self.conv_head = nn.Conv2d(last, hidden, 1)
        self.classifier = nn.Linear(hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        """x (batch, channels, height, width) -> logits (batch, classes)."""
        x = self.blocks(F.relu(self.bn1(self.conv_stem(x))))
        x = F.relu(self.conv_head(x.mean((2, 3), keepdim=True)))
        logits: Tensor = self.classifier(x.flatten(1))
        return logits


def repghostnet(
    width: float, classes: int, channels: int = 3, fusion: Fusion = "bn", shortcut: bool = True, deploy: bool = False
) -> RepGhostNet:
    """The published network at a width, for example 0.5."""
    stages = tuple(
        tuple(row._replace(middle=multiple_of_four(row.middle * width), outputs=multiple_of_four(row.outputs * width))
              for row in rows) for rows in STAGES
    )  # fmt: skip
    last = multiple_of_four(2 * 480 * width)
    return RepGhostNet(stages, multiple_of_four(16 * width), last, 1280, classes, channels, fusion, shortcut, deploy)
