"""FastViT: token mixers, position encodings and large kernels that all become one convolution; MobileOne blocks between.

RepMixer: y = x + g (BN(conv3x3(x)) + BN(conv1x1(x)) + BN(x) - BN(x)), with a factor g per channel (LayerScale)
position encoding: y = conv7x7(x) + x; downsampling: y = BN(conv7x7(x)) + BN(conv3x3(x)), strided
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from repdeploy.algebra import Linear
from repdeploy.blocks import large_kernel, mobile_one, over_parameterized, pair
from repdeploy.family import Block, BlockKind, Family
from repdeploy.skeletons import FAST_VIT, Architecture


def called(*names: str) -> Callable[[Block], bool]:
    """Other families deploy under the same name; the module's own name tells."""
    return lambda block: block.name.endswith(names)


def rep_mixer(copies: str, scale: str, identity: str) -> BlockKind:
    """Section 3.1, under one set of names; the second norm is what training subtracts from the first branches."""

    def describe(block: Block) -> Linear:
        mixer = over_parameterized(block, f"mixer.{copies}", f"mixer.{scale}") + block.norm(f"mixer.{identity}")
        mixed = mixer - block.norm(f"norm.{identity}")
        scales = [part for part in ("layer_scale.gamma", "layer_scale") if block.holds(part)]
        return block.identity() + (mixed >> block.scale(scales[0]) if scales else mixed)

    return BlockKind(
        f"mixer.{copies}.0.conv.weight",
        "reparam_conv",
        describe,
        depthwise(f"mixer.{copies}.0.conv.weight"),
        fits=lambda block: f"norm.{identity}.running_mean" in block,
        fits_fused=called("token_mixer"),
    )


def position_encoding(part: str) -> BlockKind:
    """Section 3.3 (conditional position encoding): a depthwise convolution with a bias, and the input itself."""

    def describe(block: Block) -> Linear:
        return block.biased(part) + block.identity()

    return BlockKind(
        f"{part}.weight",
        "reparam_conv",
        describe,
        depthwise(f"{part}.weight"),
        fits=lambda block: block.shape(f"{part}.weight")[1:2] == (1,),
        found="in a network" if part == "pe" else "by key",
        fits_fused=called("pos_emb"),
    )


def depthwise(anchor: str) -> Callable[[Block], int]:
    return lambda block: block.kernel_shape(anchor)[0]


def of_another(kind: BlockKind) -> BlockKind:
    """A block that also stands in other families' networks, and proves none of this one."""
    return replace(kind, found="in a network")


def variant(depths: tuple[int, ...], width: int, attends: bool = False, downsample_act: bool = False) -> Architecture:
    """Widths double from stage to stage (table 2): a stem of three blocks, a downsampling of two in front of each further
    stage, and a position encoding in front of the last one where that attends."""
    one, two, three, four = (width * 2**stage for stage in range(4))
    last = ((2, 1, depths[3]), (four, four, four)) if attends else ((2, depths[3]), (four, four))
    return Architecture(
        (3, depths[0], 2, depths[1], 2, depths[2], *last[0], 1),
        (one, one, two, two, three, three, *last[1], 2 * four),
        facts={"downsample_act": downsample_act},
    )


FAMILY = Family(
    name="fastvit",
    title="identity + (3x3-BN + 1x1-BN + BN - BN)-scale; 7x7 + identity; 7x7-BN + 3x3-BN",
    source="arXiv:2303.14189, section 3; apple/ml-fastvit; timm",
    # the convolution of a feed-forward block stays beside its norm in the official deploy model
    kinds=(
        rep_mixer("conv_kxk", "conv_scale", "identity"),
        rep_mixer("rbr_conv", "rbr_scale", "rbr_skip"),
        position_encoding("pos_enc"),
        position_encoding("pe"),
        replace(large_kernel("large_conv", "small_conv", "reparam_conv", alone=False), fits_fused=called("proj.0")),
        of_another(large_kernel("lkb_origin", "small_conv", "lkb_reparam", alone=False)),
        of_another(mobile_one("conv_kxk", "conv_scale", "identity")),
        of_another(mobile_one("rbr_conv", "rbr_scale", "rbr_skip")),
        pair("conv", "bn"),
    ),
    skeletons=(FAST_VIT,),
    architectures={
        "fastvit_t8": variant((2, 2, 4, 2), 48),
        "fastvit_t12": variant((2, 2, 6, 2), 64),
        "fastvit_s12": variant((2, 2, 6, 2), 64),
        "fastvit_sa12": variant((2, 2, 6, 2), 64, attends=True),
        "fastvit_sa24": variant((4, 4, 12, 4), 64, attends=True),
        "fastvit_sa36": variant((6, 6, 18, 6), 64, attends=True),
        "fastvit_ma36": variant((6, 6, 18, 6), 76, attends=True),
        "fastvit_mci0": variant((2, 6, 10, 2), 64, attends=True, downsample_act=True),
        "fastvit_mci1": variant((4, 12, 20, 4), 64, attends=True, downsample_act=True),
        "fastvit_mci2": variant((4, 12, 24, 4), 80, attends=True, downsample_act=True),
    },
    containers="timm's {state_dict, state_dict_ema, args, ...}, Hugging Face, {state_dict}, bare",
)
