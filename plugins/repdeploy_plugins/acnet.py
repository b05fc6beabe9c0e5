"""ACNet: a square kernel and its horizontal and vertical skeleton, each normalised, summed.

y = BN(conv_kxk(x)) + BN(conv_kx1(x)) + BN(conv_1xk(x)) [, then one more BN]

All three look at the same centres: with a padding below k // 2 the one-dimensional branches read a cropped input. The 1-D
kernels of the block of 2019 have three taps beside any square kernel.
"""

from __future__ import annotations

from repdeploy.algebra import Linear
from repdeploy.blocks import pair
from repdeploy.family import Block, BlockKind, Family
from repdeploy.skeletons import (
    BOTTLENECK_7X7,
    CIFAR_QUICK,
    CIFAR_RESNET,
    LENET,
    MOBILENET,
    MOBILENET_7X7,
    RESNET,
    RESNET_7X7,
    VGG,
    VGG_16,
    WIDE_RESNET,
    Architecture,
    Skeleton,
    cifar_resnet,
    mobilenet_v1,
    refusing,
    resnet_variants,
)


def layout(level: str) -> BlockKind:
    """The block itself, or one level down where the builder puts an activation behind it."""

    def branch(block: Block, name: str) -> Linear:
        return block.conv(f"{level}{name}_conv") >> block.norm(f"{level}{name}_bn")

    def describe(block: Block) -> Linear:
        block.undilated("its one-dimensional branches cannot be dilated: the official block raises")
        branches = branch(block, "square") + branch(block, "ver") + branch(block, "hor")
        return branches >> block.norm(f"{level}last_bn") if f"{level}last_bn" in block else branches

    return BlockKind(f"{level}square_conv.weight", f"{level}fused_conv", describe)


def official(skeleton: Skeleton, activated: str) -> Skeleton:
    """A network of ACNet's own repository, which puts a level `acb` where a ReLU follows; the DBB repository's networks of
    ACBs have the same names without that level, bottlenecks among them, and another head."""
    names = (f"{activated}.square_conv", f"{activated}.fused_conv", "stage1.0.conv3")
    return refusing(skeleton, names, "it is a network of the DBB repository")


FAMILY = Family(
    name="acnet",
    title="kxk-BN + kx1-BN + 1xk-BN",
    source="arXiv:1908.03930, section 3; DingXiaoH/ACNet, DingXiaoH/DiverseBranchBlock",
    # a convolution without an ACB (1x1, 7x7) stays beside its norm in the official deploy model
    kinds=(layout(""), layout("acb."), pair("conv", "bn")),
    skeletons=(
        official(RESNET_7X7, "stage1.0.conv1"),
        BOTTLENECK_7X7,
        CIFAR_RESNET,
        official(MOBILENET_7X7, "conv1"),
        VGG,
        LENET,
        CIFAR_QUICK,
        WIDE_RESNET,
        RESNET,
        MOBILENET,
    ),
    architectures={
        **resnet_variants(18, 34, prefix="sres", skeleton=RESNET_7X7),
        **resnet_variants(50, prefix="sres", skeleton=BOTTLENECK_7X7),
        **resnet_variants(18, 50, prefix="ResNet-"),
        "src56": cifar_resnet(9),
        "src110": cifar_resnet(18),
        "vc": VGG_16,
        "smi1": mobilenet_v1(MOBILENET_7X7),
        "MobileNet": mobilenet_v1(),
        "cfqkbnc": Architecture((1, 1, 1), (32, 32, 64)),
        "wrnc16plain": Architecture((1, 2, 2, 2), (16, 128, 256, 512)),
    },
    containers="hdf5 (deps or none), {model, optimizer, ...}, {state_dict} with module., bare",
)
