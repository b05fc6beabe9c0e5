"""TensorRT, driven through the strict stand-in for both majors: it proves names, calls and arities, not numbers.

Tests marked `tensorrt` run the real library where it is installed.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import repdeploy
from repdeploy.errors import BackendFailed, UsageError
from repdeploy.exporters.options import EngineOptions
from repdeploy.exporters.tensorrt_engine import trtexec_line
from repdeploy.runtimes import cuda_memory, tensorrt_cuda
from repdeploy.runtimes.tensorrt_cuda import EngineSession
from tests.networks import repvgg, save
from tests.standins import StandIn, install

VERSIONS = ("10.14", "11.4")


@pytest.fixture(params=VERSIONS)
def standin(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    stand = install(monkeypatch, request.param)
    yield stand
    assert not stand.leaks()
    assert not stand.callback_errors


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trt")
    repdeploy.convert(save(repvgg(), folder / "a.pth"), output=folder / "a.repdeploy", input_shape="1x3x33x31")
    return folder / "a.repdeploy"


@pytest.fixture
def bundle(converted: Path, tmp_path: Path) -> Path:
    import shutil

    return Path(shutil.copytree(converted, tmp_path / "a.repdeploy"))


def ran(bundle: Path) -> int:
    """The build script, as the target machine runs it; its exit status."""
    with pytest.raises(SystemExit) as left:
        runpy.run_path(str(bundle / "build_engine.py"), run_name="__main__")
    return int(left.value.code or 0)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_an_engine_is_built_read_back_run_and_recorded(standin: StandIn, bundle: Path, precision: Any) -> None:
    result = repdeploy.export(bundle, trt=True, precision=precision)
    assert result.missing == ""
    engine = result.artifacts[-1]
    version = standin.module.__version__.split(".post")[0]
    major = ".".join(version.split(".")[:2])
    assert engine.kind == "tensorrt"
    assert engine.file == f"model.{precision}.{cuda_memory.architecture()}.trt{major}.plan"
    assert engine.made_from == result.artifacts[0].sha256
    assert [check.subject.rpartition(", ")[2] for check in engine.checks] == ["batch 1", "batch 4", "batch 16"]
    assert all(check.passed for check in engine.checks)
    (build,) = standin.builds
    assert build.strongly_typed
    assert "TF32" not in build.flags
    assert build.profiling_verbosity == "DETAILED"
    assert build.monitored
    assert not {"FP16", "BF16", "INT8"} & build.flags
    replayed = repdeploy.verify(bundle)
    assert replayed.passed
    assert any(engine.file in check.subject for check in replayed.checks)


def test_what_is_asked_for_is_passed_on(standin: StandIn, bundle: Path, tmp_path: Path) -> None:
    cache = tmp_path / "kernels.cache"
    seen: list[tuple[str, int, int]] = []
    options: dict[str, Any] = {
        "batches": (2, 3, 5), "timing_cache": cache, "workspace": 64, "optimization_level": 2, "hardware_compatible": True,
        "version_compatible": True, "tf32": True,
    }  # fmt: skip
    result = repdeploy.export(bundle, trt=True, progress=lambda *step: seen.append(step), **options)
    (build,) = standin.builds
    assert {"TF32", "VERSION_COMPATIBLE"} <= build.flags
    assert build.pool_limits["WORKSPACE"] == 64 << 20
    engine = result.artifacts[-1]
    assert "ampere+" in engine.file
    assert engine.precision == "tf32"
    assert {check.budget for check in engine.checks} == {2e-3}
    assert [check.subject.rpartition(", ")[2] for check in engine.checks] == ["batch 2", "batch 3", "batch 5"]
    assert any(stage == "building the TensorRT engine" for stage, _, _ in seen)
    assert cache.is_file()
    repdeploy.export(bundle, trt=True, **options)
    assert standin.builds[1].timing_cache
    assert repdeploy.verify(bundle).passed


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_plan_without_its_weights_is_refitted_from_its_graph(standin: StandIn, bundle: Path, precision: Any) -> None:
    whole = repdeploy.export(bundle, trt=True, precision=precision).artifacts[-1]
    result = repdeploy.export(bundle, trt=True, precision=precision, strip_weights=True)
    graph, engine = result.artifacts
    assert "STRIP_PLAN" in standin.builds[-1].flags
    assert "STRIP_PLAN" not in standin.builds[0].flags
    assert engine.bytes < whole.bytes / 2
    plan = (bundle / engine.file).read_bytes()
    kinds = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16)
    stored = [tensor for tensor in onnx.load(bundle / graph.file).graph.initializer if tensor.data_type in kinds]
    assert len(stored) == 14
    assert not [tensor.name for tensor in stored if tensor.raw_data in plan]
    assert all(check.passed for check in engine.checks)
    assert [check.subject.rpartition(", ")[2] for check in engine.checks] == ["batch 1", "batch 4", "batch 16"]
    assert engine.options == {"strip_weights": "True"}
    assert [sorted(names) for names in standin.refits] == [sorted(tensor.name for tensor in stored)]
    replayed = repdeploy.verify(bundle)
    assert replayed.passed
    assert any(engine.file in check.subject for check in replayed.checks)
    assert len(standin.refits) == 2
    session = EngineSession(bundle / engine.file)
    try:
        with pytest.raises(BackendFailed, match=r"did not run.*refit the engine first"):
            session.run_all({"input": np.zeros((1, 3, 33, 31), np.float32)})
    finally:
        session.close()


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_weights_of_another_graph_are_not_put_into_a_plan(standin: StandIn, bundle: Path, precision: Any) -> None:
    """The graph was exported anew with other options: verify names the plan that has lost its weights."""
    engine = repdeploy.export(bundle, trt=True, precision=precision, strip_weights=True).artifacts[-1]
    other = repdeploy.export(bundle, precision=precision, fold_normalize="0.4,0.5,0.6,0.2,0.3,0.25")
    assert any("what was made from that one stays" in note and engine.file in note for note in other.notes)
    refits = len(standin.refits)
    (failed,) = (check for check in repdeploy.verify(bundle).checks if not check.passed)
    assert failed.subject == engine.file
    assert "the graph it was made from is there no more" in failed.failure
    assert len(standin.refits) == refits
    repdeploy.export(bundle, trt=True, precision=precision, strip_weights=True)
    assert repdeploy.verify(bundle).passed


def test_weights_that_do_not_fit_a_plan_are_told(standin: StandIn, bundle: Path, tmp_path: Path) -> None:
    graph, engine = repdeploy.export(bundle, trt=True, strip_weights=True).artifacts
    model = onnx.load(bundle / graph.file)
    first = model.graph.initializer[0]
    first.CopyFrom(onnx.numpy_helper.from_array(np.ones(3, np.float32), first.name))
    onnx.save(model, tmp_path / "narrow.onnx")
    with pytest.raises(BackendFailed, match=r"has 108 weights of FLOAT, 3 of FLOAT were given"):
        EngineSession(bundle / engine.file, weights=tmp_path / "narrow.onnx")
    del model.graph.initializer[0]
    onnx.save(model, tmp_path / "fewer.onnx")
    with pytest.raises(BackendFailed, match=rf"has not all weights .*: {first.name}"):
        EngineSession(bundle / engine.file, weights=tmp_path / "fewer.onnx")


def test_a_cache_of_another_machine_is_refused(standin: StandIn, bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "a.cache").write_bytes(b"from somewhere else")
    with pytest.raises(UsageError, match="timing-cache"):
        repdeploy.export(bundle, trt=True, timing_cache=tmp_path / "a.cache")
    assert not list(bundle.glob("*.plan"))


def test_the_build_script_does_the_same_by_itself(standin: StandIn, bundle: Path) -> None:
    repdeploy.export(bundle, trt=True)
    for plan in bundle.glob("*.plan"):
        plan.unlink()
    assert ran(bundle) == 0
    (plan,) = bundle.glob("*.plan")
    record = json.loads(plan.with_name(plan.name + ".json").read_text())
    assert record["error"] <= record["budget"]


@pytest.mark.parametrize(
    "options",
    [
        {"precision": "fp16", "io_dtype": "fp16"},
        {"fold_normalize": "0.4,0.5,0.6,0.2,0.3,0.25", "softmax": True, "input_name": "pixels"},
        {"tf32": True, "batches": (1, 1, 1)},
        {"dynamic": "none", "input_shape": "3x3x33x31"},
        {"dynamic": "spatial"},
    ],
)
def test_the_script_knows_what_stands_at_the_ends(standin: StandIn, bundle: Path, options: dict[str, Any]) -> None:
    result = repdeploy.export(bundle, trt=True, **options)
    assert all(check.passed for check in result.artifacts[-1].checks)
    assert ran(bundle) == 0
    assert standin.builds[0].flags == standin.builds[1].flags


def test_a_graph_with_quantisation_builds_the_same_way(standin: StandIn, tmp_path: Path) -> None:
    """Q/DQ around a convolution, converted as a graph; the engine computes in int8 where the graph says so."""
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(0)
    stored: dict[str, np.ndarray] = {
        "w": rng.standard_normal((4, 3, 3, 3)).astype(np.float32),
        "s": np.array(0.05, np.float32),
        "z": np.array(0, np.int8),
        "w1": rng.standard_normal((4, 4, 1, 1)).astype(np.float32),
        "w2": rng.standard_normal((4, 4, 1, 1)).astype(np.float32),
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]),
        helper.make_node("Conv", ["d", "w"], ["a"], pads=[1, 1, 1, 1]),
        helper.make_node("Conv", ["a", "w1"], ["b"]),
        helper.make_node("Conv", ["b", "w2"], ["y"]),
    ]
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", c, 16, 16]) for name, c in (("x", 3), ("y", 4))]
    graph = helper.make_graph(nodes, "g", ports[:1], ports[1:], [numpy_helper.from_array(v, k) for k, v in stored.items()])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)
    onnx.save(model, tmp_path / "q.onnx")
    repdeploy.convert(tmp_path / "q.onnx", output=tmp_path / "q.repdeploy")
    result = repdeploy.export(tmp_path / "q.repdeploy", trt=True, batches=(1, 2, 4))
    assert all(check.passed for check in result.artifacts[-1].checks)
    assert any("int8" in note for note in result.notes)
    assert repdeploy.verify(tmp_path / "q.repdeploy").passed
    assert ran(tmp_path / "q.repdeploy") == 0


def test_what_tensorrt_says_reaches_the_user(standin: StandIn, bundle: Path) -> None:
    standin.unsupported.add("Relu")
    with pytest.raises(BackendFailed, match=r"does not take model\.fp32\.onnx"):
        repdeploy.export(bundle, trt=True)
    standin.unsupported.clear()
    standin.refuse_build = "no kernel fits"
    with pytest.raises(BackendFailed, match="no kernel fits"):
        repdeploy.export(bundle, trt=True)
    assert not list(bundle.glob("*.plan*"))
    assert not list(bundle.glob(".*"))


def test_an_interrupted_build_leaves_nothing(standin: StandIn, bundle: Path) -> None:
    def interrupt(stage: str, done: int, total: int) -> None:
        if stage == "building the TensorRT engine" and done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        repdeploy.export(bundle, trt=True, progress=interrupt)
    assert not list(bundle.glob("*.plan"))


def test_a_changed_plan_is_not_deserialised(standin: StandIn, bundle: Path) -> None:
    plan = bundle / repdeploy.export(bundle, trt=True).artifacts[-1].file
    plan.write_bytes(plan.read_bytes() + b"x")
    count = len(standin.executions)
    replayed = repdeploy.verify(bundle)
    assert not replayed.passed
    assert any("changed since" in check.failure for check in replayed.checks)
    assert len(standin.executions) == count


def test_a_plan_of_another_version_says_what_to_do(monkeypatch: pytest.MonkeyPatch, bundle: Path) -> None:
    install(monkeypatch, "10.14")
    plan = bundle / repdeploy.export(bundle, trt=True).artifacts[-1].file
    install(monkeypatch, "11.4")
    with pytest.raises(BackendFailed, match=r"TensorRT 11\.4 does not load") as caught:
        EngineSession(plan)
    assert "export --trt" in caught.value.hint


def test_a_batch_outside_the_profile_names_it(standin: StandIn, bundle: Path) -> None:
    plan = bundle / repdeploy.export(bundle, trt=True, batches=(1, 2, 2)).artifacts[-1].file
    session = EngineSession(plan)
    try:
        with pytest.raises(BackendFailed, match="from 1x3x33x31 to 2x3x33x31, not 3x3x33x31"):
            session.run_all({"input": np.zeros((3, 3, 33, 31), np.float32)})
        assert session.timer(np.zeros((2, 3, 33, 31), np.float32))() >= 0
    finally:
        session.close()


def test_the_inspectors_words_of_both_majors() -> None:
    ten = {"Name": "a", "LayerType": "CaskConvolution", "Inputs": [{"Format/Datatype": "Row major linear FP32"}],
           "Outputs": [{"Format/Datatype": "Channel major FP16 format where C % 8 == 0"}], "TacticName": "k"}  # fmt: skip
    eleven = {"Name": "a", "LayerType": "gemm", "Inputs": [{"Format": "Row major linear", "DataType": "BFloat16"}],
              "Outputs": [{"Format": "Row major linear", "DataType": "Float"}]}  # fmt: skip
    assert tensorrt_cuda._layer(ten).types == ("fp32", "fp16")
    assert tensorrt_cuda._layer(eleven).types == ("bf16", "fp32")
    assert tensorrt_cuda._layer("only a name").name == "only a name"


def test_without_tensorrt_everything_else_is_there(bundle: Path) -> None:
    if importlib.util.find_spec("tensorrt") is not None:
        pytest.skip("TensorRT is installed here")
    result = repdeploy.export(bundle, trt=True, precision="fp16")
    assert "TensorRT is not installed" in result.missing
    assert "python build_engine.py" in result.hint
    assert (bundle / "model.fp16.onnx").is_file()
    assert any(note.startswith("or: trtexec --onnx=model.fp16.onnx") for note in result.notes)
    text = (bundle / "build_engine.py").read_text()
    imported = {
        name.split(".")[0]
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names])
    }
    assert imported == {"hashlib", "json", "sys", "pathlib", "numpy", "tensorrt", "cuda"}
    assert "@" not in text


def test_the_trtexec_line_is_strongly_typed() -> None:
    line = trtexec_line("m.onnx", {"input": (3, 8, 9)}, (1, 2, 3), EngineOptions(workspace=64, strip_weights=True))
    assert "--minShapes=input:1x3x8x9 --optShapes=input:2x3x8x9 --maxShapes=input:3x3x8x9 --stronglyTyped --noTF32" in line
    assert "--memPoolSize=workspace:64M --stripWeights" in line
    assert "Shapes" not in trtexec_line("m.onnx", {}, (2, 2, 2), EngineOptions())  # of fixed sizes: trtexec refuses them


def test_engine_options_go_with_an_engine(bundle: Path) -> None:
    with pytest.raises(UsageError, match="--workspace: only TensorRT engines"):
        repdeploy.export(bundle, workspace=64)
    with pytest.raises(UsageError, match="1 <= min <= opt <= max"):
        repdeploy.export(bundle, trt=True, batches=(4, 2, 8))
    with pytest.raises(UsageError, match="levels 0 to 5"):
        repdeploy.export(bundle, trt=True, optimization_level=9)


@pytest.mark.tensorrt
@pytest.mark.skipif(importlib.util.find_spec("tensorrt") is None, reason="TensorRT is not installed here")
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_real_library(bundle: Path, precision: Any) -> None:
    absent = tensorrt_cuda.missing()
    if absent is not None:
        pytest.skip(absent.what)
    result = repdeploy.export(bundle, trt=True, precision=precision)
    assert all(check.passed for check in result.artifacts[-1].checks)
    assert repdeploy.verify(bundle).passed


def test_the_references_are_there_at_every_size(bundle: Path) -> None:
    repdeploy.export(bundle, trt=True, input_shape="1x3x96x64")
    assert "(3, 96, 64)" in (bundle / "build_engine.py").read_text()
    with np.load(bundle / "references.npz") as references:
        assert [key for key in references if key.startswith("input") and references[key].shape[1:] == (3, 96, 64)]
