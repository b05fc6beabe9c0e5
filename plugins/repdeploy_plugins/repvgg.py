"""RepVGG: a 3x3, a 1x1 and an identity branch, each normalised, summed; the ReLU stays outside.

pre = BN(conv3x3(x)) + BN(conv1x1(x)) [+ BN(x), where widths and resolution stay]
"""

from __future__ import annotations

from dataclasses import replace

from repdeploy.algebra import Linear
from repdeploy.family import Block, BlockKind, Family
from repdeploy.skeletons import REP_VGG, Architecture, rep_vgg_variants


def layout(dense: str, point: str, identity: str, fused: str) -> BlockKind:
    """The block under one set of names."""

    def describe(block: Block) -> Linear:
        return block.with_identity(block.conv_norm(dense) + block.conv_norm(point))

    return BlockKind(f"{dense}.conv.weight", fused, describe, identity=identity)


def with_norm(fused: str) -> BlockKind:
    """A block that quantization-aware training has fused already and given a norm of its own."""
    return BlockKind(f"{fused}.conv.weight", fused, lambda block: block.conv_norm(fused))


def variants() -> dict[str, Architecture]:
    """The published ones, and their grouped forms: every second layer in 2 or 4 groups (section 3.4, table 2)."""
    table = rep_vgg_variants()
    for name in ("RepVGG-B1", "RepVGG-B2", "RepVGG-B3"):
        table.update({f"{name}g{groups}": replace(table[name], groups=groups) for groups in (2, 4)})
    return table


PLUS = {"RepVGGplus-L2pse": Architecture((1, 8, 14, 12, 12, 1), (64, 160, 320, 640, 640, 2560))}

FAMILY = Family(
    name="repvgg",
    title="3x3-BN + 1x1-BN + BN",
    source="arXiv:2101.03697, section 3.3; DingXiaoH/RepVGG; timm",
    kinds=(
        layout("rbr_dense", "rbr_1x1", "rbr_identity", "rbr_reparam"),
        layout("conv_kxk", "conv_1x1", "identity", "reparam_conv"),
        with_norm("rbr_reparam"),
    ),
    skeletons=(REP_VGG,),
    architectures=variants() | PLUS,
    containers="bare, {state_dict} with module., {model, ema, config}, timm, Hugging Face",
)
