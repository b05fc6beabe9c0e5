"""How a block's branches share its fused kernel, and whether they stayed diverse (OREPA, arXiv:2204.00826, section 4.3)."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from repdeploy.algebra import Linear, Online, Parallel, Series, branches
from repdeploy.records import BlockBranches, Branch

DEAD = 1e-6
"""A kernel, or the part of it for one output, below this share of the block's largest is dead."""


def diversity(name: str, expression: Linear) -> BlockBranches:
    """The branches of one block over its real tensors. Raises CannotSqueeze."""
    fused = expression.squeeze()
    parts = branches(expression)
    empty = replace(fused, weight=torch.zeros_like(fused.weight), bias=None)
    kernels = torch.stack([empty.plus(part.squeeze()).weight.flatten(1) for part in parts])
    whole = fused.weight.flatten(1)
    norms, size = kernels.flatten(1).norm(dim=1), float(whole.norm())
    rows = kernels.norm(dim=2)
    floor = DEAD * float(rows.max())
    shares = (kernels * whole).sum((1, 2)) / max(size * size, torch.finfo(whole.dtype).tiny)
    directions = kernels.flatten(1) / norms.clamp_min(torch.finfo(whole.dtype).tiny).unsqueeze(1)
    return BlockBranches(
        name,
        fused.out_channels,
        _count(whole.norm(dim=1) <= floor),
        tuple(
            Branch(
                _own_part(expression, part),
                float(shares[index]),
                float(norms[index]) / size if size else 0.0,
                tuple(map(float, directions @ directions[index])),
                _count(rows[index] <= floor),
                bool((rows[index] <= floor).all()),
            )
            for index, part in enumerate(parts)
        ),
    )


def _own_part(expression: Linear, branch: Linear) -> str:
    """What a branch is made of, without what follows the sum of all of them."""
    after = _behind_the_sum(expression)
    if after and isinstance(branch, Series):
        return repr(Series(branch.parts[:-after]))
    return repr(branch)


def _behind_the_sum(expression: Linear) -> int:
    """How many parts follow the sum of a block's branches."""
    if isinstance(expression, Online):
        return _behind_the_sum(expression.inside)
    if isinstance(expression, Series) and isinstance(expression.parts[0], Online | Parallel):
        return len(expression.parts) - 1 + _behind_the_sum(expression.parts[0])
    return 0


def _count(mask: Tensor) -> int:
    return int(mask.sum())
