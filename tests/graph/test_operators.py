"""One law per operator: what it is to the algebra, what of it is refused, and what the interpreter makes of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto

from repdeploy.graph.forms import OPERATORS
from repdeploy.graph.squeezer import Squeezed, squeeze
from tests.graph.onnx_graphs import EXACT, Writer, ends, kinds, run_whole, worst

Write = Callable[[Writer, str], str]
"""Writes the operator behind a value and returns what it makes."""
C = 4
IMAGE, ROW, TOKENS, VECTOR, NHWC = (2, C, 9, 11), (2, C, 13), (2, 7, C), (3, C), (2, 3, 5, C)
LAST = (TOKENS, NHWC)
"""Shapes whose channels come last."""
LINEAR = ("Conv", "Gemm", "MatMul")


def numbers(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng((seed, *shape)).standard_normal(shape)


def ints(*items: int) -> np.ndarray:
    return np.array(items, np.int64)


def statistics(channels: int = C) -> list[np.ndarray]:
    gamma, beta, mean, var = (numbers(channels, seed=seed) for seed in range(4))
    return [gamma + 1.5, beta, mean, np.abs(var) + 0.2]


def node(op: str, *others: Any, first: bool = True, **attributes: Any) -> Write:
    """The operator on the value and on constants behind it, or with `first=False` in front of it."""
    return lambda writer, x: writer.node(op, [x, *others] if first else [*others, x], **attributes)


@dataclass(frozen=True)
class Case:
    """An operator on an input of one shape. `leaves`: how many operators remain of it and of one more linear map."""

    write: Write
    shape: tuple[int, ...] = IMAGE
    opset: int = 17
    leaves: int = 1


KERNEL = numbers(C, C, 3, 3)
CASES: Mapping[str, Case] = {
    "convolution": Case(node("Conv", KERNEL, numbers(C))),
    "convolution, asymmetric pads": Case(node("Conv", numbers(6, C, 3, 2), pads=[0, 1, 2, 0])),
    "convolution, groups and dilation": Case(node("Conv", numbers(6, 2, 3, 1), group=2, dilations=[2, 3], strides=[1, 2])),
    **{
        f"convolution, {kind}, {kernel}, stride {stride}, dilation {dilation}": Case(
            node("Conv", numbers(C, C, *kernel), auto_pad=kind, strides=[stride, 1], dilations=[1, dilation])
        )
        for kind in ("SAME_UPPER", "SAME_LOWER", "VALID")
        for kernel, stride, dilation in (((3, 3), 1, 1), ((2, 4), 2, 1), ((3, 2), 3, 2), ((1, 5), 2, 2))
    },
    "convolution of a row": Case(node("Conv", numbers(C, C, 3), numbers(C), strides=[2], pads=[2, 0], dilations=[2]), ROW),
    "convolution of a row, SAME_LOWER": Case(node("Conv", numbers(C, C, 4), auto_pad="SAME_LOWER", strides=[3]), ROW),
    "norm of vectors": Case(node("BatchNormalization", *statistics(), epsilon=0.1), VECTOR),
    "norm of rows": Case(node("BatchNormalization", *statistics()), ROW),
    "norm of images": Case(node("BatchNormalization", *statistics(), momentum=0.5)),
    "norm, opset 9": Case(node("BatchNormalization", *statistics()), opset=9),
    "average": Case(node("AveragePool", kernel_shape=[3, 2])),
    "average, strided": Case(node("AveragePool", kernel_shape=[2, 2], strides=[2, 3])),
    "average, padding counted": Case(node("AveragePool", kernel_shape=[3, 3], pads=[1, 1, 1, 1], count_include_pad=1)),
    "average, uneven pads": Case(
        node("AveragePool", kernel_shape=[3, 2], pads=[1, 0, 0, 1], strides=[2, 1], count_include_pad=1)
    ),
    "average, pads wider than half": Case(
        node("AveragePool", kernel_shape=[3, 3], pads=[2, 2, 2, 2], strides=[2, 2], count_include_pad=1)
    ),
    "average, rounded up without a rest": Case(node("AveragePool", kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1)),
    "average, SAME_UPPER": Case(node("AveragePool", kernel_shape=[2, 3], auto_pad="SAME_UPPER", count_include_pad=1)),
    "average, SAME_LOWER": Case(
        node("AveragePool", kernel_shape=[3, 4], strides=[2, 2], auto_pad="SAME_LOWER", count_include_pad=1)
    ),
    "average, VALID": Case(node("AveragePool", kernel_shape=[3, 2], auto_pad="VALID")),
    "average of a row": Case(node("AveragePool", kernel_shape=[3], strides=[2], pads=[1, 1], count_include_pad=1), ROW),
    "pad": Case(node("Pad", ints(0, 0, 1, 0, 0, 0, 2, 3))),
    "pad and crop": Case(node("Pad", ints(0, 0, 1, -2, 0, 0, -1, 3)), leaves=2),
    "pad with axes": Case(node("Pad", ints(1, 2, 0, 3), np.array(0.0), ints(-1, 2)), opset=18),
    "pad, constant mode": Case(node("Pad", ints(0, 0, 1, 1, 0, 0, 1, 1), mode="constant"), opset=13),
    "pad, opset 10": Case(node("Pad", pads=[0, 0, 1, 0, 0, 0, 2, 3], value=0.0, mode="constant"), opset=10),
    "pad of a row": Case(node("Pad", ints(0, 0, 3, 0, 0, 1)), ROW),
    "crop": Case(node("Slice", ints(1, 2), ints(8, 9), ints(2, 3)), leaves=2),
    "crop from the end": Case(node("Slice", ints(-7, 0), ints(-1, -2), ints(2, -1)), leaves=2),
    "crop, open end": Case(node("Slice", ints(2), ints(2**63 - 1), ints(-2)), leaves=2),
    "crop, beyond the ends": Case(node("Slice", ints(-99, 1), ints(99, 2**31 - 1), ints(2, 3)), leaves=2),
    "crop, without axes": Case(node("Slice", ints(0, 0, 1, 0), ints(2**63 - 1, 2**63 - 1, 5, 9)), leaves=2),
    "crop with steps": Case(node("Slice", ints(1, 0), ints(8, 99), ints(2, 3), ints(2, 3)), leaves=2),
    "steps": Case(node("Slice", ints(0), ints(2**63 - 1), ints(3), ints(2))),
    "crop, opset 9": Case(node("Slice", starts=[1, -5], ends=[-1, 2**31 - 1], axes=[2, 3]), opset=9, leaves=2),
    "crop, opset 9, without axes": Case(node("Slice", starts=[0, 0, 2], ends=[2**31 - 1, 2**31 - 1, 7]), opset=9, leaves=2),
    "crop of a row": Case(node("Slice", ints(2), ints(-3), ints(2)), ROW, leaves=2),
    "scale": Case(node("Mul", numbers(C, 1, 1))),
    "scale, in front": Case(node("Mul", numbers(1, C, 1, 1), first=False)),
    "scale by one number": Case(node("Mul", numbers()), ROW),
    "divide": Case(node("Div", numbers(1, C, 1, 1) + 3)),
    "divide by one number": Case(node("Div", np.array([-0.3]))),
    "shift": Case(node("Add", numbers(C, 1, 1))),
    "shift, in front": Case(node("Add", numbers(C, 1), first=False), ROW),
    "shift of vectors": Case(node("Add", numbers(C)), VECTOR),
    "scale of vectors": Case(node("Mul", numbers(1, C)), VECTOR),
    "subtract": Case(node("Sub", numbers(C, 1, 1))),
    "subtract from": Case(node("Sub", numbers(1, C, 1, 1), first=False)),
    "subtract from one number": Case(node("Sub", np.array(1.0), first=False), VECTOR),
    "negate": Case(node("Neg")),
    "nothing": Case(node("Identity")),
    "dropout": Case(node("Dropout")),
    "dropout with a ratio": Case(node("Dropout", np.array(0.3))),
    "dropout with a mode": Case(node("Dropout", np.array(0.3), np.array(False))),
    "dropout, opset 11": Case(node("Dropout", ratio=0.3), opset=11),
    "dropout, opset 9": Case(node("Dropout", ratio=0.3), opset=9),
    "sum of one": Case(node("Sum")),
    "sum of itself": Case(lambda writer, x: writer.node("Sum", [x, x, x])),
    "twice": Case(lambda writer, x: writer.node("Add", [x, x])),
    "minus its double": Case(lambda writer, x: writer.node("Sub", [x, writer.node("Add", [x, x])])),
    "dense": Case(node("Gemm", numbers(C, 5), numbers(5)), VECTOR),
    "dense, turned": Case(node("Gemm", numbers(5, C), numbers(1, 5), transB=1), VECTOR),
    "dense, alpha and beta": Case(node("Gemm", numbers(C, 5), numbers(5), alpha=0.3, beta=-2.0), VECTOR),
    "dense, one bias for all": Case(node("Gemm", numbers(C, 5), numbers(), beta=0.5), VECTOR),
    "dense without bias": Case(node("Gemm", numbers(C, 5), alpha=2.0), VECTOR),
    "dense without bias, opset 9": Case(node("Gemm", numbers(C, 5), numbers(5)), VECTOR, opset=9),
    "matrix behind vectors": Case(node("MatMul", numbers(C, 5)), VECTOR),
    "matrix behind tokens": Case(node("MatMul", numbers(C, 5)), TOKENS),
    "matrix behind images, channels last": Case(node("MatMul", numbers(C, 5)), NHWC),
    "matrix in front of a row": Case(node("MatMul", numbers(5, C), first=False), ROW),
}  # fmt: skip


def mapping(shape: Sequence[int], outputs: int, seed: int) -> Write:
    """A linear map of values of one shape that suits them: a 1x1 convolution or a matrix, without a bias."""
    if shape in LAST:
        return node("MatMul", numbers(shape[-1], outputs, seed=seed))
    if len(shape) == 2:
        return node("Gemm", numbers(shape[1], outputs, seed=seed), np.zeros(outputs))
    return node("Conv", numbers(outputs, shape[1], *(1,) * (len(shape) - 2), seed=seed))


def behind(case: Case) -> Write:
    """A linear map of what the operator of a case makes."""
    dims = model_of(case.shape, case.opset, [case.write]).graph.output[0].type.tensor_type.shape.dim
    shape = tuple(dim.dim_value for dim in dims)
    return node("MatMul", numbers(shape[-1], 6)) if case.shape in LAST else mapping(shape, 6, seed=1)


def model_of(shape: Sequence[int], opset: int, writes: Sequence[Write], elem: int = TensorProto.DOUBLE) -> onnx.ModelProto:
    """The operators one behind the other, from "x" to "y"."""
    writer, value = Writer(opset, elem), "x"
    for write in writes:
        value = write(writer, value)
    writer.nodes[-1].output[0] = "y"
    graph = writer.model({"x": shape}, {"y": 0})
    found = onnx.shape_inference.infer_shapes(without_output_shape(graph), data_prop=True).graph.output[0]
    graph.graph.output[0].CopyFrom(found)
    return graph


def without_output_shape(model: onnx.ModelProto) -> onnx.ModelProto:
    """For shape inference to find out."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    copy.graph.output[0].type.tensor_type.ClearField("shape")
    return copy


