"""Which regions to squeeze: from the outputs back, at every value the reading that saves most, if it pays and is exact.

A region pays where its convolution needs no more operations than the nodes that vanish with it. A node vanishes if nothing
outside the region uses what it computes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import onnx_ir as ir

from repdeploy.algebra import FILL_TOLERANCE, Conv, Geometry
from repdeploy.errors import CannotSqueeze
from repdeploy.graph import costs
from repdeploy.graph.costs import Cost
from repdeploy.graph.forms import OPERATORS, PASSED
from repdeploy.graph.known import Known
from repdeploy.graph.readings import Reading, Readings, Source

HALF_MAX = 65504.0
"""The largest float16."""
EXPORTER_TOLERANCE = 1e-6
"""How far border values may differ where an exporter folded norms in float32 before we saw them."""


@dataclass(frozen=True, slots=True, eq=False)
class Region:
    """`output` = `reading`, to become `conv`. `vanishing`: its nodes that nothing else needs, in the order of the graph."""

    output: ir.Value
    reading: Reading
    conv: Conv
    vanishing: tuple[ir.Node, ...]
    before: Cost | None
    after: Cost | None
    tolerance: float


@dataclass(frozen=True, slots=True)
class Estimate:
    """A region that was left as it is because it would grow."""

    before: Cost
    after: Cost


@dataclass(frozen=True, slots=True)
class Kept:
    """A linear operator that stays, and why."""

    node: ir.Node
    reason: str
    estimate: Estimate | None = None


@dataclass(slots=True)
class _Choice:
    """The state of choosing: which nodes are still alive, and who reads a value."""

    known: Known
    sizes: Known
    force: bool
    order: dict[ir.Node, int]
    readers: dict[ir.Value, set[object]]
    pinned: set[ir.Value]
    convolves: bool
    dead: set[ir.Node] = field(default_factory=set)
    regions: list[Region] = field(default_factory=list)
    reasons: dict[ir.Node, list[Kept]] = field(default_factory=dict)


def choose(
    graph: ir.Graph, known: Known, sizes: Known, readings: Readings, *, force: bool, convolve_float64: bool
) -> tuple[list[Region], list[Kept]]:
    """The regions to squeeze, outputs first, and the linear operators that stay.

    `sizes`: shapes at a concrete input, for the estimates; `force`: squeeze what grows as well; `convolve_float64`: put
    convolutions in float64 into a graph that has none so far, which few runtimes take.
    """
    nodes = living(graph, known)
    readers: dict[ir.Value, set[object]] = {}
    for node in nodes:
        for used in node.inputs:
            if used is not None:
                readers.setdefault(used, set()).add(node)
    pinned = set(graph.outputs) | _outer_values(graph)
    order = {node: index for index, node in enumerate(nodes)}
    convolves = convolve_float64 or any(node.op_type == "Conv" for node in nodes)
    state = _Choice(known, sizes, force, order, readers, pinned, convolves)
    for node in reversed(nodes):
        if node in state.dead:
            continue
        value = node.outputs[0] if node.outputs else None
        if value is not None and value in readings.of:
            _choose_at(state, value, readings.of[value].values())
    return state.regions, list(_kept(state, nodes, readings))


def living(graph: ir.Graph, known: Known) -> list[ir.Node]:
    """The nodes that the outputs need, once constants are constants, in the order of the graph."""
    outer = _outer_values(graph)
    needed = {value for value in (*graph.outputs, *outer) if value not in known.constants}
    nodes = []
    for node in reversed(list(graph)):
        if any(value in needed for value in node.outputs):
            nodes.append(node)
            needed.update(value for value in node.inputs if value is not None and value not in known.constants)
    return nodes[::-1]


def _outer_values(graph: ir.Graph) -> set[ir.Value]:
    """Values of this graph that its subgraphs read."""
    own = set(graph)
    read = {value for node in graph.all_nodes() if node not in own for value in node.inputs if value is not None}
    return read | {value for subgraph in graph.subgraphs() for value in subgraph.outputs}


def _choose_at(state: _Choice, value: ir.Value, readings: Iterable[Reading]) -> None:
    node = value.producer()
    assert node is not None
    candidates = []
    for reading in readings:
        vanishing = _vanishing(state, value, reading)
        needed = nodes_needed(reading, state.known, value)
        if needed is None or len(vanishing) <= needed:
            continue
        before, after = costs.of_nodes(vanishing, state.sizes), _after(state, value, reading)
        if not state.force and (before is None or after is None or after.flops > before.flops):
            estimate = Estimate(before, after) if before is not None and after is not None else None
            reason = "it would grow" if estimate is not None else "nothing tells the sizes that it would have"
            _note(state, node, Kept(node, reason, estimate))
            continue
        saved = (before.flops - after.flops, before.bytes - after.bytes) if before and after else (0, 0)
        candidates.append((saved, len(vanishing), reading, vanishing, before, after))
    for _, _, reading, vanishing, before, after in sorted(candidates, key=lambda item: item[:2], reverse=True):
        try:
            conv, tolerance = _squeezed(reading)
            _check_type(state.known.dtype(value), conv, state.convolves)
        except CannotSqueeze as reason:
            _note(state, node, Kept(node, str(reason)))
            continue
        region = Region(value, reading, conv, vanishing, before, after, tolerance)
        state.regions.append(region)
        for gone in vanishing:
            state.dead.add(gone)
            for used in gone.inputs:
                if used is not None:
                    state.readers[used].discard(gone)
        state.readers.setdefault(reading.source.base, set()).add(region)
        return


def _squeezed(reading: Reading) -> tuple[Conv, float]:
    """The convolution, exactly where possible, and how far its border values disagree at most. Raises CannotSqueeze."""
    try:
        return reading.expression.squeeze().zero_filled(), FILL_TOLERANCE
    except CannotSqueeze:
        return reading.expression.squeeze(EXPORTER_TOLERANCE).zero_filled(EXPORTER_TOLERANCE), EXPORTER_TOLERANCE


def _check_type(dtype: ir.DataType | None, conv: Conv, convolves: bool) -> None:
    """Raises CannotSqueeze where the value's type cannot hold the kernel, or few runtimes convolve in it."""
    if dtype == ir.DataType.DOUBLE and not convolves:
        raise CannotSqueeze("few runtimes convolve in float64, and this graph does not so far")
    largest = float(max(conv.weight.abs().max(), conv.bias_or_zero().abs().max())) if conv.weight.numel() else 0.0
    if dtype == ir.DataType.FLOAT16 and largest > HALF_MAX:
        raise CannotSqueeze(f"its kernel reaches {largest:.3g}, and float16 ends at {HALF_MAX:g}")
    if largest != largest or largest == float("inf"):
        raise CannotSqueeze("its weights have NaN or Inf")


