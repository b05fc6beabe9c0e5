"""RepViT (arXiv:2307.09283, section 3) under timm's names and the official ones: depthwise token mixers, 1x1 channel mixers.

Stem of two strided 3x3; between stages a strided depthwise and a 1x1 convolution; the head is the mean of two heads, which the
distillation left.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from repdeploy.errors import NotRecognised
from repdeploy.skeletons.attention import squeeze_excite
from repdeploy.skeletons.layers import required, summed
from repdeploy.skeletons.net import Net, Skeleton


def forward(net: Net, x: Tensor) -> Tensor:
    """(batch, channels, height, width) -> logits (batch, classes). Raises NotRecognised where no naming fits."""
    if "stem.conv1" in net and net.children("stages"):
        return net.linear("head", net.pooled(of_timm(net, x)).mean((2, 3)))
    if "features.0.0" in net:
        return net.linear("classifier", net.pooled(official(net, x)).mean((2, 3)))
    raise NotRecognised("neither stem.conv1 and stages nor features.0.0")


def of_timm(net: Net, x: Tensor) -> Tensor:
    """timm's stages: a `downsample` in front of the blocks, whose `pre_block` belongs to the stage before."""
    x = net.at("stem.conv2", F.gelu(net.at("stem.conv1", x, stride=2)), stride=2)
    for stage in net.children("stages"):
        down = f"{stage}.downsample"
        if down in net:
            x = mixers(net, f"{down}.pre_block", x)
            x = net.at(f"{down}.channel_downsample", net.at(f"{down}.spatial_downsample", x, stride=2))
            x = feed_forward(net, f"{down}.ffn", "conv1", "conv2", x)
        for name in net.children(f"{stage}.blocks"):
            x = mixers(net, name, x)
    return x


def mixers(net: Net, name: str, x: Tensor) -> Tensor:
    x = attended(net, f"{name}.se", net.at(f"{name}.token_mixer", x))
    return feed_forward(net, f"{name}.channel_mixer", "conv1", "conv2", x)


def official(net: Net, x: Tensor) -> Tensor:
    """The flat list: behind the stem every block is a token mixer with its squeeze-excite and a channel mixer; one with a
    third part in its token mixer is strided."""
    first, *blocks = net.children("features")
    x = net.at(f"{first}.2", F.gelu(net.at(f"{first}.0", x, stride=2)), stride=2)
    for name in blocks:
        mixer = f"{name}.token_mixer"
        strided = f"{mixer}.2" in net
        x = attended(net, f"{mixer}.1", net.at(f"{mixer}.0", x, stride=2 if strided else 1))
        if strided:
            x = net.at(f"{mixer}.2", x)
        x = feed_forward(net, f"{name}.channel_mixer.m", "0", "2", x)
    return x


def attended(net: Net, name: str, x: Tensor) -> Tensor:
    if name not in net:
        return x
    required(net, f"{name}.fc1.bias", f"{name}.fc2.bias")
    return squeeze_excite(net, name, x, reduce="fc1", expand="fc2")


def feed_forward(net: Net, name: str, first: str, second: str, x: Tensor) -> Tensor:
    """A residual block of two 1x1 convolutions with a GELU between."""
    return summed(name, net.at(f"{name}.{second}", F.gelu(net.at(f"{name}.{first}", x))), x)


REP_VIT = Skeleton("rep_vit", forward, ("stem.conv1", "features.0.0"), activations=("ReLU", "GELU"))
