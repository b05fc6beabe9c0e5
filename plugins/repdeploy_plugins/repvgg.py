"""RepVGG: a 3x3, a 1x1 and an identity branch, each normalised, summed; the ReLU stays outside.

pre = BN(conv3x3(x)) + BN(conv1x1(x)) [+ BN(x), where widths and resolution stay]
"""

from __future__ import annotations

from repdeploy.algebra import Linear
from repdeploy.family import Block, BlockKind, Family
from repdeploy.skeletons import REP_VGG, Architecture


def layout(dense: str, point: str, identity: str, fused: str) -> BlockKind:
    """The block under one set of names."""

    def describe(block: Block) -> Linear:
        branches = block.conv_norm(dense) + block.conv_norm(point)
        return branches + block.norm(identity) if identity in block else branches

    def inputs(block: Block) -> int | None:
        return block.shape(f"{identity}.weight")[0] if identity in block else None

    return BlockKind(f"{dense}.conv.weight", fused, describe, inputs)


def with_norm(fused: str) -> BlockKind:
    """A block that quantization-aware training has fused already and given a norm of its own."""
    return BlockKind(f"{fused}.conv.weight", fused, lambda block: block.conv_norm(fused))


def variants() -> dict[str, Architecture]:
    """RepVGG-A0 ... B3, and their grouped forms: every second layer in 2 or 4 groups (section 3.4, table 2)."""
    table = {}
    for name, width in WIDTHS.items():
        depths = DEPTHS[name[0]]
        table[f"RepVGG-{name}"] = Architecture(depths, width)
        if name in ("B1", "B2", "B3"):
            table.update({f"RepVGG-{name}g{groups}": Architecture(depths, width, groups) for groups in (2, 4)})
    return table


WIDTHS = {
    "A0": (48, 48, 96, 192, 1280), "A1": (64, 64, 128, 256, 1280), "A2": (64, 96, 192, 384, 1408),
    "B0": (64, 64, 128, 256, 1280), "B1": (64, 128, 256, 512, 2048), "B2": (64, 160, 320, 640, 2560),
    "B3": (64, 192, 384, 768, 2560), "D2se": (64, 160, 320, 640, 2560),
}  # fmt: skip
DEPTHS = {"A": (1, 2, 4, 14, 1), "B": (1, 4, 6, 16, 1), "D": (1, 8, 14, 24, 1)}
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
