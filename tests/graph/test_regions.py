"""Regions one by one: what vanishes, what stays and which reason it gives."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from repdeploy.algebra import Conv
from repdeploy.graph.onnx_source import read_onnx, write_model
from repdeploy.graph.squeezer import Squeezed, squeeze
from tests.graph.onnx_graphs import EXACT, STORED_FLOAT32, Writer, ends, kinds, run_onnxruntime, run_whole, worst

C = 6
SHAPE = (2, C, 9, 11)
IMAGE: Mapping[str, Sequence[int | str]] = {"x": SHAPE}
SECONDS = 10.0
"""For a thousand nodes, on one core of a laptop."""


def numbers(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng((seed, *shape)).standard_normal(shape)


def ints(*items: int) -> np.ndarray:
    return np.array(items, np.int64)


def statistics(channels: int = C, seed: int = 0) -> list[np.ndarray]:
    gamma, beta, mean, var = (numbers(channels, seed=seed + index) for index in range(4))
    return [gamma + 1.5, beta, mean, np.abs(var) + 0.2]


def kernel(outputs: int, inputs: int, *size: int, seed: int = 0) -> np.ndarray:
    return numbers(outputs, inputs, *size, seed=seed) / np.sqrt(inputs * np.prod(size))


def squeezed(
    model: onnx.ModelProto, *, force: bool = False, bound: float = EXACT, shape: tuple[int, ...] = SHAPE, open_: bool = False
) -> tuple[onnx.ModelProto, Squeezed]:
    """Squeezed, checked by onnx, with the same ends and the same outputs. `open_`: the file leaves sizes open."""
    onnx.checker.check_model(model, full_check=True)
    graph = ir.serde.deserialize_model(model)
    found = squeeze(graph, {"x": shape} if open_ else None, force=force)
    after = ir.serde.serialize_model(graph)
    onnx.checker.check_model(after, full_check=True)
    assert ends(after) == ends(model)
    feeds = {"x": numbers(*shape, seed=7)}
    assert worst(run_whole(after, feeds), run_whole(model, feeds)) <= bound
    return after, found


def reasons(found: Squeezed, op: str) -> str:
    """What is said about the operators of one kind that stay."""
    return "\n".join(item.reason for item in found.kept if item.node.op_type == op)


def repvgg(writer: Writer, x: str, channels: int = C, seed: int = 0, output: str = "") -> str:
    """3x3, 1x1 and identity, each with its norm; the sum."""
    large = writer.norm(
        writer.conv(x, kernel(channels, channels, 3, 3, seed=seed), pads=[1] * 4), statistics(channels, seed), epsilon=1e-3
    )
    small = writer.norm(writer.conv(x, kernel(channels, channels, 1, 1, seed=seed)), statistics(channels, seed + 1))
    return writer.node("Add", [writer.node("Add", [large, small]), writer.norm(x, statistics(channels, seed + 2))], output)


def test_a_block_is_one_convolution_named_like_its_weights() -> None:
    writer = Writer()
    weight = writer.store(kernel(C, C, 3, 3), "stage1.block0.dense.weight")
    other = writer.store(kernel(C, C, 1, 1), "stage1.block0.small.weight")
    large = writer.node("Conv", ["x", weight], pads=[1] * 4)
    writer.node("Add", [large, writer.node("Conv", ["x", other])], "y")
    after, found = squeezed(writer.model(IMAGE, {"y": SHAPE}))
    assert kinds(after) == ["Conv"]
    assert after.graph.node[0].name == "stage1.block0"
    assert {item.name for item in after.graph.initializer} == {"stage1.block0.weight"}
    (region,) = found.regions
    assert region.report.formula == "3x3 + 1x1"
    assert region.report.source_keys == ("stage1.block0.dense.weight", "stage1.block0.small.weight")
    assert region.check.passed
    assert region.report.residual <= EXACT
    assert not found.kept


def test_a_value_that_is_read_elsewhere_stays_and_the_rest_is_squeezed() -> None:
    writer = Writer()
    large = writer.norm(writer.conv("x", kernel(C, C, 3, 3), pads=[1] * 4), statistics())
    small = writer.norm(writer.conv("x", kernel(C, C, 1, 1)), statistics(seed=1))
    writer.node("Relu", [small], "watched")
    writer.node("Add", [large, small], "y")
    after, _ = squeezed(writer.model(IMAGE, {"y": SHAPE, "watched": SHAPE}))
    assert sorted(kinds(after)) == ["Conv", "Conv", "Relu"]


def test_an_output_inside_a_region_stays() -> None:
    writer = Writer()
    large = writer.norm(writer.conv("x", kernel(C, C, 3, 3), pads=[1] * 4), statistics())
    writer.norm(writer.conv("x", kernel(C, C, 1, 1)), statistics(seed=1), "inside")
    writer.node("Add", [large, "inside"], "y")
    after, _ = squeezed(writer.model(IMAGE, {"y": SHAPE, "inside": SHAPE}))
    assert kinds(after) == ["Conv", "Conv"]


def test_a_watched_sum_is_squeezed_and_what_follows_says_that_it_is_needed() -> None:
    writer = Writer()
    total = repvgg(writer, "x")
    writer.node("Relu", [total], "watched")
    writer.norm(total, statistics(), "y")
    after, found = squeezed(writer.model(IMAGE, {"y": SHAPE, "watched": SHAPE}))
    assert sorted(kinds(after)) == ["BatchNormalization", "Conv", "Relu"]
    assert "BatchNormalization" in {item.node.op_type for item in found.kept}


def test_a_value_that_a_branch_of_if_reads_stays() -> None:
    writer = Writer()
    inside = writer.conv("x", kernel(C, C, 3, 3), output="inside", pads=[1] * 4)
    scaled = writer.node("Mul", [inside, numbers(C, 1, 1)])
    total = writer.node("Add", [scaled, writer.conv("x", kernel(C, C, 3, 3, seed=1), pads=[1] * 4)])

    def branch(op: str, value: str) -> onnx.GraphProto:
        out = helper.make_tensor_value_info(f"{op}.out", TensorProto.DOUBLE, SHAPE)
        return helper.make_graph([helper.make_node(op, [value], [f"{op}.out"])], op, [], [out])

    chosen = writer.node("If", ["condition"], then_branch=branch("Relu", "inside"), else_branch=branch("Neg", "x"))
    writer.node("Add", [total, chosen], "y")
    model = writer.model({**IMAGE, "condition": ()}, {"y": SHAPE}, types={"condition": TensorProto.BOOL})
    onnx.checker.check_model(model, full_check=True)
    graph = ir.serde.deserialize_model(model)
    squeeze(graph)
    after = ir.serde.serialize_model(graph)
    onnx.checker.check_model(after, full_check=True)
    assert sorted(kinds(after)) == ["Add", "Conv", "Conv", "If"]
    for condition in (True, False):
        feeds = {"x": numbers(*SHAPE), "condition": np.array(condition)}
        got, wanted = (ReferenceEvaluator(item).run(None, feeds)[0] for item in (after, model))
        np.testing.assert_allclose(got, wanted, rtol=0, atol=EXACT)


def test_weights_that_two_nodes_share_serve_both() -> None:
    writer = Writer()
    weight, scale = writer.store(kernel(C, C, 3, 3)), writer.store(numbers(C, 1, 1))
    first = writer.node("Mul", [writer.node("Conv", ["x", weight], pads=[1] * 4), scale])
    bent = writer.node("Relu", [first])
    writer.node("Mul", [writer.node("Conv", [bent, weight], pads=[1] * 4), scale], "y")
    after, _ = squeezed(writer.model(IMAGE, {"y": SHAPE}))
    assert kinds(after) == ["Conv", "Relu", "Conv"]


def test_a_weight_that_is_still_read_stays_in_the_file() -> None:
    writer = Writer()
    weight = writer.store(kernel(C, C, 1, 1), "weight")
    squared = writer.node("Mul", [writer.node("Conv", ["x", weight]), numbers(C, 1, 1)])
    bent = writer.node("Relu", [squared])
    writer.node("Mul", [writer.node("Sigmoid", [bent]), writer.node("ReduceSum", [weight], keepdims=0)], "y")
    after, _ = squeezed(writer.model(IMAGE, {"y": SHAPE}))
    assert kinds(after)[:2] == ["Conv", "Relu"]


def test_the_sum_of_a_residual_block_stays() -> None:
    writer = Writer()
    bent = writer.node("Relu", [repvgg(writer, "x")])
    writer.node("Add", ["x", repvgg(writer, bent, seed=5)], "y")
    after, found = squeezed(writer.model(IMAGE, {"y": SHAPE}))
    assert kinds(after) == ["Conv", "Relu", "Conv", "Add"]
    assert "the input x and Relu" in reasons(found, "Add")


def test_something_non_linear_in_a_branch_stays_and_is_named() -> None:
    writer = Writer()
    plain = writer.norm(writer.conv("x", kernel(C, C, 3, 3), pads=[1] * 4), statistics())
    bent = writer.node("Sigmoid", [writer.conv("x", kernel(C, C, 1, 1))], name="the_bend")
    writer.node("Add", [plain, writer.norm(writer.conv(bent, kernel(C, C, 1, 1)), statistics(seed=1))], "y")
    after, found = squeezed(writer.model(IMAGE, {"y": SHAPE}))
    assert sorted(kinds(after)) == ["Add", "Conv", "Conv", "Conv", "Sigmoid"]
    assert "Sigmoid the_bend" in reasons(found, "Add")


def test_zero_padding_behind_a_biased_map_stays_with_its_numbers() -> None:
    writer = Writer()
    first = writer.conv("x", kernel(C, C, 1, 1), np.full(C, 0.625))
    writer.conv(first, kernel(C, C, 3, 3), output="y", pads=[1] * 4)
    after, found = squeezed(writer.model(IMAGE, {"y": SHAPE}), force=True)
    assert kinds(after) == ["Conv", "Conv"]
    assert "pads with 0, but the first gives 0.625 outside the image" in reasons(found, "Conv")


def test_padding_of_a_padded_map_stays_with_its_numbers() -> None:
    writer = Writer()
    first = writer.conv("x", kernel(C, C, 3, 3), pads=[1] * 4)
    writer.conv(first, kernel(C, C, 3, 3), output="y", pads=[1] * 4)
    after, found = squeezed(writer.model(IMAGE, {"y": SHAPE}), force=True)
    assert kinds(after) == ["Conv", "Conv"]
    assert "padded by 1, where the first kernel (3 wide) needs at least 2" in reasons(found, "Conv")


def growing(writer: Writer, kind: str) -> None:
    if kind == "narrow":
        writer.conv(writer.conv("x", kernel(2, C, 1, 1)), kernel(24, 2, 1, 1), output="y")
    elif kind == "separable":
        writer.conv(writer.conv("x", kernel(C, 1, 3, 3), pads=[1] * 4, group=C), kernel(24, C, 1, 1), output="y")
    else:
        pooled = writer.node("AveragePool", ["x"], kernel_shape=[3, 3], pads=[1] * 4, count_include_pad=1)
        writer.conv(pooled, kernel(24, C, 1, 1), output="y")


@pytest.mark.parametrize("kind", ["narrow", "separable", "pooled"])
def test_what_would_grow_stays_with_an_estimate_unless_forced(kind: str) -> None:
    writer = Writer()
    growing(writer, kind)
    model = writer.model(IMAGE, {"y": (2, 24, 9, 11)})
    after, found = squeezed(model)
    assert kinds(after) == kinds(model)
    stays = next(item for item in found.kept if item.estimate is not None)
    assert "grow" in stays.reason
    pixels, taps = 2 * 9 * 11, 1 if kind == "narrow" else 9
    before = {"narrow": 2 * C * 2 + 2 * 2 * 24, "separable": 2 * 9 * C + 2 * C * 24, "pooled": 9 * C + 2 * C * 24}[kind]
    assert stays.estimate is not None
    assert (stays.estimate.before.flops, stays.estimate.after.flops) == (pixels * before, pixels * 2 * taps * C * 24)
    forced, _ = squeezed(model, force=True)
    assert kinds(forced) == ["Conv"]


def test_generated_weights_are_folded() -> None:
    """As OREPA generates kernels: products, sums, contractions of stored tensors."""
    writer = Writer(17)
    first = writer.node("Mul", [kernel(C, C, 3, 3), numbers(C, 1, 1, 1)])
    second = writer.node("Einsum", [numbers(C, 5), kernel(5, C, 3, 3)], equation="oi,ichw->ochw")
    flat = writer.node("MatMul", [numbers(C, 4), numbers(4, 9 * C)])
    third = writer.node("Reshape", [flat, ints(C, C, 3, 3)])
    total = writer.node("Add", [writer.node("Add", [first, second]), third])
    bias = writer.node("ReduceSum", [numbers(C, 3), ints(1)], keepdims=0)
    made = writer.node("Conv", ["x", total, bias], pads=[1] * 4)
    writer.norm(made, statistics(), "y")
    after, _ = squeezed(writer.model(IMAGE, {"y": SHAPE}))
    assert kinds(after) == ["Conv"]
    assert len(after.graph.initializer) == 2


def test_a_generated_weight_of_a_convolution_that_stays_is_stored() -> None:
    writer = Writer()
    weight = writer.node("Mul", [kernel(C, C, 3, 3), numbers(C, 1, 1, 1)])
    writer.node("Relu", [repvgg(writer, writer.node("Relu", [writer.node("Conv", ["x", weight], pads=[1] * 4)]))], "y")
    after, _ = squeezed(writer.model(IMAGE, {"y": SHAPE}))
    assert kinds(after) == ["Conv", "Relu", "Conv", "Relu"]


def test_constants_that_feed_nothing_alive_vanish() -> None:
    writer = Writer()
    dead = writer.node("Mul", [numbers(C, C), numbers(C, C, seed=1)])
    writer.node("Relu", [writer.node("MatMul", [dead, numbers(C, C)])], "nobody")
    repvgg(writer, "x", output="y")
    after, _ = squeezed(writer.model(IMAGE, {"y": SHAPE}))
    assert kinds(after) == ["Conv"]
    assert len(after.graph.initializer) == 2


def test_an_output_that_is_constant_stays() -> None:
    writer = Writer()
    writer.node("Mul", [numbers(C, C), numbers(C, C, seed=1)], "fixed")
    repvgg(writer, "x", output="y")
    squeezed(writer.model(IMAGE, {"y": SHAPE, "fixed": (C, C)}))


def test_products_of_constants_that_are_too_large_to_fold_are_left_alone() -> None:
    writer = Writer()
    product = writer.node("Mul", [np.ones((8200, 1)), np.ones((1, 8200))])
    mean = writer.node("ReduceMean", [product], axes=[0, 1], keepdims=0)
    writer.node("Add", [writer.conv("x", kernel(C, C, 1, 1)), mean], "y")
    model = writer.model(IMAGE, {"y": SHAPE})
    graph = ir.serde.deserialize_model(model)
    squeeze(graph)
    assert {"Conv", "Add", "Mul", "ReduceMean"} == {node.op_type for node in graph.graph}


@pytest.mark.parametrize("what", ["batch", "image"])
def test_open_sizes_stay_open(what: str) -> None:
    """Estimates need sizes; the result holds for every one."""
    shape = ("batch", C, 9, 11) if what == "batch" else ("batch", C, "height", "width")
    writer = Writer()
    x = writer.node("Relu", [repvgg(writer, "x")])
    x = writer.conv(x, kernel(C, C, 3, 3), pads=[1] * 4, strides=[2, 1])
    x = writer.node("Mul", [writer.node("Identity", [x]), numbers(C, 1, 1)])
    x = writer.node("Dropout", [writer.node("Neg", [writer.node("Sub", [numbers(1, C, 1, 1), x])])])
    writer.node("Slice", [x, ints(1, 0), ints(-1, 2**63 - 1), ints(2, 3)], "y")
    model = writer.model({"x": shape}, {"y": 4})
    after, _ = squeezed(model, open_=True)
    assert kinds(after) == ["Conv", "Relu", "Slice", "Conv"] or kinds(after) == ["Conv", "Relu", "Conv", "Slice"]
    assert [dim.dim_param or dim.dim_value for dim in after.graph.input[0].type.tensor_type.shape.dim] == list(shape)
    feeds = {"x": numbers(3, C, 9, 11) if what == "batch" else numbers(3, C, 14, 7)}
    assert worst(run_whole(after, feeds), run_whole(model, feeds)) <= EXACT


def test_without_stated_sizes_usual_ones_are_estimated() -> None:
    writer = Writer()
    repvgg(writer, "x", output="y")
    after, _ = squeezed(writer.model({"x": ("batch", C, "height", "width")}, {"y": 4}))
    assert kinds(after) == ["Conv"]


def test_a_node_of_another_domain_is_left_untouched() -> None:
    writer = Writer(17, TensorProto.FLOAT)
    first = repvgg(writer, "x")
    writer.nodes.append(helper.make_node("Conv", [first], ["odd"], domain="elsewhere", strength=3))
    repvgg(writer, "odd", seed=4, output="y")
    model = writer.model(IMAGE, {"y": SHAPE}, domains={"elsewhere": 1})
    model.graph.value_info.append(helper.make_tensor_value_info("odd", TensorProto.FLOAT, SHAPE))
    graph = ir.serde.deserialize_model(model)
    squeeze(graph)
    after = ir.serde.serialize_model(graph)
    onnx.checker.check_model(after)
    assert [(node.domain, node.op_type) for node in after.graph.node] == [("", "Conv"), ("elsewhere", "Conv"), ("", "Conv")]
    assert after.graph.node[1] == next(node for node in model.graph.node if node.domain)


STORED = {TensorProto.FLOAT16: 5e-3, TensorProto.FLOAT: STORED_FLOAT32, TensorProto.DOUBLE: EXACT}


@pytest.mark.parametrize(("elem", "bound"), STORED.items())
def test_a_graph_keeps_its_floating_type(elem: int, bound: float) -> None:
    """The bounds are what storing a weight in that type costs: half a unit in its last place, over 60 taps."""
    writer = Writer(17, elem)
    x = writer.node("Relu", [repvgg(writer, "x")])
    pooled = writer.node("Flatten", [writer.node("GlobalAveragePool", [writer.norm(x, statistics())])])
    writer.node("Gemm", [pooled, numbers(C, 3), numbers(3)], "y")
    after, _ = squeezed(writer.model(IMAGE, {"y": (2, 3)}), bound=bound)
    assert kinds(after) == ["Conv", "Relu", "GlobalAveragePool", "Flatten", "Gemm"]
    assert {item.data_type for item in after.graph.initializer} == {elem}


def test_bfloat16_is_kept_too() -> None:
    writer = Writer(22, TensorProto.BFLOAT16)
    repvgg(writer, "x", output="y")
    after, _ = squeezed(writer.model(IMAGE, {"y": SHAPE}), bound=4e-2)
    assert kinds(after) == ["Conv"]
    assert {item.data_type for item in after.graph.initializer} == {TensorProto.BFLOAT16}


def test_crops_of_a_branch_become_part_of_the_kernel() -> None:
    """ACNet: 3x1 and 1x3 whose padding is cropped before they convolve, beside a 3x3 without padding."""
    writer = Writer()
    square = writer.conv("x", kernel(C, C, 3, 3))
    rows = writer.conv(writer.node("Slice", ["x", ints(0, 1), ints(99, -1), ints(2, 3)]), kernel(C, C, 3, 1, seed=1))
    columns = writer.conv(writer.node("Slice", ["x", ints(1), ints(-1), ints(2)]), kernel(C, C, 1, 3, seed=2))
    writer.node("Sum", [writer.norm(item, statistics(seed=seed)) for seed, item in enumerate((square, rows, columns))], "y")
    after, _ = squeezed(writer.model(IMAGE, {"y": (2, C, 7, 9)}))
    assert kinds(after) == ["Conv"]


@pytest.mark.parametrize("form", ["Add", "ScatterND"])
def test_a_border_written_by_hand_is_a_border_of_the_norm(form: str) -> None:
    """DBB: 1x1, norm, padded with the norm of zero, 3x3, norm."""
    writer = Writer()
    norm = statistics()
    of_zero = norm[1] - norm[0] * norm[2] / np.sqrt(norm[3] + 1e-5)
    inner = writer.norm(writer.conv("x", kernel(C, C, 1, 1)), norm)
    padded = writer.node("Pad", [inner, ints(0, 0, 1, 1, 0, 0, 1, 1)])
    batch, _, height, width = SHAPE
    image = np.zeros((batch, C, height + 2, width + 2))
    image[:] = of_zero[:, None, None]
    image[:, :, 1:-1, 1:-1] = 0
    if form == "Add":
        bordered = writer.node("Add", [padded, image[:1]])
    else:
        places = np.argwhere(np.pad(np.zeros((batch, C, height, width)), ((0, 0), (0, 0), (1, 1), (1, 1)), constant_values=1))
        bordered = writer.node("ScatterND", [padded, places, image[tuple(places.T)]])
    writer.norm(writer.conv(bordered, kernel(C, C, 3, 3)), statistics(seed=3), "y")
    after, found = squeezed(writer.model(IMAGE, {"y": SHAPE}))
    assert kinds(after) == ["Conv"]
    assert found.regions[0].report.formula == "1x1-BN-PAD-3x3-BN"


def test_a_border_of_another_value_stays_as_it_was_written() -> None:
    writer = Writer()
    inner = writer.norm(writer.conv("x", kernel(C, C, 1, 1)), statistics())
    padded = writer.node("Pad", [inner, ints(0, 0, 1, 1, 0, 0, 1, 1)])
    image = np.pad(np.zeros((1, C, 9, 11)), ((0, 0), (0, 0), (1, 1), (1, 1)), constant_values=0.25)
    writer.conv(writer.node("Add", [padded, image]), kernel(C, C, 3, 3), output="y")
    after, _ = squeezed(writer.model(IMAGE, {"y": SHAPE}))
    assert kinds(after) == ["Conv", "Pad", "Add", "Conv"]


def test_one_convolution_that_serves_as_two_branches_counts_twice() -> None:
    x, weight, bias = (torch.from_numpy(item) for item in (numbers(1, C, 7, 8), kernel(C, C, 3, 3), numbers(C)))
    one = Conv(weight, bias)
    torch.testing.assert_close((one + one).squeeze().run(x), 2 * one.run(x), rtol=0, atol=EXACT)


def reread(model: onnx.ModelProto, folder: Path) -> onnx.ModelProto:
    """As the file road goes: read, squeezed, written."""
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, folder / "before.onnx")
    source = read_onnx(folder / "before.onnx")
    squeeze(source.model)
    write_model(source.model, folder / "after.onnx")
    return onnx.load(folder / "after.onnx")


@pytest.mark.parametrize("opset", [9, 13])
@pytest.mark.parametrize("version", [3, 4, 8])
def test_weights_that_are_inputs_too_as_old_files_have_them(opset: int, version: int, tmp_path: Path) -> None:
    """Up to version 3 every stored tensor is an input as well, with its value as the default."""
    writer = Writer(opset, TensorProto.FLOAT)
    repvgg(writer, "x", output="y")
    stored = {name: tuple(item.dims) for name, item in writer.stored.items()}
    model = writer.model({"x": SHAPE, **stored}, {"y": SHAPE}, ir_version=version)
    after = reread(model, tmp_path)
    assert kinds(after) == ["Conv"]
    assert [value.name for value in after.graph.input] == ["x"]
    assert len(after.graph.initializer) == 2
    feeds = {"x": numbers(*SHAPE).astype(np.float32)}
    assert worst(run_onnxruntime(after, feeds), run_onnxruntime(model, feeds)) <= STORED_FLOAT32


def test_the_long_name_of_the_standard_domain_is_the_standard_domain(tmp_path: Path) -> None:
    writer = Writer(17, TensorProto.FLOAT)
    repvgg(writer, "x", output="y")
    model = writer.model(IMAGE, {"y": SHAPE})
    model.opset_import[0].domain = "ai.onnx"
    after = reread(model, tmp_path)
    assert kinds(after) == ["Conv"]
    feeds = {"x": numbers(*SHAPE).astype(np.float32)}
    assert worst(run_onnxruntime(after, feeds), run_onnxruntime(model, feeds)) <= STORED_FLOAT32


def test_an_empty_crop_of_an_open_image_is_left_alone() -> None:
    writer = Writer()
    writer.node("Slice", [writer.node("Neg", [writer.conv("x", kernel(C, C, 1, 1))]), ints(0), ints(0), ints(2)], "y")
    graph = ir.serde.deserialize_model(writer.model({"x": ("n", C, "h", "w")}, {"y": 4}))
    squeeze(graph, {"x": SHAPE}, force=True)
    assert "Slice" in {node.op_type for node in graph.graph}


def test_names_that_exist_are_not_taken() -> None:
    writer = Writer()
    taken = writer.store(numbers(C), "block.weight")
    large = writer.node("Conv", ["x", writer.store(kernel(C, C, 3, 3), "block.a.weight")], pads=[1] * 4)
    small = writer.node("Conv", ["x", writer.store(kernel(C, C, 1, 1), "block.b.weight")], "block.bias")
    total = writer.node("Add", [large, small])
    writer.node("Relu", [total], "y", name="block")
    writer.node("Exp", [taken], "block_1")
    after, _ = squeezed(writer.model(IMAGE, {"y": SHAPE, "block_1": (C,)}))
    names = [name for node in after.graph.node for name in node.output] + [item.name for item in after.graph.initializer]
    assert len(names) == len(set(names))


def test_a_thousand_nodes_take_seconds() -> None:
    writer = Writer(17, TensorProto.FLOAT)
    x = "x"
    for block in range(120):
        x = writer.node("Relu", [repvgg(writer, x, 8, seed=block)])
    x = writer.node("Identity", [writer.node("Neg", [x])], "y")
    model = writer.model({"x": (1, 8, 16, 16)}, {"y": (1, 8, 16, 16)})
    assert len(model.graph.node) >= 960
    graph = ir.serde.deserialize_model(model)
    start = time.perf_counter()
    found = squeeze(graph)
    seconds = time.perf_counter() - start
    assert len(found.regions) == 120
    assert [node.op_type for node in graph.graph] == ["Conv", "Relu"] * 120 + ["Neg", "Identity"]
    assert seconds < SECONDS, f"{seconds:.1f} s"
