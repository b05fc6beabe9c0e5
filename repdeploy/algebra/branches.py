"""Branches taken apart and put together: the linearization of a block, and the branches whose kernels sum to it."""

from __future__ import annotations

from dataclasses import replace
from functools import reduce

import torch

from repdeploy.algebra.conv import Conv
from repdeploy.algebra.generated import Flip, Online
from repdeploy.algebra.leaves import NORM_EPS, Identity, Norm, Pad, Scale, Shift
from repdeploy.algebra.linear import Linear, Parallel, Series
from repdeploy.algebra.matrix import AsMatrix


def linearize(expression: Linear) -> Series:
    """Block linearization: every norm inside becomes a scale, one norm follows the sum. The map stays the same.

    The result's last part is that norm, what stands before it is linear without any constant. Raises CannotSqueeze where
    the expression equals no single convolution with a zero border.
    Source: OREPA, arXiv:2204.00826, section 3.2.
    """
    shift = expression.squeeze().zero_filled().bias_or_zero()
    one = torch.ones_like(shift)
    return _without_constants(expression) >> Norm(torch.zeros_like(shift), one - NORM_EPS, one, shift, NORM_EPS)


def _without_constants(expression: Linear) -> Linear:
    if isinstance(expression, Series):
        return reduce(Linear.__rshift__, map(_without_constants, expression.parts))
    if isinstance(expression, Parallel):
        return reduce(Linear.__add__, map(_without_constants, expression.parts))
    if isinstance(expression, Online | Flip):
        return replace(expression, inside=_without_constants(expression.inside))
    if isinstance(expression, Norm):
        return Scale(expression.squeeze().weight.flatten())
    if isinstance(expression, Pad):
        return replace(expression, value=torch.zeros_like(expression.value))
    if isinstance(expression, Conv):
        return replace(expression, bias=None, fill=None)
    if isinstance(expression, Shift):
        return Identity(torch.ones_like(expression.value))
    return expression


def branches(expression: Linear) -> tuple[Linear, ...]:
    """The parallel branches of a block, each with what follows the sum, so that their kernels add up to the block's.

    A block without parallel branches is its own only branch.
    """
    return _branches(expression, nested=False)


def _branches(expression: Linear, nested: bool) -> tuple[Linear, ...]:
    if isinstance(expression, Online):
        return _branches(expression.inside, nested=False)
    if isinstance(expression, AsMatrix):
        return tuple(AsMatrix(part, expression.size) for part in _branches(expression.inside, nested=False))
    if isinstance(expression, Parallel):
        return tuple(branch for part in expression.parts for branch in _branches(part, nested=True))
    if isinstance(expression, Series):
        first, *rest = expression.parts
        # a sum at the head of one branch among others is that branch's own business
        if isinstance(first, Online) or (isinstance(first, Parallel) and not nested):
            return tuple(reduce(Linear.__rshift__, rest, branch) for branch in _branches(first, nested))
    return (expression,)
