"""The graph with its regions squeezed: one operator in each one's place, constants as constants, nothing that is dead."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass
from torch import Tensor

from repdeploy.algebra import Conv
from repdeploy.graph.forms import Through
from repdeploy.graph.known import Known
from repdeploy.graph.regions import Region, living, operator_for

WEIGHT, BIAS = ".weight", ".bias"
END = int(np.iinfo(np.int64).max)
SLICE_TAKES_INPUTS, GEMM_NEEDS_NO_BIAS = 10, 11
"""The opsets since which it is so."""
SMALL = 1 << 12
"""Numbers of a computed constant that is stored whatever it was computed from."""
SHARED = 0.85
"""Of a region's layers: how many have to lie in a module for the region to have its name. Some may be shared with others."""


@dataclass(frozen=True, slots=True)
class Placed:
    """What stands in a region's place: the node's name, and by name its stored tensors, in float64 before they were rounded."""

    name: str
    stored: Mapping[str, Tensor]


def rewrite(model: ir.Model, known: Known, regions: Sequence[Region], reserved: Iterable[str] = ()) -> dict[Region, Placed]:
    """Change the model in place. `reserved`: names that mean something already, though the graph has them no more."""
    graph, reserved = model.graph, tuple(reserved)
    names = _Names(graph, reserved)
    modules = {region: name_of(region, known) for region in regions}
    shared = Counter(modules.values())
    # several regions of one module go by their kernels
    wanted = {region: name if shared[name] == 1 else kernel_of(region, known) for region, name in modules.items()}
    placed = {}
    for region in regions:
        name = names.unused(wanted[region])
        placed[region] = Placed(name, _replace(graph, known, region, name, names))
    _fold(graph, known, names)
    RemoveUnusedNodesPass()(model)
    graph.sort()
    return _renamed(graph, placed, wanted, _Names(graph, reserved))


def _renamed(
    graph: ir.Graph, placed: Mapping[Region, Placed], wanted: Mapping[Region, str], names: _Names
) -> dict[Region, Placed]:
    """Under the names that were wanted, where what had them is gone."""
    nodes = {node.name: node for node in graph}
    renamed = dict(placed)
    for region, item in placed.items():
        name = wanted[region]
        if item.name == name or not names.are_free(name):
            continue
        names.unused(name)
        nodes[item.name].name = name
        stored = {}
        for key, exact in item.stored.items():
            value = graph.initializers[key]
            value.name = name + key.removeprefix(item.name)
            stored[value.name] = exact
        renamed[region] = Placed(name, stored)
    return renamed


def name_of(region: Region, known: Known) -> str:
    """The module that most of a region's weights share, as their dotted names tell; else that of its largest kernel."""
    module: list[str] = []
    paths = [list(path) for path in {tuple(name.split(".")[:-1]) for name in roots_of(region, known)}]
    while paths:
        (part, count), *_ = Counter(path[len(module)] if len(path) > len(module) else "" for path in paths).most_common(1)
        if not part or count < SHARED * len(paths):
            break
        module.append(part)
        paths = [path for path in paths if path[: len(module)] == module]
    return ".".join(module) if module else kernel_of(region, known)


def kernel_of(region: Region, known: Known) -> str:
    """The module of a region's largest stored tensor."""
    roots = roots_of(region, known)
    return max(roots, key=lambda name: roots[name]).removesuffix(WEIGHT) if roots else region.output.name or "region"


def roots_of(region: Region, known: Known) -> dict[str, int]:
    """The stored tensors that a region's constants come from, by name, and how many numbers each has."""
    inputs = (value for node in region.vanishing for value in node.inputs if value in known.constants)
    return {
        root.name or "": numbers_in(root) for value in inputs if value is not None for root in initializers_below(value, known)
    }


def numbers_in(value: ir.Value) -> int:
    """How many numbers a stored tensor holds."""
    return math.prod(value.shape.numpy()) if value.shape is not None else 0


