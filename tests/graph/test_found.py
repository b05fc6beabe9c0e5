"""What an adversary found on the graph road: each was a wrong answer, an answer nobody had checked, or a trace."""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

import repdeploy
from repdeploy.errors import InputError, RepDeployError, UnreadableCheckpoint
from repdeploy.graph.known import Known
from repdeploy.graph.open_sizes import expanded, reshaped
from repdeploy.graph.sample_inputs import plans
from repdeploy.graph.squeezer import squeeze
from repdeploy.records import Conversion
from tests.graph.onnx_graphs import Writer, kinds, run_onnxruntime

RNG = np.random.default_rng(0)
SHAPE = ("N", 4, 9, 7)


def branches(writer: Writer, x: str, output: str = "") -> str:
    """3x3 and 1x1, each with a norm, summed: what is to become one convolution."""
    norms = [[RNG.standard_normal(4), RNG.standard_normal(4), RNG.standard_normal(4), RNG.random(4) + 0.5] for _ in range(2)]
    large = writer.norm(writer.conv(x, RNG.standard_normal((4, 4, 3, 3)), pads=[1] * 4), norms[0])
    small = writer.norm(writer.conv(x, RNG.standard_normal((4, 4, 1, 1))), norms[1])
    return writer.node("Add", [large, small], output)


def converted(model: onnx.ModelProto, folder: Path, **options: object) -> Conversion:
    onnx.save(model, folder / "a.onnx")
    return repdeploy.convert(folder / "a.onnx", output=folder / "a.repdeploy", **options)  # type: ignore[arg-type]


def written(folder: Path) -> onnx.ModelProto:
    return onnx.load(folder / "a.repdeploy" / "model.fp32.onnx")


def test_a_mask_that_is_drawn_at_every_run_is_no_constant() -> None:
    writer = Writer(elem=TensorProto.FLOAT)
    ones, ratio = writer.store(np.ones((1, 4, 9, 7), np.float32)), writer.store(np.float32(0.5))
    mask = writer.node("Dropout", [ones, ratio, writer.store(np.array(True))])
    writer.node("Mul", [branches(writer, "x"), mask], "z")
    model = ir.serde.deserialize_model(writer.model({"x": SHAPE}, {"z": SHAPE}))
    squeeze(model)
    assert "Dropout" in {node.op_type for node in model.graph}


@pytest.mark.parametrize("narrow", [TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.FLOAT8E4M3FN])
def test_a_weight_that_is_cast_down_keeps_what_the_cast_left(narrow: int, tmp_path: Path) -> None:
    writer = Writer(opset=19, elem=TensorProto.FLOAT)
    weight = writer.node("Cast", [writer.store(RNG.standard_normal((4, 4, 1, 1)))], to=narrow)
    again = writer.node("Cast", [weight], to=TensorProto.FLOAT)
    writer.norm(writer.node("Conv", ["x", again]), [np.ones(4), np.zeros(4), np.zeros(4), np.ones(4)], "y")
    model = writer.model({"x": SHAPE}, {"y": SHAPE})
    converted(model, tmp_path)
    feeds = {"x": RNG.standard_normal((2, 4, 9, 7)).astype(np.float32)}
    before, after = (run_onnxruntime(graph, feeds)["y"] for graph in (model, written(tmp_path)))
    np.testing.assert_allclose(after, before, rtol=0, atol=1e-5 * np.abs(before).max())


@pytest.mark.parametrize("count", [60, 130])
def test_what_is_squeezed_in_rounds_is_exact_and_counted_once(count: int, tmp_path: Path) -> None:
    """Weights of one round are taken in unrounded by the next, under names that mean one thing."""
    writer, x = Writer(elem=TensorProto.FLOAT), "x"
    for index in range(count):
        weight = writer.store((np.eye(4) + 0.1 * RNG.standard_normal((4, 4)))[:, :, None, None], f"layer{index}.weight")
        x = writer.node("Conv", [x, weight], "y" if index == count - 1 else "")
    done = converted(writer.model({"x": SHAPE}, {"y": SHAPE}), tmp_path)
    assert done.manifest.verdict.passed
    assert len(done.manifest.blocks) == 1
    assert kinds(written(tmp_path)) == ["Conv"]


def test_a_graph_that_forks_and_joins_again_and_again_takes_no_exponential_time() -> None:
    writer, last, x = Writer(), "x", "x"
    for _ in range(40):
        last, x = x, writer.node("Add", [writer.conv(x, RNG.standard_normal((4, 4, 1, 1)) / 4), last])
    writer.node("Relu", [x], "y")
    model = ir.serde.deserialize_model(writer.model({"x": SHAPE}, {"y": SHAPE}))
    assert squeeze(model).regions


def test_a_border_that_is_scattered_into_named_images_stays_where_the_batch_is_open() -> None:
    """It writes into image 0; with an open batch that is not the border of all images."""
    for batch, convolutions in (("N", 2), (1, 1)):
        writer = Writer()
        one = writer.conv("x", RNG.standard_normal((4, 4, 1, 1)))
        padded = writer.node("Pad", [one, writer.store(np.array([0, 0, 1, 0, 0, 0, 0, 0]))])
        indices = np.stack(np.meshgrid([0], range(4), [0], range(7), indexing="ij"), -1)
        values = np.repeat(np.zeros(4), 7).reshape(1, 4, 1, 7)
        border = writer.node("ScatterND", [padded, writer.store(indices), writer.store(values)])
        writer.conv(border, RNG.standard_normal((4, 4, 2, 1)), output="y")
        model = ir.serde.deserialize_model(writer.model({"x": (batch, 4, 9, 7)}, {"y": 4}))
        squeeze(model, force=True)
        assert [node.op_type for node in model.graph].count("Conv") == convolutions


