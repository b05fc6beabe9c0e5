"""The same backbones with every kind of block, for `repdeploy bench --train-step`: what each costs in training.

The name of a factory is the block kind, then the backbone.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from repdeploy.skeletons import Architecture, rep_vgg_variants
from sample_models import acnet, dbb, orepa, repvgg
from sample_models.backbones import Builder, Layer, ResNet

CLASSES = 1000
DEPTHS = (2, 2, 2, 2)
WIDTHS = (64, 64, 128, 256, 512)
"""ResNet-18 (arXiv:1512.03385, table 1): of the stem, and behind each stage."""
A0 = rep_vgg_variants("A0")["RepVGG-A0"]


class Summed(nn.ModuleList):
    """Branches, summed."""

    def forward(self, x: Tensor) -> Tensor:
        first, *rest = self
        total: Tensor = first(x)
        for branch in rest:
            total = total + branch(x)
        return total


def three_branches(layer: Layer) -> nn.Module:
    """RepVGG's block (arXiv:2101.03697, figure 2) without its ReLU, which is the backbone's."""
    branches = [dbb.conv_norm(layer), dbb.conv_norm(Layer(layer.inputs, layer.outputs, 1, layer.stride, layer.groups))]
    if layer.inputs == layer.outputs and layer.stride == 1:
        branches.append(nn.BatchNorm2d(layer.inputs))
    return Summed(branches)


def plain_resnet18(classes: int = CLASSES, widths: Sequence[int] = WIDTHS) -> nn.Module:
    return _resnet18(dbb.Layers(block=dbb.conv_norm), classes, widths)


def acnet_resnet18(classes: int = CLASSES, widths: Sequence[int] = WIDTHS) -> nn.Module:
    return _resnet18(acnet.Layers(), classes, widths)


def repvgg_resnet18(classes: int = CLASSES, widths: Sequence[int] = WIDTHS) -> nn.Module:
    return _resnet18(dbb.Layers(block=three_branches), classes, widths)


def dbb_resnet18(classes: int = CLASSES, widths: Sequence[int] = WIDTHS) -> nn.Module:
    return _resnet18(dbb.TRAINING, classes, widths)


def orepa_resnet18(classes: int = CLASSES, widths: Sequence[int] = WIDTHS) -> nn.Module:
    return _resnet18(orepa.Layers(), classes, widths)


def repvgg_a0(classes: int = CLASSES, architecture: Architecture = A0) -> nn.Module:
    return repvgg.RepVGG(architecture.depths[1:], architecture.widths, classes)


def orepa_a0(classes: int = CLASSES, architecture: Architecture = A0) -> nn.Module:
    return orepa.RepVGG(architecture.depths[1:], architecture.widths, classes)


def _resnet18(builder: Builder, classes: int, widths: Sequence[int]) -> nn.Module:
    return ResNet(builder, DEPTHS, widths, classes)
