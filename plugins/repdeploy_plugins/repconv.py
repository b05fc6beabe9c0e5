"""RepConv: RepVGG's block as YOLO detectors write it, with batch norm's eps at 1e-3, and YOLOv7's implicit layers.

pre = BN(conv3x3(x)) + BN(conv1x1(x)) [+ BN(x)]; implicit: y = m * conv1x1(x + a), m and a learned per channel
"""

from __future__ import annotations

from dataclasses import replace

from repdeploy.algebra import Linear, Scale, Shift
from repdeploy.family import Block, BlockKind, Family

EPS = 1e-3
"""YOLOv6, v7 and v9 set it on every batch norm."""
LEVELS = 8
"""Resolutions that a detection head may have; the published ones have three or four."""


def layout(dense: str, point: str, identity: str, fused: str, conv: str = "conv", norm: str = "bn") -> BlockKind:
    """The block under one set of names."""

    def describe(block: Block) -> Linear:
        return block.with_identity(block.conv_norm(dense, conv, norm) + block.conv_norm(point, conv, norm))

    return BlockKind(f"{dense}.{conv}.weight", fused, describe, eps=EPS, identity=identity)


def side_by_side(block: Block) -> bool:
    """Whether conv2 can stand beside conv1: the same channels, one tap."""
    wide, narrow = "conv1.conv.weight", "conv2.conv.weight"
    return narrow in block and block.shape(narrow) == (*block.shape(wide)[:2], 1, 1) != block.shape(wide)


def implicit(level: int) -> BlockKind:
    """What IDetect does at one resolution: add, convolve, multiply."""

    def describe(block: Block) -> Linear:
        add, multiply = (block.tensor(f"{part}.{level}.implicit").flatten() for part in ("ia", "im"))
        return Shift(add) >> block.conv(f"m.{level}") >> Scale(multiply)

    return BlockKind(
        f"m.{level}.weight",
        f"m.{level}",
        describe,
        inputs=lambda block: block.kernel_shape(f"m.{level}.weight")[1],
        fits=lambda block: f"ia.{level}.implicit" in block and f"im.{level}.implicit" in block,
        eps=EPS,
        ordinary_name=True,
        one_of_several=True,
    )


FAMILY = Family(
    name="repconv",
    title="3x3-BN + 1x1-BN + BN (YOLO, eps 1e-3); m (1x1 (x + a))",
    source="meituan/YOLOv6 (RepVGGBlock), WongKinYiu/yolov7 (RepConv, IDetect), WongKinYiu/yolov9 (RepConvN)",
    kinds=(
        # YOLOv6 has RepVGG's very keys: without its name, or a pickled model's eps, they are taken for RepVGG's
        replace(layout("rbr_dense", "rbr_1x1", "rbr_identity", "rbr_reparam"), found="when named"),
        layout("rbr_dense", "rbr_1x1", "rbr_identity", "rbr_reparam", "0", "1"),
        # conv1 and conv2 stand one behind the other in most networks
        replace(
            layout("conv1", "conv2", "bn", "conv"),
            found="when named",
            classes=("RepConvN",),
            fits=side_by_side,
            ordinary_name=True,
        ),
        *(implicit(level) for level in range(LEVELS)),
    ),
    containers="pickled models {model, ema, ...}, bare, {state_dict}",
)
