"""FastViT (arXiv:2303.14189, section 3) under timm's names and the official ones: RepMixer or attention as token mixers,
convolutional feed-forward blocks.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from repdeploy.errors import InputError, NotRecognised
from repdeploy.facts import FactKind, positive_int, yes_or_no
from repdeploy.skeletons.attention import squeeze_excite
from repdeploy.skeletons.layers import required, summed
from repdeploy.skeletons.net import Net, Skeleton

HEAD_DIM = FactKind("head_dim", positive_int, "channels of one attention head")
DOWNSAMPLE_ACT = FactKind(
    "downsample_act", yes_or_no, "whether a GELU follows the large kernels between stages, as in the mci variants"
)
STEM_STRIDES = (2, 2, 1)


def forward(net: Net, x: Tensor) -> Tensor:
    """(batch, channels, height, width) -> logits (batch, classes). Raises NotRecognised where no naming fits."""
    if "stem.0" in net and "final_conv" in net:
        x = stem(net, "stem", x)
        for stage in net.children("stages"):
            for part in (f"{stage}.downsample", f"{stage}.pos_emb", f"{stage}.blocks"):
                x = stage_or_layer(net, part, x)
        return head(net, "final_conv", "head.fc", x)
    if "patch_embed.0" in net and "conv_exp" in net:
        x = stem(net, "patch_embed", x)
        for name in net.children("network"):
            x = stage_or_layer(net, name, x)
        return head(net, "conv_exp", "head", x)
    raise NotRecognised("neither stem.0 and final_conv nor patch_embed.0 and conv_exp")


def stem(net: Net, name: str, x: Tensor) -> Tensor:
    blocks = net.children(name)
    if len(blocks) != len(STEM_STRIDES):
        raise NotRecognised(f"{name} has {len(blocks)} blocks, expected {len(STEM_STRIDES)}")
    for block, stride in zip(blocks, STEM_STRIDES, strict=True):
        x = mobile_one(net, block, x, stride)
    return x


def stage_or_layer(net: Net, name: str, x: Tensor) -> Tensor:
    """What stands under a name, if anything: a downsampling, a position encoding, or a stage of blocks."""
    if f"{name}.proj" in net:
        return downsample(net, name, x)
    blocks = net.children(name)
    if name in net and not blocks:
        return net.at(name, x)
    for block in blocks:
        x = attention_block(net, block, x) if f"{block}.token_mixer.qkv" in net else mixer_block(net, block, x)
    return x


def downsample(net: Net, name: str, x: Tensor) -> Tensor:
    """A strided large kernel, one group per input channel, then a 1x1 block."""
    large, point = net.children(f"{name}.proj")
    x = attended(net, large, net.at(large, x, stride=2))
    squeezes = any(f"{other}.se" in net for other in _large_kernels(net))
    if net.fact(DOWNSAMPLE_ACT.name, squeezes):
        x = F.gelu(x)
    return mobile_one(net, point, x, 1)


def _large_kernels(net: Net) -> list[str]:
    stages = [f"{stage}.downsample" for stage in net.children("stages")] + list(net.children("network"))
    return [f"{name}.proj.0" for name in stages]


def mobile_one(net: Net, name: str, x: Tensor, stride: int) -> Tensor:
    return F.gelu(attended(net, name, net.at(name, x, stride=stride)))


def attended(net: Net, name: str, x: Tensor) -> Tensor:
    if f"{name}.se" not in net:
        return x
    reduce, expand = ("fc1", "fc2") if f"{name}.se.fc1" in net else ("reduce", "expand")
    return squeeze_excite(net, f"{name}.se", x, reduce=reduce, expand=expand)


def mixer_block(net: Net, name: str, x: Tensor) -> Tensor:
    x = net.at(f"{name}.token_mixer", x)
    return summed(name, feed_forward(net, name, "layer_scale", x), x)


def attention_block(net: Net, name: str, x: Tensor) -> Tensor:
    x = summed(name, attention(net, name, x), x)
    return summed(name, feed_forward(net, name, "layer_scale_2", x), x)


def attention(net: Net, name: str, x: Tensor) -> Tensor:
    """Multi-head self-attention over the places of the map, behind a norm."""
    height, width = x.shape[2:]
    size = net.fact(HEAD_DIM.name, 32)
    projected = net.at(f"{name}.token_mixer.qkv", x, before=f"{name}.norm")
    channels = projected.shape[1] // 3
    if channels % size or projected.shape[1] % 3:
        raise InputError(
            f"{name} has {channels} channels, which do not divide into attention heads of {size}",
            hint="state how many channels a head has: --set head_dim=NUMBER",
        )
    query, key, value = projected.unflatten(1, (3, channels // size, size)).flatten(4).unbind(1)
    required(net, f"{name}.token_mixer.proj.bias")
    weights = ((query * size**-0.5).transpose(-2, -1) @ key).softmax(-1)
    mixed = (value @ weights.transpose(-2, -1)).flatten(1, 2).unflatten(2, (height, width))
    return net.at(f"{name}.token_mixer.proj", mixed, behind=_scale(net, f"{name}.layer_scale_1"))


def feed_forward(net: Net, name: str, scale: str, x: Tensor) -> Tensor:
    """A depthwise convolution, then two 1x1 with a GELU between."""
    inside = f"{name}.mlp" if f"{name}.mlp" in net else f"{name}.convffn"
    required(net, f"{inside}.fc1.bias", f"{inside}.fc2.bias")
    x = F.gelu(net.at(f"{inside}.fc1", net.at(f"{inside}.conv", x)))
    return net.at(f"{inside}.fc2", x, behind=_scale(net, f"{name}.{scale}"))


def _scale(net: Net, name: str) -> str | None:
    """Layer scales stand in every block, or in none. Raises InputError where only this one is missing."""
    stages = (*(f"{stage}.blocks" for stage in net.children("stages")), *net.children("network"))
    blocks = (block for stage in stages for block in net.children(stage))
    if any(f"{block}.{part}" in net for block in blocks for part in ("layer_scale", "layer_scale_2")):
        required(net, name)
        return name
    return None


def head(net: Net, expansion: str, classifier: str, x: Tensor) -> Tensor:
    required(net, f"{expansion}.se", f"{classifier}.bias")
    return net.linear(classifier, mobile_one(net, expansion, net.pooled(x), 1).mean((2, 3)))


FAST_VIT = Skeleton(
    "fast_vit", forward, ("stem.0", "patch_embed.0"), side=256, facts=(HEAD_DIM, DOWNSAMPLE_ACT), activations=("ReLU", "GELU")
)
