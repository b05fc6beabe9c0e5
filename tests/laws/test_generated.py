"""Kernels generated from branches (OREPA): squeezing online, cross-correlated kernels, linearization, branches taken apart."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given
from hypothesis import strategies as st

from repdeploy.algebra import (
    Conv,
    Flip,
    Identity,
    Linear,
    Norm,
    Online,
    Pad,
    Scale,
    Series,
    Shift,
    branches,
    fixed,
    generated,
    linearize,
)
from repdeploy.errors import CannotSqueeze
from tests.laws.expressions import chains, convs, image, norms, pointwise, random_tensor, seeds, widths
from tests.laws.test_algebra import close, same


@given(chains(), seeds)
def test_squeezing_online_is_the_same_map(chain: Linear, seed: int) -> None:
    x = image(chain, seed)
    close(Online(chain).run(x), chain.run(x))
    assert Online(chain).geometry == chain.squeeze().geometry


@given(st.data(), widths, widths, seeds)
def test_a_flipped_convolution_turns_its_kernel_and_nothing_else(
    data: st.DataObject, inputs: int, outputs: int, seed: int
) -> None:
    conv = data.draw(convs(inputs, outputs))
    x = image(conv, seed)
    close(Flip(conv).run(x), replace(conv, weight=conv.weight.flip(2, 3)).run(x))
    same(Flip(Flip(conv)), conv)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("kernels", [2, 3, 4])
def test_a_series_of_flipped_kernels_is_their_cross_correlation(kernels: int, groups: int) -> None:
    """OREPA's stem, in the words of its own code: every kernel slides over the one generated so far, padded by two."""
    weights = [random_tensor(i, 8, (6 if i == 0 else 8) // groups, 3, 3) for i in range(kernels)]
    wanted = weights[0].transpose(0, 1)
    for weight in weights[1:]:
        wanted = F.conv2d(wanted, weight, padding=2, groups=groups)
    whole: Linear = Conv(weights[0], pads=(kernels,) * 4, groups=groups)
    for index, weight in enumerate(weights[1:], 2):
        whole = whole >> Flip(Conv(weight, stride=(2, 2) if index == kernels else (1, 1), groups=groups))
    squeezed = whole.squeeze()
    close(squeezed.weight, wanted.transpose(0, 1))
    assert squeezed.stride == (2, 2)
    assert squeezed.pads == (kernels,) * 4


def branching(data: st.DataObject, width: int) -> Linear:
    """Branches with norms inside, some of them in series, on one grid and with a zero border."""
    stride = data.draw(st.sampled_from([(1, 1), (2, 1), (2, 2)]))

    def kernel(size: int, seed: int) -> Conv:
        return Conv(random_tensor(seed, width, width, size, size), None, stride, (size // 2,) * 4)

    seed = data.draw(seeds)
    first = Conv(random_tensor(seed + 2, width, width, 1, 1)) >> data.draw(norms(width))
    outside = first.squeeze().bias
    assert outside is not None
    series = first >> Pad(outside, (1, 1, 1, 1)) >> Conv(random_tensor(seed + 3, width, width, 3, 3), None, stride)
    total = (kernel(3, seed) >> data.draw(norms(width))) + (kernel(1, seed + 1) >> data.draw(norms(width)))
    total = total + (series >> data.draw(norms(width)) >> Shift(random_tensor(seed + 4, width)))
    return total if stride != (1, 1) else total + data.draw(norms(width))


@given(st.data(), widths, seeds)
def test_linearization_keeps_the_map_and_leaves_one_norm(data: st.DataObject, width: int, seed: int) -> None:
    block = branching(data, width)
    linear = linearize(block)
    x = image(block, seed)
    close(linear.run(x), block.run(x))
    close(linear.squeeze().weight, block.squeeze().weight)
    *rest, last = linear.parts
    assert isinstance(last, Norm)
    before: Linear = rest[0] if len(rest) == 1 else Series(tuple(rest))
    assert "BN" not in repr(before)
    zero = torch.zeros_like(x)
    assert not before.run(zero).any()


@given(st.data(), seeds)
def test_linearization_holds_for_any_chain_with_a_zero_border(data: st.DataObject, seed: int) -> None:
    chain = data.draw(chains())
    try:
        chain.squeeze().zero_filled()
    except CannotSqueeze:
        assume(False)
    x = image(chain, seed)
    close(linearize(chain).run(x), chain.run(x), 1e-10)


def test_linearization_refuses_what_has_no_zero_border() -> None:
    padded = Pad(torch.ones(2, dtype=torch.float64), (1, 1, 1, 1)) >> Conv(random_tensor(0, 2, 2, 3, 3))
    with pytest.raises(CannotSqueeze, match="not with zero"):
        linearize(padded)


@given(st.data(), widths)
def test_the_kernels_of_all_branches_add_up_to_the_block(data: st.DataObject, width: int) -> None:
    inside = branching(data, width)
    after = data.draw(pointwise(width))
    for block in (inside, inside >> after, Online(inside) >> after, (Online(inside) >> after) + inside):
        parts = branches(block)
        assert len(parts) >= 3
        whole = block.squeeze()
        empty = replace(whole, weight=torch.zeros_like(whole.weight), bias=None)
        close(sum(empty.plus(part.squeeze()).weight for part in parts), whole.weight, 1e-10)


@given(st.data(), widths)
def test_fixed_kernels_are_the_same_map_without_any_generation(data: st.DataObject, width: int) -> None:
    inside = branching(data, width)
    after = data.draw(pointwise(width))
    block = (Online(inside) >> after) + inside
    still = fixed(block)
    same(still, block)
    assert list(generated(still)) == []


def test_a_sum_inside_one_branch_belongs_to_that_branch() -> None:
    """DBB's idconv1 is a convolution plus the identity: one link of its third branch."""
    one = Conv(random_tensor(0, 3, 3, 1, 1))
    third = (one + Identity(torch.ones(3, dtype=torch.float64))) >> Scale(random_tensor(1, 3))
    assert [repr(part) for part in branches(one + third)] == ["1x1", "(1x1 + ID)-SCALE"]
    assert [repr(part) for part in branches(third)] == ["1x1-SCALE", "ID-SCALE"]
    assert branches(one) == (one,)


def test_what_is_generated_is_found_at_every_depth() -> None:
    inner = Conv(random_tensor(0, 2, 2, 3, 3))
    stem = Online(inner >> Flip(Conv(random_tensor(1, 2, 2, 1, 1)))) >> Scale(random_tensor(2, 2))
    assert [repr(part) for part in generated(stem)] == ["3x3-FLIP1x1", "1x1"]
    assert list(generated(inner)) == []


def test_one_can_train_through_the_generated_kernel() -> None:
    """The gradient reaches every branch, the scales and the kernels behind a flip."""
    block = Online(
        (Conv(random_tensor(0, 3, 3, 3, 3), pads=(2,) * 4) >> Scale(random_tensor(1, 3)))
        >> Flip(Conv(random_tensor(2, 3, 3, 3, 3)))
    )
    trained = block.map(lambda tensor: tensor.clone().requires_grad_())
    trained.run(random_tensor(3, 1, 3, 8, 9)).square().sum().backward()
    assert all(tensor.grad is not None and bool(tensor.grad.any()) for _, tensor in trained.tensors())
