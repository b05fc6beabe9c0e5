"""An ONNX graph as the stand-in of TensorRT sees it: types by shape inference, and onnxruntime's CPU to run it."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import onnx

Shape = tuple[int, ...]
FOLDED = ("Constant", "Identity")
FLOATING = (1, 10, 16)
"""The element types whose weights a plan can do without."""
SIZED_BY = ("Resize", "Upsample")
"""What these are given beside their image decides shapes: it is read while the engine is built, and never refitted."""


@dataclass(frozen=True)
class Kind:
    """One element type: its DataType, its numpy name, and how the inspectors of both majors write it."""

    name: str
    numpy: str
    ten: str
    eleven: str

    @property
    def itemsize(self) -> int:
        return 2 if self.name == "BF16" else np.dtype(self.numpy).itemsize


KINDS = {
    1: Kind("FLOAT", "float32", "FP32", "Float"),
    2: Kind("UINT8", "uint8", "UInt8", "UInt8"),
    3: Kind("INT8", "int8", "Int8", "Int8"),
    6: Kind("INT32", "int32", "Int32", "Int32"),
    7: Kind("INT64", "int64", "Int64", "Int64"),
    9: Kind("BOOL", "bool", "Bool", "Bool"),
    10: Kind("HALF", "float16", "FP16", "Half"),
    16: Kind("BF16", "bfloat16", "BFloat16", "BFloat16"),
}
"""By the number of ONNX's TensorProto.DataType; TensorRT takes no other type here, float64 among them."""


@dataclass
class Tensor:
    """A value of the graph: ONNX element type, dims with -1 where open."""

    name: str
    kind: int
    shape: Shape


@dataclass
class Layer:
    """What the inspector calls a layer: one node, or a convolution with the Relu behind it.

    `parameters`: of a convolution, under the inspector's names.
    """

    name: str
    operator: str
    inputs: list[Tensor]
    outputs: list[Tensor]
    parameters: dict[str, Any] = field(default_factory=dict)


class Graph:
    """An ONNX model with every type inferred."""

    def __init__(self, model: onnx.ModelProto) -> None:
        import onnx

        self.model = onnx.shape_inference.infer_shapes(model, data_prop=True)
        graph = self.model.graph
        self.constants = {tensor.name for tensor in graph.initializer}
        self.tensors = {value.name: tensor_of(value) for value in (*graph.input, *graph.value_info, *graph.output)}
        self.inputs = [self.tensors[value.name] for value in graph.input if value.name not in self.constants]
        self.outputs = [self.tensors[value.name] for value in graph.output]
        self.nodes = list(graph.node)
        self.constants |= {name for node in self.nodes if node.op_type == "Constant" for name in node.output}

    def tensor(self, name: str) -> Tensor:
        return self.tensors.get(name, Tensor(name, 0, ()))

    def fixed(self, shapes: Mapping[str, Shape]) -> Graph:
        """The same graph for inputs of these shapes."""
        model = copy.deepcopy(self.model)
        del model.graph.value_info[:]
        for value in (*model.graph.input, *model.graph.output):
            shape = shapes.get(value.name)
            for axis, dim in enumerate(value.type.tensor_type.shape.dim):
                if shape is not None:
                    dim.dim_value = shape[axis]
                elif dim.HasField("dim_param"):
                    dim.ClearField("dim_param")
        return Graph(model)

    def layers(self) -> list[Layer]:
        readers: dict[str, list[Any]] = {}
        for node in self.nodes:
            for name in node.input:
                readers.setdefault(name, []).append(node)
        ends = {tensor.name for tensor in self.outputs}
        fused, found = set(), []
        for node in self.nodes:
            if node.op_type in FOLDED or id(node) in fused:
                continue
            inputs = [self.tensor(name) for name in node.input if name and name not in self.constants]
            name, outputs = node_name(node), list(node.output)
            after = readers.get(node.output[0], [])
            if node.op_type == "Conv" and len(after) == 1 and after[0].op_type == "Relu" and node.output[0] not in ends:
                fused.add(id(after[0]))
                name, outputs = f"{name} + {node_name(after[0])}", list(after[0].output)
            parameters = self._parameters(node, "NONE" if outputs == list(node.output) else "RELU")
            found.append(Layer(name, node.op_type, inputs, [self.tensor(each) for each in outputs if each], parameters))
        return found

    def _parameters(self, node: onnx.NodeProto, activation: str) -> dict[str, Any]:
        """As NVIDIA's documentation shows them for a convolution ("Engine Inspector")."""
        stored = {tensor.name: tensor for tensor in self.model.graph.initializer}
        if node.op_type != "Conv" or node.input[1] not in stored:
            return {}
        weights, bias = stored[node.input[1]], stored.get(node.input[2]) if len(node.input) > 2 else None
        axes = len(weights.dims) - 2
        said = {item.name: list(item.ints) or item.i for item in node.attribute}
        pads = said.get("pads", [0] * 2 * axes)
        return {
            "ParameterType": "Convolution",
            "Kernel": list(weights.dims[2:]),
            "PaddingMode": "kEXPLICIT_ROUND_DOWN",
            "PrePadding": pads[:axes],
            "PostPadding": pads[axes:],
            "Stride": said.get("strides", [1] * axes),
            "Dilation": said.get("dilations", [1] * axes),
            "OutMaps": weights.dims[0],
            "Groups": said.get("group", 1),
            "Weights": {"Type": KINDS[weights.data_type].eleven, "Count": math.prod(weights.dims)},
            "Bias": {"Type": KINDS[bias.data_type if bias else weights.data_type].eleven, "Count": bias.dims[0] if bias else 0},
            "Activation": activation,
            "HasBias": int(bias is not None),
            "HasReLU": int(activation == "RELU"),
        }


