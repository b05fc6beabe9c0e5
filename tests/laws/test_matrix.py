"""AsMatrix: on tiles that are stored as channels, whatever stands inside is one 1x1 convolution."""

from __future__ import annotations

from functools import reduce

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from repdeploy.algebra import AsMatrix, Conv, Linear, Norm, branches
from repdeploy.errors import CannotSqueeze, IllegalInput


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def local(sets: int, kernel: int, seed: int, groups: int) -> Linear:
    """A convolution inside the tile and its norm."""
    conv = Conv(normal(sets, sets // groups, kernel, kernel, seed=seed), None, pads=(kernel // 2,) * 4, groups=groups)
    return conv >> Norm(
        normal(sets, seed=seed + 1), normal(sets, seed=seed + 2).abs() + 0.3, normal(sets), normal(sets, seed=9)
    )


@settings(deadline=None)
@given(
    sets=st.integers(1, 4),
    kernels=st.lists(st.sampled_from((1, 3, 5)), min_size=1, max_size=3),
    tile=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    depthwise=st.booleans(),
    places=st.tuples(st.integers(1, 3), st.integers(1, 3)),
)
def test_the_matrix_is_what_stands_inside(
    sets: int, kernels: list[int], tile: tuple[int, int], depthwise: bool, places: tuple[int, int]
) -> None:
    groups = sets if depthwise else 1
    inside = reduce(Linear.__add__, (local(sets, kernel, index, groups) for index, kernel in enumerate(kernels)))
    matrix = AsMatrix(inside, tile)
    squeezed = matrix.squeeze()
    assert squeezed.geometry == matrix.geometry
    x = normal(2, matrix.in_channels, *places, seed=7)
    wanted = matrix.run(x)
    assert torch.allclose(squeezed.run(x), wanted, atol=1e-12)
    # one place at a time, the tile as an image
    for row in range(places[0]):
        image = x[:, :, row, 0].reshape(2, sets, *tile)
        assert torch.allclose(inside.run(image).flatten(1), wanted[:, :, row, 0], atol=1e-12)


def test_the_matrix_of_the_paper() -> None:
    """W[s p + o, i] = K[s][iy - oy + r, ix - ox + r], 0 where the index leaves the kernel (section 3.3)."""
    sets, (height, width), radius = 2, (3, 4), 1
    kernel, positions = normal(sets, 1, 3, 3), 12
    weight = AsMatrix(Conv(kernel, pads=(1,) * 4, groups=sets), (height, width)).squeeze().weight[:, :, 0, 0]
    for group in range(sets):
        for o in range(positions):
            for i in range(positions):
                row, column = i // width - o // width + radius, i % width - o % width + radius
                expected = float(kernel[group, 0, row, column]) if 0 <= row < 3 and 0 <= column < 3 else 0.0
                assert float(weight[group * positions + o, i]) == expected


def test_it_stands_beside_a_fully_connected_layer() -> None:
    """Injection: fc3 + the matrix of the convolutions, in one squeeze; the branches are told apart again."""
    sets, tile = 3, (4, 2)
    fc3 = Conv(normal(sets * 8, 8, 1, 1), groups=sets) >> Norm(normal(sets), normal(sets).abs() + 1).repeated(8)
    whole = fc3 + AsMatrix(local(sets, 1, 0, sets) + local(sets, 3, 3, sets), tile)
    x = normal(5, sets * 8, 1, 1, seed=2)
    assert torch.allclose(whole.squeeze().run(x), whole.run(x), atol=1e-12)
    parts = branches(whole)
    assert list(map(repr, parts)) == ["1x1-BN", "MATRIX(DW1x1-BN)", "MATRIX(DW3x3-BN)"]
    assert torch.allclose(sum(part.squeeze().weight for part in parts), whole.squeeze().weight, atol=1e-12)


def test_what_cannot_be_a_matrix() -> None:
    with pytest.raises(IllegalInput, match="does not fit"):
        _ = AsMatrix(Conv(normal(1, 1, 5, 5)), (3, 3)).geometry
    filled = Conv(normal(1, 1, 3, 3), pads=(1,) * 4, fill=torch.ones(1, dtype=torch.float64))
    with pytest.raises(CannotSqueeze, match="not with zero"):
        AsMatrix(filled, (3, 3)).squeeze()


def test_strided_convolutions_make_smaller_tiles() -> None:
    matrix = AsMatrix(Conv(normal(4, 2, 3, 3), stride=(2, 2), pads=(1,) * 4), (5, 4))
    assert (matrix.in_channels, matrix.out_channels) == (40, 24)
    x = normal(3, 40, 2, 1)
    assert torch.allclose(matrix.squeeze().run(x), matrix.run(x), atol=1e-12)
