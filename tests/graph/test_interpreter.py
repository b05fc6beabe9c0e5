"""The interpreter against onnxruntime, operator by operator, in float32: what a graph means is what a runtime computes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import TensorProto, helper

from repdeploy.graph import interpreter
from repdeploy.graph.interpreter import CannotInterpret, Interpreter, evaluate
from repdeploy.graph.typed import TypedGraph
from tests.graph.onnx_graphs import Writer, run_onnxruntime, run_whole

AGREES = 1e-5
"""float32 here and float32 in onnxruntime, relative to the largest value."""


def numbers(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng((seed, *shape)).standard_normal(shape).astype(np.float32)


def whole(*shape: int, low: int = -9, high: int = 9) -> np.ndarray:
    return np.random.default_rng(shape).integers(low, high, shape)


def ints(*items: int) -> np.ndarray:
    return np.array(items, np.int64)


def floats(*items: float) -> np.ndarray:
    return np.array(items, np.float32)


X = numbers(2, 4, 7, 9)
ROW = numbers(2, 4, 11)


@dataclass(frozen=True)
class Case:
    """One node: what the network is given first, what is stored, and the attributes."""

    op: str
    given: Sequence[np.ndarray] = (X,)
    stored: Sequence[np.ndarray | None] = ()
    opset: int = 17
    outputs: int = 1
    attributes: Mapping[str, Any] = field(default_factory=dict)

    def model(self) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
        writer = Writer(self.opset, TensorProto.FLOAT)
        feeds = {f"x{index}": array for index, array in enumerate(self.given)}
        stored = ["" if array is None else writer.store(array) for array in self.stored]
        names = [f"y{index}" for index in range(self.outputs)]
        writer.nodes.append(helper.make_node(self.op, [*feeds, *stored], names, **self.attributes))
        types = {name: helper.np_dtype_to_tensor_dtype(array.dtype) for name, array in feeds.items()}
        model = writer.model({name: array.shape for name, array in feeds.items()}, dict.fromkeys(names, 0), types=types)
        for output in model.graph.output:
            output.type.Clear()
        return onnx.shape_inference.infer_shapes(model, data_prop=True), feeds


def case(op: str, *given: np.ndarray, stored: Sequence[Any] = (), opset: int = 17, outputs: int = 1, **attributes: Any) -> Case:
    return Case(op, given or (X,), stored, opset, outputs, attributes)


def conv_cases() -> dict[str, Case]:
    kernel, bias = numbers(6, 4, 3, 2), numbers(6)
    found = {
        "conv": case("Conv", stored=[kernel, bias], pads=[1, 0, 2, 1], strides=[2, 1], dilations=[1, 3]),
        "conv, groups": case("Conv", stored=[numbers(6, 2, 3, 3)], group=2),
        "conv of a row": case("Conv", ROW, stored=[numbers(6, 4, 3)], pads=[2, 0], strides=[3]),
        "conv of a volume": case("Conv", numbers(1, 2, 4, 5, 6), stored=[numbers(3, 2, 2, 3, 2)], pads=[0, 1, 0, 1, 1, 1]),
        "transposed": case("ConvTranspose", stored=[numbers(4, 3, 3, 2), numbers(3)], strides=[2, 3], pads=[1, 0, 0, 1]),
        "transposed, groups": case("ConvTranspose", stored=[numbers(4, 3, 3, 3)], group=2, dilations=[2, 1]),
        "transposed, more": case("ConvTranspose", stored=[numbers(4, 3, 2, 2)], strides=[2, 2], output_padding=[1, 0]),
        "transposed row": case("ConvTranspose", ROW, stored=[numbers(4, 3, 3)], strides=[2]),
    }
    for kind in ("SAME_UPPER", "SAME_LOWER", "VALID"):
        for stride in (1, 2, 3):
            name = f"conv, {kind}, stride {stride}"
            found[name] = case("Conv", stored=[numbers(6, 4, 4, 3)], auto_pad=kind, strides=[stride, 2])
    return found


def pool_cases() -> dict[str, Case]:
    found = {
        "max": case("MaxPool", kernel_shape=[3, 2]),
        "max, dilated": case("MaxPool", kernel_shape=[3, 2], dilations=[2, 3], pads=[1, 1, 0, 1]),
        "max of a row": case("MaxPool", ROW, kernel_shape=[3], strides=[2], pads=[1, 1]),
        "average of a row": case("AveragePool", ROW, kernel_shape=[3], strides=[2], pads=[1, 0]),
        "average, dilated": case("AveragePool", kernel_shape=[2, 3], dilations=[2, 1], opset=19),
        "global average": case("GlobalAveragePool"),
        "global average of a row": case("GlobalAveragePool", ROW),
        "global maximum": case("GlobalMaxPool"),
    }
    for op in ("MaxPool", "AveragePool"):
        for pads in ([0, 0, 0, 0], [1, 1, 1, 1], [0, 1, 1, 0]):
            for ceil in (0, 1) if pads[: len(pads) // 2] == pads[len(pads) // 2 :] or op == "MaxPool" else (0,):
                for strides in ([2, 2], [3, 2], [1, 3]):
                    for counted in (0, 1) if op == "AveragePool" else (0,):
                        more = {"count_include_pad": counted} if op == "AveragePool" else {}
                        name = f"{op}, pads {pads}, ceil {ceil}, strides {strides}, counted {counted}"
                        found[name] = case(
                            op, kernel_shape=[3, 3], pads=pads, ceil_mode=ceil, strides=strides, opset=19, **more
                        )
        for kind in ("SAME_UPPER", "SAME_LOWER", "VALID"):
            found[f"{op}, {kind}"] = case(op, kernel_shape=[3, 2], auto_pad=kind, strides=[2, 1])
    return found


def resize_cases() -> dict[str, Case]:
    x = numbers(1, 2, 5, 6)
    found: dict[str, Case] = {}
    for spot in ("half_pixel", "asymmetric", "align_corners", "pytorch_half_pixel"):
        for rounding in ("round_prefer_floor", "round_prefer_ceil", "floor", "ceil"):
            for factor in (2.0, 3.0, 0.7) if spot != "align_corners" else (2.0, 3.0):
                found[f"nearest, {spot}, {rounding}, {factor}"] = case(
                    "Resize",
                    x,
                    stored=[None, floats(1, 1, factor, 2)],
                    coordinate_transformation_mode=spot,
                    nearest_mode=rounding,
                )
        for factor in (2.0, 1.5, 0.7) if spot != "align_corners" else (2.0, 3.0):
            for mode in ("linear", "cubic"):
                found[f"{mode}, {spot}, {factor}"] = case(
                    "Resize", x, stored=[None, floats(1, 1, factor, 2)], mode=mode, coordinate_transformation_mode=spot
                )
    found |= {
        "nearest to a size": case("Resize", x, stored=[None, None, ints(1, 2, 10, 6)]),
        "nearest to an odd size": case("Resize", x, stored=[None, None, ints(1, 2, 7, 4)]),
        "linear to a size": case("Resize", x, stored=[None, None, ints(1, 2, 7, 13)], mode="linear"),
        "linear, axes": case("Resize", x, stored=[None, None, ints(7, 13)], mode="linear", axes=[2, 3], opset=18),
        "linear, keeping the aspect": case(
            "Resize", x, stored=[None, None, ints(1, 2, 10, 18)], mode="linear", keep_aspect_ratio_policy="not_larger", opset=18
        ),
        "linear, antialiased": case("Resize", x, stored=[None, floats(1, 1, 0.7, 0.5)], mode="linear", antialias=1, opset=18),
        "nearest, opset 10": case("Resize", x, stored=[floats(1, 1, 2, 3)], opset=10),
        "nearest, opset 9": case("Upsample", x, stored=[floats(1, 1, 2, 3)], opset=9),
    }
    return found


def reduce_cases() -> dict[str, Case]:
    found: dict[str, Case] = {}
    for op in ("ReduceMean", "ReduceMax", "ReduceSum", "ReduceMin", "ReduceL2", "ReduceProd"):
        newest = 13 if op == "ReduceSum" else 18
        for axes in ([2, 3], [-1], [1], [0, 2]):
            for keep in (0, 1):
                name = f"{op} over {axes}, keep {keep}"
                found[f"{name}, attribute"] = case(op, axes=axes, keepdims=keep, opset=11)
                found[f"{name}, input"] = case(op, stored=[ints(*axes)], keepdims=keep, opset=newest)
        found[f"{op} over all"] = case(op, opset=newest, keepdims=0)
        found[f"{op} over nothing"] = case(op, stored=[ints()], opset=newest, noop_with_empty_axes=1)
    found["ReduceSum of whole numbers"] = case("ReduceSum", whole(3, 4), stored=[ints(1)])
    found["ReduceMax of whole numbers"] = case("ReduceMax", whole(3, 4), axes=[0])
    return found


def elementwise_cases() -> dict[str, Case]:
    found: dict[str, Case] = {}
    for op in ("Add", "Sub", "Mul", "Div"):
        found[op] = case(op, X, numbers(1, 4, 1, 1) + 3)
        found[f"{op}, broadcast"] = case(op, numbers(4, 1, 9) + 3, X)
        for dtype in (np.int64, np.int32):
            divisor = np.array([3, -2, 5, -7], dtype)
            found[f"{op} of {dtype.__name__}"] = case(op, whole(3, 4).astype(dtype), divisor)
            found[f"{op} of {dtype.__name__}, one number"] = case(op, whole(5).astype(dtype), stored=[np.array(-4, dtype)])
    for op in (
        "Sqrt",
        "Neg",
        "Abs",
        "Exp",
        "Erf",
        "Relu",
        "Sigmoid",
        "Tanh",
        "HardSigmoid",
        "HardSwish",
        "LeakyRelu",
        "Identity",
    ):
        found[op] = case(op, np.abs(X) if op == "Sqrt" else 3 * X)
    found |= {
        "Neg of whole numbers": case("Neg", whole(3, 4)),
        "Abs of whole numbers": case("Abs", whole(3, 4)),
        "HardSigmoid, alpha": case("HardSigmoid", 3 * X, alpha=0.3, beta=0.1),
        "LeakyRelu, alpha": case("LeakyRelu", alpha=-0.2),
        "PRelu": case("PRelu", stored=[numbers(4, 1, 1)]),
        "PRelu, one slope": case("PRelu", stored=[numbers(1)]),
        "Sum of one": case("Sum", X),
        "Sum of three": case("Sum", X, numbers(1, 4, 1, 1), numbers(9)),
        "Clip, opset 9": case("Clip", min=-0.5, max=0.25, opset=9),
        "Clip, opset 9, one end": case("Clip", max=0.25, opset=9),
        "Clip": case("Clip", stored=[np.float32(-0.5), np.float32(0.25)]),
        "Clip, one end": case("Clip", stored=[np.float32(-0.5)]),
        "Clip, other end": case("Clip", stored=[None, np.float32(0.5)]),
        "Clip of whole numbers": case("Clip", whole(3, 4), stored=[np.array(-2), np.array(5)]),
        "Clip of whole numbers, one end": case("Clip", whole(3, 4), stored=[np.array(-2)]),
        "Where": case("Where", whole(2, 4, 7, 9) > 0, X, numbers(9)),
        "Cast to whole numbers": case("Cast", 5 * X, to=TensorProto.INT64),
        "Cast to bytes": case("Cast", 5 * np.abs(X), to=TensorProto.UINT8),
        "Cast to truth": case("Cast", whole(3, 4), to=TensorProto.BOOL),
        "Cast from whole numbers": case("Cast", whole(3, 4), to=TensorProto.FLOAT),
        "CastLike": case("CastLike", whole(3, 4), stored=[floats(1)]),
        "CastLike, of whole numbers": case("CastLike", 5 * X, stored=[ints(1)]),
        "Gelu": case("Gelu", opset=20),
        "Gelu, by tanh": case("Gelu", opset=20, approximate="tanh"),
        "Cast to double": case("Cast", to=TensorProto.DOUBLE),
    }
    return found


def shape_cases() -> dict[str, Case]:
    pads = ints(0, 1, 2, -1, 0, 0, -2, 3)
    return {
        "Pad": case("Pad", stored=[pads]),
        "Pad with a value": case("Pad", stored=[pads, np.float32(0.7)]),
        "Pad with axes": case("Pad", stored=[ints(1, 2, 0, 3), None, ints(-1, 2)], opset=18),
        "Pad, opset 10": case("Pad", pads=pads.tolist(), value=0.7, opset=10),
        "Pad by reflection": case("Pad", stored=[np.abs(pads)], mode="reflect"),
        "Pad by the edge, opset 10": case("Pad", pads=np.abs(pads).tolist(), mode="edge", opset=10),
        "Pad of whole numbers": case("Pad", whole(3, 4), stored=[ints(1, 0, 0, 2), np.array(7)]),
        "Transpose": case("Transpose", perm=[0, 2, 3, 1]),
        "Transpose, default": case("Transpose"),
        "Flatten": case("Flatten"),
        **{f"Flatten from {axis}": case("Flatten", axis=axis) for axis in (0, 2, 4, -1, -3)},
        "Concat": case("Concat", X, numbers(2, 3, 7, 9), axis=1),
        "Concat from the end": case("Concat", X, numbers(2, 4, 7, 2), axis=-1),
        "Slice": case("Slice", stored=[ints(1, -1), ints(9, -99), ints(2, -1), ints(2, -3)]),
        "Slice, opset 9": case("Slice", starts=[1, -5], ends=[99, -1], axes=[2, 3], opset=9),
        "Squeeze, opset 11": case("Squeeze", numbers(1, 6, 1, 1), axes=[2, 3], opset=11),
        "Squeeze": case("Squeeze", numbers(1, 6, 1, 1), stored=[ints(2, 3)]),
        "Unsqueeze, opset 11": case("Unsqueeze", ROW, axes=[1], opset=11),
        "Unsqueeze": case("Unsqueeze", ROW, stored=[ints(1)]),
        "Split, opset 11": case("Split", axis=1, split=[1, 3], outputs=2, opset=11),
        "Split": case("Split", stored=[ints(1, 3)], axis=1, outputs=2),
        "Reshape": case("Reshape", stored=[ints(0, -1, 3)]),
        "Expand": case("Expand", numbers(4, 1), stored=[ints(2, 1, 5)]),
        "Gather": case("Gather", stored=[ints(2, 0, -1)], axis=1),
        "Shape": case("Shape"),
        "Dropout": case("Dropout"),
        "Dropout, opset 9": case("Dropout", ratio=0.3, opset=9),
        "Dropout, opset 11": case("Dropout", ratio=0.3, opset=11),
    }


def network_cases() -> dict[str, Case]:
    gamma, beta, mean, var = (numbers(4, seed=seed) for seed in range(4))
    var = np.abs(var) + np.float32(0.2)
    tokens = numbers(2, 7, 6)
    return {
        "norm": case("BatchNormalization", stored=[gamma, beta, mean, var], epsilon=0.01),
        "norm, opset 9": case("BatchNormalization", stored=[gamma, beta, mean, var], opset=9),
        "norm of a row": case("BatchNormalization", ROW, stored=[gamma, beta, mean, var]),
        "norm of vectors": case("BatchNormalization", numbers(3, 4), stored=[gamma, beta, mean, var]),
        "norm over instances": case("InstanceNormalization", stored=[gamma, beta]),
        "norm over groups": case("GroupNormalization", stored=[gamma, beta], num_groups=2, opset=21),
        "norm over groups, opset 18": case("GroupNormalization", stored=[gamma[:2], beta[:2]], num_groups=2, opset=18),
        "norm over layers": case("LayerNormalization", tokens, stored=[numbers(6), numbers(6, seed=1)], epsilon=0.1),
        "norm over layers, two axes": case("LayerNormalization", tokens, stored=[numbers(7, 6)], axis=1),
        "norm over layers, without shift": case("LayerNormalization", tokens, stored=[numbers(6)]),
        "Gemm": case("Gemm", numbers(3, 4), stored=[numbers(4, 5), numbers(5)]),
        "Gemm, turned": case(
            "Gemm", numbers(4, 3), stored=[numbers(5, 4), numbers(3, 1)], transA=1, transB=1, alpha=0.3, beta=-2.0
        ),
        "Gemm, without bias": case("Gemm", numbers(3, 4), stored=[numbers(4, 5)], alpha=2.0),
        "MatMul": case("MatMul", tokens, stored=[numbers(6, 5)]),
        "MatMul from the left": case("MatMul", numbers(5, 7), tokens),
        "MatMul of batches": case("MatMul", tokens, numbers(2, 6, 5)),
        "Softmax": case("Softmax"),
        "Softmax over channels": case("Softmax", axis=1),
        "Softmax, opset 11": case("Softmax", axis=1, opset=11),
        "Softmax, opset 11, last": case("Softmax", axis=3, opset=11),
        "LogSoftmax, opset 11": case("LogSoftmax", axis=1, opset=11),
    }


CASES = {
    **conv_cases(), **pool_cases(), **resize_cases(), **reduce_cases(), **elementwise_cases(), **shape_cases(),
    **network_cases(),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_an_operator_means_what_onnxruntime_computes(name: str) -> None:
    model, feeds = CASES[name].model()
    wanted = run_onnxruntime(model, feeds)
    got = run_whole(model, feeds, torch.float32)
    for output, reference in wanted.items():
        assert got[output].shape == reference.shape
        if reference.dtype.kind == "f":
            scale = max(1.0, float(np.abs(reference).max()))
            np.testing.assert_allclose(got[output], reference, rtol=0, atol=AGREES * scale)
        else:
            np.testing.assert_array_equal(got[output], reference)


def test_linear_interpolation_of_opset_10_is_that_of_onnxruntime_or_refused() -> None:
    """Its coordinates are asymmetric, without an attribute that says so."""
    model, feeds = case("Resize", numbers(1, 2, 5, 6), stored=[floats(1, 1, 2, 3)], mode="linear", opset=10).model()
    try:
        got = run_whole(model, feeds, torch.float32)["y0"]
    except CannotInterpret:
        return
    np.testing.assert_allclose(got, run_onnxruntime(model, feeds)["y0"], rtol=0, atol=AGREES * 4)


SEQUENCES = {"SplitToSequence", "SequenceAt", "SequenceConstruct", "ConcatFromSequence"}
QUANTISED = {"QuantizeLinear", "DequantizeLinear"}  # tested together, below


def test_every_operator_of_the_table_has_a_case() -> None:
    assert set(interpreter._OPERATORS) - SEQUENCES - QUANTISED <= {item.op for item in CASES.values()}


@pytest.mark.parametrize("keepdims", [0, 1])
def test_sequences_are_split_indexed_and_joined_as_onnxruntime_does(keepdims: int) -> None:
    """Parts of given lengths, and parts of one; their sum, and all of them joined anew."""
    writer = Writer(elem=TensorProto.FLOAT)
    parts = writer.node("SplitToSequence", ["x", np.array([2, 1, 3], np.int64)], axis=1)
    ones = writer.node("SplitToSequence", ["x"], axis=2, keepdims=keepdims)
    picked = [writer.node("SequenceAt", [parts, np.array(index, np.int64)]) for index in (0, 1)]
    again = writer.node("SequenceConstruct", picked)
    writer.node("ConcatFromSequence", [again], "y0", axis=1)
    writer.node("ConcatFromSequence", [ones], "y1", axis=2, new_axis=1 - keepdims)
    model = writer.model({"x": (2, 6, 4)}, {"y0": 3, "y1": 3})
    feeds = {"x": np.random.default_rng(0).standard_normal((2, 6, 4)).astype(np.float32)}
    got, wanted = run_whole(model, feeds, torch.float32), run_onnxruntime(model, feeds)
    for name in ("y0", "y1"):
        np.testing.assert_array_equal(got[name], wanted[name])


@pytest.mark.parametrize(
    "name", ["conv", "norm", "Gemm", "linear, half_pixel, 2.0", "Softmax", "ReduceMean over [2, 3], keep 1, input"]
)
def test_every_floating_type_is_read_as_the_chosen_one(name: str) -> None:
    model, feeds = CASES[name].model()
    assert {array.dtype for array in run_whole(model, feeds).values()} == {np.dtype(np.float64)}


def test_what_is_random_is_not_run() -> None:
    node = ir.node("RandomNormalLike", [ir.val("x")])
    with pytest.raises(CannotInterpret, match="something else at every run"):
        Interpreter(17).run(node, [torch.zeros(2)])


def test_what_nobody_knows_is_not_run() -> None:
    node = ir.node("Conjure", [ir.val("x")], domain="elsewhere")
    with pytest.raises(CannotInterpret, match="Conjure"):
        Interpreter(17).run(node, [torch.zeros(2)])


def test_values_are_computed_in_order_and_only_the_wanted_ones_stay() -> None:
    x = ir.val("x")
    first = ir.node("Neg", [x])
    second = ir.node("Add", [first.outputs[0], first.outputs[0]])
    found = evaluate(Interpreter(17), [first, second], {x: torch.tensor(-1.5)}, [second.outputs[0], x])
    assert {value: float(tensor) for value, tensor in found.items()} == {second.outputs[0]: 3.0, x: -1.5}


@pytest.mark.parametrize("opset", [13, 18, 21])
@pytest.mark.parametrize(("kind", "axis"), [(np.int8, None), (np.uint8, 1), (np.int8, 0)])
def test_quantised_values_are_onnxruntimes(opset: int, kind: type, axis: int | None) -> None:
    """Both operators, per tensor and per axis; onnx's own reference begins at opset 19."""
    rng = np.random.default_rng(0)
    count = 1 if axis is None else (3, 4)[axis]
    scale = np.float32(rng.uniform(0.02, 0.1, count) if axis is not None else 0.05)
    zero = rng.integers(0, 9, count).astype(kind) if axis is not None else np.array(3, kind)
    options = {} if axis is None else {"axis": axis}
    nodes = [
        onnx.helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], **options),
        onnx.helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"], **options),
    ]
    ports = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [3, 4, 5]) for name in "xy"]
    stored = [onnx.numpy_helper.from_array(np.asarray(value), name) for name, value in (("s", scale), ("z", zero))]
    graph = onnx.helper.make_graph(nodes, "g", ports[:1], ports[1:], stored)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)], ir_version=9)
    x = rng.standard_normal((3, 4, 5)).astype(np.float32) * 4
    (got,) = TypedGraph(ir.from_proto(model)).run({"x": x}).values()
    np.testing.assert_allclose(got.numpy(), run_onnxruntime(model, {"x": x})["y"], atol=1e-6)
