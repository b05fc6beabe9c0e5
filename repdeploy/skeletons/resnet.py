"""ResNets and ResNeXts (arXiv:1512.03385, 1611.05431), basic and bottleneck, as the repositories name and pool them.

The stride of a stage is on the 3x3 convolution of its first block; whether a block is a bottleneck, how many blocks and
groups there are follows from the keys and shapes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch.nn.functional as F
from torch import Tensor

from repdeploy.errors import NotRecognised
from repdeploy.skeletons.layers import GLOBAL, WINDOW, averaged, layer, summed
from repdeploy.skeletons.net import Architecture, Net, Skeleton


@dataclass(frozen=True, slots=True)
class Layout:
    """`stems`: names of the first layer; `block`: what stands in front of a block's number; `window`: the head's;
    `is_small`: for images of 32x32 (a 3x3 stem of stride 1, no max pooling, the first stage keeps the resolution)."""

    stems: tuple[str, ...]
    stages: tuple[str, ...]
    block: str
    head: str
    window: int | str
    is_small: bool = False


def forward(layout: Layout, net: Net, x: Tensor) -> Tensor:
    """(batch, channels, height, width) -> logits (batch, classes)."""
    stem = next((name for name in layout.stems if name in net), None)
    if stem is None or layout.head not in net or not net.children(layout.stages[0], layout.block):
        names = f"{' or '.join(layout.stems)}, {layout.stages[0]}.{layout.block}0, {layout.head}"
        raise NotRecognised(f"not all of {names} are there")
    x = F.relu(layer(net, stem, x, stride=1 if layout.is_small else 2))
    if not layout.is_small:
        x = F.max_pool2d(x, 3, 2, 1)
    for stage in layout.stages:
        for index, name in enumerate(net.children(stage, layout.block)):
            shortcut = f"{stage}.projection" if index == 0 and f"{stage}.projection" in net else f"{name}.shortcut"
            x = residual(net, name, x, 2 if index == 0 and stage != layout.stages[0] else 1, shortcut)
    return averaged(net, x, layout.head, window=layout.window)


def residual(net: Net, name: str, x: Tensor, stride: int, shortcut: str) -> Tensor:
    """conv1, conv2 (and conv3 in a bottleneck), the shortcut, a ReLU behind each but the last and behind the sum."""
    is_bottleneck = f"{name}.conv3" in net
    branch = F.relu(layer(net, f"{name}.conv1", x, stride=1 if is_bottleneck else stride))
    branch = layer(net, f"{name}.conv2", branch, stride=stride if is_bottleneck else 1)
    if is_bottleneck:
        branch = layer(net, f"{name}.conv3", F.relu(branch))
    return F.relu(summed(name, branch, layer(net, shortcut, x, stride=stride) if shortcut in net else x))


def _skeleton(name: str, layout: Layout) -> Skeleton:
    return Skeleton(name, partial(forward, layout), layout.stems, 32 if layout.is_small else 224, (WINDOW,))


FOUR = ("stage1", "stage2", "stage3", "stage4")
# DiverseBranchBlock and OREPA; their HDF5 files may lack the level stage0
RESNET = _skeleton("resnet", Layout(("stage0.conv1", "conv1"), FOUR, "", "linear", GLOBAL))
# ACNet and ResRep: sres18, sres34; sres50, sres101, sres152; src20 ... src110
RESNET_7X7 = _skeleton("resnet_7x7", Layout(("conv1",), FOUR, "", "linear", 7))
BOTTLENECK_7X7 = _skeleton("bottleneck_resnet_7x7", Layout(("conv1",), FOUR, "block", "fc", 7))
CIFAR_RESNET = _skeleton("cifar_resnet", Layout(("stage1.conv1",), FOUR[:3], "block", "linear", 8, is_small=True))


def cifar_resnet(blocks: int) -> Architecture:
    """Three stages of so many basic blocks (section 4.2)."""
    return Architecture((blocks, blocks, blocks), (16, 32, 64))


def resnet_variants(*depths: int, prefix: str, skeleton: Skeleton = RESNET) -> Mapping[str, Architecture]:
    """The official ImageNet ResNets (table 1) under their repository's names, as that repository builds them."""
    blocks = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
    return {
        f"{prefix}{depth}": Architecture(
            (1, *blocks[depth]),
            (64, *(width * (1 if depth < 50 else 4) for width in (64, 128, 256, 512))),
            skeleton=skeleton.name,
        )
        for depth in depths
    }
