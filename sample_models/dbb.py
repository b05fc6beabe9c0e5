"""Diverse Branch Block in training and deploy form, with the official key names (arXiv:2103.13425)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sample_models.backbones import Layer


class NormAndPad(nn.Module):
    """A norm under `bn`, then a border of what it answers to zero."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(channels)
        self.width = width

    def forward(self, x: Tensor) -> Tensor:
        return bordered(self.bn(x), answer_to_zero(self.bn), self.width)


class NormAndPadOfMarch2021(nn.BatchNorm2d):
    """The same, where the module is the norm itself: its keys have one level less."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__(channels)
        self.width = width

    def forward(self, input: Tensor) -> Tensor:
        return bordered(super().forward(input), answer_to_zero(self), self.width)


def answer_to_zero(norm: nn.BatchNorm2d) -> Tensor:
    """(1, channels, 1, 1), from the running statistics in training too."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
    return (norm.bias - norm.running_mean * scale).view(1, -1, 1, 1)


def bordered(x: Tensor, border: Tensor, width: int) -> Tensor:
    """x (batch, channels, height, width) with `border` (1, channels, 1, 1) on every side."""
    return F.pad(x - border, (width,) * 4) + border


class IdentityBasedConv(nn.Conv2d):
    """1x1: the stored weight is what training added to the identity."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__(channels, channels, 1, groups=groups, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + input


def conv_norm(layer: Layer) -> nn.Module:
    """ConvBN: a convolution beside its norm."""
    conv = nn.Conv2d(layer.inputs, layer.outputs, layer.kernel, layer.stride, layer.padding, groups=layer.groups, bias=False)
    return nn.Sequential(OrderedDict(conv=conv, bn=nn.BatchNorm2d(layer.outputs)))


class DBB(nn.Module):
    """Four branches, summed; three where each output has a group of its own (depthwise).

    `internal`: channels between the 1x1 and the kxk convolution; `march_2021`: the key layout before April 2021.
    (batch, inputs, height, width) -> (batch, outputs, ceil(height / stride), ceil(width / stride)).
    """

    def __init__(self, layer: Layer, *, internal: int | None = None, march_2021: bool = False) -> None:
        super().__init__()
        pad = NormAndPadOfMarch2021 if march_2021 else NormAndPad
        inputs, outputs, kernel, groups = layer.inputs, layer.outputs, layer.kernel, layer.groups
        half, is_depthwise = kernel // 2, groups >= outputs
        middle = internal or (2 * inputs if is_depthwise else inputs)
        self.dbb_origin = conv_norm(layer)
        if not is_depthwise:
            self.dbb_1x1 = conv_norm(Layer(inputs, outputs, 1, layer.stride, groups))
        first = (
            {"idconv1": IdentityBasedConv(inputs, groups)}
            if middle == inputs
            else {"conv1": nn.Conv2d(inputs, middle, 1, groups=groups, bias=False)}
        )
        series: dict[str, nn.Module] = {
            **first,
            "bn1": pad(middle, half),
            "conv2": nn.Conv2d(middle, outputs, kernel, layer.stride, groups=groups, bias=False),
            "bn2": nn.BatchNorm2d(outputs),
        }
        self.dbb_1x1_kxk = nn.Sequential(OrderedDict(series))
        average: dict[str, nn.Module] = {}
        if not is_depthwise:
            average = {"conv": nn.Conv2d(inputs, outputs, 1, groups=groups, bias=False), "bn": pad(outputs, half)}
        average["avg"] = nn.AvgPool2d(kernel, layer.stride, half if is_depthwise else 0)
        average["avgbn"] = nn.BatchNorm2d(outputs)
        self.dbb_avg = nn.Sequential(OrderedDict(average))

    def forward(self, x: Tensor) -> Tensor:
        first, *rest = self.children()
        total: Tensor = first(x)
        for branch in rest:
            total = total + branch(x)
        return total


def fused(layer: Layer, name: str) -> nn.Module:
    """The deploy form: one convolution with a bias, under `name`."""
    conv = nn.Conv2d(layer.inputs, layer.outputs, layer.kernel, layer.stride, layer.padding, groups=layer.groups)
    return nn.Sequential(OrderedDict({name: conv}))


@dataclass(frozen=True, slots=True)
class Layers:
    """The official builder: kernels of 2 to 6 become `block`, all others `pair`; a ReLU never makes a level."""

    block: Callable[[Layer], nn.Module] = DBB
    pair: Callable[[Layer], nn.Module] = conv_norm

    def normed(self, layer: Layer) -> nn.Module:
        return self.block(layer) if 1 < layer.kernel < 7 else self.pair(layer)

    def activated(self, layer: Layer) -> nn.Module:
        return self.normed(layer)

    def shortcut(self, layer: Layer) -> nn.Module:
        return self.pair(layer)


TRAINING = Layers()
MARCH_2021 = Layers(partial(DBB, march_2021=True))
DEPLOYED = Layers(partial(fused, name="dbb_reparam"), partial(fused, name="conv"))
