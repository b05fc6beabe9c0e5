"""A family of somebody else: a 5x5 and a pooled branch, in a small network of its own. One file, as for ours."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from repdeploy.algebra import AveragePool, Linear
from repdeploy.family import Block, BlockKind, Family
from repdeploy.skeletons import Net, Skeleton


def describe(block: Block) -> Linear:
    wide = block.conv_norm("wide")
    pool = AveragePool(torch.ones(block.shape("wide.conv.weight")[1], dtype=torch.float64), (3, 3), (1, 1), (1, 1))
    return wide + (pool >> block.conv("point"))


def forward(net: Net, x: Tensor) -> Tensor:
    for name in net.children("layers"):
        x = F.gelu(net.at(name, x))
    return net.linear("classes", net.pooled(x).amax((2, 3)))


FAMILY = Family(
    name="twobranch",
    title="5x5-BN + AVG-1x1",
    source="tests",
    kinds=(BlockKind("wide.conv.weight", "whole", describe),),
    skeletons=(Skeleton("twobranch", forward, stems=("layers.0",), side=32),),
)
