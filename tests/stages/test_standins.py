"""The stand-ins themselves: as strict as the listings, and able to carry a graph from file to numbers."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from tests.conftest import REFERENCE
from tests.standins import StandIn, cuda_runtime, install
from tests.standins.strict import HERE, listing, parse_signature
from tests.standins.tensorrt import BEHAVIOURS

VERSIONS = ("10.14", "11.4")
LISTINGS = REFERENCE.parent / "tensorrt"


@pytest.fixture(params=VERSIONS)
def stand(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> StandIn:
    return install(monkeypatch, request.param)


def model(kind: int = TensorProto.FLOAT) -> onnx.ModelProto:
    """input (batch, 3, 6, 5) -> Conv 4 -> Relu -> Add 1 -> output (batch, 4, 6, 5)."""
    weight = np.random.default_rng(3).standard_normal((4, 3, 3, 3)).astype(np.float32)
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["input", "weight"], ["conv"], name="/conv/Conv", pads=[1] * 4),
            helper.make_node("Relu", ["conv"], ["relu"], name="/act/Relu"),
            helper.make_node("Add", ["relu", "one"], ["output"], name="/Add"),
        ],
        "small",
        [helper.make_tensor_value_info("input", kind, ["batch", 3, 6, 5])],
        [helper.make_tensor_value_info("output", kind, ["batch", 4, 6, 5])],
        [numpy_helper.from_array(weight.astype(dtype), "weight"), numpy_helper.from_array(np.ones(1, dtype), "one")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


class Monitor:
    """Mixed into IProgressMonitor by the tests, whose base exists only once a stand-in is installed."""

    calls: list[tuple[Any, ...]]
    cancel_at: str | None

    def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
        self.calls.append(("start", phase_name, parent_phase, num_steps))

    def step_complete(self, phase_name: str, step: int) -> bool:
        self.calls.append(("step", phase_name, step))
        return phase_name != self.cancel_at

    def phase_finish(self, phase_name: str) -> None:
        self.calls.append(("finish", phase_name))


def monitor(trt: Any, cancel_at: str | None = None) -> Any:
    made = type("UserMonitor", (Monitor, trt.IProgressMonitor), {})()
    made.calls, made.cancel_at = [], cancel_at
    return made


def parts(trt: Any, data: bytes | None = None, flags: int | None = None) -> tuple[Any, Any, Any, Any]:
    """Builder, network, configuration and parser, the network filled and a profile of batches 1 to 4 added."""
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED) if flags is None else flags)
    parser = trt.OnnxParser(network, logger)
    assert parser.parse(model().SerializeToString() if data is None else data)
    config = builder.create_builder_config()
    profile = builder.create_optimization_profile()
    profile.set_shape("input", (1, 3, 6, 5), opt=(2, 3, 6, 5), max=[4, 3, 6, 5])
    assert config.add_optimization_profile(profile) == 0
    return builder, network, config, parser


def run(stand: StandIn, engine: Any, x: np.ndarray[Any, Any], out: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """`out` filled by the engine, the way a runner does it; nothing stays allocated."""
    cuda = stand.runtime

    def call(result: tuple[Any, ...]) -> Any:
        assert result[0] == cuda.cudaError_t.cudaSuccess
        return result[1] if len(result) > 1 else None

    before = out.copy()
    context = engine.create_execution_context()
    stream = call(cuda.cudaStreamCreate())
    here = {name: call(cuda.cudaMalloc(array.nbytes)) for name, array in (("input", x), ("output", out))}
    assert context.set_input_shape("input", x.shape)
    for name, address in here.items():
        assert context.set_tensor_address(name, int(address))
    kinds = cuda.cudaMemcpyKind
    call(cuda.cudaMemcpyAsync(here["input"], x.ctypes.data, x.nbytes, kinds.cudaMemcpyHostToDevice, stream))
    assert context.execute_async_v3(int(stream))
    call(cuda.cudaMemcpyAsync(out.ctypes.data, here["output"], out.nbytes, kinds.cudaMemcpyDeviceToHost, stream))
    np.testing.assert_array_equal(out, before)  # nobody synchronised yet
    call(cuda.cudaStreamSynchronize(stream))
    assert tuple(context.get_tensor_shape("output")) == out.shape
    for address in here.values():
        call(cuda.cudaFree(address))
    call(cuda.cudaStreamDestroy(stream))
    assert stand.leaks() == {}
    return out


# ---- as strict as the listings


@pytest.mark.parametrize("version", VERSIONS)
def test_the_committed_listing_says_what_the_bindings_said(version: str) -> None:
    if not LISTINGS.is_dir():
        pytest.skip("the listings of the TensorRT bindings (shared/tensorrt) are not beside this checkout")
    whole = (LISTINGS / f"api-{version}.json").read_text().replace("tensorrt_bindings.tensorrt.", "")
    source, kept = json.loads(whole.replace("tensorrt_bindings.tenso", "")), listing(version)
    assert kept.version == source["version"]
    assert kept.functions == source["functions"]
    assert len(kept.classes) >= len(source["classes"]) - 4
    for name, members in kept.classes.items():
        mine = {member: text.replace("tensorrt_bindings.tenso", "") for member, text in members.items()}
        assert mine == source["classes"][name], name


def test_every_class_has_the_members_of_its_listing_and_no_others(stand: StandIn) -> None:
    known = stand.bindings.listing
    for name, members in known.classes.items():
        cls = getattr(stand.module, name)
        for member, text in members.items():
            assert hasattr(cls, member), (name, member)
            if text.startswith("enum="):
                assert int(getattr(cls, member)) == getattr(cls, member).value == int(text.removeprefix("enum="))
        inherited = {"name", "value"} | (set(dir(bytes)) if name == "IHostMemory" else set())
        extra = {m for m in dir(cls) if not m.startswith("_")} - set(members) - inherited
        assert not extra - {m for parent in cls.__mro__ for m in known.classes.get(parent.__name__, ())}, (name, extra)


def test_what_is_simulated_exists_in_some_version() -> None:
    """A behaviour cannot invent a member."""
    for behaviour in BEHAVIOURS:
        listed = {member for version in VERSIONS for member in listing(version).classes.get(behaviour.of, ())}
        mine = {m for cls in behaviour.__mro__[:-2] for m in (*vars(cls), *vars(cls).get("__annotations__", ()))}
        invented = {m for m in mine if not m.startswith("_")} - listed - {"of", "written", "simulates"}
        assert not invented, (behaviour.of, invented)
        assert set(behaviour.written) <= listed, behaviour.of


@pytest.mark.parametrize(
    ("version", "flag", "number"),
    [("10.14", "FP16", 0), ("10.14", "STRIP_PLAN", 19), ("11.4", "STRIP_PLAN", 18), ("11.4", "FP16", None)],
)
def test_flags_are_those_of_the_version(monkeypatch: pytest.MonkeyPatch, version: str, flag: str, number: int | None) -> None:
    trt = install(monkeypatch, version).module
    if number is None:
        with pytest.raises(AttributeError, match=flag):
            getattr(trt.BuilderFlag, flag)
    else:
        assert int(getattr(trt.BuilderFlag, flag)) == number


def test_unknown_names_fail_on_reading_and_on_writing(stand: StandIn) -> None:
    trt: Any = stand.module
    builder, network, config, _ = parts(trt)
    plan = builder.build_serialized_network(network, config)
    for owner in (
        trt,
        trt.Builder,
        builder,
        network,
        config,
        trt.BuilderFlag,
        trt.BuilderFlag.TF32,
        plan,
        network.get_input(0),
    ):
        with pytest.raises(AttributeError):
            owner.max_workspace_size  # noqa: B018
        with pytest.raises(AttributeError):
            owner.max_workspace_size = 1
    with pytest.raises(AttributeError):
        builder.create_network = None
    with pytest.raises(AttributeError):
        trt.Builder.create_network = None
    with pytest.raises(AttributeError, match="no setter"):
        config.num_optimization_profiles = 2
    with pytest.raises(AttributeError):
        plan.hex()
    with pytest.raises(TypeError):
        len(plan)


def test_wrong_calls_fail(stand: StandIn) -> None:
    trt: Any = stand.module
    builder, network, config, parser = parts(trt)
    with pytest.raises(TypeError, match="missing"):
        builder.build_serialized_network(network)
    with pytest.raises(TypeError, match="unknown"):
        builder.create_network(flag=1)
    with pytest.raises(TypeError):
        builder.create_network(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    with pytest.raises(TypeError):
        1 << trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED
    with pytest.raises(TypeError):
        config.set_flag(trt.MemoryPoolType.WORKSPACE)
    with pytest.raises(TypeError):
        config.set_flag(int(trt.BuilderFlag.TF32))
    with pytest.raises(TypeError):
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, 1e9)
    with pytest.raises(TypeError):
        config.profiling_verbosity = trt.LayerInformationFormat.JSON
    with pytest.raises(TypeError):
        parser.parse_from_file(Path("model.onnx"))
    with pytest.raises(TypeError, match="No constructor"):
        trt.IBuilderConfig()
    with pytest.raises(ValueError, match="no flag"):
        builder.create_network(1 << 7)
    with pytest.raises(NotImplementedError, match=r"INetworkDefinition\.add_softmax"):
        network.add_softmax(network.get_input(0))
    assert int(trt.BuilderFlag.TF32) != trt.BuilderFlag.TF32


def test_interfaces_of_the_user_call_their_base(stand: StandIn) -> None:
    trt: Any = stand.module

    def quiet(self: Any) -> None:
        """Forgets super().__init__()."""

    for base in (trt.IProgressMonitor, trt.ILogger, trt.Logger):
        with pytest.raises(TypeError, match="must be called"):
            type("Mine", (base,), {"__init__": quiet})()
    heard: list[tuple[str, str]] = []
    logger = type("Mine", (trt.ILogger,), {"log": lambda self, severity, msg: heard.append((severity.name, msg))})()
    builder = trt.Builder(logger)
    assert builder.build_serialized_network(builder.create_network(0), builder.create_builder_config()) is None
    assert [severity for severity, _ in heard] == ["INFO", "ERROR"]
    assert trt.Logger.ERROR < trt.Logger.WARNING == trt.ILogger.Severity.WARNING


def test_a_signature_is_read_as_pybind_writes_it() -> None:
    text = "f(self: X, a: typing.List[Tuple[int, str]], b: Y = <Y.ONE: 1>, c: str = None) -> None"
    assert [(p.name, p.kind, p.default) for p in parse_signature(text)] == [
        ("a", "typing.List[Tuple[int, str]]", None), ("b", "Y", "<Y.ONE: 1>"), ("c", "str", "None"),
    ]  # fmt: skip


def test_both_modules_are_found(stand: StandIn) -> None:
    for name in ("tensorrt", "cuda", "cuda.bindings", "cuda.bindings.runtime"):
        assert importlib.util.find_spec(name) is not None, name
    from cuda.bindings import runtime

    assert runtime is stand.runtime
    assert importlib.import_module("tensorrt").__version__ == stand.bindings.listing.version
    assert stand.bindings.listing.version.startswith(stand.version)


def test_nothing_stays_installed() -> None:
    with pytest.MonkeyPatch.context() as patch:
        before = sys.modules.get("tensorrt")
        install(patch, "11.4")
    assert sys.modules.get("tensorrt") is before
    assert sorted(path.name for path in HERE.glob("*.json")) == ["tensorrt-10.14.json", "tensorrt-11.4.json"]


# ---- from a file to numbers


def test_a_round_trip_gives_what_onnxruntime_gives(stand: StandIn, tmp_path: Path) -> None:
    import onnxruntime

    trt: Any = stand.module
    builder, network, config, _ = parts(trt)
    assert network.get_input(0).shape == (-1, 3, 6, 5)
    assert network.get_input(0).dtype == trt.DataType.FLOAT
    config.clear_flag(trt.BuilderFlag.TF32)
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, 1 << 20)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.progress_monitor = mine = monitor(trt)
    config.set_timing_cache(config.create_timing_cache(b""), ignore_mismatch=False)
    plan = builder.build_serialized_network(network, config)
    (tmp_path / "model.plan").write_bytes(plan)
    assert plan.dtype == trt.DataType.INT8
    assert plan.nbytes == len(bytes(plan)) == memoryview(plan).nbytes
    (build,) = stand.builds
    assert build.strongly_typed
    assert build.flags == frozenset()
    assert build.pool_limits == {"WORKSPACE": 1 << 20}
    assert build.profiles == [{"input": ((1, 3, 6, 5), (2, 3, 6, 5), (4, 3, 6, 5))}]
    assert (build.profiling_verbosity, build.timing_cache, build.monitored) == ("DETAILED", 0, True)
    assert mine.calls[0] == ("start", "Building engine", None, 3)
    assert mine.calls[1][2] == "Building engine"
    assert config.create_timing_cache(bytes(config.get_timing_cache().serialize())) is not None

    engine = trt.Runtime(trt.Logger()).deserialize_cuda_engine((tmp_path / "model.plan").read_bytes())
    assert [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)] == ["input", "output"]
    assert engine.get_tensor_profile_shape("input", 0) == [(1, 3, 6, 5), (2, 3, 6, 5), (4, 3, 6, 5)]
    x = np.random.default_rng(5).standard_normal((3, 3, 6, 5)).astype(np.float32)
    out = run(stand, engine, x, np.full((3, 4, 6, 5), np.nan, np.float32))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model().SerializeToString(), options, providers=["CPUExecutionProvider"])
    np.testing.assert_array_equal(out, session.run(None, {"input": x})[0])
    assert stand.executions == [{"input": (3, 3, 6, 5)}]


def test_the_inspector_writes_its_majors_schema(stand: StandIn) -> None:
    trt: Any = stand.module
    builder, network, config, _ = parts(trt, model(TensorProto.FLOAT16).SerializeToString())
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    engine = trt.Runtime(trt.Logger()).deserialize_cuda_engine(builder.build_serialized_network(network, config))
    said = json.loads(engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON))
    assert [layer["Name"] for layer in said["Layers"]] == ["/conv/Conv + /act/Relu", "/Add"]
    assert engine.num_layers == 2
    tensor = said["Layers"][0]["Outputs"][0]
    assert tensor["Dimensions"] == [-1, 4, 6, 5]
    if stand.version == "10.14":
        assert tensor["Format/Datatype"] == "Row major linear FP16"
        assert said["Bindings"] == ["input", "output"]
    else:
        assert (tensor["Format"], tensor["DataType"]) == ("Row major linear", "Half")
        assert [each["Name"] for each in said["I/O Tensors"]] == ["input", "output"]
        assert said["I/O Tensors"][0]["ProfileInfo"][0]["MaxShape"] == [4, 3, 6, 5]
    config.profiling_verbosity = trt.ProfilingVerbosity.LAYER_NAMES_ONLY
    engine = trt.Runtime(trt.Logger()).deserialize_cuda_engine(builder.build_serialized_network(network, config))
    said = json.loads(engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON))
    assert said["Layers"] == ["/conv/Conv + /act/Relu", "/Add"]


@pytest.mark.parametrize("kind", [TensorProto.FLOAT16, TensorProto.BFLOAT16])
def test_narrow_types_pass_the_border(stand: StandIn, kind: int) -> None:
    """Half runs; a bfloat16 convolution is what onnxruntime's CPU lacks, and the stand-in says so."""
    trt: Any = stand.module
    builder, network, config, _ = parts(trt, model(kind).SerializeToString())
    engine = trt.Runtime(trt.Logger()).deserialize_cuda_engine(builder.build_serialized_network(network, config))
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    assert engine.get_tensor_dtype("input") == (trt.DataType.HALF if kind == TensorProto.FLOAT16 else trt.DataType.BF16)
    x, out = np.ones((2, 3, 6, 5), dtype), np.zeros((2, 4, 6, 5), dtype)
    if kind == TensorProto.BFLOAT16:
        with pytest.raises(NotImplementedError, match="bfloat16"):
            run(stand, engine, x, out)
    else:
        assert run(stand, engine, x, out).max() > 1


