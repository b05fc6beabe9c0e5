"""The caster, the overflow guard and execution by types: laws over many small graphs, then numbers computed by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.transformers.float16 import convert_float_to_float16

import repdeploy
from repdeploy.errors import InputError, UsageError
from repdeploy.exporters import casting
from repdeploy.exporters.casting import Keep
from repdeploy.exporters.interface import Case
from repdeploy.exporters.judging import judged
from repdeploy.exporters.overflow import too_wide_for_half
from repdeploy.graph.onnx_source import read_onnx
from repdeploy.graph.typed import TypedGraph
from repdeploy.records import WideLayer
from tests.graph.onnx_graphs import Writer, ends, run_onnxruntime
from tests.networks import repvgg, save

FLOAT, HALF, BRAIN = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16
NARROW = {"fp16": HALF, "bf16": BRAIN}
FLOATS = {FLOAT, HALF, BRAIN}
CLOSE = {"fp16": 1e-2, "bf16": 8e-2}
"""How near a cast graph comes to the wide one, relative to the largest output; a wrong tensor shows at 0.5 and more."""
IMAGE = ("n", 4, 6, 6)
OPSET = 22
X = np.random.default_rng(0).standard_normal((2, 4, 6, 6)).astype(np.float32)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """The networks here are small: one thread runs them faster than several that wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed + sum(shape)).standard_normal(shape).astype(np.float32) * 0.5


def statistics(channels: int) -> list[np.ndarray]:
    return [normal(channels), normal(channels, seed=1), normal(channels, seed=2), np.abs(normal(channels, seed=3)) + 0.5]


def wide_model(model: onnx.ModelProto) -> ir.Model:
    return casting.prepared(ir.from_proto(model))


def cast(
    model: onnx.ModelProto, precision: str, *patterns: str, found: Mapping[str, str] | None = None, narrow_ends: bool = False
) -> tuple[onnx.ModelProto, tuple[WideLayer, ...]]:
    done = casting.narrowed(
        wide_model(model), casting.PRECISIONS[precision], Keep(patterns, found or {}), narrow_ends=narrow_ends
    )
    return ir.to_proto(casting.swept(done.model)), done.wide


def types(model: onnx.ModelProto) -> dict[str, int]:
    """The element type of every value, as onnx infers them."""
    graph = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
    found = {value.name: value.type.tensor_type.elem_type for value in (*graph.input, *graph.output, *graph.value_info)}
    return found | {tensor.name: tensor.data_type for tensor in graph.initializer}


def typed(model: onnx.ModelProto, feeds: Mapping[str, np.ndarray], *values: str) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in TypedGraph(ir.from_proto(model)).run(feeds, values).items()}


def distance(got: np.ndarray, wanted: np.ndarray) -> float:
    assert got.shape == wanted.shape
    return float(np.abs(got - wanted).max() / max(1.0, np.abs(wanted).max()))


def attribute(node: onnx.NodeProto) -> Any:
    return helper.get_attribute_value(node.attribute[0])


def node_of(model: onnx.ModelProto, operator: str) -> onnx.NodeProto:
    (node,) = (node for node in model.graph.node if node.op_type == operator)
    return node


def image_model(writer: Writer, outputs: Mapping[str, Any], **options: Any) -> onnx.ModelProto:
    return writer.model({"x": IMAGE}, outputs, **options)


# --- a gallery of graphs, one trap each; every one takes x (n, 4, 6, 6) ------------------------------------------------------


def plain(w: Writer) -> onnx.ModelProto:
    a = w.node("Relu", [w.norm(w.conv("x", normal(6, 4, 3, 3), normal(6), pads=[1, 1, 1, 1]), statistics(6))])
    b = w.node("MaxPool", [a], kernel_shape=[2, 2], strides=[2, 2])
    c = w.node("Flatten", [w.node("Relu", [w.conv(b, normal(8, 3, 3, 3), group=2)])])
    w.node("Gemm", [c, normal(8, 5), normal(5)], "y")
    return image_model(w, {"y": ["n", 5]})


def resize(w: Writer) -> onnx.ModelProto:
    scales, region = np.array([1, 1, 2, 2], np.float32), np.zeros(0, np.float32) if w.opset < 13 else ""
    w.conv(w.node("Resize", ["x", region, scales], mode="nearest"), normal(3, 4, 1, 1), output="y")
    return image_model(w, {"y": ["n", 3, 12, 12]})


def shape_path(w: Writer) -> onnx.ModelProto:
    batch = w.node("Gather", [w.node("Shape", ["x"]), np.array(0)])
    sizes = w.node("Concat", [w.node("Unsqueeze", [batch, np.array([0])]), np.array([-1])], axis=0)
    w.node("Gemm", [w.node("Reshape", ["x", sizes]), normal(144, 3)], "y")
    return image_model(w, {"y": ["n", 3]})


def float_range(w: Writer) -> onnx.ModelProto:
    steps = w.node("Range", [np.float32(0), np.float32(6), np.float32(1)])
    w.node("Add", [w.node("Relu", ["x"]), steps], "y")
    return image_model(w, {"y": IMAGE})


def cast_inside(w: Writer) -> onnx.ModelProto:
    index = w.node("Cast", [w.node("ArgMax", ["x"], axis=1)], to=FLOAT)
    w.node("Mul", ["x", index], "y")
    return image_model(w, {"y": IMAGE})


