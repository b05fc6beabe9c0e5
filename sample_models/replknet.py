"""RepLKNet with the official key names (arXiv:2203.06717, section 4), in training form and with its kernels merged."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from sample_models.repvgg import ConvNorm


def conv_norm_relu(inputs: int, outputs: int, kernel: int, stride: int, groups: int) -> nn.Sequential:
    return ConvNorm(inputs, outputs, kernel, stride, groups).append(nn.ReLU())


class LargeKernel(nn.Module):
    """A large depthwise kernel and, if there is one, a small one on the same centre, each normalised, summed.

    x (batch, channels, height, width), same shape out; odd kernels only. `deploy`: the one biased convolution `lkb_reparam`.
    """

    def __init__(self, channels: int, kernel: int, small_kernel: int | None, deploy: bool) -> None:
        super().__init__()
        self.lkb_reparam = nn.Conv2d(channels, channels, kernel, padding=kernel // 2, groups=channels) if deploy else None
        if not deploy:
            self.lkb_origin = ConvNorm(channels, channels, kernel, 1, channels)
            self.small_conv = ConvNorm(channels, channels, small_kernel, 1, channels) if small_kernel else None

    def forward(self, x: Tensor) -> Tensor:
        if self.lkb_reparam is not None:
            merged: Tensor = self.lkb_reparam(x)
            return merged
        large: Tensor = self.lkb_origin(x)
        return large if self.small_conv is None else large + self.small_conv(x)


class LargeKernelBlock(nn.Module):
    """A residual block: norm, 1x1 to `inside` channels, ReLU, the large kernel, ReLU, 1x1 back."""

    def __init__(self, channels: int, inside: int, kernel: int, small_kernel: int | None, deploy: bool) -> None:
        super().__init__()
        self.prelkb_bn = nn.BatchNorm2d(channels)
        self.pw1 = ConvNorm(channels, inside, 1, 1, 1)
        self.large_kernel = LargeKernel(inside, kernel, small_kernel, deploy)
        self.pw2 = ConvNorm(inside, channels, 1, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.pw2(F.relu(self.large_kernel(F.relu(self.pw1(self.prelkb_bn(x))))))
        return x + y


class FeedForwardBlock(nn.Module):
    """A residual block: norm, 1x1 to `inside` channels, exact GELU, 1x1 back."""

    def __init__(self, channels: int, inside: int) -> None:
        super().__init__()
        self.preffn_bn = nn.BatchNorm2d(channels)
        self.pw1 = ConvNorm(channels, inside, 1, 1, 1)
        self.pw2 = ConvNorm(inside, channels, 1, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.pw2(F.gelu(self.pw1(self.preffn_bn(x))))
        return x + y


class Stage(nn.Module):
    """Keys start at `blocks`: the two kinds in turn."""

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.blocks(x)
        return result


class RepLKNet(nn.Module):
    """Per stage: the large kernel's side, the layers (each a large-kernel and a feed-forward block) and the channels.

    `dw_ratio`, `ffn_ratio`: channels inside the two kinds of blocks over the stage's. The stem divides height and width by
    4, every transition by 2. `deploy`: the kernels merged, all norms still there.
    """

    def __init__(
        self, kernels: Sequence[int], layers: Sequence[int], channels: Sequence[int], classes: int,
        small_kernel: int | None = 5, dw_ratio: float = 1.0, ffn_ratio: float = 4.0, in_channels: int = 3, deploy: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        stem = channels[0]
        self.stem = nn.Sequential(
            conv_norm_relu(in_channels, stem, 3, 2, 1),
            conv_norm_relu(stem, stem, 3, 1, stem),
            conv_norm_relu(stem, stem, 1, 1, 1),
            conv_norm_relu(stem, stem, 3, 2, stem),
        )
        self.stages, self.transitions = nn.ModuleList(), nn.ModuleList()
        for kernel, count, width in zip(kernels, layers, channels, strict=True):
            blocks: list[nn.Module] = []
            for _ in range(count):
                blocks.append(LargeKernelBlock(width, int(width * dw_ratio), kernel, small_kernel, deploy))
                blocks.append(FeedForwardBlock(width, int(width * ffn_ratio)))
            self.stages.append(Stage(blocks))
        for inputs, outputs in pairwise(channels):
            pair = conv_norm_relu(inputs, outputs, 1, 1, 1), conv_norm_relu(outputs, outputs, 3, 2, outputs)
            self.transitions.append(nn.Sequential(*pair))
        self.norm = nn.BatchNorm2d(channels[-1])
        self.head = nn.Linear(channels[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        """x (batch, in_channels, height, width) -> logits (batch, classes)."""
        x = self.stages[0](self.stem(x))
        for transition, stage in zip(self.transitions, self.stages[1:], strict=True):
            x = stage(transition(x))
        logits: Tensor = self.head(self.norm(x).mean((2, 3)))
        return logits