def test_bfloat16_runs_where_onnxruntime_can(stand: StandIn) -> None:
    graph = helper.make_graph(
        [helper.make_node("Cast", ["input"], ["wide"], to=1), helper.make_node("Relu", ["wide"], ["relu"]),
         helper.make_node("Cast", ["relu"], ["output"], to=16)],
        "casts",
        [helper.make_tensor_value_info("input", TensorProto.BFLOAT16, ["batch", 3, 6, 5])],
        [helper.make_tensor_value_info("output", TensorProto.BFLOAT16, ["batch", 3, 6, 5])],
    )  # fmt: skip
    trt: Any = stand.module
    data = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9).SerializeToString()
    builder, network, config, _ = parts(trt, data)
    engine = trt.Runtime(trt.Logger()).deserialize_cuda_engine(builder.build_serialized_network(network, config))
    dtype = helper.tensor_dtype_to_np_dtype(TensorProto.BFLOAT16)
    x = np.linspace(-1, 1, 180).reshape(2, 3, 6, 5).astype(dtype)
    np.testing.assert_array_equal(run(stand, engine, x, np.full(x.shape, 7, dtype)), np.maximum(x, dtype.type(0)))


def test_weakly_typed_networks_exist_in_ten_only(stand: StandIn) -> None:
    trt: Any = stand.module
    builder, network, config, _ = parts(trt, flags=0)
    assert builder.build_serialized_network(network, config) is not None
    assert stand.builds[-1].strongly_typed is (stand.version == "11.4")


