"""Wide ResNet for 32x32 images (arXiv:1605.07146) with pre-activation: batch norm and ReLU stand before each convolution."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from repdeploy.errors import NotRecognised
from repdeploy.skeletons.layers import WINDOW, averaged, summed
from repdeploy.skeletons.net import Net, Skeleton

BEFORE_RELU = "a ReLU follows it and its input is used a second time"


def forward(net: Net, x: Tensor) -> Tensor:
    """(batch, 3, height, width) with sides 29 to 32 -> logits (batch, classes)."""
    if "last_bn" not in net or not net.children("stage1", "block"):
        raise NotRecognised("no stage1.block1 and last_bn")
    x = net.at("conv1", x)
    for stage in ("stage1", "stage2", "stage3"):
        for index, name in enumerate(net.children(stage, "block")):
            x = block(net, name, x, 2 if index == 0 and stage != "stage1" else 1)
    x = net.norm("last_bn", x, why="it follows a residual sum")
    return averaged(net, x, "linear", window=8, step=1)


def block(net: Net, name: str, x: Tensor, stride: int) -> Tensor:
    """Two convolutions and, where it has weights, a 1x1 shortcut, each behind a norm and a ReLU of its own."""
    first, second, shortcut = (f"{name}.{part}" if name else part for part in ("conv1", "conv2", "proj"))
    branch = F.relu(net.norm(f"{first}.bn", x, why=BEFORE_RELU))
    branch = net.at(_convolution(net, first), branch, stride=stride, behind=f"{second}.bn")
    branch = net.at(_convolution(net, second), F.relu(branch))
    if shortcut in net:
        x = F.relu(net.norm(f"{shortcut}.bn", x, why=BEFORE_RELU))
        x = net.at(_convolution(net, shortcut), x, stride=stride)
    return summed(name, branch, x)


def _convolution(net: Net, name: str) -> str:
    """A plain convolution beside its norm is a slot of its own: taken together they would be read in the wrong order."""
    return f"{name}.conv" if f"{name}.conv" in net else name


WIDE_RESNET = Skeleton("wide_resnet", forward, ("conv1",), side=32, facts=(WINDOW,))
