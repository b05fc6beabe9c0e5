"""OREPA: branches without norms, scaled per output channel, squeezed into one kernel at every training step; one norm.

W = v0 kxk + v1 1x1-AVG + v2 1x1-PRIOR + v3 1x1-kxk + v4 1x1 + v5 DEPTHWISE-1x1;  y = BN(conv(x, W))

OREPA_VGG: BN(conv(x, W without the 1x1)) + BN(1x1) + BN. A stem multiplies 3x3 kernels by cross-correlation.
Rows of `vector`, the averaging map, the frequency filters and the identity are read from the file: training may change them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce

from repdeploy.algebra import Conv, Flip, Linear, Online, Scale
from repdeploy.blocks import pair
from repdeploy.errors import InputError
from repdeploy.family import Block, BlockKind, Family
from repdeploy.skeletons import REP_VGG, RESNET, Architecture, refusing, rep_vgg_variants, resnet_variants

EXPANSION = 8
"""Rows of the depthwise branch per input channel."""


def kernel(block: Block, prefix: str, names: str, padding: int, stride: int) -> Linear:
    """W of section 3.3. `prefix`: in front of every key; `names`: what the repository calls the weights (orepa, rbr);
    `padding`: that of the kxk kernels."""
    groups, key = block.groups, f"{prefix}weight_{names}_"
    channels = groups * block.kernel_shape(f"{key}origin")[1]
    origin = block.conv(f"{key}origin", padding=padding, stride=stride)
    outputs, size = origin.out_channels, origin.geometry.kernel_size

    def point(part: str) -> Conv:
        return block.conv(f"{key}{part}", stride=1, padding=0)

    def filtered(part: str, *shape: int) -> Conv:
        """A buffer as one filter per output channel."""
        if block.shape(f"{key}{part}") != shape:
            raise InputError(f"{block.path(key + part)} has shape {block.shape(key + part)}; expected {shape}")
        filters = block.tensor(f"{key}{part}").expand(outputs, *size).unsqueeze(1)
        return Conv(filters, None, origin.stride, origin.pads, origin.dilation, outputs)

    first: Linear = point("1x1_kxk_idconv1" if f"{key}1x1_kxk_idconv1" in block else "1x1_kxk_conv1")
    if f"{prefix}id_tensor" in block:
        first = first + block.conv(f"{prefix}id_tensor", stride=1, padding=0)
    depthwise = block.conv(f"{key}gconv_dw", padding=padding, stride=stride, groups=channels)
    rows = block.tensor(f"{key}gconv_pw")  # in the order (out / groups, groups), unlike those of a grouped convolution
    branches: list[Linear] = [
        origin,
        point("avg_conv") >> filtered("avg_avg", *size),
        point("pfir_conv") >> filtered("prior", outputs, *size),
        first >> block.conv(f"{key}1x1_kxk_conv2", padding=padding, stride=stride),
    ]
    if names == "orepa":
        centred = padding - size[0] // 2 * origin.dilation[0]
        branches.append(block.conv(f"{key}1x1", padding=centred, stride=stride))
    branches.append(depthwise >> Conv(rows.unflatten(0, (-1, groups)).transpose(0, 1).flatten(0, 1), groups=groups))
    # a row more than there are branches is memory that nobody initialised
    vector = block.tensor(f"{prefix}vector", rows=len(branches))
    scaled = [branch >> Scale(row) for branch, row in zip(branches, vector, strict=True)]
    return sum(scaled[1:], start=scaled[0])


def orepa(block: Block) -> Linear:
    half = block.kernel_shape("weight_orepa_origin")[2] // 2
    return Online(kernel(block, "", "orepa", block.padding(block.dilation * half), block.stride)) >> block.norm("bn")


def point(block: Block) -> Linear:
    """OREPA_1x1: W = v0 O + v1 C2 C1."""
    one, two = block.tensor("vector", rows=2)
    origin, series = block.conv("weight_or1x1_origin"), block.conv("weight_or1x1_l2i_conv1", stride=1)
    weights = (origin >> Scale(one)) + (series >> block.conv("weight_or1x1_l2i_conv2") >> Scale(two))
    return Online(weights) >> block.norm("bn")


def stem(block: Block) -> Linear:
    """LargeConv and LargeConvBase: n 3x3 kernels make one of 2n + 1; the first has all the padding, the last the stride."""
    count = block.numbered("", "weight")
    padding = block.padding(block.dilation * count)

    def part(index: int) -> Linear:
        border, stride = padding if index == 0 else 0, block.stride if index == count - 1 else 1
        if f"weight{index}.weight_orepa_origin" in block:
            return kernel(block, f"weight{index}.", "orepa", border, stride)
        return block.conv(f"weight{index}", padding=border, stride=stride)

    whole = reduce(Linear.__rshift__, (Flip(part(index)) for index in range(1, count)), part(0))
    return Online(whole) >> block.norm("bn")


def vgg(block: Block) -> Linear:
    """RepVGGBlock_OREPA; without an identity branch its vector may have a row that nothing reads."""
    if block.groups != 1:
        raise InputError(
            f"block {block.name or '(the whole file)'} is an OREPA_VGG block of {block.groups} groups, which its own code "
            "does not run: its kernel generation raises",
            hint="check where the file comes from: these weights cannot have been trained by the official code",
        )
    dense = Online(kernel(block, "rbr_dense.", "rbr", block.padding(block.dilation), block.stride))
    branches = (dense >> block.norm("rbr_dense.bn")) + block.conv_norm("rbr_1x1")
    return block.with_identity(branches)


# OREPA_VGG in a ResNet can be built, and then applies a ReLU behind the last convolution of each block too
OREPA_RESNET = refusing(
    RESNET,
    ("stage1.0.conv1.rbr_dense", "stage1.0.conv1.rbr_reparam"),
    "OREPA_VGG blocks in a ResNet apply a ReLU in front of the residual sum too",
)


def inputs(prefix: str) -> Callable[[Block], int]:
    return lambda block: block.kernel_shape(f"{prefix}gconv_dw")[0] // EXPANSION


def base_inputs(block: Block) -> int:
    """Every kernel behind the first has out / groups columns."""
    out, within = block.kernel_shape("weight0")[:2]
    return within * (out // block.kernel_shape("weight1")[1])


FAMILY = Family(
    name="orepa",
    title="(kxk + 1x1-AVG + 1x1-PRIOR + 1x1-kxk + 1x1 + DW-1x1)-BN",
    source="arXiv:2204.00826, section 3; JUGGHM/OREPA_CVPR2022",
    kinds=(
        BlockKind("weight_orepa_origin", "orepa_reparam", orepa, inputs("weight_orepa_")),
        BlockKind("weight_or1x1_origin", "or1x1_reparam", point),
        BlockKind("rbr_dense.weight_rbr_origin", "rbr_reparam", vgg, inputs("rbr_dense.weight_rbr_"), identity="rbr_identity"),
        BlockKind("weight0.weight_orepa_origin", "or_large_reparam", stem, inputs("weight0.weight_orepa_"), geometry_of=""),
        BlockKind(
            "weight0",
            "or_large_reparam",
            stem,
            base_inputs,
            fits=lambda block: "weight1" in block and "bn" in block,
            geometry_of="",
        ),
        pair("conv", "bn", deploys_as="conv"),
    ),
    skeletons=(OREPA_RESNET, REP_VGG),
    architectures={
        **resnet_variants(18, 34, 50, 101, prefix="ResNet-"),
        "ResNet-18-1.5x": Architecture((1, 2, 2, 2, 2), (96, 96, 192, 384, 768)),
        "ResNet-18-2x": Architecture((1, 2, 2, 2, 2), (128, 128, 256, 512, 1024)),
        "ResNeXt-50": Architecture((1, 3, 4, 6, 3), (64, 256, 512, 1024, 2048), 32),
        **rep_vgg_variants("A0", "A1", "A2", "B1"),
    },
    containers="{state_dict} with module., bare",
)
