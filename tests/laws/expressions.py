"""Random expressions for the laws: small, odd-shaped, with batch-norm statistics that are far from their defaults."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

from repdeploy.algebra import AveragePool, Conv, Identity, Linear, Norm, Online, Pad, Scale, Shift

Draw = st.DrawFn


def random_tensor(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


seeds = st.integers(0, 2**31 - 1)
sides = st.integers(1, 3)


@st.composite
def norms(draw: Draw, channels: int, affine: bool = True) -> Norm:
    seed = draw(seeds)
    mean, var, gamma, beta = (random_tensor(seed + i, channels) for i in range(4))
    gamma[0] *= draw(st.sampled_from([1.0, -1.0, 1e-7, 0.0]))
    eps = draw(st.sampled_from([1e-5, 1e-3, 0.1]))
    return Norm(mean, var.abs() * 2 + 1e-3, gamma if affine else None, beta if affine else None, eps)


def groupings(a: int, b: int) -> list[int]:
    return [g for g in range(1, min(a, b) + 1) if a % g == 0 and b % g == 0]


@st.composite
def convs(
    draw: Draw,
    inputs: int,
    outputs: int,
    *,
    padded: bool = True,
    fill: bool = False,
    bias: bool | None = None,
    strides: tuple[int, ...] = (1, 2, 3),
) -> Conv:
    groups = draw(st.sampled_from(groupings(inputs, outputs)))
    size, seed = (draw(sides), draw(sides)), draw(seeds)
    low, high = (-1, 3) if padded else (0, 0)
    return Conv(
        random_tensor(seed, outputs, inputs // groups, *size),
        random_tensor(seed + 1, outputs) if (draw(st.booleans()) if bias is None else bias) else None,
        stride=(draw(st.sampled_from(strides)), draw(st.sampled_from(strides))),
        pads=tuple(draw(st.integers(low, high)) for _ in range(4)),  # type: ignore[arg-type]
        dilation=(draw(st.integers(1, 3)), draw(st.integers(1, 2))),
        groups=groups,
        fill=random_tensor(seed + 2, inputs) if fill and draw(st.booleans()) else None,
    )


widths = st.sampled_from([1, 2, 3, 4, 6])


@st.composite
def pointwise(draw: Draw, channels: int) -> Linear:
    """Maps that neither pad nor change the geometry."""
    seed = draw(seeds)
    return draw(
        st.one_of(
            norms(channels),
            norms(channels, affine=False),
            st.just(Scale(random_tensor(seed, channels))),
            st.just(Shift(random_tensor(seed, channels))),
            st.just(Online(Scale(random_tensor(seed, channels)) + Identity(random_tensor(seed, channels)))),
            st.just(Identity(random_tensor(seed, channels))),
        )
    )


@st.composite
def chains(draw: Draw, inputs: int | None = None, outputs: int | None = None) -> Linear:
    """A series that squeezes by construction: only its first map pads, or a Pad repeats what came before it."""
    first_width = inputs or draw(widths)
    width = draw(widths)
    chain: Linear = draw(convs(first_width, width, fill=True))
    for _ in range(draw(st.integers(0, 3))):
        kind = draw(st.sampled_from(["point", "valid", "pool", "crop"]))
        if kind == "point":
            chain = chain >> draw(pointwise(width))
        elif kind == "pool":
            size = (draw(sides), draw(sides))
            chain = chain >> AveragePool(random_tensor(0, width), size, (draw(st.integers(1, 2)), draw(st.integers(1, 2))))
        elif kind == "crop":
            chain = chain >> Pad(random_tensor(draw(seeds), width), (0, -1, 0, 0))
        else:
            following = draw(widths)
            chain, width = chain >> draw(convs(width, following, padded=False, strides=(1, 2))), following
    if outputs is not None and width != outputs:
        chain = chain >> draw(convs(width, outputs, padded=False, strides=(1,)))
    return chain


def image(expression: Linear, seed: int) -> Tensor:
    """An image with border and interior, odd and not square, large enough for the expression."""
    side = 127
    return random_tensor(seed, 2, expression.in_channels, side, side + 6)
