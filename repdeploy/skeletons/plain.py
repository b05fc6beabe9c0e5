"""Plain networks for small images, of ACNet and ResRep: VGG-16, LeNet-5 and cifar-quick, each layer followed by a ReLU.

Their fully connected layers fix the size of the last map, and with it the sizes of images they take.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from repdeploy.errors import NotRecognised
from repdeploy.skeletons.layers import layer
from repdeploy.skeletons.net import Architecture, Net, Skeleton

POOLED = (2, 4, 7, 10, 13)
"""VGG-16: the layers with a max pooling behind them (arXiv:1409.1556, table 1, D)."""


def vgg(net: Net, x: Tensor) -> Tensor:
    """(batch, 3, height, width) with sides 32 to 63 -> logits (batch, classes)."""
    if "stem.conv13" not in net:
        raise NotRecognised("no layers stem.conv1 to stem.conv13")
    for index in range(1, 14):
        x = F.relu(layer(net, f"stem.conv{index}", x))
        if index in POOLED:
            x = F.max_pool2d(x, 2)
    return _two_linear(net, x, "linear1", "linear2")


def lenet(net: Net, x: Tensor) -> Tensor:
    """(batch, 1, height, width) with sides 28 to 31 -> logits (batch, classes). Its 5x5 kernels have no padding."""
    if "stem.conv2" not in net or "stem.conv3" in net:
        raise NotRecognised("no layers stem.conv1 and stem.conv2 alone")
    for name in ("stem.conv1", "stem.conv2"):
        x = F.max_pool2d(F.relu(layer(net, name, x, padding=0)), 2)
    return _two_linear(net, x, "linear1", "linear2")


def cifar_quick(net: Net, x: Tensor) -> Tensor:
    """(batch, 3, height, width) with sides 31 to 38 -> logits (batch, classes)."""
    if "conv3" not in net or "fc1" not in net:
        raise NotRecognised("no layers conv1 to conv3 and fc1")
    x = F.max_pool2d(F.relu(layer(net, "conv1", x)), 3, 2)
    for name in ("conv2", "conv3"):
        x = F.avg_pool2d(F.relu(layer(net, name, x)), 3, 2)
    return _two_linear(net, x, "fc1", "fc2")


def _two_linear(net: Net, x: Tensor, first: str, second: str) -> Tensor:
    return net.linear(second, F.relu(net.linear(first, x.flatten(1))))


VGG = Skeleton("vgg", vgg, ("stem.conv1",), side=32)
VGG_16 = Architecture((1,) * 13, (64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512))
LENET = Skeleton("lenet", lenet, ("stem.conv1",), side=28)
CIFAR_QUICK = Skeleton("cifar_quick", cifar_quick, ("conv1",), side=32)
