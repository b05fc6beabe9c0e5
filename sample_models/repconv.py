"""RepConv as YOLO detectors write it, in a small classifier of no known architecture, saved the way YOLO saves models."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPS = 1e-3
"""Of every batch norm in YOLOv6, v7 and v9."""


def norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=EPS)


class Conv(nn.Module):
    """A convolution, its norm and SiLU, or none (`is_linear`)."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, *, is_linear: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
        self.bn = norm(outputs)
        self.act = nn.Identity() if is_linear else nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.act(self.bn(self.conv(x)))
        return y


class RepConv(nn.Module):
    """YOLOv7's: rbr_dense.0 and .1, rbr_1x1.0 and .1, rbr_identity where the map keeps its shape; `deploy`: rbr_reparam."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1, deploy: bool = False) -> None:
        super().__init__()
        self.deploy = deploy
        if deploy:
            self.rbr_reparam = nn.Conv2d(inputs, outputs, 3, stride, 1)
            return
        self.rbr_dense = nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), norm(outputs))
        self.rbr_1x1 = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), norm(outputs))
        self.rbr_identity = norm(inputs) if inputs == outputs and stride == 1 else None

    def forward(self, x: Tensor) -> Tensor:
        if self.deploy:
            return F.silu(self.rbr_reparam(x))
        total: Tensor = self.rbr_dense(x) + self.rbr_1x1(x)
        return F.silu(total if self.rbr_identity is None else total + self.rbr_identity(x))


class RepConvN(nn.Module):
    """YOLOv9's: conv1 beside conv2, with a norm each; `deploy`: conv."""

    def __init__(self, inputs: int, outputs: int, deploy: bool = False) -> None:
        super().__init__()
        self.deploy = deploy
        if deploy:
            self.conv = nn.Conv2d(inputs, outputs, 3, 1, 1)
            return
        self.conv1 = Conv(inputs, outputs, 3, is_linear=True)
        self.conv2 = Conv(inputs, outputs, 1, is_linear=True)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.conv(x) if self.deploy else self.conv1(x) + self.conv2(x))


class Implicit(nn.Module):
    """A learned number per channel, (1, channels, 1, 1), that is added (`mean` 0) or multiplied (`mean` 1)."""

    def __init__(self, channels: int, mean: float) -> None:
        super().__init__()
        self.is_factor = mean == 1
        self.implicit = nn.Parameter(torch.randn(1, channels, 1, 1) * 0.02 + mean)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.implicit if self.is_factor else x + self.implicit


class Head(nn.Module):
    """YOLOv7's IDetect at one resolution: add, 1x1 convolution, multiply; here the mean over the map gives the logits."""

    def __init__(self, channels: int, classes: int, deploy: bool = False) -> None:
        super().__init__()
        self.m = nn.ModuleList([nn.Conv2d(channels, classes, 1)])
        self.deploy = deploy
        if not deploy:
            self.ia = nn.ModuleList([Implicit(channels, 0.0)])
            self.im = nn.ModuleList([Implicit(classes, 1.0)])

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.m[0](x) if self.deploy else self.im[0](self.m[0](self.ia[0](x)))
        return y.mean((2, 3))


def classifier(width: int, classes: int, channels: int = 1, deploy: bool = False) -> nn.Sequential:
    """(batch, channels, height, width) -> logits (batch, classes)."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    layers["0"] = Conv(channels, width, 3, 2)
    layers["1"] = RepConv(width, width, deploy=deploy)
    layers["2"] = RepConv(width, 2 * width, 2, deploy=deploy)
    layers["3"] = RepConvN(2 * width, 2 * width, deploy=deploy)
    layers["4"] = Head(2 * width, classes, deploy=deploy)
    return nn.Sequential(layers)


def save_whole(model: nn.Module, path: Path, epochs: int, name: str) -> None:
    """{epoch, best_fitness, model, ema, updates}: YOLOv7's and v9's scripts, with the model itself pickled."""
    torch.save({"epoch": epochs, "best_fitness": None, "model": model, "ema": None, "updates": 0}, path)
