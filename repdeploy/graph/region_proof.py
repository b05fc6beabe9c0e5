"""Gate 1 on the graph road: a region's expression, the convolution it became and its original nodes, in float64."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir
import torch
from torch import Tensor

from repdeploy import gates
from repdeploy.algebra import FILL_TOLERANCE
from repdeploy.graph.forms import Layout
from repdeploy.graph.interpreter import Interpreter, Values, evaluate
from repdeploy.graph.known import Known
from repdeploy.graph.regions import Region
from repdeploy.records import Check

FOLDED_BUDGET = 1e-5
"""Where an exporter folded norms in float32, a border and what it must equal agree to float32 only."""
NOTHING = 1e-6
"""Of the image: an output below this is a difference of larger things."""
OTHER_SIZE = 3
"""Of an open axis that is neither the batch nor an image's: tokens, for example."""


def region_check(known: Known, region: Region, name: str, seed: int = 0) -> Check:
    """Run a region three ways on one image. The error is the largest of expression and nodes against the convolution."""
    x = gates.algebra_image(_shape(known, region), seed)
    source, layout = region.reading.source, region.reading.source.layout
    interpreter = Interpreter(known.opset)
    with gates.exact_arithmetic():
        passed = x
        for item in source.through:
            passed = passed.flatten(1) if item.kind == "flatten" else _applied(interpreter, known, item.node, passed)
        image = as_image(passed, layout)
        literal, squeezed = region.reading.expression.run(image), region.conv.run(image)
        order = [node for node in region.output.graph or () if node in region.reading.nodes]
        found = evaluate(_Flattening(known.opset), order, {**_others(known, order), source.base: x}, [region.output])
        original = as_image(found[region.output], layout)
    exact = region.tolerance <= FILL_TOLERANCE
    budget = gates.ALGEBRA_BUDGET if exact else FOLDED_BUDGET
    detail = "" if exact else "an exporter folded norms in float32: border values agree to that"
    if literal.shape != squeezed.shape or original.shape != squeezed.shape:
        shapes = f"{tuple(squeezed.shape)}, its branches {tuple(literal.shape)}, its nodes {tuple(original.shape)}"
        return Check("algebra", name, float("inf"), budget, failure=f"the squeezed convolution gives {shapes}")
    # what cancels to nothing is measured against the image
    scale = max(float(original.abs().max()), NOTHING * float(x.abs().max())) if original.numel() else 1.0
    error = max(float((squeezed - other).abs().max()) for other in (literal, original)) / scale if original.numel() else 0.0
    if error != error or not bool(torch.isfinite(squeezed).all()):
        return Check("algebra", name, float("inf"), budget, failure="the output has NaN or Inf")
    return Check("algebra", name, error, budget, detail=detail)


def as_image(x: Tensor, layout: Layout) -> Tensor:
    """Any value as (batch, channels, height, width): what is missing has size 1."""
    if layout == "last":
        x = x.movedim(-1, 1).flatten(2)
    return x.reshape(*x.shape, *(1,) * (4 - x.dim()))


class _Flattening(Interpreter):
    """A region's Reshape flattens, to whatever batch it is given here."""

    def run(self, node: ir.Node, inputs: Sequence[Tensor | None]) -> Values:
        if node.op_type == "Reshape" and inputs[0] is not None:
            return (inputs[0].flatten(1),)
        return super().run(node, inputs)


def _others(known: Known, nodes: Sequence[ir.Node]) -> dict[ir.Value, Tensor]:
    """What nodes read beside the image: constants, and the target of a Reshape, which is not looked at."""
    found = {}
    for node in nodes:
        for value in node.inputs:
            if value is not None and value in known.constants:
                found[value] = known.constants[value]
            elif value is not None and node.op_type == "Reshape" and value is node.inputs[1]:
                found[value] = torch.zeros(0)
    return found


def _applied(interpreter: Interpreter, known: Known, node: object, x: Tensor) -> Tensor:
    others = [known.constants[value] if value is not None else None for value in node.inputs[1:]]  # type: ignore[attr-defined]
    return interpreter.run(node, [x, *others])[0]  # type: ignore[arg-type]


def _shape(known: Known, region: Region) -> tuple[int, ...]:
    """The smallest that shows border and interior; the graph's own size where the region holds at that only."""
    source, geometry = region.reading.source, region.conv.geometry
    sizes = known.sizes(source.base) or ()
    kinds = [item.kind for item in source.through]
    turned = kinds.count("transpose") % 2 == 1
    channels_last = (source.layout == "last") != turned
    rests_on_size = region.reading.bound or ("flatten" in kinds and "pool" not in kinds)
    if channels_last:
        return (*(size or OTHER_SIZE for size in sizes[:-1]), geometry.in_channels)
    batch, image = sizes[0] or 1, sizes[2:]
    if rests_on_size or turned or source.layout == "last":
        return (batch, geometry.in_channels, *(size or OTHER_SIZE for size in image))
    return (batch, geometry.in_channels, *gates.border_and_interior(geometry)[: len(image)])
