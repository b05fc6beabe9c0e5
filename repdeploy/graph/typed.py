"""A graph as its types say: every node in float32 on rounded inputs, its results rounded to the type that the file gives them.

onnxruntime's CPU leaves such roundings out (a half of 81000 comes back finite), so reduced precisions are judged by this.
Source: design section 6, gate 4; ONNX operator specification for the types of results.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
import onnx_ir as ir
import torch
from torch import Tensor

from repdeploy.gates import exact_arithmetic
from repdeploy.graph.interpreter import CannotInterpret, Interpreter, Values, evaluate
from repdeploy.graph.known import LIKE_THEIR_INPUT

ROUNDED: Mapping[ir.DataType, torch.dtype] = {ir.DataType.FLOAT16: torch.float16, ir.DataType.BFLOAT16: torch.bfloat16}
"""The types of values that are rounded; what is wider is left in float32."""


class TypedInterpreter(Interpreter):
    """Runs nodes in float32 and rounds each result to its own type."""

    def __init__(self, opset: int) -> None:
        super().__init__(opset, torch.float32, rounds=True)

    def run(self, node: ir.Node, inputs: Sequence[Tensor | None]) -> Values:
        return tuple(rounded(x, value.dtype) for x, value in zip(super().run(node, inputs), node.outputs, strict=False))


class TypedGraph:
    """A model, ready to be executed by its types. Raises CannotInterpret where a value has no known type."""

    def __init__(self, model: ir.Model) -> None:
        self.model = with_types(model)
        self._interpreter = TypedInterpreter(self.model.opset_imports[""])
        self._stored = self._interpreter.stored(self.model.graph)

    def run(self, feeds: Mapping[str, np.ndarray], values: Sequence[str] = ()) -> dict[str, Tensor]:
        """Every output by name, in float32 where it is a rounded one; also `values` from inside. Raises CannotInterpret."""
        graph = self.model.graph
        known = dict(self._stored)
        for value in graph.inputs:
            if (name := value.name or "") in feeds:
                known[value] = rounded(self._interpreter.tensor(feeds[name]), value.dtype)
        inside = [value for node in graph for value in node.outputs if value.name in set(values)]
        wanted = list(dict.fromkeys((*graph.outputs, *inside)))
        with exact_arithmetic():
            found = evaluate(self._interpreter, graph, known, wanted)
        return {value.name or "": tensor for value, tensor in found.items()}


def rounded(x: Tensor, dtype: ir.DataType | None) -> Tensor:
    """float32 values rounded once to a narrower type, and read back."""
    narrow = ROUNDED.get(dtype) if dtype is not None else None
    return x if narrow is None or not isinstance(x, Tensor) or not x.is_floating_point() else x.to(narrow).to(x.dtype)


def with_types(model: ir.Model) -> ir.Model:
    """The same model with the type of every value, as onnx infers them. Raises CannotInterpret where one stays unknown."""
    if _untyped(model) is None:
        return model
    while True:
        model = ir.from_proto(onnx.shape_inference.infer_shapes(ir.to_proto(model), data_prop=True))
        like = [node for node in model.graph if node.op_type in LIKE_THEIR_INPUT and node.outputs[0].type is None]
        told = [node for node in like if node.inputs[0] is not None and node.inputs[0].type is not None]
        if not told:
            break
        for node in told:
            assert node.inputs[0] is not None
            node.outputs[0].type, node.outputs[0].shape = node.inputs[0].type, node.inputs[0].shape
    missing = _untyped(model)
    if missing is not None:
        raise CannotInterpret(f"nothing tells the type of {missing.name}")
    return model


def _untyped(model: ir.Model) -> ir.Value | None:
    return next((value for node in model.graph for value in node.outputs if value.name and value.type is None), None)
