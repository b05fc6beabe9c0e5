"""RepViT: a depthwise 3x3, a 1x1 with a bias and the input itself, summed, then one norm; heads behind a norm, averaged.

y = BN(BN(conv3x3(x)) + conv1x1(x) + x); in the first variants (m1, m2, m3) y = BN(conv3x3(x)) + BN(conv1x1(x)) + x
"""

from __future__ import annotations

from repdeploy.algebra import Linear, Scale
from repdeploy.blocks import pair
from repdeploy.family import Block, BlockKind, Family
from repdeploy.skeletons import REP_VIT, Architecture


def describe(block: Block) -> Linear:
    dense = block.conv_norm("conv", "c")
    if "bn" in block:
        return (dense + block.biased("conv1") + block.identity()) >> block.norm("bn")
    return dense + block.conv_norm("conv1", "c") + block.identity()


def is_no_gate(block: Block) -> bool:
    """Squeeze-excite's layers have always been as they are."""
    return not block.name.endswith((".fc1", ".fc2"))


def inputs(block: Block) -> int:
    """Both kernels are depthwise."""
    return block.kernel_shape("conv.c.weight")[0]


def heads(one: str, distilled: str) -> BlockKind:
    """A norm and a fully connected layer, twice where the network was distilled: then their mean is the output."""

    def head(block: Block, name: str) -> Linear:
        return block.norm(f"{name}.bn") >> block.biased(f"{name}.l")

    def describe(block: Block) -> Linear:
        if distilled not in block:
            return head(block, one)
        both = head(block, one) + head(block, distilled)
        return both >> Scale(block.tensor(f"{one}.l.bias").new_full((both.out_channels,), 0.5))

    return BlockKind(f"{one}.l.weight", "", describe, found="in a network", is_dense=True)


def variant(width: int, one: int, two: int, three: int, four: int) -> Architecture:
    """timm's table: blocks per stage, whose widths double; seven convolutions between stages (two mixers, two strided or
    widening ones, a feed-forward block)."""
    depths, widths = [1, 1, one], [width // 2, width, width]
    for depth in (two, three, four):
        depths += [1] * 7 + [depth]
        widths += [width, 2 * width, width, width, 2 * width, 4 * width, 2 * width, 2 * width]
        width *= 2
    return Architecture(tuple(depths), tuple(widths))


FAMILY = Family(
    name="repvit",
    title="BN(3x3-BN + 1x1 + identity) (depthwise)",
    source="arXiv:2307.09283, section 3; THU-MIG/RepViT; timm",
    kinds=(
        # the official deploy model keeps every fused convolution under its block's own name
        BlockKind(
            "conv.c.weight", "", describe, inputs, lambda block: "conv1" in block, ordinary_name=True, fits_fused=is_no_gate
        ),
        heads("head", "head_dist"),
        heads("classifier", "classifier_dist"),
        pair("c", "bn", deploys_as="", fits_fused=is_no_gate),
    ),
    skeletons=(REP_VIT,),
    architectures={
        "repvit_m0_6": variant(40, 1, 1, 8, 1),
        "repvit_m0_9": variant(48, 2, 2, 14, 2),
        "repvit_m1_0": variant(56, 2, 2, 14, 2),
        "repvit_m1_1": variant(64, 2, 2, 12, 2),
        "repvit_m1_5": variant(64, 4, 4, 24, 4),
        "repvit_m2_3": variant(80, 6, 6, 34, 2),
        "repvit_m1": variant(48, 2, 2, 14, 2),
        "repvit_m2": variant(64, 2, 2, 12, 2),
        "repvit_m3": variant(64, 4, 4, 18, 2),
    },
    containers="timm's {state_dict, args, ...}, Hugging Face, {model, ...}, bare",
)
