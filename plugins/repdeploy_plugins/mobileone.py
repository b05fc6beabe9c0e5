"""MobileOne: n copies of the same convolution, a 1x1 and an identity branch, each normalised, summed; ReLU outside.

y = BN(conv_kxk(x)) + ... + BN(conv_kxk(x)) [+ BN(conv1x1(x))] [+ BN(x)]; depthwise 3x3 and dense 1x1 blocks in turn
"""

from __future__ import annotations

from repdeploy.blocks import mobile_one
from repdeploy.family import Family
from repdeploy.skeletons import REP_VGG, Architecture


def variant(*multipliers: float) -> Architecture:
    """Blocks and widths of table 2: each block is a depthwise and a pointwise one."""
    widths = tuple(int(base * multiplier) for base, multiplier in zip((64, 128, 256, 512), multipliers, strict=True))
    return Architecture((1, 4, 16, 20, 2), (min(64, widths[0]), *widths))


FAMILY = Family(
    name="mobileone",
    title="n (kxk-BN) + 1x1-BN + BN",
    source="arXiv:2206.04040, section 3.2; apple/ml-mobileone; timm",
    kinds=(
        mobile_one("rbr_conv", "rbr_scale", "rbr_skip"),
        mobile_one("conv_kxk", "conv_scale", "identity"),
    ),
    skeletons=(REP_VGG,),
    architectures={
        "mobileone_s0": variant(0.75, 1.0, 1.0, 2.0),
        "mobileone_s1": variant(1.5, 1.5, 2.0, 2.5),
        "mobileone_s2": variant(1.5, 2.0, 2.5, 4.0),
        "mobileone_s3": variant(2.0, 2.5, 3.0, 4.0),
        "mobileone_s4": variant(3.0, 3.5, 3.5, 4.0),
    },
    containers="bare, timm, Hugging Face",
)
