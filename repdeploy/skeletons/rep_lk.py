"""RepLKNet (arXiv:2203.06717, section 4): blocks of a large depthwise kernel, feed-forward blocks of 1x1 convolutions."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from repdeploy.errors import NotRecognised
from repdeploy.skeletons.layers import averaged, summed
from repdeploy.skeletons.net import Net, Skeleton


def forward(net: Net, x: Tensor) -> Tensor:
    """(batch, channels, height, width) -> logits (batch, classes)."""
    stem = net.children("stem")
    if len(stem) != 4 or not net.children("stages") or "head" not in net:
        raise NotRecognised("no stem of four convolutions, stages and head")
    for index, name in enumerate(stem):
        x = F.relu(net.at(name, x, stride=2 if index in (0, 3) else 1))
    for number, stage in enumerate(net.children("stages")):
        for name in net.children(f"{stage}.blocks"):
            branch = feed_forward if f"{name}.preffn_bn" in net else large_kernel
            x = summed(name, branch(net, name, x), x)
        for index, name in enumerate(net.children(f"transitions.{number}")):
            x = F.relu(net.at(name, x, stride=1 if index == 0 else 2))
    x = net.norm("norm", x, why="it follows a residual sum, in front of the head's pooling")
    return averaged(net, x, "head")


def large_kernel(net: Net, name: str, x: Tensor) -> Tensor:
    x = F.relu(net.at(f"{name}.pw1", x, before=f"{name}.prelkb_bn"))
    return net.at(f"{name}.pw2", F.relu(net.at(f"{name}.large_kernel", x)))


def feed_forward(net: Net, name: str, x: Tensor) -> Tensor:
    return net.at(f"{name}.pw2", F.gelu(net.at(f"{name}.pw1", x, before=f"{name}.preffn_bn")))


REP_LK = Skeleton("rep_lk", forward, ("stem.0",), activations=("ReLU", "GELU"))
