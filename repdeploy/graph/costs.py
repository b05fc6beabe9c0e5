"""What nodes and convolutions cost, estimated from shapes: floating point operations, and bytes moved if nothing is fused."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import onnx_ir as ir

from repdeploy.algebra import Geometry
from repdeploy.graph.attributes import ints
from repdeploy.graph.known import Known

BYTES = 4
"""Per value: the estimate is for float32."""


@dataclass(frozen=True, slots=True)
class Cost:
    """`flops`: additions and multiplications; `bytes`: inputs, weights and outputs, each once per operator."""

    flops: int
    bytes: int

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.bytes + other.bytes)


NOTHING = Cost(0, 0)
PER_OUTPUT = {"BatchNormalization": 2, "Add": 1, "Sub": 1, "Mul": 1, "Div": 1, "Neg": 1}


def of_nodes(nodes: Iterable[ir.Node], sizes: Known) -> Cost | None:
    """The sum over nodes; None where a size is unknown. `sizes`: shapes at a concrete input."""
    total = NOTHING
    for node in nodes:
        cost = of_node(node, sizes)
        if cost is None:
            return None
        total += cost
    return total


def of_node(node: ir.Node, sizes: Known) -> Cost | None:
    counts = [sizes.elements(value) for value in (*node.inputs, *node.outputs[:1]) if value is not None]
    output = sizes.elements(node.outputs[0])
    if output is None or None in counts:
        return None
    moved = sum(count for count in counts if count is not None) * BYTES
    return Cost(_flops(node, output, counts, sizes), moved)


def _flops(node: ir.Node, output: int, counts: list[int | None], sizes: Known) -> int:
    if node.op_type in PER_OUTPUT:
        return PER_OUTPUT[node.op_type] * output
    if node.op_type == "Sum":
        return (len(counts) - 2) * output
    if node.op_type == "Conv":
        weight = sizes.sizes(node.inputs[1])  # type: ignore[arg-type]
        biased = len(node.inputs) > 2 and node.inputs[2] is not None
        return output * (2 * math.prod(weight[1:]) + biased) if weight and None not in weight else 0  # type: ignore[arg-type]
    if node.op_type in ("Gemm", "MatMul"):
        first = sizes.sizes(node.inputs[0])  # type: ignore[arg-type]
        return output * (2 * (first[-1] or 0) + (len(node.inputs) > 2)) if first else 0
    if node.op_type == "AveragePool":
        return output * math.prod(ints(node, "kernel_shape"))
    if node.op_type in ("GlobalAveragePool", "ReduceMean"):
        return counts[0] or 0
    return 0


def of_conv(geometry: Geometry, biased: bool, inputs: int, outputs: int) -> Cost:
    """One convolution from `inputs` to `outputs` elements."""
    taps = math.prod(geometry.weight_shape[1:])
    weights = math.prod(geometry.weight_shape) + biased * geometry.out_channels
    return Cost(outputs * (2 * taps + biased), BYTES * (inputs + outputs + weights))
