"""Block kinds that several families share, public so that other distributions' families can use them."""

from __future__ import annotations

from collections.abc import Callable

from repdeploy.algebra import Linear
from repdeploy.family import Block, BlockKind


def pair(
    conv: str, norm: str, deploys_as: str | None = None, fits_fused: Callable[[Block], bool] = lambda block: True
) -> BlockKind:
    """A convolution and the norm behind it, where a known network says that they follow each other.

    Kept in the deploy weights unless `deploys_as` names where the official deploy model has the folded convolution.
    """

    def describe(block: Block) -> Linear:
        # whoever folded the norm left its shift in a bias; without either the norm is missing
        folded = deploys_as is None and f"{norm}.running_mean" not in block and f"{conv}.bias" in block
        return block.conv(conv) if folded else block.conv(conv) >> block.norm(norm)

    def fits(block: Block) -> bool:
        return deploys_as is None or f"{norm}.running_mean" in block

    return BlockKind(f"{conv}.weight", deploys_as, describe, fits=fits, found="in a network", fits_fused=fits_fused)


def mobile_one(copies: str, scale: str, identity: str) -> BlockKind:
    """MobileOne's block (arXiv:2206.04040, section 3.2) under one set of names."""

    def describe(block: Block) -> Linear:
        return block.with_identity(over_parameterized(block, copies, scale))

    return BlockKind(f"{copies}.0.conv.weight", "reparam_conv", describe, identity=identity)


def over_parameterized(block: Block, copies: str, scale: str) -> Linear:
    """n copies of one convolution and, where it is there, a 1x1, each normalised, summed."""
    branches: Linear = block.conv_norm(f"{copies}.0")
    for index in range(1, block.numbered(copies)):
        branches = branches + block.conv_norm(f"{copies}.{index}")
    return branches + block.conv_norm(scale) if scale in block else branches


def large_kernel(large: str, small: str, fused: str, *, alone: bool = True) -> BlockKind:
    """A large kernel and a small one on the same centre, each normalised, summed (arXiv:2203.06717, section 3.1); one group per
    input channel. `alone`: whether the small one may be missing."""

    def describe(block: Block) -> Linear:
        block.undilated("what its small kernel should do then is not defined")
        branch = block.conv_norm(large)
        return branch if alone and small not in block else branch + block.conv_norm(small)

    return BlockKind(f"{large}.conv.weight", fused, describe)
