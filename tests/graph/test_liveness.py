"""The exact peak of live activation bytes: by hand, and against an execution that really holds its arrays."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from repdeploy.errors import InputError
from repdeploy.graph.liveness import Peak, peak
from tests.graph.onnx_graphs import Writer

IMAGE = (1, 4, 5, 3)
MAP = 4 * 5 * 3 * 4
"""Bytes of one map of IMAGE in float32."""


class Floats(Writer):
    """Of float32, with convolutions that keep the size of IMAGE."""

    def __init__(self, elem: int = TensorProto.FLOAT) -> None:
        super().__init__(elem=elem)

    def same(self, x: str, kernel: int, output: str = "") -> str:
        weight = np.ones((4, 4, kernel, kernel))
        return self.conv(x, weight, np.zeros(4), output, pads=[kernel // 2] * 4)

    def peak(self, *outputs: str, image: Sequence[int | str] = IMAGE, types: dict[str, int] | None = None) -> Peak:
        """At IMAGE; `image`: what the file says of it."""
        model = self.model({"x": image}, {name: ["n"] * 4 for name in outputs}, types=types)
        return peak(ir.from_proto(model), {"x": IMAGE})


def residual(writer: Floats) -> str:
    first = writer.same("x", 3, "a")
    return writer.node("Add", [writer.same(first, 3, "b"), "x"], "sum")


def test_a_chain_holds_an_input_and_an_output() -> None:
    writer = Floats()
    writer.same(writer.same(writer.same("x", 3, "a"), 1, "b"), 3, "y")
    assert writer.peak("y") == Peak(2 * MAP, "Conv", ("x", "a"))


def test_a_residual_block_takes_twice_as_much_beside_its_input_as_a_chain() -> None:
    """The paper's figure 3: two maps beside the input, not one."""
    writer = Floats()
    residual(writer)
    assert writer.peak("sum") == Peak(3 * MAP, "Conv", ("x", "a", "b"))


def test_sizes_are_those_that_were_asked_for_and_the_node_is_named() -> None:
    writer = Floats()
    writer.same("x", 3, "a")
    writer.nodes[-1].name = "stem"
    assert writer.peak("a", image=["batch", 4, "height", "width"]) == Peak(2 * MAP, "Conv stem", ("x", "a"))


def test_a_repvgg_block_before_and_after() -> None:
    """While the second branch is added, the input still waits for the third; what is left is a convolution and its ReLU."""
    writer, statistics = Floats(), [np.ones(4)] * 4
    dense = writer.norm(writer.same("x", 3), statistics, "dense")
    point = writer.norm(writer.same("x", 1), statistics, "point")
    both = writer.node("Add", [dense, point], "both")
    total = writer.node("Add", [both, writer.norm("x", statistics, "identity")], "total")
    writer.node("Relu", [total], "y")
    assert writer.peak("y") == Peak(4 * MAP, "BatchNormalization", ("x", "dense", writer.nodes[2].output[0], "point"))
    fused = Floats()
    fused.node("Relu", [fused.same("x", 3, "conv")], "y")
    assert fused.peak("y") == Peak(2 * MAP, "Conv", ("x", "conv"))


def test_branches_wait_for_their_concatenation() -> None:
    writer = Floats()
    writer.node("Concat", [writer.same("x", size, f"branch{size}") for size in (1, 3, 5)], "y", axis=1)
    assert writer.peak("y") == Peak(6 * MAP, "Concat", ("branch1", "branch3", "branch5", "y"))


def test_views_share_their_inputs_bytes_and_keep_it() -> None:
    writer = Floats()
    flat = writer.node("Flatten", [writer.node("Identity", ["x"])])
    rows = writer.node("Reshape", [flat, np.array([4, 15])])
    writer.node("Squeeze", [writer.node("Unsqueeze", [rows, np.array([0])]), np.array([0])], "view")
    writer.node("Relu", ["x"], "a")  # x lives on as the view, which is an output
    writer.node("Relu", ["a"], "y")
    assert writer.peak("view", "y") == Peak(3 * MAP, "Relu", ("x", "a", "y"))