def clip_both(w: Writer) -> onnx.ModelProto:
    w.node("Clip", [w.node("Clip", ["x", np.float32(-0.5), np.float32(0.75)]), "", np.float32(0.6)], "y")
    return image_model(w, {"y": IMAGE})


def prelu(w: Writer) -> onnx.ModelProto:
    w.node("PRelu", ["x", normal(4, 1, 1)], "y")
    return image_model(w, {"y": IMAGE})


def where(w: Writer) -> onnx.ModelProto:
    w.node("Where", [w.node("Greater", ["x", np.float32(0.25)]), "x", normal(4, 1, 1)], "y")
    return image_model(w, {"y": IMAGE})


def pad_value(w: Writer) -> onnx.ModelProto:
    w.node("Pad", ["x", np.array([0, 0, 1, 1, 0, 0, 1, 1]), np.float32(0.3)], "y")
    return image_model(w, {"y": ["n", 4, 8, 8]})


def pad_computed(w: Writer) -> onnx.ModelProto:
    fill = w.node("ReduceMax", ["x"], keepdims=0)
    w.node("Pad", ["x", np.array([0, 0, 1, 1, 0, 0, 1, 1]), fill], "y")
    return image_model(w, {"y": ["n", 4, 8, 8]})


def batch_norm(w: Writer) -> onnx.ModelProto:
    w.norm("x", statistics(4), "y")
    return image_model(w, {"y": IMAGE})


def constants(w: Writer) -> onnx.ModelProto:
    w.nodes.append(helper.make_node("Constant", [], ["k"], value=numpy_helper.from_array(normal(4, 1, 1))))
    w.nodes.append(helper.make_node("Constant", [], ["one"], value_float=1.5))
    w.nodes.append(helper.make_node("Constant", [], ["axes"], value_ints=[2, 3]))
    w.node("Mul", [w.node("ReduceSum", [w.node("Add", ["x", "k"]), "axes"]), "one"], "y")
    return image_model(w, {"y": ["n", 4, 1, 1]})


def constant_of_shape(w: Writer) -> onnx.ModelProto:
    value = numpy_helper.from_array(np.array([0.25], np.float32))
    ones = w.node("ConstantOfShape", [w.node("Shape", ["x"])], value=value)
    w.node("Sub", ["x", ones], "y")
    return image_model(w, {"y": IMAGE})


def shared_weights(w: Writer) -> onnx.ModelProto:
    weight, bias = w.store(normal(4, 4, 3, 3), "w"), w.store(normal(4), "b")
    first = w.node("Conv", ["x", weight, bias], pads=[1, 1, 1, 1])
    second = w.node("Conv", [w.node("Relu", [first]), weight, bias], pads=[1, 1, 1, 1])
    soft = w.node("Softmax", [w.node("Add", [second, w.store(normal(4, 1, 1), "s")])], axis=1)
    w.node("Mul", [w.node("Softmax", [w.node("Identity", ["s"])], axis=0), soft], "y")
    return image_model(w, {"y": IMAGE})


def read_twice(w: Writer) -> onnx.ModelProto:
    a = w.node("Mul", ["x", "x"])
    soft = w.node("Softmax", [a], axis=1)
    w.node("Concat", [w.node("Add", [soft, soft]), a, a], "y", axis=1)
    return image_model(w, {"y": ["n", 12, 6, 6]})


def output_read_inside(w: Writer) -> onnx.ModelProto:
    w.conv("x", normal(4, 4, 1, 1), output="y")
    w.node("Softmax", [w.node("Relu", ["y"])], "z", axis=1)
    w.node("LogSoftmax", ["y"], "l", axis=1)
    return image_model(w, {"z": IMAGE, "y": IMAGE, "l": IMAGE})


def input_is_output(w: Writer) -> onnx.ModelProto:
    w.node("Relu", [w.node("Softmax", ["x"], axis=1)], "y")
    return image_model(w, {"x": IMAGE, "y": IMAGE})


def integer_output(w: Writer) -> onnx.ModelProto:
    values, indices = w.name(), "i"
    w.nodes.append(helper.make_node("TopK", ["x", w.store(np.array([2]))], [values, indices], axis=1))
    w.node("Sigmoid", [values], "y")
    return image_model(w, {"y": ["n", 2, 6, 6], "i": ["n", 2, 6, 6]}, types={"i": TensorProto.INT64})


def norms(w: Writer) -> onnx.ModelProto:
    a = w.node("InstanceNormalization", ["x", normal(4), normal(4, seed=1)])
    w.node("LayerNormalization", [a, normal(6), normal(6, seed=1)], "y", axis=-1)
    return image_model(w, {"y": IMAGE})


def tokens(w: Writer) -> onnx.ModelProto:
    rows = w.node("Transpose", [w.node("Reshape", ["x", np.array([0, 4, 36])])], perm=[0, 2, 1])
    q, k = (w.node("MatMul", [rows, normal(4, 4, seed=seed)]) for seed in range(2))
    scores = w.node("Softmax", [w.node("MatMul", [q, w.node("Transpose", [k], perm=[0, 2, 1])])], axis=-1)
    w.node("Gelu", [w.node("MatMul", [scores, rows])], "y")
    return image_model(w, {"y": ["n", 36, 4]})


def quantised(w: Writer) -> onnx.ModelProto:
    scale, zero = w.store(np.float32(0.05)), w.store(np.array(0, np.int8))
    read = w.node("DequantizeLinear", [w.node("QuantizeLinear", ["x", scale, zero]), scale, zero])
    w.conv(read, normal(3, 4, 1, 1), output="y")
    return image_model(w, {"y": ["n", 3, 6, 6]})