def test_precision_flags_do_not_go_with_strong_types(monkeypatch: pytest.MonkeyPatch) -> None:
    stand = install(monkeypatch, "10.14")
    trt: Any = stand.module
    builder, network, config, _ = parts(trt)
    config.set_flag(trt.BuilderFlag.FP16)
    assert builder.build_serialized_network(network, config) is None
    assert "FP16" in str(stand.builds[-1].reason)


@pytest.mark.parametrize(
    ("shapes", "reason"),
    [
        (None, "no optimization profile"),
        ({"other": ((1,), (1,), (1,))}, "no shape for the dynamic input"),
        ({"input": ((2, 3, 6, 5), (1, 3, 6, 5), (4, 3, 6, 5))}, "min <= opt <= max"),
        ({"input": ((1, 3, 6, 5), (2, 3, 7, 5), (4, 3, 8, 5))}, "in the network"),
    ],
)
def test_a_profile_must_fit(stand: StandIn, shapes: dict[str, Any] | None, reason: str) -> None:
    trt: Any = stand.module
    builder, network, _, _ = parts(trt)
    config = builder.create_builder_config()
    if shapes is not None:
        profile = builder.create_optimization_profile()
        for name, bounds in shapes.items():
            profile.set_shape(name, *bounds)
        config.add_optimization_profile(profile)
    assert builder.build_serialized_network(network, config) is None
    assert reason in str(stand.builds[-1].reason)