def squeezed(model: onnx.ModelProto, *, force: bool = True, **feeds: tuple[int, ...]) -> tuple[onnx.ModelProto, Squeezed]:
    graph = ir.serde.deserialize_model(model)
    found = squeeze(graph, feeds or None, force=force)
    after = ir.serde.serialize_model(graph)
    onnx.checker.check_model(after, full_check=True)
    assert ends(after) == ends(model)
    return after, found


ALONE = [name for name, case in CASES.items() if case.leaves == 1]
"""What no crop in front is needed for."""


@pytest.mark.parametrize("name", ALONE)
def test_an_operator_becomes_part_of_the_map_behind_it(name: str) -> None:
    case = CASES[name]
    check([case.write, behind(case)], case)


@pytest.mark.parametrize("name", ALONE)
def test_an_operator_becomes_part_of_the_map_in_front_of_it(name: str) -> None:
    case = CASES[name]
    check([mapping(case.shape, C, seed=2), case.write], case)


@pytest.mark.parametrize("name", CASES)
def test_an_operator_becomes_part_of_the_maps_around_it(name: str) -> None:
    case = CASES[name]
    check([mapping(case.shape, C, seed=2), case.write, behind(case)], case)


def check(writes: Sequence[Write], case: Case) -> None:
    """One linear operator remains, with at most a crop in front of it, and the map is the same."""
    model = model_of(case.shape, case.opset, writes)
    onnx.checker.check_model(model, full_check=True)
    after, _ = squeezed(model)
    feeds = {"x": numbers(*case.shape, seed=9)}
    assert worst(run_whole(after, feeds), run_whole(model, feeds)) <= EXACT
    left = kinds(after)
    assert len(left) <= case.leaves, left
    assert left[-1] in LINEAR, left
    assert set(left[:-1]) <= {"Slice"}, left