def split_and_expand(w: Writer) -> onnx.ModelProto:
    parts = [w.name(), w.name()]
    w.nodes.append(helper.make_node("Split", ["x"], parts, axis=1, num_outputs=2))
    gate = w.node("Expand", [w.node("HardSigmoid", [normal(1, 2, 1, 1)]), np.array([1, 2, 6, 6])])
    w.node("Mul", [w.node("Max", [*parts, gate]), gate], "y")
    return image_model(w, {"y": ["n", 2, 6, 6]})


def up_and_down(w: Writer) -> onnx.ModelProto:
    up = w.node("ConvTranspose", ["x", normal(4, 3, 2, 2), normal(3)], strides=[2, 2])
    w.node("AveragePool", [w.node("HardSwish", [up])], "y", kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    return image_model(w, {"y": ["n", 3, 6, 6]})


def half_inside(w: Writer) -> onnx.ModelProto:
    """Another exporter has put a part of it into float16 already."""
    w.stored["h"] = numpy_helper.from_array(normal(4, 4, 1, 1).astype(np.float16), "h")
    inner = w.node("Relu", [w.node("Conv", [w.node("Cast", ["x"], to=HALF), "h"])])
    w.node("Sigmoid", [w.node("Cast", [inner], to=FLOAT)], "y")
    return image_model(w, {"y": IMAGE})


def names_like_ours(w: Writer) -> onnx.ModelProto:
    """Values that are called as casts and stored tensors are called here."""
    soft = w.node("Softmax", ["x"], "x.fp32", axis=1)
    first = w.node("Add", ["x", normal(4, 1, 1)], "x.bf16")
    w.node("Concat", [w.node("Relu", [first], "x.fp16"), soft, first], "y", axis=1)
    return image_model(w, {"y": ["n", 12, 6, 6]})


GALLERY: dict[str, Callable[[Writer], onnx.ModelProto]] = {
    item.__name__: item
    for item in (
        plain, resize, shape_path, float_range, cast_inside, clip_both, prelu, where, pad_value, pad_computed, batch_norm,
        constants, constant_of_shape, shared_weights, read_twice, output_read_inside, input_is_output,
        integer_output, norms, tokens, quantised, split_and_expand, up_and_down, half_inside, names_like_ours,
    )
}  # fmt: skip
CHOICES: tuple[tuple[tuple[str, ...], bool], ...] = (
    ((), False),
    ((), True),
    (("none",), True),
    (("none", ".*"), False),
    ((r".*_[02468]",), False),
    (("none", r".*_[13579]"), True),
)
"""What to keep, and whether the ends are narrow."""


def made(name: str, opset: int = OPSET) -> onnx.ModelProto:
    return GALLERY[name](Writer(opset, FLOAT))


# --- laws --------------------------------------------------------------------------------------------------------------------


def assert_lawful(model: onnx.ModelProto, precision: str, patterns: tuple[str, ...], narrow_ends: bool) -> None:
    """What holds of every cast graph, whatever the graph."""
    narrow = NARROW[precision]
    done, wide = cast(model, precision, *patterns, narrow_ends=narrow_ends)
    onnx.checker.check_model(done, full_check=True)
    assert [name for name, _ in ends(done)] == [name for name, _ in ends(model)]
    found, kept = types(done), {layer.name for layer in wide}
    for before, after in zip((*model.graph.input, *model.graph.output), (*done.graph.input, *done.graph.output), strict=True):
        old, new = (item.type.tensor_type.elem_type for item in (before, after))
        assert new == (narrow if narrow_ends and old == FLOAT else old), before.name
        assert before.type.tensor_type.shape == after.type.tensor_type.shape
    own = {node.name for node in wide_model(model).graph}
    for node in done.graph.node:
        if node.name not in own:
            assert node.op_type == "Cast"
            continue
        made_floats = {found[name] for name in node.output if found.get(name) in FLOATS}
        if node.name in kept:
            assert made_floats == {FLOAT}, node.name
            if node.op_type != "Cast":
                assert {found[name] for name in node.input if found.get(name) in FLOATS} <= {FLOAT}, node.name
        else:
            assert FLOAT not in made_floats, node.name
    got, exact = typed(done, {"x": X}), typed(model, {"x": X})
    for name, wanted in exact.items():
        if wanted.dtype.kind == "f":
            assert distance(got[name], wanted) <= CLOSE[precision], name


@pytest.mark.parametrize("precision", NARROW)
@pytest.mark.parametrize("name", GALLERY)
def test_every_cast_graph_is_valid_and_means_the_same(name: str, precision: str) -> None:
    model = made(name)
    for patterns, narrow_ends in CHOICES[:3] if name == "half_inside" else CHOICES:
        try:
            assert_lawful(model, precision, patterns, narrow_ends)
        except UsageError:
            assert patterns  # a pattern that no node of so small a graph answers to
        except Exception as reason:
            reason.add_note(f"{name}, keep {patterns}, narrow ends {narrow_ends}")
            raise


@st.composite
def graphs(draw: st.DrawFn) -> onnx.ModelProto:
    """Maps of one size, each made from one to three earlier ones."""
    w, maps, count = Writer(OPSET, FLOAT), ["x"], draw(st.integers(1, 8))
    weight = w.store(normal(4, 4, 3, 3), "shared")
    for index in range(count):
        a, b = (maps[draw(st.integers(0, len(maps) - 1))] for _ in range(2))
        last = f"m{index}"
        match draw(st.sampled_from(("Conv", "shared", "Relu", "Add", "Where", "Concat", "Softmax", "Clip", "Norm", "Shape"))):
            case "Conv":
                w.conv(a, normal(4, 4, 3, 3, seed=index), normal(4), last, pads=[1, 1, 1, 1])
            case "shared":
                w.node("Conv", [a, weight], last, pads=[1, 1, 1, 1])
            case "Where":
                w.node("Where", [w.node("Less", [a, b]), a, b], last)
            case "Concat":
                w.conv(w.node("Concat", [a, b, a], axis=1), normal(4, 12, 1, 1), output=last)
            case "Clip":
                w.node("Clip", [a, np.float32(-1), np.float32(1)], last)
            case "Norm":
                w.norm(a, statistics(4), last)
            case "Shape":
                w.node("Reshape", [w.node("Flatten", [a]), w.node("Shape", [b])], last)
            case "Softmax":
                w.node("Softmax", [a], last, axis=1)
            case "Add":
                w.node("Add", [a, b], last)
            case operator:
                w.node(operator, [a], last)
        maps.append(last)
    outputs = draw(st.lists(st.sampled_from(maps[1:]), unique=True, min_size=1, max_size=3))
    return image_model(w, dict.fromkeys(sorted({*outputs, maps[-1]}), IMAGE))


@given(graphs(), st.sampled_from(sorted(NARROW)), st.booleans(), st.booleans(), st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_any_choice_of_layers_may_stay_wide(
    model: onnx.ModelProto, precision: str, ends: bool, bare: bool, chance: Any
) -> None:
    names = [node.name for node in wide_model(model).graph]
    chosen = chance.sample(names, chance.randint(0, len(names)))
    assert_lawful(model, precision, (*(["none"] if bare else []), *chosen), ends)


@pytest.mark.parametrize("name", GALLERY)
def test_casting_is_repeatable_and_leaves_the_wide_model_alone(name: str) -> None:
    wide = wide_model(made(name))
    before = ir.to_proto(wide).SerializeToString(deterministic=True)
    first, second = (
        ir.to_proto(casting.swept(casting.narrowed(wide, to, Keep(), narrow_ends=True).model))
        for to in (casting.PRECISIONS["fp16"],) * 2
    )
    assert first.SerializeToString(deterministic=True) == second.SerializeToString(deterministic=True)
    assert ir.to_proto(wide).SerializeToString(deterministic=True) == before


# --- graphs that were seen to break these laws ---


def assert_valid(model: onnx.ModelProto, precision: str, *patterns: str, narrow_ends: bool = False) -> None:
    onnx.checker.check_model(cast(model, precision, *patterns, narrow_ends=narrow_ends)[0], full_check=True)


def test_a_half_layer_of_another_exporter_may_be_kept_wide() -> None:
    assert_lawful(made("half_inside"), "fp16", ("Conv",), False)


@pytest.mark.parametrize("precision", NARROW)
def test_an_output_whose_type_an_attribute_states(precision: str) -> None:
    w = Writer(OPSET, FLOAT)
    square = w.node("ReduceMax", ["x", np.array([0, 1])], keepdims=0)
    w.node("MatMul", ["x", w.node("EyeLike", [square], dtype=FLOAT)], "y")
    assert_valid(image_model(w, {"y": IMAGE}), precision)


@pytest.mark.parametrize("precision", NARROW)
def test_a_sequence_of_maps(precision: str) -> None:
    w = Writer(OPSET, FLOAT)
    pair = w.node("SequenceConstruct", ["x", w.node("Relu", ["x"])])
    w.node("ConcatFromSequence", [pair], "y", axis=1)
    assert_valid(image_model(w, {"y": ["n", 8, 6, 6]}), precision)


@pytest.mark.parametrize("narrow_ends", [False, True])
def test_a_weight_that_is_an_output_too(narrow_ends: bool) -> None:
    w = Writer(OPSET, FLOAT)
    w.node("Conv", ["x", w.store(normal(4, 4, 1, 1), "k")], "y")
    model = image_model(w, {"y": IMAGE, "k": [4, 4, 1, 1]})
    before = model.SerializeToString(deterministic=True)
    assert_valid(model, "fp16", narrow_ends=narrow_ends)
    assert model.SerializeToString(deterministic=True) == before


def test_a_group_normalization_whose_type_onnx_does_not_infer() -> None:
    """onnx has no inference for it; repdeploy.graph.known lists it as being like its input."""
    w = Writer(OPSET, FLOAT)
    w.node("Relu", [w.node("GroupNormalization", ["x", normal(4), normal(4, seed=1)], num_groups=2)], "y")
    assert_lawful(image_model(w, {"y": IMAGE}), "fp16", (), False)


def test_a_name_of_an_input_is_not_given_away() -> None:
    w = Writer(OPSET, FLOAT)
    w.node("Add", ["x", w.node("Softmax", ["x.fp16"], axis=1)], "y")
    assert_valid(w.model({"x": IMAGE, "x.fp16": IMAGE}, {"y": IMAGE}), "fp16")


def test_a_name_that_ends_like_ours_is_not_given_away() -> None:
    """A stored tensor of the user's called `x.fp16` beside an input `x`."""
    w = Writer(OPSET, FLOAT)
    w.node("Add", ["x", w.store(normal(4, 1, 1), "x.fp16")], "y")
    assert_valid(image_model(w, {"y": IMAGE}), "fp16", "Add")


# --- what stays wide ---------------------------------------------------------------------------------------------------------


def test_by_default_sums_and_exponentials_stay_wide() -> None:
    for name, operators in (
        ("tokens", {"Softmax"}),
        ("norms", {"InstanceNormalization", "LayerNormalization"}),
        ("plain", set()),
    ):
        assert {layer.operator for layer in cast(made(name), "fp16")[1]} == operators
        assert not cast(made(name), "fp16", "none")[1]


@pytest.mark.parametrize(
    ("pattern", "kept"),
    [
        ("Conv", {"Conv_0", "Conv_4"}),
        ("Conv_4", {"Conv_4"}),
        ("Conv_.", {"Conv_0", "Conv_4"}),
        (".*_[05]", {"Conv_0", "Relu_5"}),
        ("Gemm", {"Gemm_7"}),
    ],
)
def test_a_pattern_keeps_exactly_what_it_says(pattern: str, kept: set[str]) -> None:
    done, wide = cast(made("plain"), "fp16", pattern)
    assert {layer.name for layer in wide} == kept
    assert {layer.reason for layer in wide} == {f"--keep-fp32 {pattern}"}
    found = types(done)
    for node in done.graph.node:
        if not node.name.startswith("cast."):
            expected = FLOAT if node.name in kept else HALF
            assert {found[name] for name in (*node.input, *node.output)} == {expected}, node.name


def test_an_operator_is_no_part_of_a_name() -> None:
    """`Conv` is an operator, not the beginning of ConvTranspose_0 or Conv_1."""
    w = Writer(OPSET, FLOAT)
    w.node("ConvTranspose", [w.conv("x", normal(4, 4, 1, 1)), normal(4, 3, 2, 2)], "y", strides=[2, 2])
    assert {layer.operator for layer in cast(image_model(w, {"y": ["n", 3, 12, 12]}), "fp16", "Conv")[1]} == {"Conv"}


def test_a_name_that_is_no_regular_expression_is_still_a_name() -> None:
    model = made("plain")
    for index, node in enumerate(model.graph.node):
        node.name = f"blocks[{index}"
    assert {layer.name for layer in cast(model, "fp16", "blocks[3")[1]} == {"blocks[3"}


@pytest.mark.parametrize(("pattern", "hint"), [("Cnov", "Conv"), ("Conv_7", "Conv_"), ("qqqq", "regular expression")])
def test_a_pattern_without_an_answer_names_what_is_near(pattern: str, hint: str) -> None:
    with pytest.raises(UsageError, match=f"--keep-fp32 {pattern}: no layer") as caught:
        cast(made("plain"), "fp16", pattern)
    assert hint in caught.value.hint


def test_a_broken_regular_expression_says_so() -> None:
    with pytest.raises(UsageError, match="is no regular expression"):
        cast(made("plain"), "fp16", "Conv[")


@pytest.mark.parametrize("opset", [13, 20, 21])
def test_where_onnx_has_no_such_type_a_layer_stays_wide(opset: int) -> None:
    done, wide = cast(made("plain", opset), "bf16")
    onnx.checker.check_model(done, full_check=True)
    found = {layer.operator: layer.reason for layer in wide}
    assert {"Conv", "MaxPool"} <= found.keys()
    assert found["Conv"] == f"ONNX has no bfloat16 Conv in opset {opset}"
    assert {"Gemm", "Relu"} & found.keys() == set()
    assert distance(typed(done, {"x": X})["y"], typed(made("plain", opset), {"x": X})["y"]) < CLOSE["bf16"]


@pytest.mark.parametrize("opset", [11, 13, 17, 18, 20, 23])
@pytest.mark.parametrize("name", ["plain", "clip_both", "pad_value", "batch_norm", "resize", "prelu"])
def test_every_opset_that_is_exported_is_cast(name: str, opset: int) -> None:
    model = made(name, opset)
    assert_lawful(model, "fp16", (), False)
    assert_lawful(model, "fp16", (), True)


@pytest.mark.parametrize("precision", NARROW)
def test_scales_of_a_resize_stay_float(precision: str) -> None:
    done, wide = cast(made("resize"), precision)
    node, found = node_of(done, "Resize"), types(done)
    assert (found[node.input[0]], found[node.input[2]], found[node.output[0]]) == (NARROW[precision], FLOAT, NARROW[precision])
    assert not wide


def test_a_range_is_made_in_float_and_cast_afterwards() -> None:
    done, wide = cast(made("float_range"), "fp16")
    assert [layer.operator for layer in wide] == ["Range"]
    assert types(done)[node_of(done, "Range").output[0]] == FLOAT
    assert types(done)[node_of(done, "Add").input[1]] == HALF


def test_shapes_and_indices_are_left_alone() -> None:
    model = made("shape_path")
    done, wide = cast(model, "fp16")
    assert not wide
    old = {value: kind for value, kind in types(model).items() if kind == TensorProto.INT64}
    assert old.items() <= types(done).items()
    assert sum(node.op_type == "Cast" for node in done.graph.node) == 2  # of the image and of the answer


def test_a_cast_to_float_becomes_a_cast_to_half() -> None:
    done, _ = cast(made("cast_inside"), "fp16", narrow_ends=True)
    (node,) = (node for node in done.graph.node if node.op_type == "Cast")
    assert attribute(node) == HALF


def test_shared_weights_are_stored_in_each_type_that_is_read() -> None:
    done, _ = cast(made("shared_weights"), "fp16", "none", "Conv_2", narrow_ends=True)
    stored = {item.name: item.data_type for item in done.graph.initializer}
    first, second = (node for node in done.graph.node if node.op_type == "Conv")
    assert [stored[name] for name in first.input[1:]] == [HALF, HALF]
    assert [stored[name] for name in second.input[1:]] == [FLOAT, FLOAT]
    assert list(second.input[1:]) == ["w", "b"]
    everywhere, _ = cast(made("shared_weights"), "fp16", "none")
    assert {item.name for item in everywhere.graph.initializer} == {"w", "b", "s"}


def test_a_value_is_cast_once_however_often_it_is_read() -> None:
    done, _ = cast(made("read_twice"), "fp16", narrow_ends=True)
    assert sum(node.op_type == "Cast" for node in done.graph.node) == 2  # into the softmax, and out of it


def test_stored_half_numbers_are_the_nearest_ones() -> None:
    done, _ = cast(made("batch_norm"), "bf16")
    stored = {item.name: numpy_helper.to_array(item) for item in done.graph.initializer}
    for item in made("batch_norm").graph.initializer:
        assert np.array_equal(
            stored[item.name].astype(np.float32), numpy_helper.to_array(item).astype(ml_dtypes.bfloat16).astype(np.float32)
        )


def test_an_operator_of_somebody_else_stays_wide() -> None:
    w = Writer(OPSET, FLOAT)
    inner = w.node("Relu", ["x"])
    w.node("Sigmoid", [w.node("Mish2", [inner], "foreign", domain="com.somebody")], "y")
    model = image_model(w, {"y": IMAGE}, domains={"com.somebody": 1})
    model.graph.value_info.append(helper.make_tensor_value_info("foreign", FLOAT, IMAGE))
    done, wide = cast(model, "fp16")
    assert [layer.operator for layer in wide] == ["Mish2"]
    (foreign,) = (node for node in done.graph.node if node.op_type == "Mish2")
    (before,) = (node for node in done.graph.node if node.output[0] == foreign.input[0])
    assert attribute(before) == FLOAT


@pytest.mark.parametrize("operator", ["ConstantOfShape", "Range"])
def test_the_reason_for_a_wide_layer_is_true(operator: str) -> None:
    """What a node has no float input for is not what ONNX has no type for: ConstantOfShape exists in float16."""
    _, wide = cast(made({"ConstantOfShape": "constant_of_shape", "Range": "float_range"}[operator]), "fp16")
    schema = onnx.defs.get_schema(operator, OPSET)
    lacks = "tensor(float16)" not in schema.outputs[0].types
    assert any(layer.operator == operator and "ONNX has no float16" in layer.reason for layer in wide) == lacks


def test_control_flow_is_refused_by_name() -> None:
    side = [
        helper.make_graph([helper.make_node(op, ["x"], [op])], op, [], [helper.make_tensor_value_info(op, FLOAT, IMAGE)])
        for op in ("Relu", "Sigmoid")
    ]
    w = Writer(OPSET, FLOAT)
    w.node("If", [w.store(np.array(True))], "y", then_branch=side[0], else_branch=side[1])
    with pytest.raises(InputError, match=r"If .* holds a graph of its own"):
        wide_model(image_model(w, {"y": IMAGE}))


# --- execution by types ------------------------------------------------------------------------------------------------------


def test_eighty_one_thousand_is_infinite_in_half() -> None:
    """onnxruntime's CPU computes between casts in float32 and returns it finite."""
    w = Writer(OPSET, FLOAT)
    big = w.conv("x", np.full((1, 1, 1, 1), 300, np.float32), output="big")
    w.conv(big, np.full((1, 1, 1, 1), 0.5, np.float32), output="y")
    model = w.model({"x": [1, 1, 1, 1]}, {"y": [1, 1, 1, 1]})
    done, _ = cast(model, "fp16")
    feeds = {"x": np.full((1, 1, 1, 1), 270, np.float32)}
    got = typed(done, feeds, "big")
    assert np.isinf(got["big"]).all()
    assert np.isinf(got["y"]).all()
    assert typed(model, feeds)["y"].item() == 40500
    (out_of_onnxruntime,) = run_optimised(done, feeds)
    assert np.isfinite(out_of_onnxruntime).all()


def run_optimised(model: onnx.ModelProto, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    import onnxruntime

    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return list(session.run(None, dict(feeds)))


@pytest.mark.parametrize(
    ("precision", "step"), [("fp16", 2.0**-11), ("bf16", 2.0**-8)], ids=["half: 11 bits", "bfloat16: 8 bits"]
)
def test_every_result_is_rounded_once(precision: str, step: float) -> None:
    """1 + step is a tie and becomes 1 before the next addition; in float32 the two steps would add up."""
    w = Writer(OPSET, FLOAT)
    first = w.node("Add", ["x", np.float32(step)], "first")
    w.node("Add", [first, np.float32(step)], "y")
    model = w.model({"x": [1]}, {"y": [1]})
    got = typed(cast(model, precision)[0], {"x": np.ones(1, np.float32)}, "first")
    assert (got["first"].item(), got["y"].item()) == (1, 1)
    kept = typed(cast(model, precision, "Add_0")[0], {"x": np.ones(1, np.float32)})  # 1 + step stays, and is cast afterwards
    assert kept["y"].item() == 1
    assert typed(model, {"x": np.ones(1, np.float32)})["y"].item() == 1 + 2 * step


def test_inputs_and_weights_are_rounded_too() -> None:
    w = Writer(OPSET, FLOAT)
    w.node("Mul", ["x", np.float32(1 / 3)], "y")
    done, _ = cast(w.model({"x": [1]}, {"y": [1]}), "fp16")
    x = np.array([0.1], np.float32)
    assert typed(done, {"x": x})["y"].item() == float(np.float16(np.float32(np.float16(0.1)) * np.float32(np.float16(1 / 3))))


@pytest.mark.parametrize(("to", "kind"), [(HALF, np.float16), (BRAIN, ml_dtypes.bfloat16), (FLOAT, np.float32)])
def test_a_cast_rounds_to_its_type(to: int, kind: Any) -> None:
    w = Writer(OPSET, FLOAT)
    w.node("Cast", [w.node("Cast", ["x"], to=to)], "y", to=FLOAT)
    assert typed(w.model({"x": [1]}, {"y": [1]}), {"x": np.array([0.1], np.float32)})["y"].item() == float(kind(0.1))


def test_half_and_bfloat16_end_where_they_end() -> None:
    w = Writer(OPSET, FLOAT)
    w.node("Mul", ["x", np.float32(1)], "y")
    model, x = w.model({"x": [4]}, {"y": [4]}), np.array([65504, 65520, 1e38, 3e-8], np.float32)
    assert typed(cast(model, "fp16")[0], {"x": x})["y"].tolist() == [65504, np.inf, np.inf, 2.0**-24 if 3e-8 > 2.0**-25 else 0]
    assert np.isfinite(typed(cast(model, "bf16")[0], {"x": x})["y"]).all()


def test_typed_execution_agrees_with_onnxruntimes_own_half_kernels() -> None:
    """Where nothing overflows, and no optimiser removes a cast."""
    done, _ = cast(made("plain"), "fp16", "none")
    assert distance(typed(done, {"x": X})["y"], run_onnxruntime(done, {"x": X})["y"]) < 3e-3


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("narrow_ends", [False, True])
def test_the_cast_is_that_of_onnxruntimes_converter(seed: int, narrow_ends: bool) -> None:
    w = Writer(17, FLOAT)
    a = w.node("Relu", [w.conv("x", normal(8, 4, 3, 3, seed=seed), normal(8, seed=seed), pads=[1, 1, 1, 1])])
    b = w.node("Add", [w.conv(a, normal(8, 2, 3, 3, seed=seed), group=4, pads=[1, 1, 1, 1]), a])
    c = w.node("Flatten", [w.node("MaxPool", [w.node("Sigmoid", [b])], kernel_shape=[2, 2], strides=[2, 2])])
    w.node("Gemm", [c, normal(72, 5, seed=seed), normal(5)], "y")
    model = image_model(w, {"y": ["n", 5]})
    theirs = convert_float_to_float16(copy.deepcopy(model), keep_io_types=not narrow_ends)
    ordered = ir.from_proto(theirs)
    ordered.graph.sort()  # it appends its casts to the end
    ours, wide = cast(model, "fp16", narrow_ends=narrow_ends)
    assert not wide
    assert ends(ours) == ends(theirs)
    assert np.array_equal(typed(ours, {"x": X})["y"], typed(ir.to_proto(ordered), {"x": X})["y"])


@pytest.mark.parametrize("name", ["a", "b"])
@pytest.mark.parametrize("side", ["artifact", "reference"])
def test_nan_passes_nowhere(name: str, side: str) -> None:
    good = {"a": np.ones((1, 2)), "b": np.ones((1, 2))}
    bad = good | {name: np.array([[1.0, np.nan]])}
    got, wanted = (bad, good) if side == "artifact" else (good, bad)
    (check,) = judged(lambda _: got, [Case("one", {}, wanted)], "fp16", "m")
    assert not check.passed


# --- the guard ---------------------------------------------------------------------------------------------------------------


def guard(model: onnx.ModelProto, *feeds: np.ndarray) -> dict[str, str]:
    return too_wide_for_half(wide_model(model), [{"x": x} for x in feeds or (X,)])


def two_convs(first: np.ndarray, second: np.ndarray, bias: np.ndarray | None = None) -> onnx.ModelProto:
    w = Writer(OPSET, FLOAT)
    w.conv(w.node("Relu", [w.conv("x", first, bias)]), second, output="y")
    return image_model(w, {"y": ["n", len(second), 6, 6]})


def test_an_ordinary_network_keeps_nothing() -> None:
    for name in ("plain", "tokens", "norms", "batch_norm", "pad_value"):
        assert guard(made(name)) == {}, name


def test_what_makes_and_what_reads_a_large_value_is_named() -> None:
    found = guard(two_convs(normal(4, 4, 1, 1) * 1e5, normal(3, 4, 1, 1) * 1e-3))
    assert set(found) == {"Conv_0", "Relu_1", "Conv_2"}
    assert found["Conv_0"].startswith("its output reaches ")
    assert "float16 ends at 65504" in found["Conv_0"]
    assert found["Conv_2"].startswith("it reads Relu_1, which reaches ")


@pytest.mark.parametrize(("reach", "flagged"), [(16000.0, False), (17000.0, True), (66000.0, True)])
def test_a_quarter_of_the_range_is_left_to_other_images(reach: float, flagged: bool) -> None:
    w = Writer(OPSET, FLOAT)
    w.node("Mul", [w.node("Mul", ["x", np.float32(reach)], "big"), np.float32(1e-3)], "y")
    model = w.model({"x": [1]}, {"y": [1]})
    assert bool(guard(model, np.ones(1, np.float32))) == flagged
    assert bool(guard(model, np.full(1, 0.5, np.float32), np.ones(1, np.float32))) == flagged  # the worst of all images


def test_an_input_that_is_too_large_is_kept_wide_by_its_readers() -> None:
    w = Writer(OPSET, FLOAT)
    w.conv("x", normal(4, 4, 1, 1) * 1e-2, output="y")
    found = guard(image_model(w, {"y": IMAGE}), X * 1e5)
    assert set(found) == {"Conv_0"}
    assert found["Conv_0"].startswith("it reads x, which reaches")


def test_weights_that_half_cannot_hold_are_named() -> None:
    found = guard(two_convs(normal(4, 4, 1, 1) * 1e-3, normal(3, 4, 1, 1) * 2e5), X * 1e-1)
    assert "its weights reach" in found["Conv_2"] or "its output reaches" in found["Conv_2"]
    found = guard(two_convs(normal(4, 4, 1, 1) * 1e-3, normal(3, 4, 1, 1) * 2e5), X * 1e-3)
    assert found["Conv_2"].startswith("its weights reach ")


def test_subnormal_weights_are_named_and_kept() -> None:
    model = two_convs(normal(4, 4, 1, 1) * 1e3, normal(3, 4, 1, 1) * 1e-7)
    found = guard(model)
    assert set(found) == {"Conv_2"}
    assert "of its weights in" in found["Conv_2"]
    assert "subnormal" in found["Conv_2"]
    kept, wide = cast(model, "fp16", found=found)
    assert [layer.name for layer in wide] == ["Conv_2"]
    exact = typed(model, {"x": X})["y"]
    (last,) = (node for node in kept.graph.node if node.name == "Conv_2")
    assert types(kept)[last.input[1]] == FLOAT
    assert np.abs(typed(kept, {"x": X})["y"] - exact).max() < 1e-2 * np.abs(exact).max()
    lost = typed(cast(model, "fp16")[0], {"x": X})["y"]
    assert np.abs(lost - exact).max() > 1e-2 * np.abs(exact).max()


def test_an_output_that_stays_tiny_is_named() -> None:
    found = guard(two_convs(normal(4, 4, 1, 1) * 1e-6, normal(3, 4, 1, 1) * 100))
    assert "no normal numbers" in found["Conv_0"]
    assert "Conv_2" in found


def test_a_tiny_bias_beside_a_large_sum_is_no_loss() -> None:
    bias = normal(4) * 1e-7
    assert guard(two_convs(normal(4, 4, 1, 1), normal(3, 4, 1, 1), bias)) == {}
    alone = Writer(OPSET, FLOAT)
    alone.node("Mul", ["x", alone.store(bias.reshape(4, 1, 1))], "y")
    assert guard(image_model(alone, {"y": IMAGE}), X * 1e4)


def test_zeros_are_no_tiny_weights() -> None:
    assert guard(two_convs(np.zeros((4, 4, 1, 1), np.float32), normal(3, 4, 1, 1), normal(4))) == {}


def scaled_up_in_the_middle(tmp_path: Path, factor: float) -> Path:
    """A RepVGG whose stage2.1 answers `factor` times as large, and whose stage3.0 takes that back: the same function."""
    model = repvgg(blocks=(1, 2, 2, 1))
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.BatchNorm2d) and name.startswith("stage2.1."):
            module.weight.data *= factor
            module.bias.data *= factor
        if isinstance(module, torch.nn.BatchNorm2d) and name.startswith("stage3.0."):
            module.running_mean *= factor  # type: ignore[operator]
            module.weight.data /= factor
    bundle = tmp_path / "big.repdeploy"
    repdeploy.convert(save(model, tmp_path / "big.pth"), output=bundle, input_shape="1x3x33x31")
    return bundle


def test_a_network_that_overflows_in_the_middle_is_exported_right(tmp_path: Path) -> None:
    bundle = scaled_up_in_the_middle(tmp_path, 2.0**17)
    (artifact,) = repdeploy.export(bundle, precision="fp16").artifacts
    assert all(check.passed for check in artifact.checks)
    assert all(check.budget == 1e-2 for check in artifact.checks if "executed by its types" in check.subject)
    reached = {layer.name: layer for layer in artifact.wide if layer.operator != "ReduceMean"}
    convs = {name for name, layer in reached.items() if layer.operator == "Conv"}
    assert len(convs) == 2
    assert any("stage2.1" in name for name in convs)
    assert any("stage3.0" in name for name in convs)
    assert sorted(layer.operator for layer in reached.values()) == ["Conv", "Conv", "Relu"]
    value = float(next(layer.reason for layer in reached.values() if "its output reaches" in layer.reason).split()[3])
    assert value > 65504
    assert {item.name for item in artifact.drift} >= convs
    assert repdeploy.verify(bundle).passed

    repdeploy.export(bundle)
    exact = read_onnx(bundle / "model.fp32.onnx").model
    (unguarded, _), image = cast(ir.to_proto(exact), "fp16"), np.load(bundle / "references.npz")
    feeds = {"input": next(image[name] for name in image if name.startswith("input"))}
    inside = [node.output[0] for node in unguarded.graph.node if node.op_type == "Conv"]
    values = typed(unguarded, feeds, *inside)
    assert any(np.isinf(values[name]).any() for name in inside)
    assert not np.isfinite(values["output"]).all()