def test_the_batch_of_a_second_input_need_not_be_its_first_axis() -> None:
    writer = Writer(elem=TensorProto.FLOAT)
    writer.node("Relu", ["x"], "y")
    writer.node("Relu", ["state"], "z")
    model = ir.serde.deserialize_model(writer.model({"state": (1, "N", 3), "x": SHAPE}, {"y": SHAPE, "z": (1, "N", 3)}))
    plan = plans(model.graph, None)[0]
    assert plan.image == "x"
    assert plan.with_batch(5).shapes == {"state": (1, 5, 3), "x": (5, 4, 9, 7)}


def test_masks_and_shapes_that_depend_on_data_are_outputs_as_well(tmp_path: Path) -> None:
    writer = Writer(elem=TensorProto.FLOAT)
    y = branches(writer, "x", "y")
    mask = writer.node("Greater", [y, np.zeros(1)], "mask")
    writer.node("NonZero", [mask], "where")
    types = {"mask": TensorProto.BOOL, "where": TensorProto.INT64}
    done = converted(writer.model({"x": SHAPE}, {"y": SHAPE, "mask": SHAPE, "where": (4, "found")}, types=types), tmp_path)
    assert done.manifest.verdict.passed
    assert repdeploy.verify(tmp_path / "a.repdeploy").checks


def test_random_graphs_are_refused_and_sizes_are_computed_as_runtimes_do(tmp_path: Path) -> None:
    writer = Writer(elem=TensorProto.FLOAT)
    noise = writer.node("RandomNormalLike", ["x"])
    writer.node("Add", [branches(writer, "x"), noise], "y")
    with pytest.raises(InputError, match="draws random numbers"):
        converted(writer.model({"x": SHAPE}, {"y": SHAPE}), tmp_path)
    sizes = Writer(elem=TensorProto.FLOAT)
    shape = sizes.node("Cast", [sizes.node("Shape", ["x"], start=2, end=3)], to=TensorProto.FLOAT)
    product = sizes.node("Mul", [shape, np.array([0.7], np.float32)])
    floor = sizes.node("Cast", [sizes.node("Floor", [product])], "size", to=TensorProto.INT64)
    sizes.node("Relu", ["x"], "y")
    model = sizes.model({"x": (1, 4, 10, 10)}, {"y": 4, "size": (1,)}, types={"size": TensorProto.INT64})
    known = Known(ir.serde.deserialize_model(model))
    value = next(value for value in known.constants if value.name == floor)
    wanted = run_onnxruntime(model, {"x": np.zeros((1, 4, 10, 10), np.float32)})["size"]
    np.testing.assert_array_equal(known.constants[value].numpy(), wanted)


def test_open_sizes_are_never_guessed() -> None:
    assert expanded(("N",), (5,)) == (None,)
    assert expanded((1, "C"), ("N", 1)) == ("N", "C")
    assert reshaped(("N", 4, 6), ("N", -1)) == ("N", 24)
    assert reshaped(("N", 4, 6), (-1, 24)) == ("N", 24)
    assert reshaped(("N", 4, 6), (-1, 5)) == (None, 5)


@pytest.mark.parametrize("name", ["source.onnx", "model.fp32.onnx", "manifest.json", "references.npz"])
def test_weights_beside_a_graph_may_not_have_a_bundles_names(name: str, tmp_path: Path) -> None:
    writer = Writer(elem=TensorProto.FLOAT)
    branches(writer, "x", "y")
    model = writer.model({"x": SHAPE}, {"y": SHAPE})
    with contextlib.suppress(FileExistsError):
        onnx.save(model, tmp_path / "a.onnx", save_as_external_data=True, location=name, size_threshold=0)
    with pytest.raises(InputError, match="a name of a bundle's own files"):
        repdeploy.convert(tmp_path / "a.onnx", output=tmp_path / "a.repdeploy")


def test_weights_that_end_early_or_are_sparse_are_refused(tmp_path: Path) -> None:
    writer = Writer(elem=TensorProto.FLOAT)
    branches(writer, "x", "y")
    model = writer.model({"x": SHAPE}, {"y": SHAPE})
    onnx.save(model, tmp_path / "a.onnx", save_as_external_data=True, location="w.bin", size_threshold=0)
    (tmp_path / "w.bin").write_bytes((tmp_path / "w.bin").read_bytes()[:100])
    with pytest.raises(UnreadableCheckpoint, match=r"w\.bin is shorter than the weights"):
        repdeploy.convert(tmp_path / "a.onnx", output=tmp_path / "a.repdeploy")
    model = writer.model({"x": SHAPE}, {"y": SHAPE})
    values, indices = numpy_helper.from_array(np.ones(1, np.float32), "s"), numpy_helper.from_array(np.zeros(1, np.int64), "i")
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [4]))
    with pytest.raises(RepDeployError, match="sparse weights"):
        converted(model, tmp_path)


def test_a_kernel_that_float16_cannot_hold_stays_in_two(tmp_path: Path) -> None:
    writer = Writer(elem=TensorProto.FLOAT16)
    first = writer.conv("x", np.full((4, 4, 1, 1), 300.0))
    writer.conv(first, np.full((4, 4, 1, 1), 300.0), output="y")
    model = ir.serde.deserialize_model(writer.model({"x": SHAPE}, {"y": SHAPE}))
    kept = squeeze(model).kept
    assert len(model.graph) == 2
    assert any("float16 ends at 65504" in item.reason for item in kept)
