"""RepLKNet: a large depthwise kernel and a small one on the same centre, each normalised, summed.

y = BN(conv_KxK(x)) [+ BN(conv_kxk(x))]
"""

from __future__ import annotations

from dataclasses import replace

from repdeploy.blocks import large_kernel, pair
from repdeploy.family import Block, Family
from repdeploy.skeletons import REP_LK, Architecture


def inputs(block: Block) -> int:
    """Both kernels are depthwise."""
    return block.kernel_shape("lkb_origin.conv.weight")[0]


def variant(*channels: int) -> Architecture:
    """Stem, then stages of (2, 2, 18, 2) layers, each two blocks, and a transition of two convolutions between (table 5)."""
    one, two, three, four = channels
    return Architecture((4, 4, 2, 4, 2, 36, 2, 4), (one, one, two, two, three, three, four, four))


FAMILY = Family(
    name="replknet",
    title="KxK-BN + kxk-BN (depthwise)",
    source="arXiv:2203.06717, section 3.1; DingXiaoH/RepLKNet-pytorch",
    # all other convolutions stay beside their norms in the official merged model
    kinds=(replace(large_kernel("lkb_origin", "small_conv", "lkb_reparam"), inputs=inputs), pair("conv", "bn")),
    skeletons=(REP_LK,),
    architectures={
        "RepLKNet-31B": variant(128, 256, 512, 1024),
        "RepLKNet-31L": variant(192, 384, 768, 1536),
        "RepLKNet-XL": variant(256, 512, 1024, 2048),
    },
    containers="{model, model_ema, args, ...}, {module}, {state_dict}, bare",
)
