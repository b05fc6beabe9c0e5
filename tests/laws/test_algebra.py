"""The laws of the algebra: for every expression that squeezes, running it and convolving once give the same map."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from repdeploy.algebra import AveragePool, Conv, Identity, Linear, Norm, Pad, Parallel, Scale, Series
from repdeploy.errors import CannotSqueeze
from tests.laws.expressions import chains, convs, groupings, image, norms, pointwise, random_tensor, seeds, sides, widths

settings.register_profile("laws", deadline=None, max_examples=150, derandomize=True)
settings.load_profile("laws")


def close(got: Tensor, wanted: Tensor, bound: float = 1e-11) -> None:
    assert got.shape == wanted.shape
    scale = max(1.0, float(wanted.abs().max())) if wanted.numel() else 1.0
    assert float((got - wanted).abs().max() if wanted.numel() else 0.0) <= bound * scale


def same(a: Linear, b: Linear, seed: int = 0) -> None:
    """Two expressions are one map, and one convolution where both squeeze."""
    x = image(a, seed)
    close(a.run(x), b.run(x))
    close(a.squeeze().run(x), b.squeeze().run(x))


@given(chains(), seeds)
def test_a_series_squeezes_to_what_it_runs(chain: Linear, seed: int) -> None:
    x = image(chain, seed)
    close(chain.squeeze().run(x), chain.run(x))


@given(st.data(), widths, widths, seeds)
def test_parallel_branches_add(data: st.DataObject, inputs: int, outputs: int, seed: int) -> None:
    """Kernels of different sizes, dilations and groups on one grid, aligned by their padding; crops included."""
    stride, slack = (data.draw(sides), data.draw(sides)), (data.draw(st.integers(-4, 1)), data.draw(st.integers(-4, 1)))
    fill = random_tensor(seed, inputs) if data.draw(st.booleans()) else None
    branches = []
    for index in range(data.draw(st.integers(2, 4))):
        groups = data.draw(st.sampled_from(groupings(inputs, outputs)))
        size = (data.draw(sides), data.draw(sides))
        dilation = (data.draw(sides), data.draw(sides))
        extent = [(k - 1) * d + 1 for k, d in zip(size, dilation, strict=True)]
        before = [data.draw(st.integers(-2, 3)) for _ in size]
        after = [slack[axis] + extent[axis] - before[axis] for axis in (0, 1)]
        branches.append(
            Conv(
                random_tensor(seed + index, outputs, inputs // groups, *size),
                random_tensor(seed + 50 + index, outputs),
                stride,
                (before[0], before[1], after[0], after[1]),
                dilation,
                groups,
                fill,
            )
        )
    x = random_tensor(seed, 2, inputs, 23, 29)
    squeezed = Parallel(tuple(branches)).squeeze()
    close(squeezed.run(x), sum(branch.run(x) for branch in branches))
    assert squeezed.groups == math.gcd(*(branch.groups for branch in branches))


@given(st.data(), widths, seeds)
def test_series_is_associative(data: st.DataObject, width: int, seed: int) -> None:
    a = data.draw(convs(width, 4, fill=True))
    b, c = data.draw(convs(4, 6, padded=False)), data.draw(convs(6, 2, padded=False))
    same((a >> b) >> c, a >> (b >> c), seed)
    x = image(a, seed)
    close(a.then(b).then(c).run(x), a.then(b.then(c)).run(x))


@given(st.data(), seeds)
def test_series_distributes_over_parallel_from_both_sides(data: st.DataObject, seed: int) -> None:
    a = data.draw(convs(4, 6, strides=(1, 2)))
    b = Conv(random_tensor(seed, 6, 2, *a.geometry.kernel_size), random_tensor(seed + 1, 6), a.stride, a.pads, a.dilation, 2)
    after, before = data.draw(convs(6, 3, padded=False, bias=False)), data.draw(pointwise(4))
    same((a + b) >> after, (a >> after) + (b >> after), seed)
    if not (a.geometry.is_padded and any(before.squeeze().run(torch.zeros(1, 4, 1, 1, dtype=torch.float64)).flatten() != 0)):
        same(before >> (a + b), (before >> a) + (before >> b), seed)


@given(chains(inputs=4, outputs=6), seeds)
def test_identity_is_neutral_and_minus_cancels(chain: Linear, seed: int) -> None:
    same(chain >> Identity(random_tensor(0, 6)), chain, seed)
    first = chain.squeeze()
    if first.fill is None:  # the first map alone says what stands outside the image: behind an identity that is zero
        same(Identity(random_tensor(0, 4)) >> chain, chain, seed)
    cancelled = (chain - chain).squeeze()
    assert float(cancelled.weight.abs().max()) == 0.0
    close(cancelled.run(image(chain, seed)), torch.zeros_like(chain.run(image(chain, seed))))


@given(st.data(), widths, seeds)
def test_batch_norm_is_one_scale_and_one_shift(data: st.DataObject, width: int, seed: int) -> None:
    norm = data.draw(norms(width))
    x = random_tensor(seed, 2, width, 5, 3)
    layer = torch.nn.BatchNorm2d(width, eps=norm.eps, dtype=torch.float64).eval()
    assert norm.gamma is not None
    assert norm.beta is not None
    layer.load_state_dict(
        {
            "weight": norm.gamma,
            "bias": norm.beta,
            "running_mean": norm.mean,
            "running_var": norm.var,
            "num_batches_tracked": torch.tensor(1),
        }
    )
    close(norm.squeeze().run(x), layer(x).detach())
    assert norm.squeeze().geometry.is_diagonal


@given(st.data(), seeds)
def test_the_general_series_rule_agrees_with_its_diagonal_shortcuts(data: st.DataObject, seed: int) -> None:
    conv, scale = data.draw(convs(4, 6)), Scale(random_tensor(seed, 6)).squeeze()
    dense = Conv(torch.diag(scale.weight.view(-1)).view(6, 6, 1, 1))
    close(conv.then(scale).run(image(conv, seed)), conv.then(dense).run(image(conv, seed)))
    before = Scale(random_tensor(seed, 4)).squeeze()
    dense = Conv(torch.diag(before.weight.view(-1)).view(4, 4, 1, 1))
    close(before.then(conv).run(image(conv, seed)), dense.then(conv).run(image(conv, seed)))


@given(st.data(), st.sampled_from([(12, 12, 12, 4, 6), (12, 6, 12, 3, 2), (6, 6, 6, 6, 6), (8, 8, 4, 2, 4)]), seeds)
def test_groups_are_kept_as_fine_as_both_factors_allow(
    data: st.DataObject, shape: tuple[int, int, int, int, int], seed: int
) -> None:
    inputs, middle, outputs, first_groups, second_groups = shape
    if middle % first_groups or middle % second_groups or outputs % second_groups:
        return
    first = Conv(random_tensor(seed, middle, inputs // first_groups, 3, 2), groups=first_groups)
    second = Conv(random_tensor(seed + 1, outputs, middle // second_groups, 2, 3), groups=second_groups)
    assert first.then(second).groups == math.gcd(first_groups, second_groups)
    same(first >> second, first.then(second), seed)


@given(st.data(), widths, seeds)
def test_padding_with_the_response_to_the_border_is_exact(data: st.DataObject, width: int, seed: int) -> None:
    """DBB's BNAndPad (section 3.2): pad behind a biased map with that map's answer to zero."""
    before = data.draw(convs(width, 4, padded=False, strides=(1,))) if data.draw(st.booleans()) else None
    reach = [0, 0] if before is None else [side - 1 for side in before.geometry.extent]
    norm = data.draw(norms(4))
    if before is None:
        inner: Linear = Identity(random_tensor(0, 4)) >> norm
    else:
        inner = Pad(before.weight.new_zeros(width), (reach[0], reach[1], reach[0], reach[1])) >> before >> norm
    outside = inner.squeeze().bias
    assert outside is not None
    pads = tuple(data.draw(st.integers(0, 2)) for _ in range(4))
    chain = inner >> Pad(outside, pads) >> data.draw(convs(4, 3, padded=False))  # type: ignore[arg-type]
    close(chain.squeeze().run(image(chain, seed)), chain.run(image(chain, seed)))


@given(st.data(), seeds)
def test_a_refused_series_is_no_convolution(data: st.DataObject, seed: int) -> None:
    """Padding with anything else is refused, and rightly so: composing the kernels anyway would be wrong at the border."""
    norm = data.draw(norms(3))
    conv = data.draw(convs(3, 2, padded=False, strides=(1,)))
    shift = norm.squeeze().bias
    assert shift is not None
    padded = Conv(conv.weight, conv.bias, pads=(1, 1, 1, 1), dilation=conv.dilation)
    if conv.groups != 1 or float(shift.abs().max()) < 1e-3 or float(conv.weight.abs().min()) < 1e-3:
        return
    with pytest.raises(CannotSqueeze, match="outside the image"):
        (norm >> padded).squeeze()
    x = image(norm, seed)
    interior_only = norm.squeeze().then(Conv(padded.weight, padded.bias, dilation=conv.dilation))
    forced = Conv(interior_only.weight, interior_only.bias, pads=padded.pads, dilation=conv.dilation)
    assert float((forced.run(x) - (norm >> padded).run(x)).abs().max()) > 1e-9


def test_a_border_that_stops_short_of_the_kernel_is_refused() -> None:
    """3x3 padded by 1, then padded again: the outer ring of the middle map would need taps outside the padded image."""
    first = Conv(random_tensor(0, 2, 2, 3, 3), pads=(1, 1, 1, 1))
    second = Conv(random_tensor(1, 2, 2, 3, 3), pads=(1, 1, 1, 1))
    with pytest.raises(CannotSqueeze, match="at least 2"):
        (first >> second).squeeze()
    wide = Conv(first.weight, pads=(2, 2, 2, 2))
    same(wide >> second, wide.then(second))


def test_a_strided_map_may_pad_again_on_the_side_its_stride_covers() -> None:
    """A 2x2 kernel of stride 2 needs no padding at the top, one row at the bottom."""
    first = Conv(random_tensor(0, 2, 2, 2, 2), stride=(2, 2), pads=(0, 0, 1, 1))
    second = Conv(random_tensor(1, 2, 2, 3, 3), pads=(1, 1, 1, 1))
    chain = first >> second
    for height in range(7, 13):
        x = random_tensor(height, 1, 2, height, height + 1)
        close(chain.squeeze().run(x), chain.run(x))
    with pytest.raises(CannotSqueeze, match="bottom"):
        (Conv(first.weight, stride=(2, 2)) >> second).squeeze()


@pytest.mark.parametrize(
    ("branches", "reason"),
    [
        (({"stride": (2, 2)}, {}), "different strides"),
        (({"pads": (1, 1, 1, 1)}, {}), "different heights"),
        (({"pads": (0, 0, 1, 0)}, {"pads": (0, 0, 0, 1)}), "different heights"),
    ],
)
def test_branches_that_do_not_line_up_are_refused(branches: tuple[dict[str, tuple[int, ...]], ...], reason: str) -> None:
    parts = tuple(Conv(random_tensor(i, 2, 2, 3, 3), **options) for i, options in enumerate(branches))  # type: ignore[arg-type]
    with pytest.raises(CannotSqueeze, match=reason):
        Parallel(parts).squeeze()


def test_branches_that_pad_with_different_values_are_refused() -> None:
    a = Conv(random_tensor(0, 2, 2, 3, 3), pads=(1, 1, 1, 1))
    b = Conv(random_tensor(1, 2, 2, 3, 3), pads=(1, 1, 1, 1), fill=random_tensor(2, 2))
    with pytest.raises(CannotSqueeze, match="different values"):
        (a + b).squeeze()


def test_only_zero_can_be_deployed_as_a_border() -> None:
    value = random_tensor(0, 2)
    padded = (Pad(value, (1, 1, 1, 1)) >> Conv(random_tensor(1, 2, 2, 3, 3))).squeeze()
    with pytest.raises(CannotSqueeze, match="not with zero"):
        padded.zero_filled()
    assert (Pad(value, (-1, 0, 0, 0)) >> Conv(random_tensor(1, 2, 2, 3, 3))).squeeze().zero_filled().fill is None


def test_a_variance_without_a_root_is_refused() -> None:
    with pytest.raises(CannotSqueeze, match="channel 1"):
        Norm(torch.zeros(2), torch.tensor([1.0, -0.5])).squeeze()


def test_widths_must_meet() -> None:
    with pytest.raises(ValueError, match="gives 2 channels, the next takes 3"):
        Series((Identity(torch.ones(2)), Identity(torch.ones(3))))
    with pytest.raises(ValueError, match="equal widths"):
        Identity(torch.ones(2)) + Identity(torch.ones(3))


def test_squeezing_is_differentiable() -> None:
    """A sample model may train through `squeeze`: its gradient is the gradient of running the branches."""
    x = random_tensor(9, 2, 4, 7, 5)

    def build(weight: Tensor, small: Tensor, gamma: Tensor) -> Linear:
        norm = Norm(random_tensor(3, 6), random_tensor(4, 6).abs() + 0.1, gamma, random_tensor(5, 6))
        return (Conv(weight, pads=(1, 1, 1, 1), groups=2) >> norm) + (Conv(small) >> AveragePool(gamma, (1, 1)))

    leaves = [random_tensor(i, *s).requires_grad_() for i, s in enumerate([(6, 2, 3, 3), (6, 4, 1, 1), (6,)])]
    run = torch.autograd.grad(build(*leaves).run(x).square().sum(), leaves)
    squeezed = torch.autograd.grad(build(*leaves).squeeze().run(x).square().sum(), leaves)
    for a, b in zip(run, squeezed, strict=True):
        close(a, b, 1e-10)


def test_an_expression_prints_as_the_papers_write_it() -> None:
    ones = torch.ones(2)
    branches = (Conv(torch.ones(2, 2, 3, 3), stride=(2, 2)) >> Norm(ones, ones)) + Norm(ones, ones)
    assert repr(branches) == "3x3-BN + BN"
    assert repr(branches >> Pad(ones, (1, 1, 1, 1)) >> AveragePool(ones, (3, 3))) == "(3x3-BN + BN)-PAD-AVG"


@given(chains(), seeds)
def test_geometry_needs_no_numbers(chain: Linear, seed: int) -> None:
    """The third reading: shapes alone give the geometry of what squeezing gives, and the size of what running gives."""
    assert chain.geometry == chain.squeeze().geometry
    ghost = chain.map(lambda tensor: torch.ones(1).expand(tensor.shape))
    assert ghost.geometry == chain.geometry
    x = image(chain, seed)
    assert chain.run(x).shape[2:] == chain.geometry.output_size(*x.shape[2:])


def test_tensors_have_unique_paths_and_map_keeps_their_order() -> None:
    chain = (Conv(random_tensor(0, 2, 2, 1, 1)) >> Norm(torch.zeros(2), torch.ones(2))) + Identity(torch.ones(2))
    paths = [path for path, _ in chain.tensors()]
    assert paths == ["parts.0.parts.0.weight", "parts.0.parts.1.mean", "parts.0.parts.1.var", "parts.1.like"]
    seen: list[tuple[int, ...]] = []
    halved = chain.map(lambda tensor: (seen.append(tuple(tensor.shape)), tensor.float())[1])
    assert seen == [tuple(tensor.shape) for _, tensor in chain.tensors()]
    assert {tensor.dtype for _, tensor in halved.tensors()} == {torch.float32}
