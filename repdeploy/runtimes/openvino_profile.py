"""What OpenVINO really ran: its performance counters, joined with the graph that it executes.

The executed graph has every tensor's shape and the kernel's name; strides stand in the model as it was read. A counter is the
mean of all runs since the model was compiled, in whole microseconds; the first, which prepare kernels, are taken out of it.
Sources: OpenVINO's Python API (get_profiling_info, get_runtime_model), its CPU plugin (PerfCount); graphs of OpenVINO 2026.4.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from repdeploy.measurements import RanLayer
from repdeploy.runtimes.ran_layers import FLOAT32, Shape, convolution, matrix_product

WARM_UP_RUNS = 2
CONVOLUTIONS = frozenset({"Convolution", "GroupConvolution"})
PRODUCTS = frozenset({"FullyConnected", "MatMul"})
ITEMSIZES = {"f32": 4, "bf16": 2, "f16": 2, "i8": 1, "u8": 1}


def profiled(compiled: Any, request: Any, model: Any, once: Callable[[], object], runs: int) -> tuple[RanLayer, ...]:
    """Every layer that was executed, in its order, with its mean time over `runs` of `once`: 0 below a microsecond.

    `compiled`: the model, compiled to count and not yet run; `request`: what `once` runs; `model`: as it was read.
    """
    first = _after(request, once, WARM_UP_RUNS)
    whole = _after(request, once, runs)
    strides = {
        node.get_friendly_name(): tuple(node.get_attributes()["strides"])
        for node in model.get_ops()
        if node.get_type_name() in CONVOLUTIONS
    }
    nodes = {node.get_friendly_name(): node for node in compiled.get_runtime_model().get_ordered_ops()}
    layers = []
    for before, after in zip(first, whole, strict=True):
        if before.status == before.Status.EXECUTED:  # later, a mean below a microsecond reads as not run
            total = (WARM_UP_RUNS + runs) * after.real_time - WARM_UP_RUNS * before.real_time
            seconds = max(0.0, total.total_seconds() / runs)
            layers.append(_layer(after.node_name, seconds, nodes[after.node_name], strides))
    return tuple(layers)


def _after(request: Any, once: Callable[[], object], runs: int) -> list[Any]:
    for _ in range(runs):
        once()
    return list(request.get_profiling_info())


def _layer(name: str, seconds: float, node: Any, strides: Mapping[str, Shape]) -> RanLayer:
    told = {key: str(value.astype(str)) for key, value in node.get_rt_info().items()}
    kind = told["layerType"]
    inputs = [_shape(port) for port in node.input_values()]
    output = _shape(node.output(0))
    itemsize = ITEMSIZES.get(told["runtimePrecision"], FLOAT32)
    implementation = told["primitiveType"]
    if kind == "Convolution" and len(inputs) > 1:
        grouped = len(inputs[1]) > len(inputs[0])  # (groups, outputs / groups, inputs / groups, ...)
        weights = (inputs[1][0] * inputs[1][1], *inputs[1][2:]) if grouped else inputs[1]
        merged = told["originalLayersNames"].split(",")
        return convolution(
            name, implementation, seconds, input_shape=inputs[0], weight_shape=weights, output_shape=output,
            stride=next((strides[part] for part in (name, *merged) if part in strides), ()),
            biased=any(shape == (weights[0],) for shape in inputs[2:]), itemsize=itemsize,
            added=sum(math.prod(shape) for shape in inputs[2:] if shape == output),
        )  # fmt: skip
    if kind in PRODUCTS and len(inputs) > 1 and min(len(inputs[0]), len(inputs[1]), len(output)) > 1:
        factors = math.prod(inputs[1]) // (math.prod(inputs[1][:-2]) * output[-1])
        return matrix_product(
            name, implementation, seconds, first=(*output[:-1], factors), second=(*inputs[1][:-2], factors, output[-1]),
            output_shape=output, biased=any(shape == (output[-1],) for shape in inputs[2:]), itemsize=itemsize,
        )  # fmt: skip
    moved = itemsize * (sum(math.prod(shape) for shape in inputs) + math.prod(output))
    return RanLayer(
        name, "reorder" if kind == "Reorder" else "other", implementation, seconds, input_shape=inputs[0] if inputs else (),
        output_shape=output, bytes=moved,
    )  # fmt: skip


def _shape(port: Any) -> Shape:
    return tuple(int(size) for size in port.get_shape())