@pytest.mark.parametrize("opset", [9, 10, 11, 17])
def test_a_border_of_the_bias_is_a_border_of_zero_in_front(opset: int) -> None:
    """DBB's padding by hand: what a biased map gives outside the image is what it is padded with."""
    pads, value = [0, 0, 1, 0, 0, 0, 2, 3], 0.75
    pad = node("Pad", pads=pads, value=value) if opset < 11 else node("Pad", ints(*pads), np.array(value))
    biased = node("Conv", numbers(C, C, 1, 1), np.full(C, value))
    check([biased, pad, node("Conv", numbers(6, C, 3, 3))], Case(pad, opset=opset))


@pytest.mark.parametrize("opset", [11, 17])
def test_a_border_of_another_value_stays(opset: int) -> None:
    pad = node("Pad", ints(0, 0, 1, 1, 0, 0, 1, 1), np.array(0.7))
    model = model_of(IMAGE, opset, [mapping(IMAGE, C, 0), pad, mapping(IMAGE, C, 1)])
    after, found = squeezed(model)
    assert kinds(after) == ["Conv", "Pad", "Conv"]
    assert any("0.7" in kept.reason for kept in found.kept)


POOLS: Mapping[str, tuple[int, Sequence[Write]]] = {
    "GlobalAveragePool, Flatten": (9, [node("GlobalAveragePool"), node("Flatten")]),
    "GlobalAveragePool, Reshape": (17, [node("GlobalAveragePool"), node("Reshape", ints(-1, C))]),
    "GlobalAveragePool, Reshape 0": (17, [node("GlobalAveragePool"), node("Reshape", ints(0, -1))]),
    "GlobalAveragePool, Squeeze": (17, [node("GlobalAveragePool"), node("Squeeze", ints(3, 2))]),
    "GlobalAveragePool, Squeeze, opset 11": (11, [node("GlobalAveragePool"), node("Squeeze", axes=[2, 3])]),
    "ReduceMean": (17, [node("ReduceMean", axes=[-1, 2], keepdims=0)]),
    "ReduceMean, opset 18": (18, [node("ReduceMean", ints(2, 3), keepdims=0)]),
    "ReduceMean, Flatten": (13, [node("ReduceMean", axes=[2, 3]), node("Flatten", axis=-3)]),
}


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", POOLS)
def test_a_pointwise_map_passes_pooling_and_flattening(name: str, batch: int) -> None:
    opset, pool = POOLS[name]
    pointwise = [node("BatchNormalization", *statistics()), node("Conv", numbers(C, C, 1, 1), numbers(C)), node("Neg")]
    model = model_of((batch, *IMAGE[1:]), opset, [*pointwise, *pool, node("Gemm", numbers(C, 5), numbers(5))])
    after, _ = squeezed(model, force=False)
    feeds = {"x": numbers(batch, *IMAGE[1:])}
    assert worst(run_whole(after, feeds), run_whole(model, feeds)) <= EXACT
    assert kinds(after)[0] in ("GlobalAveragePool", "ReduceMean")
    assert kinds(after)[-1] == "Gemm"
    assert len(kinds(after)) == 1 + len(pool)


