"""Diverse Branch Block: a convolution as an Inception-like unit of four branches, each normalised, summed.

Reparam(kxk) = kxk-BN + 1x1-BN + 1x1-BN-kxk-BN + 1x1-BN-AVG-BN; depthwise: kxk-BN + 1x1-BN-kxk-BN + AVG-BN

Behind the first norm of a series the border is that norm's answer to zero, not zero (BNAndPad).
"""

from __future__ import annotations

import torch

from repdeploy.algebra import AveragePool, Linear, Pad
from repdeploy.blocks import pair
from repdeploy.family import Block, BlockKind, Family
from repdeploy.skeletons import MOBILENET, RESNET, mobilenet_v1, resnet_variants


def describe(block: Block) -> Linear:
    block.undilated("only its first branch would dilate: the official block raises")
    origin = block.conv_norm("dbb_origin")
    series = padded_norm(block, first(block), "dbb_1x1_kxk.bn1")
    series = series >> block.conv("dbb_1x1_kxk.conv2", padding=0) >> block.norm("dbb_1x1_kxk.bn2")
    if "dbb_avg.conv" not in block and "dbb_1x1" not in block:  # depthwise
        return origin + series + (average(block, border(block)) >> block.norm("dbb_avg.avgbn"))
    pooled = padded_norm(block, block.conv("dbb_avg.conv", stride=1, padding=0), "dbb_avg.bn")
    pooled = pooled >> average(block, 0) >> block.norm("dbb_avg.avgbn")
    return origin + block.conv_norm("dbb_1x1") + series + pooled


def first(block: Block) -> Linear:
    """The 1x1 convolution in front of the kxk one; `idconv1` stores what training added to the identity."""
    if "dbb_1x1_kxk.idconv1" in block:
        return block.conv("dbb_1x1_kxk.idconv1", stride=1, padding=0) + block.identity()
    return block.conv("dbb_1x1_kxk.conv1", stride=1, padding=0)


def padded_norm(block: Block, before: Linear, name: str) -> Linear:
    """BNAndPad (section 3.2); in the files of March 2021 its norm has no level of its own."""
    norm = block.norm(f"{name}.bn" if f"{name}.bn" in block else name)
    return before >> norm >> Pad(norm.of_zero(), (border(block),) * 4)


def border(block: Block) -> int:
    return block.kernel_shape("dbb_origin.conv.weight")[2] // 2


def average(block: Block, padding: int) -> AveragePool:
    """Over a window as large as the kernel, the zeros of the padding counted."""
    channels, _, *window = block.kernel_shape("dbb_origin.conv.weight")
    like = torch.ones(channels, dtype=torch.float64)
    return AveragePool(like, (window[0], window[1]), (block.stride, block.stride), (padding, padding))


def inputs(block: Block) -> int:
    """idconv1 maps every input to itself; conv1 and conv2 tell how many groups share its rows."""
    within = block.kernel_shape("dbb_origin.conv.weight")[1]
    key = "dbb_1x1_kxk.idconv1.weight"
    if key in block:
        return block.kernel_shape(key)[0]
    rows = block.kernel_shape("dbb_1x1_kxk.conv1.weight")[0]
    return within * (rows // block.kernel_shape("dbb_1x1_kxk.conv2.weight")[1])


FAMILY = Family(
    name="dbb",
    title="kxk-BN + 1x1-BN + 1x1-BN-kxk-BN + 1x1-BN-AVG-BN",
    source="arXiv:2103.13425, section 3; DingXiaoH/DiverseBranchBlock, JUGGHM/OREPA_CVPR2022",
    kinds=(
        BlockKind("dbb_origin.conv.weight", "dbb_reparam", describe, inputs),
        pair("conv", "bn", deploys_as="conv"),
    ),
    skeletons=(RESNET, MOBILENET),
    architectures={
        **resnet_variants(18, 34, 50, 101, prefix="ResNet-"),
        "MobileNet": mobilenet_v1(),
    },
    containers="{state_dict} with module., bare, hdf5 (stage0. or not)",
)
