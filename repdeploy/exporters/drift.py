"""How far each layer of a graph in reduced precision is from the same layer in float64, block by block."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from repdeploy import gates
from repdeploy.exporters.interface import Case
from repdeploy.graph.interpreter import Interpreter, evaluate
from repdeploy.graph.onnx_source import read_onnx
from repdeploy.graph.typed import TypedGraph
from repdeploy.records import Drift

LAYERS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
"""Operators with weights: what reduced precision is told of, and kept out of, one by one."""


def drift(wide: ir.Model, narrow: Path, case: Case) -> tuple[Drift, ...]:
    """Every layer with weights, in the order of the graph. `wide`: the float32 graph that `narrow` was cast from.

    Layers are found in both graphs by the value they make, which casting leaves its name.
    """
    graph = wide.graph
    layers = {node.outputs[0].name or "": node for node in graph if node.op_type in LAYERS}
    interpreter = Interpreter(wide.opset_imports[""])
    fed = {value: interpreter.tensor(case.feeds[name]) for value in graph.inputs if (name := value.name or "") in case.feeds}
    typed = TypedGraph(read_onnx(narrow).model)
    with gates.exact_arithmetic():
        exact = evaluate(interpreter, graph, interpreter.stored(graph) | fed, [node.outputs[0] for node in layers.values()])
    made = typed.run(case.feeds, tuple(layers))
    return tuple(
        Drift(layers[name].name or name, gates.relative_error(made[name], tensor))
        for value, tensor in exact.items()
        if (name := value.name or "") in made
    )