@pytest.mark.parametrize("phase", ["Building engine", "Timing tactics"])
def test_a_monitor_cancels(stand: StandIn, phase: str) -> None:
    trt: Any = stand.module
    builder, network, config, _ = parts(trt)
    config.progress_monitor = mine = monitor(trt, cancel_at=phase)
    assert builder.build_serialized_network(network, config) is None
    assert stand.builds[-1].cancelled
    starts, ends = ([c[1] for c in mine.calls if c[0] == what] for what in ("start", "finish"))
    assert sorted(starts) == sorted(ends)


def test_plans_belong_to_their_version(monkeypatch: pytest.MonkeyPatch) -> None:
    plans = {}
    for version in VERSIONS:
        trt: Any = install(monkeypatch, version).module
        builder, network, config, _ = parts(trt)
        plans[version] = bytes(builder.build_serialized_network(network, config))
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
        plans[f"{version} compatible"] = bytes(builder.build_serialized_network(network, config))
    stand = install(monkeypatch, "11.4")
    trt = stand.module
    runtime = trt.Runtime(trt.Logger(trt.Logger.INTERNAL_ERROR))
    assert runtime.deserialize_cuda_engine(plans["11.4"]) is not None
    assert runtime.deserialize_cuda_engine(plans["10.14"]) is None
    assert "10.14" in stand.messages[-1][1]
    assert runtime.deserialize_cuda_engine(plans["11.4"][:-1]) is None
    assert runtime.deserialize_cuda_engine(b"not a plan") is None
    assert runtime.deserialize_cuda_engine(plans["10.14 compatible"]) is None
    runtime.engine_host_code_allowed = True
    assert runtime.deserialize_cuda_engine(plans["10.14 compatible"]) is not None
    stand.gpu.capability = (9, 0)
    assert runtime.deserialize_cuda_engine(plans["11.4"]) is None


