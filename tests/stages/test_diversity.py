"""inspect --branches: how branches share a kernel, which are alike, which are dead."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import repdeploy
from repdeploy.algebra import Conv, Linear, Online, Scale
from repdeploy.diversity import diversity
from sample_models.backbones import Layer
from sample_models.orepa import Orepa
from tests.laws.expressions import random_tensor
from tests.networks import repvgg, save


def kernel(seed: int, size: int) -> Conv:
    return Conv(random_tensor(seed, 6, 4, size, size), pads=(size // 2,) * 4)


def test_the_shares_of_a_block_add_up_to_one(tmp_path: Path) -> None:
    found = repdeploy.inspect(save(repvgg(), tmp_path / "a.pth"), branches=True)
    assert [block.name for block in found.branches] == [block.name for block in found.blocks]
    for block in found.branches:
        assert sum(branch.share for branch in block.branches) == pytest.approx(1)
        for index, branch in enumerate(block.branches):
            assert branch.similarity[index] == pytest.approx(1)
            assert all(-1 <= cosine <= 1 + 1e-12 for cosine in branch.similarity)
    assert repdeploy.inspect(tmp_path / "a.pth").branches == ()


def test_one_branch_is_the_whole_kernel() -> None:
    (branch,) = diversity("b", kernel(0, 3)).branches
    assert (branch.share, branch.norm, *branch.similarity) == pytest.approx((1.0, 1.0, 1.0))


def test_equal_branches_have_cosine_one_and_opposite_ones_minus_one() -> None:
    one = kernel(0, 3)
    double = diversity("b", one + (one >> Scale(torch.full((6,), 3.0, dtype=torch.float64))))
    assert [branch.share for branch in double.branches] == pytest.approx([0.25, 0.75])
    assert double.branches[0].similarity == pytest.approx((1.0, 1.0))
    against = diversity("b", one + (one >> Scale(torch.full((6,), -0.5, dtype=torch.float64))))
    assert [branch.share for branch in against.branches] == pytest.approx([2.0, -1.0])
    assert against.branches[0].similarity == pytest.approx((1.0, -1.0))


def test_a_1x1_is_compared_at_the_centre_of_a_3x3() -> None:
    wide, narrow = kernel(0, 3), kernel(1, 1)
    block = diversity("b", wide + narrow)
    centre = wide.weight[:, :, 1:2, 1:2]
    cosine = float((centre * narrow.weight).sum() / (wide.weight.norm() * narrow.weight.norm()))
    assert block.branches[0].similarity[1] == pytest.approx(cosine)


def test_dead_branches_and_channels_are_counted() -> None:
    half = torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    nothing = torch.zeros(6, dtype=torch.float64)
    block = diversity("b", (kernel(0, 3) >> Scale(half)) + (kernel(1, 1) >> Scale(nothing)))
    first, second = block.branches
    assert (first.dead_channels, first.is_dead) == (3, False)
    assert (second.dead_channels, second.is_dead, second.share) == (6, True, 0.0)
    assert block.dead_channels == 3


def test_a_generated_kernel_is_taken_apart_too() -> None:
    """OREPA's rows of the vector, which decide what each branch counts for; a row of zeros is a dead branch."""
    torch.manual_seed(0)
    block = Orepa(Layer(4, 6, 3)).double()
    expression = block.description().map(torch.Tensor.detach)
    found = diversity("b", expression)
    assert len(found.branches) == 6
    assert [branch.is_dead for branch in found.branches] == [False, False, True, False, False, False]
    assert sum(branch.share for branch in found.branches) == pytest.approx(1)


def test_branches_that_cancel_leave_a_block_without_a_kernel() -> None:
    one: Linear = kernel(0, 3)
    found = diversity("b", Online(one - one))
    assert found.dead_channels == 6
    assert not any(branch.is_dead for branch in found.branches)
    assert all(branch.norm == 0 for branch in found.branches)
