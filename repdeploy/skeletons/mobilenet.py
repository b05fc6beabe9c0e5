"""MobileNet-v1 (arXiv:1704.04861, table 1): a stem and blocks of a depthwise and a pointwise layer, a ReLU behind each."""

from __future__ import annotations

from functools import partial

import torch.nn.functional as F
from torch import Tensor

from repdeploy.errors import NotRecognised
from repdeploy.skeletons.layers import GLOBAL, WINDOW, averaged, layer
from repdeploy.skeletons.net import Architecture, Net, Skeleton

STRIDED = (1, 3, 5, 11)
"""The blocks that halve the resolution."""


def forward(window: int | str, net: Net, x: Tensor) -> Tensor:
    """(batch, channels, height, width) -> logits (batch, classes)."""
    blocks = net.children("stem")
    if not blocks or "stem.0.depthwise" not in net or "linear" not in net:
        raise NotRecognised("no blocks stem.0.depthwise and head linear")
    x = F.relu(layer(net, "conv1", x, stride=2))
    for index, name in enumerate(blocks):
        x = F.relu(layer(net, f"{name}.depthwise", x, stride=2 if index in STRIDED else 1))
        x = F.relu(layer(net, f"{name}.pointwise", x))
    return averaged(net, x, "linear", window=window)


MOBILENET = Skeleton("mobilenet", partial(forward, GLOBAL), ("conv1",), facts=(WINDOW,))
MOBILENET_7X7 = Skeleton("mobilenet_7x7", partial(forward, 7), ("conv1",), facts=(WINDOW,))


def mobilenet_v1(skeleton: Skeleton = MOBILENET) -> Architecture:
    """The published widths (table 1), as one repository or the other builds them."""
    return Architecture((1, 13), (32, 1024), skeleton=skeleton.name)