def _vanishing(state: _Choice, value: ir.Value, reading: Reading) -> tuple[ir.Node, ...]:
    """The nodes of a reading that are needed for nothing but its value, which is computed anew."""
    gone: set[object] = set()
    vanishing = []
    for node in sorted(reading.nodes - state.dead, key=lambda node: state.order[node], reverse=True):
        outputs = [output for output in node.outputs if output is not value]
        if all(output not in state.pinned and state.readers.get(output, set()) <= gone for output in outputs):
            gone.add(node)
            vanishing.append(node)
    return tuple(reversed(vanishing))


def nodes_needed(reading: Reading, known: Known, value: ir.Value) -> int | None:
    """How many operators write a squeezed reading; None where ONNX has none for it."""
    shape = known.shape(value)
    if shape is None:
        return None
    operator = operator_for(reading.geometry, reading.source, len(shape))
    if operator is None or (operator == "Conv" and _cuts_padding(reading.geometry, known.sizes(reading.source.base))):
        return None
    through = len(reading.source.through)
    return through + 1 + (operator == "Conv" and min(reading.geometry.pads) < 0) + (operator == "MatMul" and reading.shifts)


def _cuts_padding(geometry: Geometry, sizes: tuple[int | None, ...] | None) -> bool:
    """Whether a crop takes all that the image has, so that what is left is padding."""
    image = () if sizes is None else sizes[2:]
    cuts = [-min(geometry.pads[axis], geometry.pads[axis + 2], 0) for axis in range(len(image))]
    return any(size is not None and 0 < size <= cut for size, cut in zip(image, cuts, strict=True))


def operator_for(geometry: Geometry, source: Source, rank: int) -> str | None:
    """Conv where the channels come first and there is an image, Gemm where there is none, MatMul where they come last."""
    pointwise = geometry.kernel_size == (1, 1) == geometry.stride and not any(geometry.pads)
    if source.layout == "last":
        return "MatMul" if pointwise and geometry.groups == 1 else None
    if rank == 2:
        return "Gemm" if pointwise and geometry.groups == 1 else None
    if rank == 3:
        flat = (geometry.kernel_size[1], geometry.stride[1], geometry.pads[1], geometry.pads[3]) == (1, 1, 0, 0)
        return "Conv" if flat else None
    return "Conv" if rank == 4 else None


def _after(state: _Choice, value: ir.Value, reading: Reading) -> Cost | None:
    """What the squeezed region costs, the nodes in front of it included."""
    outputs, inputs = state.sizes.elements(value), state.sizes.elements(reading.source.base)
    if outputs is None or inputs is None:
        return None
    total = costs.NOTHING
    for passed in reading.source.through:
        if passed.kind == "pool":
            shape = state.sizes.sizes(passed.node.outputs[0])
            area = state.sizes.sizes(passed.input)
            if shape is None or area is None or area[1] is None:
                return None
            total += Cost(inputs, costs.BYTES * inputs)
            inputs = (area[0] or 1) * reading.geometry.in_channels
    return total + costs.of_conv(reading.geometry, reading.shifts, inputs, outputs)


def _note(state: _Choice, node: ir.Node, kept: Kept) -> None:
    state.reasons.setdefault(node, []).append(kept)


def _kept(state: _Choice, nodes: list[ir.Node], readings: Readings) -> Iterable[Kept]:
    """One reason per linear operator that stays: the one nearest to having been squeezed."""
    for node in nodes:
        if node in state.dead or node.op_type not in OPERATORS or node.op_type in PASSED:
            continue
        noted = state.reasons.get(node, [])
        growing = next((kept for kept in noted if kept.estimate is not None), None)
        refused = readings.forms.refused.get(node) or next(iter(readings.refused.get(node, [])), None)
        if noted and growing is None:
            yield noted[0]
        elif growing is not None:
            yield growing
        elif refused is not None:
            yield Kept(node, refused)
        else:
            yield Kept(node, _alone(state, node, readings))


def _alone(state: _Choice, node: ir.Node, readings: Readings) -> str:
    found = readings.of.get(node.outputs[0], {})
    if any(len(reading.nodes) > 1 for reading in found.values()):
        return "what it follows is needed elsewhere as well"
    if node.op_type in ("Conv", "Gemm", "MatMul"):
        return "it is one operator already, between others that are not linear"
    return "there is no convolution before or behind it that it could become part of"
