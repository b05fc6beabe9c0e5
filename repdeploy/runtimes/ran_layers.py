"""The layers that a profile is made of: what each costs, by its shapes, and its usual time over several runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from repdeploy.errors import BackendFailed
from repdeploy.measurements import RanLayer, quantile

FLOAT32 = 4
"""Bytes per value where nothing says otherwise."""
Shape = tuple[int, ...]


def convolution(
    name: str,
    implementation: str,
    seconds: float,
    *,
    input_shape: Shape,
    weight_shape: Shape,
    output_shape: Shape,
    stride: Shape,
    biased: bool,
    itemsize: int = FLOAT32,
    added: int = 0,
) -> RanLayer:
    """A convolution of an input (batch, channels, ...) with weights (outputs, inputs / groups, ...).

    `itemsize`: bytes per value; `added`: values of what is added to the output in the same kernel.
    """
    outputs = math.prod(output_shape)
    values = math.prod(input_shape) + math.prod(weight_shape) + biased * weight_shape[0] + outputs + added
    return RanLayer(
        name,
        "convolution",
        implementation,
        seconds,
        kernel=weight_shape[2:],
        stride=stride,
        groups=input_shape[1] // weight_shape[1],
        inputs=input_shape[1],
        outputs=weight_shape[0],
        input_shape=input_shape,
        output_shape=output_shape,
        flops=outputs * (2 * math.prod(weight_shape[1:]) + biased),
        bytes=itemsize * values,
    )


def matrix_product(
    name: str,
    implementation: str,
    seconds: float,
    *,
    first: Shape,
    second: Shape,
    output_shape: Shape,
    biased: bool,
    itemsize: int = FLOAT32,
) -> RanLayer:
    """A product of (..., rows, inputs) and (..., inputs, outputs), of which the second may be weights."""
    outputs = math.prod(output_shape)
    values = math.prod(first) + math.prod(second) + biased * second[-1] + outputs
    return RanLayer(
        name,
        "matmul",
        implementation,
        seconds,
        inputs=first[-1],
        outputs=second[-1],
        input_shape=first,
        output_shape=output_shape,
        flops=outputs * (2 * first[-1] + biased),
        bytes=itemsize * values,
    )


def typical(runs: Sequence[Sequence[RanLayer]], told_by: str) -> tuple[RanLayer, ...]:
    """Every layer with its median time, position by position. Raises BackendFailed where two runs ran different layers."""
    first = [timeless(layer) for layer in runs[0]]
    if any([timeless(layer) for layer in run] != first for run in runs):
        counts = ", ".join(str(len(run)) for run in runs)
        raise BackendFailed(
            f"{told_by} does not tell the same layers in every run (it tells {counts}), so there is no usual time of each",
            hint="profile again; where layers come and go from run to run there is no profile",
        )
    return tuple(
        replace(layer, seconds=quantile(tuple(run[index].seconds for run in runs), 0.5)) for index, layer in enumerate(first)
    )


def timeless(layer: RanLayer) -> RanLayer:
    """What ran, however long it took."""
    return replace(layer, seconds=0.0)