def test_the_parser_says_why_it_refuses(stand: StandIn, tmp_path: Path) -> None:
    trt: Any = stand.module
    stand.unsupported.add("Relu")
    builder = trt.Builder(trt.Logger(trt.Logger.INTERNAL_ERROR))
    parser = trt.OnnxParser(builder.create_network(0), builder.logger)
    (tmp_path / "a.onnx").write_bytes(model().SerializeToString())
    assert not parser.parse_from_file(str(tmp_path / "a.onnx"))
    assert parser.num_errors == 1
    error = parser.get_error(0)
    assert (error.node_operator(), error.node(), error.code().name) == ("Relu", 1, "UNSUPPORTED_NODE")
    assert "Relu" in error.desc()
    assert not parser.parse(b"nonsense")
    assert "MODEL_DESERIALIZE_FAILED" in str(parser.get_error(0))
    assert not parser.parse_from_file(str(tmp_path / "missing.onnx"))


def test_a_context_fails_where_tensorrt_would(stand: StandIn) -> None:
    trt: Any = stand.module
    builder, network, config, _ = parts(trt)
    engine = trt.Runtime(builder.logger).deserialize_cuda_engine(builder.build_serialized_network(network, config))
    context = engine.create_execution_context()
    assert context.infer_shapes() == ["input"]
    assert not context.execute_async_v3(0)
    assert not context.set_input_shape("input", (5, 3, 6, 5))
    assert not context.execute_async_v3(0)
    assert context.set_input_shape("input", (1, 3, 6, 5))
    assert not context.execute_async_v3(0)
    for name in ("input", "output"):
        assert context.set_tensor_address(name, stand.runtime.cudaMalloc(360 if name == "input" else 479)[1])
    with pytest.raises(AssertionError, match="run out of an allocation"):
        context.execute_async_v3(0)


