"""RepGhost: a depthwise 3x3 and what is fused into it, a batch norm of its input, the input itself, both or neither.

y = BN(conv3x3(x)) [+ BN(x)] [+ x]

A fused identity has no tensors. Where the norm is there, the published variants have no identity; where it is missing,
nothing tells RepGhost with an identity from no fusion at all, and it must be said.
"""

from __future__ import annotations

from repdeploy.algebra import Linear
from repdeploy.blocks import pair
from repdeploy.facts import FactKind, one_of
from repdeploy.family import Block, BlockKind, Family
from repdeploy.skeletons import REP_GHOST, Architecture

FUSION = FactKind(
    "fusion",
    one_of("none", "bn", "identity", "bn+identity"),
    "what RepGhost adds to its depthwise branch: none, bn, identity or bn+identity",
)


def describe(block: Block) -> Linear:
    has_norm = "fusion_bn.0" in block
    fusion = block.choice(
        FUSION.name,
        ("bn", "bn+identity") if has_norm else ("identity", "none"),
        "bn" if has_norm else None,
        "its keys do not tell whether the block adds its input: the variants with (repid) and without (norep) have the same",
    )
    branches = block.conv_norm("cheap_operation", "0", "1")
    if has_norm:
        branches = branches + block.norm("fusion_bn.0")
    return branches + block.identity() if "identity" in fusion else branches


def inputs(block: Block) -> int:
    """The branch is depthwise."""
    return block.kernel_shape("cheap_operation.0.weight")[0]


def multiple_of_four(width: float) -> int:
    """Rounded, but never more than 10 % down (MobileNet's rule)."""
    rounded = max(4, int(width + 2) // 4 * 4)
    return rounded if rounded >= 0.9 * width else rounded + 4


def variants() -> dict[str, Architecture]:
    """Table 3: stages of 1, 1, 1, 1, 1, 1, 5, 1, 4 bottlenecks and a last 1x1; official names and timm's."""
    table = {}
    for width in (0.5, 0.58, 0.8, 1.0, 1.11, 1.3, 1.5, 2.0):
        widths = (16, 24, 24, 40, 40, 80, 112, 160, 160)
        shape = (1, 1, 1, 1, 1, 1, 5, 1, 4), tuple(multiple_of_four(base * width) for base in widths)
        default = Architecture(*shape, facts={"fusion": "bn", "shortcut": True})
        table[f"repghostnet_{str(width).replace('.', '_')}x"] = default
        table[f"repghostnet_{round(100 * width):03d}"] = default
        if width == 0.5:
            table["repghostnet_norep_0_5x"] = Architecture(*shape, facts={"fusion": "none", "shortcut": True})
            table["repghostnet_repid_0_5x"] = Architecture(*shape, facts={"fusion": "identity", "shortcut": True})
            table["repghostnet_wo_0_5x"] = Architecture(*shape, facts={"fusion": "bn", "shortcut": False})
    return table


FAMILY = Family(
    name="repghost",
    title="3x3-BN + BN + identity (depthwise)",
    source="arXiv:2211.06088, section 3.3; ChengpengChen/RepGhost; timm",
    # all other convolutions stay beside their norms in the official deploy model
    kinds=(BlockKind("cheap_operation.0.weight", "cheap_operation", describe, inputs), pair("0", "1")),
    skeletons=(REP_GHOST,),
    architectures=variants(),
    facts=(FUSION,),
    containers="timm's {state_dict, state_dict_ema, args, ...}, {state_dict}, Hugging Face, bare",
)
