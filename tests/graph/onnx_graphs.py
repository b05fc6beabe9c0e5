"""ONNX graphs written node by node, and run as a whole in float64 or in onnxruntime: what all tests of this folder share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper

from repdeploy import gates
from repdeploy.graph.interpreter import Interpreter, evaluate

Arrays = Mapping[str, np.ndarray]
EXACT = 1e-10
"""Double graphs: float64 from end to end; a wrong tap shows at 1e-2 and more."""
STORED_FLOAT32 = 1e-5
"""Float graphs evaluated in float64: squeezed weights are rounded once, to float32."""


class Writer:
    """Collects the nodes and constants of one graph. `elem`: the floating type of all of it."""

    def __init__(self, opset: int = 17, elem: int = TensorProto.DOUBLE) -> None:
        self.opset, self.elem = opset, elem
        self.nodes: list[onnx.NodeProto] = []
        self.stored: dict[str, onnx.TensorProto] = {}
        self._count = 0

    def name(self, wanted: str = "v") -> str:
        self._count += 1
        return f"{wanted}{self._count}"

    def store(self, array: Any, name: str = "") -> str:
        """An initializer; floating values take the graph's type."""
        array = np.asarray(array)
        if array.dtype.kind == "f":
            array = array.astype(helper.tensor_dtype_to_np_dtype(self.elem))
        name = name or self.name("c")
        self.stored[name] = numpy_helper.from_array(array, name)
        return name

    def node(self, op: str, inputs: Sequence[str | Any], output: str = "", *, domain: str = "", **attributes: Any) -> str:
        """One node; what is no string among its inputs becomes an initializer. Returns the name of its output."""
        output = output or self.name()
        names = [item if isinstance(item, str) else self.store(item) for item in inputs]
        self.nodes.append(helper.make_node(op, names, [output], domain=domain, **attributes))
        return output

    def conv(self, x: str, weight: np.ndarray, bias: np.ndarray | None = None, output: str = "", **attributes: Any) -> str:
        inputs = [x, weight] if bias is None else [x, weight, bias]
        return self.node("Conv", inputs, output, **attributes)

    def norm(self, x: str, statistics: Sequence[np.ndarray], output: str = "", epsilon: float = 1e-5) -> str:
        """`statistics`: gamma, beta, mean, variance."""
        return self.node("BatchNormalization", [x, *statistics], output, epsilon=epsilon)

    def model(
        self,
        inputs: Mapping[str, Sequence[int | str]],
        outputs: Mapping[str, Sequence[int | str] | int],
        *,
        ir_version: int = 10,
        types: Mapping[str, int] | None = None,
        domains: Mapping[str, int] | None = None,
    ) -> onnx.ModelProto:
        """Of these inputs and outputs (shape, or rank where it is left open); `types`: element types that differ."""

        def declared(name: str, shape: Sequence[int | str] | int) -> onnx.ValueInfoProto:
            sizes = [f"{name}_{axis}" for axis in range(shape)] if isinstance(shape, int) else list(shape)
            return helper.make_tensor_value_info(name, (types or {}).get(name, self.elem), sizes)

        graph = helper.make_graph(
            self.nodes,
            "graph",
            [declared(*item) for item in inputs.items()],
            [declared(*item) for item in outputs.items()],
            list(self.stored.values()),
        )
        opsets = [helper.make_opsetid(domain, version) for domain, version in {"": self.opset, **(domains or {})}.items()]
        return helper.make_model(graph, opset_imports=opsets, ir_version=ir_version)


def run_whole(model: onnx.ModelProto, feeds: Arrays, dtype: torch.dtype = torch.float64) -> dict[str, np.ndarray]:
    """Every output of a model, through this project's interpreter."""
    graph = ir.serde.deserialize_model(model).graph
    interpreter = Interpreter(graph.opset_imports[""], dtype)
    known = {}
    for value in graph.initializers.values():
        assert value.const_value is not None
        known[value] = interpreter.tensor(value.const_value.numpy())
    known |= {value: interpreter.tensor(feeds[value.name]) for value in graph.inputs if value.name in feeds}
    with gates.exact_arithmetic():
        found = evaluate(interpreter, graph, known, list(graph.outputs))
    return {value.name or "": found[value].numpy() for value in graph.outputs}


def run_onnxruntime(model: onnx.ModelProto, feeds: Arrays) -> dict[str, np.ndarray]:
    """Every output of a model, through onnxruntime without its own fusions."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(feeds)), strict=True))


def worst(got: Arrays, wanted: Arrays) -> float:
    """The largest difference over all outputs, relative to each one's largest value; infinite where shapes differ."""
    error = 0.0
    assert got.keys() == wanted.keys()
    for name, reference in wanted.items():
        if got[name].shape != reference.shape or not np.isfinite(reference.astype(np.float64)).all():
            return float("inf")
        if reference.size:
            difference = np.abs(got[name].astype(np.float64) - reference.astype(np.float64)).max()
            error = max(error, float(difference / max(1.0, np.abs(reference.astype(np.float64)).max())))
    return error


def kinds(model: onnx.ModelProto) -> list[str]:
    """The operators of a graph, in its order."""
    return [node.op_type for node in model.graph.node]


def ends(model: onnx.ModelProto) -> list[tuple[str, bytes]]:
    """Names and types of what goes in and comes out, in their order."""
    graph = model.graph
    return [(value.name, value.type.SerializeToString(deterministic=True)) for value in (*graph.input, *graph.output)]