TURNS: Mapping[str, tuple[tuple[int, ...], Sequence[Write], list[str]]] = {
    "there and back": (
        IMAGE,
        [node("Transpose", perm=[0, 2, 3, 1]), node("MatMul", numbers(C, C)), node("Transpose", perm=[0, 3, 1, 2])],
        ["Conv"],
    ),
    "rows, there and back": (
        ROW,
        [node("Transpose", perm=[0, 2, 1]), node("MatMul", numbers(C, C)), node("Transpose", perm=[0, 2, 1])],
        ["Conv"],
    ),
    "there, two matrices": (
        IMAGE,
        [node("Transpose", perm=[0, 2, 3, 1]), node("MatMul", numbers(C, 7)), node("MatMul", numbers(7, 5))],
        ["Transpose", "MatMul"],
    ),
    "a convolution, there, a matrix": (
        IMAGE,
        [node("Conv", numbers(7, C, 1, 1)), node("Transpose", perm=[0, 2, 3, 1]), node("MatMul", numbers(7, 5))],
        ["Transpose", "MatMul"],
    ),
    "a row, there, a matrix": (
        ROW,
        [node("Conv", numbers(7, C, 1)), node("Transpose", perm=[0, 2, 1]), node("MatMul", numbers(7, 5))],
        ["Transpose", "MatMul"],
    ),
    "TensorFlow's input": (
        NHWC,
        [node("Transpose", perm=[0, 3, 1, 2]), node("Conv", KERNEL, pads=[1] * 4), node("BatchNormalization", *statistics())],
        ["Transpose", "Conv"],
    ),
    "ConvNeXt's end": (
        NHWC,
        [
            node("MatMul", numbers(C, C)), node("Add", numbers(C)), node("Mul", numbers(C)),
            node("Transpose", perm=[0, 3, 1, 2]),
        ],
        ["Transpose", "Conv"],
    ),
    "height and width exchanged": (
        IMAGE,
        [node("Conv", KERNEL), node("Transpose", perm=[0, 1, 3, 2]), node("BatchNormalization", *statistics())],
        ["Conv", "Transpose", "BatchNormalization"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TURNS)
def test_channels_move_to_the_end_and_back(name: str) -> None:
    shape, writes, wanted = TURNS[name]
    model = model_of(shape, 17, writes)
    after, _ = squeezed(model, force=False)
    feeds = {"x": numbers(*shape)}
    assert worst(run_whole(after, feeds), run_whole(model, feeds)) <= EXACT
    assert kinds(after) == wanted


def test_a_matrix_from_the_left_is_a_convolution_of_rows() -> None:
    writes = [
        node("MatMul", numbers(7, C), first=False), node("Add", numbers(7, 1)), node("MatMul", numbers(5, 7), first=False),
    ]  # fmt: skip
    model = model_of(ROW, 17, writes)
    after, _ = squeezed(model)
    feeds = {"x": numbers(*ROW)}
    assert worst(run_whole(after, feeds), run_whole(model, feeds)) <= EXACT
    assert kinds(after) == ["Conv"]


def test_a_matrix_with_a_bias_is_a_matrix_and_a_sum() -> None:
    writes = [
        node("MatMul", numbers(C, 7)), node("Sub", numbers(7), first=False), node("Div", numbers(7) + 3),
        node("MatMul", numbers(7, 5)), node("Add", numbers(5)),
    ]  # fmt: skip
    model = model_of(TOKENS, 17, writes)
    after, _ = squeezed(model)
    feeds = {"x": numbers(*TOKENS)}
    assert worst(run_whole(after, feeds), run_whole(model, feeds)) <= EXACT
    assert kinds(after) == ["MatMul", "Add"]


def beside(op: str, other: Write, first: bool = True, **attributes: Any) -> Write:
    """The operator on the value and on something else that is computed from it."""

    def write(writer: Writer, x: str) -> str:
        pair = [x, other(writer, x)]
        return writer.node(op, pair if first else pair[::-1], **attributes)

    return write


def training_norm(writer: Writer, x: str) -> str:
    """With the running statistics that training gives back."""
    output = writer.node("BatchNormalization", [x, *statistics()], training_mode=1)
    writer.nodes[-1].output.extend([writer.name(), writer.name()])
    return output


GATE = node("Sigmoid")
# the operator that stays, and what of its reason must be said; nothing is said about operators that compute nothing
REFUSED: Mapping[str, tuple[Case, str, str]] = {
    "average over the edge": (
        Case(node("AveragePool", kernel_shape=[2, 2], strides=[2, 2], ceil_mode=1)), "AveragePool", "ceil_mode",
    ),
    "average of fewer values": (
        Case(node("AveragePool", kernel_shape=[3, 3], pads=[1] * 4)), "AveragePool", "count_include_pad",
    ),
    "average, SAME, of fewer values": (
        Case(node("AveragePool", kernel_shape=[3, 3], auto_pad="SAME_UPPER")), "AveragePool", "count_include_pad",
    ),
    "average, dilated": (Case(node("AveragePool", kernel_shape=[3, 3], dilations=[2, 1]), opset=19), "AveragePool", "dilated"),
    "image backwards": (Case(node("Slice", ints(-1), ints(-99), ints(2), ints(-1))), "Slice", "reverses"),
    "channels cut": (Case(node("Slice", ints(1), ints(3), ints(1))), "Slice", "channels"),
    "batch cut": (Case(node("Slice", ints(0), ints(1), ints(0))), "Slice", "batch"),
    "border mirrored": (Case(node("Pad", ints(0, 0, 1, 1, 0, 0, 1, 1), mode="reflect")), "Pad", "reflect"),
    "border repeated, opset 10": (Case(node("Pad", pads=[0, 0, 1, 1, 0, 0, 1, 1], mode="edge"), opset=10), "Pad", "edge"),
    "channels added": (Case(node("Pad", ints(0, 1, 0, 0, 0, 1, 0, 0))), "Pad", "channels"),
    "norm in training": (Case(training_norm, opset=15), "BatchNormalization", "training"),
    "dropout in training": (Case(node("Dropout", np.array(0.0), np.array(True))), "Dropout", ""),
    "factor computed": (Case(beside("Mul", GATE)), "Mul", "computed from the network's input"),
    "divisor computed": (Case(beside("Div", GATE)), "Div", "computed from the network's input"),
    "division of a constant": (Case(node("Div", numbers(C, 1, 1), first=False)), "Div", "divides by what the network computes"),
    "summand computed": (Case(beside("Add", GATE)), "Add", "different values"),
    "difference computed": (Case(beside("Sub", GATE, first=False)), "Sub", "different values"),
    "summand per pixel": (Case(node("Add", numbers(1, 1, 9, 11))), "Add", "per channel"),
    "factor per row": (Case(node("Mul", numbers(9, 1))), "Mul", "per channel"),
    "factor per image": (Case(node("Mul", numbers(2, 1, 1, 1))), "Mul", "per channel"),
    "sum with a constant": (Case(node("Sum", numbers(C, 1, 1), numbers(C, 1, 1))), "Sum", "constants"),
    "dense, input turned": (Case(node("Gemm", numbers(3, 5), transA=1), (3, 5)), "Gemm", "transposes its input"),
    "dense, bias per row": (Case(node("Gemm", numbers(C, 5), numbers(3, 1)), VECTOR), "Gemm", "per output"),
    "product computed": (Case(beside("MatMul", node("Transpose", perm=[0, 2, 1])), ROW), "MatMul", "both of its matrices"),
    "a matrix per batch": (Case(node("MatMul", numbers(2, C, 5)), TOKENS), "MatMul", "3 dimensions"),
    "volume": (Case(node("Conv", numbers(3, 2, 2, 2, 2)), (1, 2, 3, 4, 5)), "Conv", "over 3 dimensions"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_convolution_stays_and_says_why(name: str) -> None:
    case, op, reason = REFUSED[name]
    front = [mapping(case.shape, case.shape[1], seed=2)] if len(case.shape) == 4 else []
    model = model_of(case.shape, case.opset, [*front, case.write])
    onnx.checker.check_model(model, full_check=True)
    after, found = squeezed(model)
    assert kinds(after) == kinds(model)
    said = [kept.reason for kept in found.kept if kept.node.op_type == op]
    assert not reason or any(reason in text for text in said), said


def test_a_division_by_zero_stays() -> None:
    model = model_of(IMAGE, 17, [mapping(IMAGE, C, 0), node("Div", np.zeros(1))])
    _, found = squeezed(model)
    assert any("divides by zero" in kept.reason for kept in found.kept)


DYNAMIC: Mapping[str, tuple[Write, dict[str, tuple[int, ...]], dict[str, int], str]] = {
    "kernel": (lambda writer, x: writer.node("Conv", [x, "given"]), {"given": (6, C, 3, 3)}, {}, "its kernel"),
    "bias": (lambda writer, x: writer.node("Conv", [x, KERNEL, "given"]), {"given": (C,)}, {}, "its bias"),
    "variance": (
        lambda writer, x: writer.node("BatchNormalization", [x, *statistics()[:3], "given"]),
        {"given": (C,)}, {}, "its parameter",
    ),
    "pads": (lambda writer, x: writer.node("Pad", [x, "given"]), {"given": (8,)}, {"given": TensorProto.INT64}, "its pads"),
    "bounds": (
        lambda writer, x: writer.node("Slice", [x, "given", ints(5)]),
        {"given": (1,)}, {"given": TensorProto.INT64}, "its bounds",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DYNAMIC)
def test_parameters_that_the_network_is_given_are_no_constants(name: str) -> None:
    write, more, types, reason = DYNAMIC[name]
    writer = Writer()
    first = mapping(IMAGE, C, 0)(writer, "x")
    writer.node("Relu", [write(writer, first)], "y")
    model = writer.model({"x": IMAGE, **more}, {"y": 4}, types=types)
    after, found = squeezed(model)
    assert kinds(after) == kinds(model)
    assert any(reason in kept.reason and "computed" in kept.reason for kept in found.kept)


@pytest.mark.parametrize("kind", ["crop", "SAME"])
def test_what_depends_on_an_open_size_stays(kind: str) -> None:
    writer = Writer()
    x = mapping(IMAGE, C, 0)(writer, "x")
    if kind == "crop":
        x = writer.node("Slice", [x, ints(0), ints(5), ints(2)])
    else:
        x = writer.conv(x, KERNEL, auto_pad="SAME_UPPER", strides=[2, 2])
    writer.norm(x, statistics(), "y")
    model = writer.model({"x": ("n", C, "h", "w")}, {"y": 4})
    after, found = squeezed(model, x=IMAGE)
    assert [op in kinds(after) for op in ("Slice", "Conv")] == [kind == "crop", True]
    assert any("open" in kept.reason for kept in found.kept)


@pytest.mark.parametrize("type_", [TensorProto.INT64, TensorProto.INT32])
@pytest.mark.parametrize("ops", [["Div", "Mul", "Add"], ["Neg", "Neg"], ["Mul", "Add", "Mul"], ["Sub", "Neg"]])
@pytest.mark.parametrize("shape", [(2, 1, 5, 7), (2, 3, 5, 7), (7, 1)])
def test_whole_numbers_are_left_alone(type_: int, ops: list[str], shape: tuple[int, ...]) -> None:
    """ONNX has no convolution of whole numbers, and their division is not linear."""
    writer, value = Writer(), "x"
    dtype = onnx.helper.tensor_dtype_to_np_dtype(type_)
    for op in ops:
        value = writer.node(op, [value] if op == "Neg" else [value, np.array(2, dtype)])
    writer.nodes[-1].output[0] = "y"
    model = writer.model({"x": shape}, {"y": shape}, types={"x": type_, "y": type_})
    after, _ = squeezed(model)
    assert kinds(after) == ops


def test_every_linear_operator_has_a_law() -> None:
    """The tables above and the table of forms name the same operators."""
    named: set[str] = set()
    for case in CASES.values():
        named |= set(kinds(model_of(case.shape, case.opset, [case.write])))
    for opset, pool in POOLS.values():
        named |= set(kinds(model_of(IMAGE, opset, pool)))
    for shape, writes, _ in TURNS.values():
        named |= set(kinds(model_of(shape, 17, writes)))
    assert set(OPERATORS) <= named
