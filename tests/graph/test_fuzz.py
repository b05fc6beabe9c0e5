"""Thousands of random graphs: squeezed they are the same map, of as many operators as they were built to leave."""

from __future__ import annotations

from collections import Counter

import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto

from repdeploy.graph.squeezer import squeeze
from tests.graph.nests import Network, network
from tests.graph.onnx_graphs import EXACT, STORED_FLOAT32, ends, kinds, run_onnxruntime, run_whole, worst
from tests.graph.tangles import tangle

BATCH = 50
"""Graphs per test: a failure names its seed."""
EXACT_GRAPHS, FLOAT_GRAPHS, TANGLES = 1950, 50, 500


def squeezed(case: Network) -> onnx.ModelProto:
    model = ir.serde.deserialize_model(case.model)
    squeeze(model, case.shapes, force=case.force)
    return ir.serde.serialize_model(model)


def remaining(model: onnx.ModelProto) -> Counter[str]:
    names = {"Conv": "Conv", "BatchNormalization": "BatchNormalization", "Gemm": "Linear", "MatMul": "Linear"}
    return Counter(names[kind] for kind in kinds(model) if kind in names)


def check(case: Network, seed: int, bound: float) -> onnx.ModelProto:
    """Same map, same ends, as many operators as built for."""
    wanted = run_whole(case.model, case.feeds)
    after = squeezed(case)
    what = f"seed {seed}, opset {case.model.opset_import[0].version}, {'force, ' if case.force else ''}{' > '.join(case.story)}"
    onnx.checker.check_model(after, full_check=seed % 5 == 0)
    assert ends(after) == ends(case.model), what
    assert worst(run_whole(after, case.feeds), wanted) <= bound, what
    assert +remaining(after) == +case.remain, f"{what}: {kinds(case.model)} became {kinds(after)}"
    return after


@pytest.mark.parametrize("first", range(0, EXACT_GRAPHS, BATCH))
def test_double_graphs(first: int) -> None:
    for seed in range(first, first + BATCH):
        check(network(seed), seed, EXACT)


@pytest.mark.parametrize("first", range(0, FLOAT_GRAPHS, BATCH))
def test_float_graphs_also_in_onnxruntime(first: int) -> None:
    for seed in range(10_000 + first, 10_000 + first + BATCH):
        case = network(seed, TensorProto.FLOAT)
        after = check(case, seed, STORED_FLOAT32)
        assert worst(run_onnxruntime(after, case.feeds), run_whole(case.model, case.feeds)) <= STORED_FLOAT32, f"seed {seed}"


@pytest.mark.parametrize("first", range(0, TANGLES, BATCH))
def test_any_graph_stays_the_same_map(first: int) -> None:
    """Operators with odd attributes, put together without a plan; squeezed once, nothing more is left to squeeze."""
    for seed in range(first, first + BATCH):
        case = tangle(seed)
        if not case.model.graph.output:
            continue
        model = ir.serde.deserialize_model(case.model)
        squeeze(model, force=case.force)
        after = ir.serde.serialize_model(model)
        onnx.checker.check_model(after, full_check=seed % 5 == 0)
        assert ends(after) == ends(case.model), f"seed {seed}"
        assert worst(run_whole(after, case.feeds), run_whole(case.model, case.feeds)) <= EXACT, f"seed {seed}"
        assert len(kinds(after)) <= len(kinds(case.model)), f"seed {seed}"
        assert not squeeze(model, force=case.force).regions, f"seed {seed}"
