"""How much activation memory a graph takes at least: the exact peak of what must exist at once, in the graph's own order.

Source: RepVGG, arXiv:2101.03697, section 3.3 and figure 3: a residual block keeps its input until the addition, so that at the
peak two maps exist beside that input; in a plain chain it is one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import onnx
import onnx_ir as ir

from repdeploy.errors import InputError
from repdeploy.graph.known import STANDARD, Known

VIEWS = frozenset({"Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity", "Dropout"})
RANDOM = frozenset({"RandomNormalLike", "RandomUniformLike", "Bernoulli", "Multinomial"})
"""What these make of constants is none: it differs from run to run."""
BITS_PER_BYTE = 8
Size = tuple[ir.DataType, tuple[int, ...]]
"""Element type and shape."""


@dataclass(frozen=True, slots=True)
class Peak:
    """`bytes` of activations that exist at once while the node `at` (operator and name) runs; `tensors`: what they are called,
    oldest first, each view under the name of the value whose bytes it shares."""

    bytes: int
    at: str
    tensors: tuple[str, ...]


def peak(model: ir.Model, shapes: Mapping[str, tuple[int, ...]]) -> Peak:
    """The most activation bytes that live at once, at the first node where it is so. `shapes`: by the names of the inputs.

    - A value lives from the node that makes it, an input of the graph from the start, until the last node that reads it has
      run; outputs of the graph live to the end. An input that nothing reads takes nothing.
    - While a node runs, its inputs and its outputs both exist: nothing is computed in place.
    - Initializers, constants, and what can be computed from them or from shapes alone are weights: they take nothing here, and
      nodes that make nothing else do not run.
    - Reshape, Flatten, Squeeze, Unsqueeze, Identity, and a Dropout that drops nothing, are views of their input's bytes.
    - An If keeps alive what its branches read from outside. While a branch runs, its own values come on top; its results become
      the outputs of the If. The branch that takes more counts, or the one that a constant condition chooses.
    - Every value has the size of its own element type.

    Raises InputError where a size is unknown, which it names; where `shapes` names no input; for a loop.
    """
    inputs = [value.name or "" for value in model.graph.inputs]
    for name in shapes:
        if name not in inputs:
            raise InputError(f"the graph has no input {name!r}", hint=f"its inputs are called {', '.join(inputs)}")
    return _execution(model, shapes).peak


@dataclass(frozen=True, slots=True)
class _Execution:
    """What one run of a graph comes to. `outputs`: their sizes where known, which an If has from its branches."""

    peak: Peak
    outputs: tuple[Size | None, ...]


def _execution(
    model: ir.Model,
    shapes: Mapping[str, tuple[int, ...]],
    weights: frozenset[str] = frozenset(),
    lent: frozenset[str] = frozenset(),
) -> _Execution:
    """Of inputs, `weights` are constants, and `lent` is kept alive by whoever gives it: both take nothing here."""
    sizes = _Sizes(model, shapes, weights)
    graph = model.graph
    nodes = [node for node in graph if any(value.name and value not in sizes.weights for value in node.outputs)]
    home = {value: value for value in graph.inputs if value not in sizes.weights and value.name not in lent}
    last: dict[ir.Value, int] = {}
    made = []
    for step, node in enumerate(nodes):
        for value in _reads(node):
            if value in home:
                last[home[value]] = step
        made.append([value for value in node.outputs if value.name and value not in sizes.weights])
        if sizes.is_view(node):
            view, *more = made[-1]
            made[-1] = [value for value in more if value.uses() or value in graph.outputs]  # a mask is made for who wants it
            source = node.inputs[0]
            if source is not None and source in home:
                home[view] = home[source]
        home |= {value: value for value in made[-1]}
        last |= dict.fromkeys(made[-1], step)
    last |= {home[value]: len(nodes) for value in graph.outputs if value in home}

    alive = {value: sizes.bytes(value) for value in graph.inputs if value in last}
    highest = Peak(0, "", ())
    for step, node in enumerate(nodes):
        at = f"{node.op_type} {node.name or ''}".rstrip()
        waiting = _at_once(alive, at)
        alive |= {value: sizes.bytes(value) for value in made[step]}
        inside = (
            Peak(waiting.bytes + run.peak.bytes, f"{at}: {run.peak.at}", waiting.tensors + run.peak.tensors)
            for run in sizes.branches.get(node, ())
        )
        highest = max(highest, _at_once(alive, at), *inside, key=lambda found: found.bytes)
        alive = {value: size for value, size in alive.items() if last[value] > step}
    return _Execution(highest, tuple(sizes.size(value) for value in graph.outputs))


def _at_once(alive: Mapping[ir.Value, int], at: str) -> Peak:
    return Peak(sum(alive.values()), at, tuple(value.name or "" for value in alive))


class _Sizes(Known):
    """What is known of a graph's values, which of them are weights, and what the branches of each If come to."""

    def __init__(self, model: ir.Model, shapes: Mapping[str, tuple[int, ...]], weights: frozenset[str]) -> None:
        self.weights = {*model.graph.initializers.values(), *(value for value in model.graph.inputs if value.name in weights)}
        self.branches: dict[ir.Node, tuple[_Execution, ...]] = {}
        super().__init__(model, shapes)

    def size(self, value: ir.Value) -> Size | None:
        dtype, found = self.dtype(value), self.sizes(value)
        if dtype is None or dtype == ir.DataType.STRING or found is None:
            return None
        shape = tuple(axis for axis in found if axis is not None)
        return (dtype, shape) if len(shape) == len(found) else None

    def require(self, value: ir.Value) -> Size:
        """Raises InputError where the type or the shape is unknown."""
        found = self.size(value)
        if found is None:
            raise InputError(
                f"the size of {value.name!r} is not known, so neither is what memory it takes",
                hint="state the shape of every input; what depends on the numbers in an image has no fixed size",
            )
        return found

    def bytes(self, value: ir.Value) -> int:
        dtype, shape = self.require(value)
        return -(-math.prod(shape) * dtype.bitwidth // BITS_PER_BYTE)  # rounded up: two numbers of four bits share a byte

    def is_view(self, node: ir.Node) -> bool:
        if node.op_type not in VIEWS or node.domain not in STANDARD:
            return False
        training = node.inputs[2] if node.op_type == "Dropout" and len(node.inputs) > 2 else None
        return training is None or (training in self.constants and not bool(self.constants[training]))

    def _node(self, node: ir.Node) -> None:
        if _graphs(node) and node.op_type != "If":
            raise InputError(
                f"how often the {node.op_type} {node.name or ''} runs is decided by its data, so its memory has no exact peak",
                hint="export the model with its loops unrolled",
            )
        super()._node(node)
        read = list(_reads(node))
        if (node.op_type == "Constant" and node.domain in STANDARD) or (
            read and node.op_type not in RANDOM and all(value in self.weights for value in read)
        ):
            self.weights.update(node.outputs)
        self.weights.update(value for value in node.outputs if value in self.constants)

    def _infer(self, node: ir.Node) -> None:
        """The outputs of an If are those of its branches, where they agree."""
        if not _graphs(node):
            super()._infer(node)
            return
        condition = self.constants.get(node.inputs[0]) if node.inputs[0] is not None else None
        taken = ("then_branch", "else_branch") if condition is None else ("then_branch" if bool(condition) else "else_branch",)
        self.branches[node] = runs = tuple(self._run(node.attributes[name].as_graph()) for name in taken)
        for value, *ends in zip(node.outputs, *(run.outputs for run in runs), strict=True):
            if value.name and ends[0] is not None and len(set(ends)) == 1:
                self._types[value.name] = onnx.helper.make_tensor_type_proto(*_in_proto(ends[0]))

    def _run(self, branch: ir.Graph) -> _Execution:
        """A branch as a graph of its own: what it reads from outside becomes its inputs, or small constants of its own."""
        proto = ir.to_proto(branch)
        weights: set[str] = set()
        lent: set[str] = set()
        for value in _outer_values(branch):
            name = value.name or ""
            if value in self.constants:
                proto.initializer.append(onnx.numpy_helper.from_array(self._stored(value), name))
                continue
            (weights if value in self.weights else lent).add(name)
            proto.input.append(onnx.helper.make_tensor_value_info(name, *_in_proto(self.require(value))))
        closed: ir.Model = ir.from_proto(onnx.helper.make_model(proto, opset_imports=self._imports))
        for name, stored in branch.initializers.items():  # a weight in a file beside the model is found from the original
            closed.graph.initializers[name].const_value = stored.const_value
        return _execution(closed, {}, frozenset(weights), frozenset(lent))


def _in_proto(size: Size) -> tuple[int, tuple[int, ...]]:
    dtype, shape = size
    return int(dtype), shape


def _reads(node: ir.Node) -> Iterator[ir.Value]:
    """What a node needs before it runs; of an If, what its branches read from outside as well."""
    yield from (value for value in node.inputs if value is not None)
    for graph in _graphs(node):
        yield from _outer_values(graph)


def _graphs(node: ir.Node) -> list[ir.Graph]:
    return [item.as_graph() for item in node.attributes.values() if item.type == ir.AttributeType.GRAPH]


def _outer_values(graph: ir.Graph) -> list[ir.Value]:
    """What the nodes of a subgraph, and of the graphs in it, read from outside."""
    nodes = list(graph.all_nodes())
    own = {value for item in (graph, *graph.subgraphs()) for value in (*item.inputs, *item.initializers.values())}
    own.update(value for node in nodes for value in node.outputs)
    read = [value for node in nodes for value in node.inputs if value is not None]
    return [value for value in dict.fromkeys(read) if value not in own]