def tensor_of(value: onnx.ValueInfoProto) -> Tensor:
    kind = value.type.tensor_type
    return Tensor(value.name, kind.elem_type, tuple(d.dim_value if d.HasField("dim_value") else -1 for d in kind.shape.dim))


def node_name(node: onnx.NodeProto) -> str:
    return str(node.name or f"node_of_{node.output[0]}")


def dtype_of(tensor: Tensor) -> np.dtype[Any]:
    name = KINDS[tensor.kind].numpy
    if name == "bfloat16":
        import ml_dtypes

        kind: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
        return kind
    return np.dtype(name)


def refittable(model: onnx.ModelProto) -> dict[str, onnx.TensorProto]:
    """The model's own tensors that a refit can replace, by the names that NVIDIA's parser gives them."""
    graph = model.graph
    kept = {name for node in graph.node if node.op_type in SIZED_BY for name in node.input[1:]}
    found = {tensor.name: tensor for tensor in graph.initializer}
    for node in (node for node in graph.node if node.op_type == "Constant"):
        found.update((node.output[0], each.t) for each in node.attribute if each.name == "value")
    return {name: tensor for name, tensor in found.items() if tensor.data_type in FLOATING and name not in kept}


def refitted(model: bytes, data: Mapping[str, bytes]) -> bytes:
    """A serialised model with these bytes in the place of what its refittable tensors hold."""
    import onnx

    loaded = onnx.load_from_string(model)
    for name, tensor in refittable(loaded).items():
        if name in data:
            tensor.CopyFrom(
                onnx.TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims, raw_data=data[name])
            )
    return bytes(loaded.SerializeToString())


def stripped(model: bytes) -> bytes:
    """A serialised model whose refittable tensors have names, types and shapes only."""
    import onnx

    return refitted(model, dict.fromkeys(refittable(onnx.load_from_string(model)), b""))


class Program:
    """The ONNX of a plan in onnxruntime on one CPU core. bfloat16 crosses its border as float32."""

    def __init__(self, data: bytes, graph: Graph) -> None:
        import onnx
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = 1, 4
        narrow = {t.name for t in (*graph.inputs, *graph.outputs) if t.kind == onnx.TensorProto.BFLOAT16}
        model = widen(onnx.load_from_string(data), narrow) if narrow else None
        self.kinds = {tensor.name: dtype_of(tensor) for tensor in graph.outputs}
        self.narrow = narrow
        try:
            self.session = onnxruntime.InferenceSession(
                model.SerializeToString() if model else data, options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:
            if any(tensor.kind == onnx.TensorProto.BFLOAT16 for tensor in graph.tensors.values()):
                raise NotImplementedError(f"onnxruntime's CPU cannot run this bfloat16 graph: {error}") from error
            raise

    def run(self, feeds: Mapping[str, np.ndarray[Any, Any]]) -> dict[str, np.ndarray[Any, Any]]:
        given = {self._outer(k): v.astype(np.float32) if k in self.narrow else v for k, v in feeds.items()}
        names = list(self.kinds)
        values = self.session.run([self._outer(name) for name in names], given)
        return {name: np.asarray(value).astype(self.kinds[name]) for name, value in zip(names, values, strict=True)}

    def _outer(self, name: str) -> str:
        return f"{name}/float" if name in self.narrow else name


def widen(model: onnx.ModelProto, names: set[str]) -> onnx.ModelProto:
    """The same model with float32 in the place of these bfloat16 inputs and outputs, and casts behind them."""
    import onnx

    before: list[onnx.NodeProto] = []
    after: list[onnx.NodeProto] = []
    for values, casts, to in ((model.graph.input, before, 16), (model.graph.output, after, 1)):
        for value in (value for value in values if value.name in names):
            inner, outer = value.name, f"{value.name}/float"
            source, target = (outer, inner) if to == 16 else (inner, outer)
            casts.append(onnx.helper.make_node("Cast", [source], [target], to=to))
            value.name, value.type.tensor_type.elem_type = outer, onnx.TensorProto.FLOAT
    nodes = [*before, *model.graph.node, *after]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return model
