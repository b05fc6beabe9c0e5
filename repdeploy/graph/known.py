"""What a graph tells before it runs: its constants, in float64, and its shapes, in one pass from the inputs on.

Folding and shape inference feed each other (a shape is read by a node, computed with, and used to reshape), so they go
together, node by node. Source: onnx.shape_inference.infer_node_outputs; ONNX IR specification.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Mapping

import numpy as np
import onnx
import onnx_ir as ir
import torch
from onnx.shape_inference import infer_node_outputs
from torch import Tensor

from repdeploy.graph.attributes import number
from repdeploy.graph.interpreter import CannotInterpret, Interpreter
from repdeploy.graph.open_sizes import OpenSizes, Vector, expanded, reshaped

FOLDED_AT_MOST = 1 << 26
"""Elements of a constant that is computed here: what a graph expands beyond this stays as it is."""
QUANTIZED = frozenset({"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"})
"""What these make of constants is not folded: it is what makes a graph a quantized one."""
LIKE_THEIR_INPUT = frozenset({"GroupNormalization", "MeanVarianceNormalization"})
"""Operators that are defined by others alone, so that onnx infers no shape for them."""
STANDARD = ("", "ai.onnx")
SHAPE_DATA_AT_MOST = 256
"""Elements of a constant that shape inference is shown: shapes, axes, sizes."""


class Known:
    """Constants and shapes of one graph's values. Outer values that a subgraph reads are none of its business."""

    def __init__(
        self,
        model: ir.Model,
        feeds: Mapping[str, tuple[int, ...]] | None = None,
        exact: Mapping[str, Tensor] | None = None,
    ) -> None:
        """`feeds`: input shapes to assume in place of what the file leaves open; then weights are looked at for their shapes
        only. `exact`: by name what stored tensors were rounded from."""
        self._only_shapes = feeds is not None
        self.opset = model.opset_imports.get("", 1)
        self.interpreter, self._rounding = Interpreter(self.opset), Interpreter(self.opset, rounds=True)
        self.constants: dict[ir.Value, Tensor] = {}
        self._types: dict[str, onnx.TypeProto] = {}
        self._open = OpenSizes(self._integers)
        self._counted: set[ir.Value] = set()  # what is computed from sizes
        self._imports = [onnx.helper.make_opsetid(domain, version) for domain, version in model.opset_imports.items()]
        for name, value in model.graph.initializers.items():
            self._store(value)
            if exact is not None and name in exact and value in self.constants:
                self.constants[value] = exact[name]
        for value in model.graph.inputs:
            if value not in self.constants:
                self._declare(value, (feeds or {}).get(value.name or ""))
        for node in model.graph:
            self._node(node)

    def shape(self, value: ir.Value) -> Vector | None:
        """Per axis its size, its name, or None; None for an unknown rank."""
        constant = self.constants.get(value)
        if constant is not None:
            return tuple(constant.shape)
        proto = self._types.get(value.name or "")
        if proto is None or not proto.tensor_type.HasField("shape"):
            return None
        return tuple(
            dim.dim_value if dim.HasField("dim_value") and dim.dim_value >= 0 else (dim.dim_param or None)
            for dim in proto.tensor_type.shape.dim
        )

    def sizes(self, value: ir.Value) -> tuple[int | None, ...] | None:
        """Per axis its size where it is fixed."""
        found = self.shape(value)
        return None if found is None else tuple(size if isinstance(size, int) else None for size in found)

    def dtype(self, value: ir.Value) -> ir.DataType | None:
        """The type in the file, whatever the constants are computed in."""
        if value.dtype is not None:
            return value.dtype
        proto = self._types.get(value.name or "")
        return ir.DataType(proto.tensor_type.elem_type) if proto is not None and proto.tensor_type.elem_type else None

    def elements(self, value: ir.Value) -> int | None:
        found = self.sizes(value)
        return None if found is None or None in found else math.prod(found)  # type: ignore[arg-type]

    def _store(self, value: ir.Value) -> None:
        if value.const_value is None:
            return
        stored = value.const_value
        self._types[value.name or ""] = onnx.helper.make_tensor_type_proto(int(stored.dtype), tuple(stored.shape.numpy()))
        if self._only_shapes and stored.size > SHAPE_DATA_AT_MOST:
            return
        with contextlib.suppress(CannotInterpret):
            self.constants[value] = self.interpreter.tensor(stored.numpy())

    def _declare(self, value: ir.Value, shape: tuple[int, ...] | None) -> None:
        proto = ir.serde.serialize_value(value).type
        if shape is not None:
            proto = onnx.helper.make_tensor_type_proto(proto.tensor_type.elem_type, shape)
        self._types[value.name or ""] = proto

    def _node(self, node: ir.Node) -> None:
        if node.op_type == "Constant" and node.domain == "":
            self._constant(node)
            return
        self._infer(node)
        if node.domain not in STANDARD:
            return
        shape = self.shape(node.outputs[0]) if node.outputs else None
        if shape is None or len(shape) <= 1:
            self._open.follow(node)
        if node.op_type in ("Reshape", "Expand"):
            self._reshape(node)
        if node.op_type == "Shape" and node.inputs[0] is not None:
            self._shape_of(node)
        elif node.op_type == "CastLike" and node.inputs[0] in self.constants:
            self._cast_like(node)
        elif (
            node.inputs
            and node.op_type not in QUANTIZED
            and all(value is None or value in self.constants for value in node.inputs)
        ):
            self._fold(node)

    def _constant(self, node: ir.Node) -> None:
        output = node.outputs[0]
        found = ir.convenience.get_const_tensor(output)
        if found is None:
            return
        try:
            self.constants[output] = self.interpreter.tensor(found.numpy())
        except CannotInterpret:
            return
        self._types[output.name or ""] = onnx.helper.make_tensor_type_proto(
            int(found.dtype), tuple(self.constants[output].shape)
        )

    def _shape_of(self, node: ir.Node) -> None:
        source = node.inputs[0]
        assert source is not None
        found = self.shape(source)
        if found is None:
            return
        start = int(node.attributes["start"].value) if "start" in node.attributes else 0
        end = int(node.attributes["end"].value) if "end" in node.attributes else len(found)
        wanted = found[start:end]
        if all(isinstance(size, int) for size in wanted):
            self.constants[node.outputs[0]] = torch.tensor(wanted, dtype=torch.int64)
            self._counted.add(node.outputs[0])
        else:
            self._open.shape_of(node.outputs[0], wanted)

    def _reshape(self, node: ir.Node) -> None:
        """A Reshape or an Expand whose target has open sizes, or leaves some over."""
        before, target = node.inputs[0], self._open.of(node.inputs[1])
        shape = self.shape(before) if before is not None else None
        dtype = self.dtype(before) if before is not None else None
        if target is not None and 0 in target and number(node, "allowzero", 0):
            return  # an empty tensor
        if shape is not None and target is not None and dtype is not None:
            after = reshaped(shape, target) if node.op_type == "Reshape" else expanded(shape, target)
            self._types[node.outputs[0].name or ""] = onnx.helper.make_tensor_type_proto(int(dtype), after)

    def _integers(self, value: ir.Value) -> list[int] | None:
        """A small constant of whole numbers, flat."""
        constant = self.constants.get(value)
        if constant is None or constant.is_floating_point() or constant.dim() > 1 or constant.numel() > SHAPE_DATA_AT_MOST:
            return None
        return [int(item) for item in constant.flatten().tolist()]

    def _cast_like(self, node: ir.Node) -> None:
        """Of its second input only the type matters, and every floating type is one here."""
        constant, like = (self.constants.get(value) if value is not None else None for value in node.inputs)
        dtype = self.dtype(node.inputs[1]) if node.inputs[1] is not None else None
        if constant is not None and dtype is not None and dtype.is_floating_point():
            self.constants[node.outputs[0]] = constant.to(self.interpreter.dtype)
        elif constant is not None and like is not None:
            self.constants[node.outputs[0]] = constant.to(like.dtype)

    def _fold(self, node: ir.Node) -> None:
        if any((self.elements(output) or 0) > FOLDED_AT_MOST for output in node.outputs):
            return
        inputs = [None if value is None else self.constants[value] for value in node.inputs]
        interpreter = self._rounding if node.op_type == "Cast" and self._narrows(node) else self.interpreter
        try:
            outputs = interpreter.run(node, inputs)
        except CannotInterpret:
            return
        for value, result in zip(node.outputs, outputs, strict=False):
            if not isinstance(result, Tensor) or result.numel() > FOLDED_AT_MOST:
                continue
            if self._is_counted(node, result):  # sizes are computed as a runtime does, or a floor may differ
                self._counted.add(value)
                if result.is_floating_point() and self.dtype(value) == ir.DataType.FLOAT:
                    result = result.float().to(result.dtype)
            self.constants[value] = result

    def _is_counted(self, node: ir.Node, result: Tensor) -> bool:
        """Whether a constant is computed from sizes: whole numbers from any of them, floats from such floats or a Cast. An
        index says where values go, not what they are."""
        told_by = [value for value in node.inputs if value in self._counted]
        if not result.is_floating_point() or node.op_type == "Cast":
            return bool(told_by)
        return any(self.constants[value].is_floating_point() for value in told_by if value is not None)

    def _narrows(self, node: ir.Node) -> bool:
        """Whether a Cast loses digits that its input has in the file; one to the same type leaves ours as they are."""
        before = self.dtype(node.inputs[0]) if node.inputs[0] is not None else None
        after = ir.DataType(int(number(node, "to", 0)))
        return before is None or (after.is_floating_point() and after != before and after.bitwidth <= before.bitwidth)

    def _infer(self, node: ir.Node) -> None:
        if any(value is not None and value.name not in self._types for value in node.inputs) or _has_graph(node):
            self._from_file(node.outputs)
            return
        # only what the node itself reads is handed over: the whole table would be copied at every node
        types = {value.name or "": self._types[value.name or ""] for value in node.inputs if value is not None}
        try:
            schema = onnx.defs.get_schema(node.op_type, self.opset, node.domain)
            proto = ir.to_proto(node)
            data = {
                value.name or "": onnx.numpy_helper.from_array(self._stored(value), value.name or "")
                for value in node.inputs
                if value is not None and value in self.constants and self.constants[value].numel() <= SHAPE_DATA_AT_MOST
            }
            found = infer_node_outputs(schema, proto, types, data, opset_imports=self._imports)
        except Exception:  # the bindings raise their own kinds, without a common base; nothing is known then
            self._from_file(node.outputs)
            return
        if node.op_type in LIKE_THEIR_INPUT and node.inputs[0] is not None:
            self._types[node.outputs[0].name or ""] = self._types[node.inputs[0].name or ""]
            return
        for value in node.outputs:
            inferred = found.get(value.name or "")
            if inferred is not None and inferred.tensor_type.HasField("shape"):
                self._types[value.name or ""] = inferred
            else:
                self._from_file((value,), inferred)

    def _stored(self, value: ir.Value) -> np.ndarray:
        """A constant in the type it has in the file."""
        array: np.ndarray = self.constants[value].numpy()
        dtype = self.dtype(value)
        return array.astype(dtype.numpy()) if dtype is not None else array

    def _from_file(self, values: Iterable[ir.Value], inferred: onnx.TypeProto | None = None) -> None:
        """What the file itself says about a value that nothing here infers."""
        for value in values:
            if value.type is not None and value.shape is not None:
                self._types[value.name or ""] = ir.serde.serialize_value(value).type
            elif inferred is not None:
                self._types[value.name or ""] = inferred


def _has_graph(node: ir.Node) -> bool:
    kinds = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
    return any(attribute.type in kinds for attribute in node.attributes.values())