@pytest.mark.parametrize(("training", "maps"), [(False, 1.0), (True, 2.25)])
def test_dropout_is_a_view_unless_it_trains(training: bool, maps: float) -> None:
    writer = Floats()
    writer.nodes.append(helper.make_node("Dropout", ["x", "", writer.store(np.array(training))], ["y", "mask"]))
    assert writer.peak("y").bytes == maps * MAP  # a mask of one byte each, if there is one


def test_a_mask_that_is_wanted_is_made() -> None:
    writer = Floats()
    writer.nodes.append(helper.make_node("Dropout", ["x"], ["y", "mask"]))
    assert writer.peak("y", "mask", types={"mask": TensorProto.BOOL}).bytes == 1.25 * MAP


def test_every_output_of_a_node_exists_and_those_of_the_graph_stay() -> None:
    writer = Floats()
    writer.nodes.append(helper.make_node("Split", ["x"], ["left", "right"], axis=1, num_outputs=2))
    writer.opset = 18
    writer.node("Relu", ["left"], "a")  # right lives to the end, and nobody reads it
    writer.node("Relu", ["a"], "b")
    assert writer.peak("right", "b") == Peak(2 * MAP, "Split", ("x", "left", "right"))
    writer.node("Concat", ["b", "b", "b"], "c", axis=1)
    assert writer.peak("right", "c") == Peak(5 * MAP // 2, "Concat", ("right", "b", "c"))


def test_an_input_lives_from_the_start_and_an_unread_one_takes_nothing() -> None:
    writer = Floats()
    writer.node("Add", [writer.node("Relu", [writer.node("Relu", ["x"], "a")], "b"), "late"], "y")
    ends = {"late": IMAGE, "never": IMAGE, "x": IMAGE}
    found = peak(ir.from_proto(writer.model(ends, {"y": IMAGE})), {})
    assert found == Peak(3 * MAP, "Relu", ("late", "x", "a"))


def test_weights_and_what_they_make_are_no_activations() -> None:
    """Nor are shapes: reading one keeps nothing alive."""
    writer = Floats()
    kernel = writer.node("Transpose", [np.ones((4, 4, 9, 9))], perm=[1, 0, 2, 3])
    kernel = writer.node("Mul", [kernel, writer.node("Constant", [], value_float=2.0)])
    shape = writer.node("Shape", ["x"])
    writer.node("Relu", [writer.node("Relu", ["x"], "a")], "b")
    writer.node("Expand", [np.ones((1, 4, 1, 1)), shape], "grid")
    writer.conv("b", np.ones((4, 4, 1, 1)), None, "c")
    writer.nodes.append(helper.make_node("Conv", ["c", kernel], ["y"], pads=[4] * 4))
    assert writer.peak("y", "grid") == Peak(2 * MAP, "Relu", ("x", "a"))


def test_noise_is_no_constant() -> None:
    writer = Floats()
    noise = writer.node("RandomNormalLike", [np.ones(IMAGE)], "noise")
    writer.node("Add", [noise, "x"], "y")
    assert writer.peak("y") == Peak(3 * MAP, "Add", ("x", "noise", "y"))


def test_every_value_has_the_size_of_its_type() -> None:
    writer = Floats(TensorProto.FLOAT16)
    wide = writer.node("Cast", [writer.same("x", 3, "half")], "wide", to=TensorProto.FLOAT)
    writer.node("Greater", [wide, np.float16(0)], "mask")
    writer.stored[writer.nodes[-1].input[1]].CopyFrom(onnx.numpy_helper.from_array(np.float32(0), writer.nodes[-1].input[1]))
    assert writer.peak("mask", types={"mask": TensorProto.BOOL}) == Peak(3 * MAP // 2, "Cast", ("half", "wide"))


def branch(writer: Floats, output: str) -> onnx.GraphProto:
    """A subgraph that reads what it likes from outside."""
    stored = list(writer.stored.values())
    return helper.make_graph(writer.nodes, "branch", [], [helper.make_empty_tensor_value_info(output)], stored)


def conditional(condition: object) -> tuple[Floats, Peak]:
    """x -> a -> If -> y: a block over a that adds x, else a scaled."""
    then, otherwise = Floats(), Floats()
    first = then.same("a", 3, "p")
    then.node("Add", [then.same(first, 3, "q"), "x"], "r")
    otherwise.node("Mul", ["a", "scale"], "s")
    writer = Floats()
    writer.store(np.ones((4, 1, 1)), "scale")
    writer.node("Relu", ["x"], "a")
    if isinstance(condition, bool):
        writer.store(np.array(condition), "condition")
    branches = {"then_branch": branch(then, "r"), "else_branch": branch(otherwise, "s")}
    writer.nodes.append(helper.make_node("If", ["condition"], ["chosen"], **branches))
    writer.node("Relu", ["chosen"], "y")
    inputs = {"x": IMAGE} if isinstance(condition, bool) else {"x": IMAGE, "condition": ()}
    model = writer.model(inputs, {"y": ["n"] * 4}, types={"condition": TensorProto.BOOL})
    return writer, peak(ir.from_proto(model), {"x": IMAGE})


def test_an_if_takes_what_its_larger_branch_takes() -> None:
    """Outside, x and a wait for the If; in the branch, p and q exist at once, then q and r."""
    assert conditional(None)[1] == Peak(4 * MAP + 1, "If: Conv", ("x", "condition", "a", "p", "q"))
    assert conditional(True)[1] == Peak(4 * MAP, "If: Conv", ("x", "a", "p", "q"))
    assert conditional(False)[1] == Peak(3 * MAP, "If", ("x", "a", "chosen"))


def test_branches_within_branches_and_branches_that_hand_on() -> None:
    """The inner If gives an outer value or a constant: its result is a copy, which only the If itself makes."""
    inner, keep, outer = Floats(), Floats(), Floats()
    keep.node("Identity", ["a"], "kept")
    outer.node("Identity", ["x"], "same")
    inner.store(np.ones(IMAGE), "ones")
    nested = Floats()
    branches = {"then_branch": branch(inner, "ones"), "else_branch": branch(keep, "kept")}
    nested.nodes.append(helper.make_node("If", ["condition"], ["z"], **branches))
    nested.node("Relu", ["z"], "w")
    writer = Floats()
    writer.node("Relu", ["x"], "a")
    branches = {"then_branch": branch(nested, "w"), "else_branch": branch(outer, "same")}
    writer.nodes.append(helper.make_node("If", ["condition"], ["y"], **branches))
    ends = {"x": IMAGE, "condition": ()}
    model = writer.model(ends, {"y": IMAGE}, types={"condition": TensorProto.BOOL})
    found = peak(ir.from_proto(model), {})
    assert found == Peak(4 * MAP + 1, "If: Relu", ("x", "condition", "a", "z", "w"))


def test_what_has_no_exact_size_is_named() -> None:
    writer = Floats()
    writer.node("NonZero", ["x"], "places")
    with pytest.raises(InputError, match="'places'"):
        writer.peak("places", types={"places": TensorProto.INT64})
    writer = Floats()
    writer.node("Relu", ["x"], "y")
    model = ir.from_proto(writer.model({"x": ["batch", 4, 5, 3]}, {"y": 4}))
    with pytest.raises(InputError, match="'x'"):
        peak(model, {})
    with pytest.raises(InputError, match="no input 'image'") as failure:
        peak(model, {"image": IMAGE})
    assert failure.value.hint == "its inputs are called x"


def test_branches_of_two_sizes_and_loops_have_no_exact_peak() -> None:
    then, otherwise, writer = Floats(), Floats(), Floats()
    then.node("Relu", ["x"], "r")
    otherwise.node("Concat", ["x", "x"], "s", axis=1)
    branches = {"then_branch": branch(then, "r"), "else_branch": branch(otherwise, "s")}
    writer.nodes.append(helper.make_node("If", ["condition"], ["y"], **branches))
    model = writer.model({"x": IMAGE, "condition": ()}, {"y": 4}, types={"condition": TensorProto.BOOL})
    with pytest.raises(InputError, match="'y'"):
        peak(ir.from_proto(model), {})
    steps = helper.make_tensor_value_info("step", TensorProto.INT64, [])
    going, on = (helper.make_tensor_value_info(name, TensorProto.BOOL, []) for name in ("going", "on"))
    body = helper.make_graph([helper.make_node("Identity", ["going"], ["on"])], "body", [steps, going], [on])
    writer = Floats()
    writer.node("Loop", [np.array(3), ""], "unused", body=body)
    writer.nodes[-1].output.pop()
    writer.node("Relu", ["x"], "y")
    with pytest.raises(InputError, match="Loop"):
        writer.peak("y")


@st.composite
def graphs(draw: st.DrawFn) -> onnx.ModelProto:
    """Rows of numbers, added, joined, split, cast and looked at in other shapes, in any order."""
    writer = Floats()
    writer.opset = 18
    rows = {"x": 6, "second": 6}  # numbers per value
    kinds = {"x": TensorProto.FLOAT, "second": TensorProto.FLOAT}
    for step in range(draw(st.integers(1, 12))):
        name = draw(st.sampled_from(sorted(rows)))
        size, kind, made = rows[name], kinds[name], f"v{step}"
        operator = draw(st.sampled_from(["Relu", "Add", "Concat", "Split", "Cast", "Reshape", "Identity"]))
        other = draw(st.sampled_from([item for item in sorted(rows) if kinds[item] == kind]))
        if operator == "Add" and rows[other] == size:
            writer.node("Add", [name, other], made)
        elif operator == "Concat" and size + rows[other] <= 48:
            writer.node("Concat", [name, other], made, axis=0)
            rows[made] = size + rows[other]
        elif operator == "Split" and size % 2 == 0:
            writer.nodes.append(helper.make_node("Split", [name], [made, f"{made}b"], axis=0, num_outputs=2))
            rows |= {made: size // 2, f"{made}b": size // 2}
            kinds[f"{made}b"] = kind
        elif operator == "Cast":
            kinds[made] = draw(st.sampled_from([TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE]))
            writer.node("Cast", [name], made, to=kinds[made])
        elif operator == "Reshape":
            writer.node("Reshape", [name, np.array([size])], made)
        elif operator == "Identity":
            writer.node("Identity", [name], made)
        else:
            writer.node("Relu", [name], made)
        rows.setdefault(made, size)
        kinds.setdefault(made, kind)
    outputs = draw(st.lists(st.sampled_from(sorted(rows)), min_size=1, max_size=3, unique=True))
    sizes = {name: [rows[name]] for name in outputs}
    return writer.model({"x": [6], "second": [6]}, sizes, types=kinds)


def held(model: onnx.ModelProto) -> int:
    """The most bytes that numpy holds while it executes the graph and forgets an array as soon as nothing will ask for it.

    Views are views of numpy, so that what they share is found in the arrays themselves.
    """
    arrays = {item.name: np.ones(6, np.float32) for item in model.graph.input}
    outputs = {item.name for item in model.graph.output}
    most = 0
    for step in range(len(model.graph.node)):
        wanted = outputs.union(*(node.input for node in model.graph.node[step:]))
        arrays = {name: array for name, array in arrays.items() if name in wanted}
        node = model.graph.node[step]
        given = [arrays[name] for name in node.input if name in arrays]
        if node.op_type in ("Reshape", "Identity"):
            results = [given[0].view()]
        elif node.op_type == "Split":
            results = [part.copy() for part in np.split(given[0], 2)]
        elif node.op_type == "Cast":
            results = [np.array(given[0], helper.tensor_dtype_to_np_dtype(node.attribute[0].i))]
        elif node.op_type == "Concat":
            results = [np.concatenate(given)]
        else:
            results = [given[0] + given[-1]]
        arrays |= dict(zip(node.output, results, strict=True))
        owners = {
            id(owner): owner.nbytes for array in arrays.values() for owner in [array if array.base is None else array.base]
        }
        most = max(most, sum(owners.values()))
    return most


@settings(max_examples=150, deadline=None)
@given(graphs())
def test_the_peak_is_what_an_execution_holds(model: onnx.ModelProto) -> None:
    assert peak(ir.from_proto(model), {}).bytes == held(model)
