"""RepGhostNet (arXiv:2211.06088, section 3.4): bottlenecks of two RepGhost modules, official and timm's names alike."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from repdeploy.errors import NotRecognised
from repdeploy.facts import FactKind, yes_or_no
from repdeploy.skeletons.attention import squeeze_excite
from repdeploy.skeletons.layers import summed
from repdeploy.skeletons.net import Net, Skeleton

SHORTCUT = FactKind("shortcut", yes_or_no, "whether RepGhost bottlenecks of stride 1 and equal widths add their input")


def forward(net: Net, x: Tensor) -> Tensor:
    """(batch, channels, height, width) -> logits (batch, classes)."""
    stages = net.children("blocks")
    if not stages or "blocks.0.0.ghost1" not in net or "conv_head" not in net:
        raise NotRecognised("no blocks.0.0.ghost1 and conv_head")
    x = F.relu(net.at("conv_stem", x, stride=2, behind="bn1"))
    for stage in stages:
        for name in net.children(stage):
            # the last one is a plain 1x1
            plain = f"{name}.ghost1" not in net
            x = F.relu(net.at(f"{name}.conv", x, behind=f"{name}.bn1")) if plain else bottleneck(net, name, x)
    x = F.relu(net.at("conv_head", net.pooled(x).mean((2, 3), keepdim=True)))
    return net.linear("classifier", x.flatten(1))


def bottleneck(net: Net, name: str, x: Tensor) -> Tensor:
    """Two modules with a strided depthwise convolution and squeeze-excite between, where the block has them."""
    stride = 2 if f"{name}.conv_dw" in net else 1
    y = module(net, f"{name}.ghost1", x, activated=True)
    if stride == 2:
        y = net.at(f"{name}.conv_dw", y, stride=2, behind=f"{name}.bn_dw")
    if f"{name}.se" in net:
        y = squeeze_excite(net, f"{name}.se", y, reduce="conv_reduce", expand="conv_expand", gate=F.hardsigmoid)
    y = module(net, f"{name}.ghost2", y, activated=False)
    if f"{name}.shortcut" in net:
        x = net.at(f"{name}.shortcut.0", x, stride=stride, behind=f"{name}.shortcut.1")
        return summed(name, y, net.at(f"{name}.shortcut.2", x, behind=f"{name}.shortcut.3"))
    return summed(name, y, x) if net.fact(SHORTCUT.name, True) else y


def module(net: Net, name: str, x: Tensor, activated: bool) -> Tensor:
    """A 1x1 convolution, then the re-parameterized depthwise one; a ReLU behind each in the bottleneck's first module."""
    x = net.at(f"{name}.primary_conv", x)
    x = net.at(name, F.relu(x) if activated else x)
    return F.relu(x) if activated else x


REP_GHOST = Skeleton("rep_ghost", forward, ("conv_stem",), facts=(SHORTCUT,))