# ---- weights


def stripped_engine(stand: StandIn, data: bytes | None = None) -> tuple[Any, Any]:
    """An engine whose plan lacks its weights, and a refitter of it."""
    trt: Any = stand.module
    builder, network, config, _ = parts(trt, data)
    whole = bytes(builder.build_serialized_network(network, config))
    config.set_flag(trt.BuilderFlag.STRIP_PLAN)
    plan = bytes(builder.build_serialized_network(network, config))
    assert len(plan) < len(whole)
    for tensor in model().graph.initializer:
        assert tensor.raw_data in whole
        assert tensor.raw_data not in plan
    logger = trt.Logger(trt.Logger.INTERNAL_ERROR)
    engine = trt.Runtime(logger).deserialize_cuda_engine(plan)
    return engine, trt.Refitter(engine, logger)


def stored(kind: int = TensorProto.FLOAT) -> dict[str, np.ndarray[Any, Any]]:
    return {tensor.name: numpy_helper.to_array(tensor).copy() for tensor in model(kind).graph.initializer}


@pytest.mark.parametrize("given", ["arrays", "weights", "pointers", "device"])
def test_a_stripped_plan_runs_after_its_refit(stand: StandIn, given: str) -> None:
    trt: Any = stand.module
    engine, refitter = stripped_engine(stand)
    assert engine.refittable
    assert engine.get_engine_stat(trt.EngineStat.STRIPPED_WEIGHTS_SIZE) == engine.get_engine_stat() == 4 * (108 + 1)
    assert engine.get_tensor_shape("output") == (-1, 4, 6, 5)
    x, out = np.ones((2, 3, 6, 5), np.float32), np.zeros((2, 4, 6, 5), np.float32)
    context = engine.create_execution_context()
    assert context.set_input_shape("input", x.shape)
    assert not context.execute_async_v3(0)
    assert "refit" in stand.messages[-1][1]
    assert sorted(refitter.get_all_weights()) == sorted(refitter.get_missing_weights()) == ["one", "weight"]
    assert not refitter.refit_cuda_engine()
    assert stand.messages[-1][0] == "ERROR"
    arrays, here, copies = stored(), [], stand.runtime.cudaMemcpyKind.cudaMemcpyHostToDevice
    for name, array in arrays.items():
        if given == "arrays":
            assert refitter.set_named_weights(name, array)
        elif given == "weights":
            assert refitter.set_named_weights(name=name, weights=trt.Weights(array))
        elif given == "pointers":
            assert refitter.set_named_weights(name, trt.Weights(trt.DataType.FLOAT, array.ctypes.data, array.size))
        else:
            here.append(stand.runtime.cudaMalloc(array.nbytes)[1])
            stand.runtime.cudaMemcpy(here[-1], array.ctypes.data, array.nbytes, copies)
            weights = trt.Weights(trt.DataType.FLOAT, here[-1], array.size)
            assert refitter.set_named_weights(name, weights, trt.TensorLocation.DEVICE)
    assert refitter.get_missing_weights() == []
    assert refitter.get_missing() == ([], [])
    assert refitter.refit_cuda_engine()
    assert [sorted(names) for names in stand.refits] == [["one", "weight"]]
    for address in here:
        stand.runtime.cudaFree(address)
    builder, network, config, _ = parts(trt)
    whole = trt.Runtime(builder.logger).deserialize_cuda_engine(builder.build_serialized_network(network, config))
    np.testing.assert_array_equal(run(stand, engine, x, out.copy()), run(stand, whole, x, out))


def test_a_refit_reads_the_memory_as_it_is_then(stand: StandIn) -> None:
    """An array that changes, or is freed, between set_named_weights and the refit gives other weights, or none."""
    trt: Any = stand.module
    engine, refitter = stripped_engine(stand)
    arrays = stored()
    for name, array in arrays.items():
        assert refitter.set_named_weights(name, trt.Weights(trt.DataType.FLOAT, array.ctypes.data, array.size))
        array[...] = 0
    assert refitter.refit_cuda_engine()
    x, out = np.ones((1, 3, 6, 5), np.float32), np.ones((1, 4, 6, 5), np.float32)
    np.testing.assert_array_equal(run(stand, engine, x, out), np.zeros_like(out))
    if Path("/proc/self/mem").exists():
        engine, refitter = stripped_engine(stand)
        assert refitter.set_named_weights("one", np.ones(1, np.float32))
        assert refitter.set_named_weights("weight", trt.Weights(trt.DataType.FLOAT, 64, 108))
        with pytest.raises(AssertionError, match="were freed before the refit"):
            refitter.refit_cuda_engine()