def initializers_below(constant: ir.Value, known: Known) -> list[ir.Value]:
    """The stored floating point tensors that a constant is computed from; itself, if it is stored."""
    found: dict[ir.Value, None] = {}
    stack, seen = [constant], {constant}
    while stack:
        value = stack.pop()
        producer = value.producer()
        if producer is not None:
            # of a value that is computed at run time, a constant holds the type or the shape
            inputs = [item for item in producer.inputs if item is not None and item in known.constants and item not in seen]
            stack += inputs
            seen.update(inputs)
        elif value.is_initializer() and value.dtype is not None and value.dtype.is_floating_point():
            found[value] = None
    return list(found)


class _Names:
    """Names of values, initializers and nodes: a new one is like no other."""

    def __init__(self, graph: ir.Graph, reserved: Iterable[str]) -> None:
        nodes = list(graph.all_nodes())
        self._taken = {node.name for node in nodes} | set(graph.initializers) | {value.name for value in graph.inputs}
        self._taken |= {value.name for node in nodes for value in node.outputs} | set(reserved)
        for subgraph in graph.subgraphs():
            self._taken |= {value.name for value in (*subgraph.inputs, *subgraph.initializers.values())}

    def are_free(self, name: str) -> bool:
        return not {name, name + WEIGHT, name + BIAS} & self._taken

    def unused(self, wanted: str) -> str:
        """`wanted`, or with a number behind it, such that its weight and bias are unused too."""
        name, count = wanted, 0
        while not self.are_free(name):
            count += 1
            name = f"{wanted}_{count}"
        self._taken |= {name, name + WEIGHT, name + BIAS}
        return name


def _replace(graph: ir.Graph, known: Known, region: Region, name: str, names: _Names) -> dict[str, Tensor]:
    """Returns the new stored tensors by name, in float64."""
    old, conv = region.output, region.conv
    producer = old.producer()
    assert producer is not None
    dtype, rank = known.dtype(old) or ir.DataType.FLOAT, len(known.shape(old) or ())
    x, nodes = _passed(region.reading.source.base, region.reading.source.through, name, names)
    operator = operator_for(conv.geometry, region.reading.source, rank)

    exact: dict[str, Tensor] = {}

    def stored(suffix: str, tensor: Tensor) -> ir.Value:
        exact[name + suffix] = tensor
        return _stored(graph, name + suffix, tensor.numpy(), dtype)

    bias = conv.bias if conv.bias is not None and bool(conv.bias.any()) else None
    if bias is None and operator == "Gemm" and graph.opset_imports.get("", GEMM_NEEDS_NO_BIAS) < GEMM_NEEDS_NO_BIAS:
        bias = conv.bias_or_zero()
    if operator == "Conv":
        x, pads, cut = _cropped(graph, x, conv, name, names)
        nodes += cut
        weight = stored(WEIGHT, conv.weight if rank == 4 else conv.weight.squeeze(3))
        inputs = [x, weight] if bias is None else [x, weight, stored(BIAS, bias)]
        spatial = rank - 2
        attributes: dict[str, int | list[int]] = {
            "kernel_shape": list(conv.weight.shape[2:])[:spatial],
            "strides": list(conv.stride)[:spatial],
            "pads": list(pads) if spatial == 2 else [pads[0], pads[2]],
            "dilations": list(conv.dilation)[:spatial],
            "group": conv.groups,
        }
        nodes.append(ir.node("Conv", inputs, attributes, name=name))
    elif operator == "Gemm":
        inputs = [x, stored(WEIGHT, conv.weight.flatten(1))]
        inputs += [] if bias is None else [stored(BIAS, bias)]
        nodes.append(ir.node("Gemm", inputs, {"transB": 1}, name=name))
    else:
        nodes.append(ir.node("MatMul", [x, stored(WEIGHT, conv.weight.flatten(1).transpose(0, 1))], name=name))
        if bias is not None:
            nodes[-1].outputs[0].name = names.unused(f"{name}.product")
            nodes.append(ir.node("Add", [nodes[-1].outputs[0], stored(BIAS, bias)], name=names.unused(f"{name}.add")))
    new = nodes[-1].outputs[0]
    new.shape, new.type = old.shape, old.type or ir.TensorType(dtype)
    new.doc_string = old.doc_string
    new.metadata_props.update(old.metadata_props)
    graph.insert_before(producer, nodes)
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    new.name, old.name = old.name, names.unused(f"{old.name}.replaced")
    return exact


def _stored(graph: ir.Graph, name: str, array: np.ndarray, dtype: ir.DataType) -> ir.Value:
    """A new initializer, rounded once to its type."""
    rounded = np.ascontiguousarray(array.astype(dtype.numpy()))
    value = ir.Value(name=name, const_value=ir.tensor(rounded, dtype=dtype, name=name))
    value.shape, value.type = ir.Shape(rounded.shape), ir.TensorType(dtype)
    graph.register_initializer(value)
    return value


def _passed(x: ir.Value, through: Iterable[Through], name: str, names: _Names) -> tuple[ir.Value, list[ir.Node]]:
    """The nodes that stand in front of a region, on another value than before."""
    nodes = []
    for passed in through:
        label = names.unused(f"{name}.{passed.kind}")
        if passed.kind == "flatten":  # a Reshape may hold the number of channels there was
            node = ir.node("Flatten", [x], {"axis": 1}, name=label)
        else:
            node = ir.node(passed.node.op_type, [x, *passed.node.inputs[1:]], name=label)
            for attribute in passed.node.attributes.values():
                node.attributes.add(attribute)
        x = node.outputs[0]
        x.name = names.unused(f"{label}.output")
        nodes.append(node)
    return x, nodes


def _cropped(
    graph: ir.Graph, x: ir.Value, conv: Conv, name: str, names: _Names
) -> tuple[ir.Value, tuple[int, int, int, int], list[ir.Node]]:
    """An ONNX convolution crops nothing: what its pads would cut off is cut off in front of it."""
    top, left, bottom, right = conv.pads
    if min(conv.pads) >= 0:
        return x, conv.pads, []
    sides = ((2, top, bottom), (3, left, right))
    cuts = [(axis, -min(before, 0), min(after, 0) or END) for axis, before, after in sides if before < 0 or after < 0]
    label = names.unused(f"{name}.crop")
    bounds = {what: [cut[index] for cut in cuts] for index, what in ((1, "starts"), (2, "ends"), (0, "axes"))}
    if graph.opset_imports.get("", SLICE_TAKES_INPUTS) < SLICE_TAKES_INPUTS:
        node = ir.node("Slice", [x], bounds, name=label)
    else:
        stored = [
            _stored(graph, f"{label}.{what}", np.array(items, np.int64), ir.DataType.INT64) for what, items in bounds.items()
        ]
        node = ir.node("Slice", [x, *stored], name=label)
    node.outputs[0].name = names.unused(f"{label}.output")
    return node.outputs[0], (max(top, 0), max(left, 0), max(bottom, 0), max(right, 0)), [node]


def _fold(graph: ir.Graph, known: Known, names: _Names) -> None:
    """What the living nodes read and constants compute becomes a stored tensor, rounded once."""
    stored: dict[ir.Value, ir.Value] = {}
    for node in living(graph, known):
        for index, value in enumerate(node.inputs):
            producer = value.producer() if value is not None else None
            if value is None or producer is None or producer.op_type == "Constant" or value not in known.constants:
                continue
            if known.constants[value].numel() > max(SMALL, sum(numbers_in(root) for root in initializers_below(value, known))):
                continue  # what a graph expands would be stored expanded
            if value not in stored:
                dtype = known.dtype(value) or ir.DataType.from_numpy(known.constants[value].numpy().dtype)
                stored[value] = _stored(graph, names.unused(f"{value.name}.constant"), known.constants[value].numpy(), dtype)
            node.replace_input_with(index, stored[value])