def test_wrong_weights_are_refused(stand: StandIn) -> None:
    trt: Any = stand.module
    _, refitter = stripped_engine(stand)
    one = np.ones(1, np.float32)
    for name, weights, reason in (
        ("other", one, "no refittable weights named 'other'"),
        ("weight", one, "has 108 weights of FLOAT, 1 of FLOAT"),
        ("one", one.astype(np.float16), "has 1 weights of FLOAT, 1 of HALF"),
        ("one", trt.Weights(), "0 of FLOAT"),
    ):
        assert not refitter.set_named_weights(name, weights)
        assert stand.messages[-1][0] == "ERROR"
        assert reason in stand.messages[-1][1]
    for wrong in (one.tolist(), one.tobytes(), None):
        with pytest.raises(TypeError, match="incompatible function arguments"):
            refitter.set_named_weights("one", wrong)
    with pytest.raises(TypeError):
        refitter.set_named_weights("one", one, 1)
    with pytest.raises(NotImplementedError, match="WeightsRole"):
        refitter.get_missing()
    assert refitter.set_named_weights("one", one)
    assert refitter.get_named_weights("one").size == 1
    assert refitter.get_weights_location("one") == trt.TensorLocation.HOST
    assert refitter.unset_named_weights("one")
    prototype = refitter.get_weights_prototype("weight")
    assert (prototype.dtype, prototype.size) == (trt.DataType.FLOAT, 108)
    builder, network, config, _ = parts(trt)
    engine = trt.Runtime(builder.logger).deserialize_cuda_engine(builder.build_serialized_network(network, config))
    assert not engine.refittable
    assert engine.get_engine_stat(trt.EngineStat.STRIPPED_WEIGHTS_SIZE) == -1
    with pytest.raises(TypeError, match="nullptr"):
        trt.Refitter(engine, builder.logger)


def test_weights_are_an_address_and_a_count(stand: StandIn) -> None:
    trt: Any = stand.module
    array = np.arange(6, dtype=np.float16).reshape(2, 3)
    for weights in (trt.Weights(array), trt.Weights(trt.DataType.HALF, ptr=array.ctypes.data, count=6)):
        assert (weights.dtype, weights.size, weights.nbytes, len(weights)) == (trt.DataType.HALF, 6, 12, 6)
        np.testing.assert_array_equal(weights.numpy(), array.reshape(-1))
        assert np.shares_memory(weights.numpy(), array)
    assert (trt.Weights().dtype, trt.Weights(trt.DataType.INT8).size) == (trt.DataType.FLOAT, 0)
    with pytest.raises(ValueError, match="non-contiguous"):
        trt.Weights(array.T)
    with pytest.raises(TypeError, match="float64"):
        trt.Weights(array.astype(np.float64))
    with pytest.raises(TypeError, match="incompatible"):
        trt.Weights(trt.DataType.HALF, array.ctypes.data)
    with pytest.raises(AttributeError, match="no setter"):
        trt.Weights().size = 2


def test_a_constant_is_stripped_and_what_sizes_a_resize_is_not(stand: StandIn) -> None:
    """NVIDIA's parser names a Constant's weights after what it makes."""
    scales = numpy_helper.from_array(np.array([1, 1, 2, 2], np.float32), "scales")
    half = numpy_helper.from_array(np.full(1, 0.5, np.float32), "value")
    graph = helper.make_graph(
        [helper.make_node("Constant", [], ["half"], value=half), helper.make_node("Mul", ["input", "half"], ["mul"]),
         helper.make_node("Resize", ["mul", "", "scales"], ["output"], mode="nearest")],
        "resize",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 3, 6, 5])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, ["batch", 3, 12, 10])],
        [scales],
    )  # fmt: skip
    data = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9).SerializeToString()
    trt: Any = stand.module
    builder, network, config, _ = parts(trt, data)
    config.set_flag(trt.BuilderFlag.STRIP_PLAN)
    engine = trt.Runtime(builder.logger).deserialize_cuda_engine(builder.build_serialized_network(network, config))
    refitter = trt.Refitter(engine, builder.logger)
    assert refitter.get_missing_weights() == ["half"]
    assert refitter.set_named_weights("half", np.full(1, 0.25, np.float32))
    assert refitter.refit_cuda_engine()
    x, out = np.ones((1, 3, 6, 5), np.float32), np.zeros((1, 3, 12, 10), np.float32)
    np.testing.assert_array_equal(run(stand, engine, x, out), np.full_like(out, 0.25))


# ---- CUDA


def test_the_table_of_cuda_functions_is_the_real_modules() -> None:
    real = pytest.importorskip("cuda.bindings.runtime", reason="cuda-python is not installed")
    for name, parameters in cuda_runtime.PARAMETERS.items():
        line = getattr(real, name).__doc__.splitlines()[0]
        inside = line[line.index("(") + 1 : line.rindex(")")]
        said = tuple(each.split(":")[0].split()[-1] for each in inside.split(",")) if inside else ()
        assert said == parameters, line
    for mine in (cuda_runtime.cudaError_t, cuda_runtime.cudaMemcpyKind):
        theirs = getattr(real, mine.__name__)
        assert {member.name: int(member) for member in mine} == {m.name: int(getattr(theirs, m.name)) for m in mine}
    for status, text in cuda_runtime.MESSAGES.items():
        assert real.cudaGetErrorString(real.cudaError_t(int(status)))[1] == text
        assert real.cudaGetErrorName(real.cudaError_t(int(status)))[1] == status.name.encode()
    assert all(hasattr(real.cudaDeviceProp, name) for name in cuda_runtime.cudaDeviceProp.__slots__)
    assert hasattr(real.cudaStream_t, "__int__")
    for name in cuda_runtime.PARAMETERS:
        block = inspect.cleandoc(getattr(real, name).__doc__.split("Returns\n", 1)[1].split("\n\n", 1)[0])
        values = sum(not line.startswith((" ", "-")) for line in inspect.cleandoc("\n" + block).splitlines()) - 1
        expected = 0 if name in cuda_runtime.RETURNS_NOTHING else 2 if name == "cudaMemGetInfo" else 1
        assert values == expected, (name, block)


def test_device_memory_is_watched(stand: StandIn) -> None:
    cuda: Any = stand.runtime
    kinds, array = cuda.cudaMemcpyKind, np.arange(8, dtype=np.float32)
    status, address = cuda.cudaMalloc(32)
    assert (int(status), stand.live_allocations()) == (0, {address: 32})
    assert cuda.cudaMemcpy(address, array.ctypes.data, 32, kinds.cudaMemcpyHostToDevice) == (cuda.cudaError_t.cudaSuccess,)
    with pytest.raises(AssertionError, match="run out of an allocation"):
        cuda.cudaMemcpy(address + 4, array.ctypes.data, 32, kinds.cudaMemcpyHostToDevice)
    with pytest.raises(AssertionError, match="is device memory"):
        cuda.cudaMemcpy(address, address, 32, kinds.cudaMemcpyHostToDevice)
    with pytest.raises(AssertionError, match="is no device memory"):
        cuda.cudaMemcpy(array.ctypes.data, array.ctypes.data, 32, kinds.cudaMemcpyDeviceToHost)
    with pytest.raises(TypeError, match="cudaMemcpyKind"):
        cuda.cudaMemcpy(address, array.ctypes.data, 32, 1)
    with pytest.raises(TypeError, match="missing"):
        cuda.cudaMalloc()
    assert cuda.cudaFree(address) == (0,)
    with pytest.raises(AssertionError, match="freed twice"):
        cuda.cudaFree(address)
    assert cuda.cudaMalloc(stand.gpu.total_memory + 1) == (cuda.cudaError_t.cudaErrorMemoryAllocation, None)
    stand.gpu.fail["cudaGetDeviceCount"] = "cudaErrorInsufficientDriver"
    assert cuda.cudaGetDeviceCount() == (35, None)
    assert cuda.cudaGetErrorString(cuda.cudaError_t(35))[1].startswith(b"CUDA driver version")


def test_events_measure_what_was_waited_for(stand: StandIn) -> None:
    cuda: Any = stand.runtime
    stream = cuda.cudaStreamCreate()[1]
    first, second = cuda.cudaEventCreate()[1], cuda.cudaEventCreate()[1]
    cuda.cudaEventRecord(first, stream)
    cuda.cudaEventRecord(second, stream)
    assert cuda.cudaEventElapsedTime(first, second) == (cuda.cudaError_t.cudaErrorNotReady, None)
    cuda.cudaEventSynchronize(second)
    status, milliseconds = cuda.cudaEventElapsedTime(first, second)
    assert status == 0
    assert milliseconds >= 0
    assert set(stand.leaks()) == {"streams", "events"}
    with pytest.raises(AttributeError):
        cuda.cudaNoSuchThing  # noqa: B018
