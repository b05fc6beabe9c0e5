"""What each runtime says that it ran: every convolution of an odd network, with its kernel, stride, groups and operations."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from repdeploy.errors import BackendFailed
from repdeploy.exporters.options import EngineOptions
from repdeploy.exporters.tensorrt_engine import build
from repdeploy.gates import PRECISION_BUDGETS
from repdeploy.measurements import RanLayer
from repdeploy.progress import silent
from repdeploy.runtimes import (
    cuda_driver,
    cuda_profile,
    onednn_verbose,
    onnx_runtime,
    openvino_cpu,
    tensorrt_cuda,
    tensorrt_profile,
)
from repdeploy.runtimes.interface import Job, Profiling
from repdeploy.runtimes.ran_layers import typical
from repdeploy.vouching import Compiled
from tests.standins import install

SIZE = (33, 47)
RUNS = 5
HEAD = 5
LAYERS: dict[str, tuple[int, int, tuple[int, int], int, int, bool]] = {
    "stem": (3, 16, (3, 3), 2, 1, True),
    "point": (16, 24, (1, 1), 1, 1, False),
    "depth": (24, 24, (5, 5), 1, 24, True),
    "large": (24, 24, (31, 31), 1, 24, True),
    "groups": (24, 28, (3, 3), 2, 2, True),
    "wide": (28, 20, (1, 3), 1, 1, True),
}
"""Inputs, outputs, kernel, stride, groups, bias. 24, 28 and 20 channels do not fill vectors of 8 or 16."""


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        for name, (inputs, outputs, kernel, stride, groups, bias) in LAYERS.items():
            padding = (kernel[0] // 2, kernel[1] // 2)
            self.add_module(name, nn.Conv2d(inputs, outputs, kernel, stride, padding, groups=groups, bias=bias))
        self.head = nn.Linear(LAYERS["wide"][1], HEAD)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for name in LAYERS:
            x = self.get_submodule(name)(x).relu()
        return self.head(x.mean((2, 3)))


def wanted(batch: int) -> list[RanLayer]:
    """The convolutions, without names, kernels and times."""
    found, (height, width) = [], SIZE
    for inputs, outputs, kernel, stride, groups, bias in LAYERS.values():
        before, height, width = (batch, inputs, height, width), -(-height // stride), -(-width // stride)
        after = (batch, outputs, height, width)
        taps, places = inputs // groups * kernel[0] * kernel[1], batch * outputs * height * width
        numbers = batch * inputs * before[2] * before[3] + outputs * (taps + bias) + places
        found.append(
            RanLayer(
                "", "convolution", "", 0.0, kernel, (stride, stride), groups, inputs, outputs, before, after,
                flops=places * (2 * taps + bias), bytes=4 * numbers,
            )
        )  # fmt: skip
    return found


def convolutions(layers: tuple[RanLayer, ...] | list[RanLayer], **changes: Any) -> list[RanLayer]:
    kept = [layer for layer in layers if layer.kind == "convolution"]
    return [replace(layer, name="", implementation="", seconds=0.0, **changes) for layer in kept]


def head_of(layers: tuple[RanLayer, ...]) -> RanLayer:
    (found,) = (layer for layer in layers if layer.kind == "matmul")
    return found


def images(batch: int) -> np.ndarray:
    return np.random.default_rng(batch).standard_normal((batch, 3, *SIZE), np.float32)


@pytest.fixture(scope="module")
def network() -> Odd:
    return Odd().eval()


@pytest.fixture(scope="module")
def graph(network: Odd, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The network as ONNX with an open batch, written by hand, for torch's exporter takes seconds."""
    stored = {name: value.numpy() for name, value in network.state_dict().items()}
    nodes, value = [], "x"
    for name, (_, _, kernel, stride, groups, bias) in LAYERS.items():
        pads = [kernel[0] // 2, kernel[1] // 2] * 2
        inputs = [value, f"{name}.weight", *([f"{name}.bias"] if bias else [])]
        nodes.append(helper.make_node("Conv", inputs, [name], name, pads=pads, strides=[stride] * 2, group=groups))
        value = f"{name}.on"
        nodes.append(helper.make_node("Relu", [name], [value], value))
    nodes += [
        helper.make_node("GlobalAveragePool", [value], ["mean"], "pool"),
        helper.make_node("Flatten", ["mean"], ["flat"], "flatten"),
        helper.make_node("Gemm", ["flat", "head.weight", "head.bias"], ["y"], "head", transB=1),
    ]
    ports = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, *SIZE]),
             helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", HEAD])]  # fmt: skip
    made = helper.make_graph(nodes, "odd", ports[:1], ports[1:], [numpy_helper.from_array(v, k) for k, v in stored.items()])
    path = tmp_path_factory.mktemp("odd") / "odd.onnx"
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return path


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def running(network: nn.Module, batch: int, layout: torch.memory_format = torch.contiguous_format) -> Callable[[], None]:
    x = torch.from_numpy(images(batch)).contiguous(memory_format=layout)

    def once() -> None:
        with torch.inference_mode():
            network(x)

    return once


def within_the_wall(profile: Callable[[], tuple[RanLayer, ...]], timer: Callable[[], float]) -> bool:
    """Layers take no longer than the run, as far as a busy machine lets one see: in one of some attempts."""
    for _ in range(5):
        before = max(timer() for _ in range(RUNS))
        if sum(layer.seconds for layer in profile()) <= 1.2 * max(before, *(timer() for _ in range(RUNS))):
            return True
    return False


# ---- torch on the CPU


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("batch", [1, 3])
def test_torch_tells_every_convolution(network: Odd, batch: int, layout: torch.memory_format) -> None:
    once = running(Odd().eval().to(memory_format=layout), batch, layout)
    layers = onednn_verbose.profiled(once, RUNS)
    assert convolutions(layers) == wanted(batch)
    named = [layer for layer in layers if layer.kind == "convolution"]
    assert [layer.name for layer in named] == list(LAYERS)
    assert all(layer.implementation and layer.seconds > 0 for layer in named)
    assert head_of(layers).flops == batch * HEAD * (2 * 20 + 1)
    assert [layer.implementation for layer in layers].count("aten::relu") == len(LAYERS)
    assert [layer.name for layer in layers].count("outside oneDNN") == 1
    assert layers[-1].kind == "other"
    assert any(layer.kind == "reorder" and layer.bytes for layer in layers)


@pytest.mark.usefixtures("one_thread")
def test_torch_accounts_for_the_whole_run(network: Odd) -> None:
    once = running(network, 3)

    def timer() -> float:
        start = time.perf_counter()
        once()
        return time.perf_counter() - start

    assert within_the_wall(lambda: onednn_verbose.profiled(once, RUNS), timer)


@pytest.mark.usefixtures("one_thread")
def test_a_large_depthwise_kernel_falls_back_in_nchw_only() -> None:
    """On AVX-512: a matrix product per channel, 40 to 50 times slower than the kernel that channels_last has."""
    found = {}
    for layout in (torch.contiguous_format, torch.channels_last):
        layer = nn.Conv2d(32, 32, 31, padding=15, groups=32).eval().to(memory_format=layout)
        x = torch.randn(1, 32, 17, 24).contiguous(memory_format=layout)
        (found[layout],) = (item for item in onednn_verbose.profiled(partial(layer, x), RUNS) if item.kind == "convolution")
    slow, fast = found[torch.contiguous_format], found[torch.channels_last]
    assert slow.flops == fast.flops
    assert slow.is_depthwise
    if torch.backends.cpu.get_cpu_capability() == "AVX512":
        assert "gemm" in slow.implementation.split(":")
        assert "gemm" not in fast.implementation.split(":")
        assert slow.seconds > 5 * fast.seconds


@pytest.mark.usefixtures("one_thread")
def test_without_onednn_torch_is_still_told(network: Odd, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    layers = onednn_verbose.profiled(running(network, 3), 1)
    assert convolutions(layers) == wanted(3)
    assert all(layer.implementation.startswith("aten::") for layer in layers if layer.kind == "convolution")
    assert not [layer for layer in layers if layer.kind == "reorder"]


def test_standard_output_is_given_back(network: Odd, capfd: pytest.CaptureFixture[str]) -> None:
    def fails() -> None:
        running(network, 1)()
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        onednn_verbose.profiled(fails, 1)
    onednn_verbose.profiled(running(network, 1), 1)
    os.write(1, b"still here")
    running(network, 3)()
    assert capfd.readouterr().out == "still here"


def test_runs_that_differ_are_not_averaged(network: Odd) -> None:
    calls = iter(range(1, 100))
    with pytest.raises(BackendFailed, match="does not tell the same layers in every run"):
        onednn_verbose.profiled(lambda: running(network, next(calls))(), 3)
    with pytest.raises(BackendFailed, match="it tells 1, 2"):
        typical([[RanLayer("a", "other", "k", 1.0)], [RanLayer("a", "other", "k", 1.0)] * 2], "it")
    middle = typical([[RanLayer("a", "other", "k", float(n))] for n in (5, 1, 2)], "it")
    assert [layer.seconds for layer in middle] == [2.0]


LINE = (
    "onednn_verbose,v1,primitive,exec,cpu,convolution,jit:avx512_core,forward_training,src:f32:a:blocked:aBcd4b::f0 "
    "wei:f32:a:blocked:aBCde4c4b::f0 bia:f32:a:blocked:a::f0 dst:f32:a:blocked:aBcd4b::f0,attr-scratchpad:user,"
    "alg:convolution_direct,g2mb1_ic8oc16_ih33oh17kh3sh2dh0ph1_iw47ow24kw3sw2dw0pw1,0.5"
)


def test_a_line_of_onednn_is_read_by_the_names_of_its_fields() -> None:
    layer = onednn_verbose.layer_of(LINE)
    assert layer is not None
    assert (layer.seconds, layer.implementation, layer.kernel, layer.stride, layer.groups) == (
        5e-4, "jit:avx512_core", (3, 3), (2, 2), 2,
    )  # fmt: skip
    assert (layer.input_shape, layer.output_shape) == ((1, 8, 33, 47), (1, 16, 17, 24))
    assert layer.flops == 16 * 17 * 24 * (2 * 4 * 9 + 1)
    names = list(onednn_verbose.FIELDS)
    moved = ["operation", names[-1], *names[1:-1]]
    parts = LINE.split(",")
    elsewhere = ",".join(["onednn_verbose", "primitive", parts[3], parts[-1], *parts[4:-1]])
    assert onednn_verbose.layer_of(elsewhere, moved) == layer
    assert onednn_verbose.fields() == onednn_verbose.FIELDS  # of the oneDNN that is here
    for other in ("onednn_verbose,v1,info,cpu,runtime:OpenMP,nthr:1", "onednn_verbose,v1,graph,exec,cpu,1", "hello", ""):
        assert onednn_verbose.layer_of(other) is None
    with pytest.raises(BackendFailed, match="is not understood"):
        onednn_verbose.layer_of("onednn_verbose,v1,primitive,exec,cpu,convolution,jit")


def test_what_a_descriptor_leaves_out() -> None:
    square = onednn_verbose.layer_of(
        LINE.replace("g2mb1_ic8oc16_ih33oh17kh3sh2dh0ph1_iw47ow24kw3sw2dw0pw1", "ic8ih9oc4oh9kh3ph1")
    )
    assert square is not None
    assert (square.input_shape, square.output_shape, square.kernel) == ((1, 8, 9, 9), (1, 4, 9, 9), (3, 3))
    assert (square.stride, square.groups) == ((1, 1), 1)
    line = onednn_verbose.layer_of(
        LINE.replace("g2mb1_ic8oc16_ih33oh17kh3sh2dh0ph1_iw47ow24kw3sw2dw0pw1", "mb2ic8oc4_iw9ow7kw3sw1dw0pw0")
    )
    assert line is not None
    assert (line.input_shape, line.output_shape, line.kernel, line.stride) == ((2, 8, 9), (2, 4, 7), (3,), (1,))


@pytest.mark.parametrize(
    ("primitive", "problem", "shapes", "flops"),
    [
        ("inner_product", "mb3ic20oc5", ((3, 20), (3, 5)), 3 * 5 * (2 * 20 + 1)),
        ("inner_product", "mb3_ic2ih4iw5oc5", ((3, 40), (3, 5)), 3 * 5 * (2 * 40 + 1)),
        ("matmul", "7x4x6:7x6x5", ((7, 4, 6), (7, 4, 5)), 7 * 4 * 5 * (2 * 6 + 1)),
        ("reorder", "1x8x33x47", ((1, 8, 33, 47), (1, 8, 33, 47)), 0),
        ("eltwise", "1x8x33x47", ((1, 8, 33, 47), (1, 8, 33, 47)), 0),
    ],
)
def test_other_primitives(primitive: str, problem: str, shapes: tuple[Any, Any], flops: int) -> None:
    before, _, time = LINE.rpartition(",")
    line = f"{before.rpartition(',')[0].replace(',convolution,', f',{primitive},')},{problem},{time}"
    layer = onednn_verbose.layer_of(line)
    assert layer is not None
    assert layer.kind == {"inner_product": "matmul", "matmul": "matmul", "reorder": "reorder"}.get(primitive, "other")
    assert ((layer.input_shape, layer.output_shape), layer.flops) == (shapes, flops)


# ---- onnxruntime and OpenVINO


@pytest.mark.parametrize("batch", [1, 3])
def test_onnxruntime_tells_every_convolution(graph: Path, batch: int) -> None:
    runtime = onnx_runtime.CPU
    assert isinstance(runtime, Profiling)
    source, layers = runtime.profile(Job((3, *SIZE), 1, onnx=lambda: graph), images(batch), RUNS)
    assert source == "onnxruntime's profile"
    assert convolutions(layers) == wanted(batch)
    assert all(
        layer.implementation.startswith("MLAS ") for layer in layers if layer.kind in ("convolution", "matmul", "reorder")
    )
    if any("nchwc" in layer.implementation for layer in layers):  # MLAS blocks channels where the processor has AVX
        assert {layer.implementation for layer in layers if layer.kind == "reorder"} >= {"MLAS nchwc.ReorderOutput"}
    head = head_of(layers)
    assert (head.flops, head.bytes) == (batch * HEAD * (2 * 20 + 1), 4 * (batch * 25 + 20 * HEAD + HEAD))
    with runtime.open(Job((3, *SIZE), 1, onnx=lambda: graph)) as session:
        timer = session.timer(images(batch))
        assert within_the_wall(lambda: runtime.profile(Job((3, *SIZE), 1, onnx=lambda: graph), images(batch), RUNS)[1], timer)


def test_nodes_without_names_are_found(graph: Path, tmp_path: Path) -> None:
    model = onnx.load(graph)
    for node in model.graph.node:
        node.name = ""
    onnx.save(model, tmp_path / "unnamed.onnx")
    job = Job((3, *SIZE), 1, onnx=lambda: tmp_path / "unnamed.onnx")
    assert convolutions(onnx_runtime.CPU.profile(job, images(1), 1)[1]) == wanted(1)
    assert not list(tmp_path.glob("*.json"))


def test_a_norm_that_onnxruntime_runs_as_a_convolution(tmp_path: Path) -> None:
    """RepVGG's identity branch: in the blocked layout its norm is a depthwise 1x1, of as many channels as it has."""
    rng = np.random.default_rng(0)
    stored = {"w": rng.standard_normal((20, 3, 3, 3)), "v": rng.standard_normal((20, 20, 3, 3)), "s": rng.random(20) + 1}
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["a"], "first", pads=[1] * 4),
        helper.make_node("Relu", ["a"], ["b"], "on"),
        helper.make_node("Conv", ["b", "v"], ["c"], "second", pads=[1] * 4),
        helper.make_node("BatchNormalization", ["b", "s", "s", "s", "s"], ["d"], "norm"),
        helper.make_node("Add", ["c", "d"], ["y"], "sum"),
    ]
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, c, 9, 7]) for name, c in (("x", 3), ("y", 20)))
    weights = [numpy_helper.from_array(value.astype(np.float32), name) for name, value in stored.items()]
    graph = helper.make_graph(nodes, "g", [x], [y], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, tmp_path / "norm.onnx")
    image = rng.standard_normal((2, 3, 9, 7)).astype(np.float32)
    _, layers = onnx_runtime.CPU.profile(Job((3, 9, 7), 1, onnx=lambda: tmp_path / "norm.onnx"), image, 1)
    found = {(layer.kernel, layer.groups, layer.inputs, layer.outputs) for layer in layers if layer.kind == "convolution"}
    blocked = any("nchwc" in layer.implementation for layer in layers)
    norm = {((1, 1), 20, 20, 20)} if blocked else set()
    assert found == {((3, 3), 1, 3, 20), ((3, 3), 1, 20, 20)} | norm
    assert blocked or any(layer.implementation.endswith(" BatchNormalization") for layer in layers)


@pytest.mark.parametrize("runtime", [openvino_cpu.CPU, openvino_cpu.BFLOAT16_CPU], ids=lambda runtime: runtime.name)
@pytest.mark.parametrize("batch", [1, 3])
def test_openvino_tells_every_convolution(graph: Path, runtime: openvino_cpu.OpenVinoCpu, batch: int) -> None:
    assert isinstance(runtime, Profiling)
    if (absent := runtime.missing()) is not None:  # an older processor
        assert "does not compute in bfloat16" in absent.what
        return
    job = Job((3, *SIZE), 1, onnx=lambda: graph)
    source, layers = runtime.profile(job, images(batch), RUNS)
    half = runtime.precision == "bfloat16"
    assert source == "OpenVINO's performance counters (means)"
    assert convolutions(layers) == [replace(layer, bytes=layer.bytes // (1 + half)) for layer in wanted(batch)]
    assert all(layer.implementation.endswith("_bf16" if half else "_f32") for layer in layers if layer.kind == "convolution")
    assert head_of(layers).flops == batch * HEAD * (2 * 20 + 1)
    with runtime.open(job) as session:
        assert session.precision == runtime.precision
        exact, found = (item.outputs(images(batch))[0] for item in (onnx_runtime.OnnxSession(graph, 1), session))
        error = np.abs(found - exact).max() / np.abs(exact).max()
        assert error <= PRECISION_BUDGETS["bf16" if half else "fp32"]
        assert (error > PRECISION_BUDGETS["fp32"]) == half
        assert within_the_wall(lambda: runtime.profile(job, images(batch), RUNS)[1], session.timer(images(batch)))


def test_onnxruntime_on_cuda_says_what_it_lacks(graph: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    absent = onnx_runtime.CUDA.missing()
    built = onnx_runtime.CUDA_PROVIDER in onnxruntime.get_available_providers()
    assert (absent is None) == (built and cuda_driver.device_count() > 0)
    if not built:
        assert absent is not None
        assert (absent.what, "onnxruntime-gpu" in absent.hint) == ("onnxruntime is installed without CUDA", True)
        with warnings.catch_warnings(), pytest.raises(BackendFailed, match="on CPUExecutionProvider, not on CUDA"):
            warnings.simplefilter("ignore")  # that is all that onnxruntime says before it takes the CPU
            onnx_runtime.OnnxSession(graph, 1, onnx_runtime.CUDA_PROVIDER)
    monkeypatch.delenv("CUDA_LAUNCH_BLOCKING", raising=False)
    with pytest.raises(BackendFailed, match="CUDA_LAUNCH_BLOCKING=1"):
        onnx_runtime.CUDA.profile(Job((3, *SIZE), 1, onnx=lambda: graph), images(1), 1)


# ---- CUDA through torch


KERNELS = {
    "aten::mkldnn_convolution": [("void cudnn::ops::nchwToNhwcKernel<float>", 4.0), ("sm90_xmma_fprop_f32f32", 90.0),
                                 ("cudnn::fill", 1.0), ("void cudnn::ops::nhwcToNchwKernel<float>", 6.0)],
    "aten::add_": [("vectorized_elementwise_kernel<bias>", 9.0)],
    "aten::addmm": [("ampere_sgemm_32x32", 12.0)],
    "aten::clamp_min": [("vectorized_elementwise_kernel<relu>", 3.0)],
}  # fmt: skip
"""Where cuDNN's, cuBLAS' and torch's kernels are launched. Microseconds."""


def recorded(once: Callable[[], None], kernels: Mapping[str, list[tuple[str, float]]]) -> list[Any]:
    """The operators of torch's profiler on a CPU, with kernels attached as the profiler attaches those of a GPU."""
    events: list[Any] = cuda_profile.recorded(once)
    for event in events:
        for name, microseconds in kernels.get(event.name, ()):
            event.append_kernel(name, 0, microseconds)
    return events


def test_kernels_belong_to_the_operator_above_them(network: Odd) -> None:
    layers = cuda_profile.layers(recorded(running(network, 3), KERNELS))
    torchs_own = [layer.kernel for layer in convolutions(layers)]
    onednns = [layer for layer in wanted(3) if layer.kernel in torchs_own]
    assert len(onednns) >= 4  # at batch 3 oneDNN computes all but perhaps the 1x1
    assert convolutions(layers) == onednns
    first = layers[:4]
    assert [layer.kind for layer in first] == ["reorder", "convolution", "reorder", "other"]
    assert [layer.implementation.split("::")[-1] for layer in first] == [
        "nchwToNhwcKernel<float>", "sm90_xmma_fprop_f32f32", "nhwcToNchwKernel<float>", "vectorized_elementwise_kernel<relu>",
    ]  # fmt: skip
    assert [round(layer.seconds * 1e6) for layer in first] == [4, 91, 6, 3]
    assert {layer.name for layer in first[:3]} == {"stem"}
    assert first[3].name == "aten::clamp_min"  # the network's own, in none of its modules
    (head,) = (layer for layer in layers if layer.kind == "matmul")
    assert (head.implementation, head.flops) == ("ampere_sgemm_32x32", 3 * HEAD * (2 * 20 + 1))


def test_types_transposed_convolutions_and_a_bias_of_its_own() -> None:
    """bfloat16 takes two bytes; a transposed convolution has no kernel in our sense; the bias is part of its convolution."""
    layer = nn.Conv2d(4, 8, (3, 1), 2, dilation=(2, 1)).bfloat16()
    other = nn.ConvTranspose2d(8, 4, 2).bfloat16()
    x = torch.zeros(2, 4, 11, 9, dtype=torch.bfloat16)

    def once() -> None:
        with torch.inference_mode():
            other(layer(x))

    launched = [("half_kernel", 5.0)]
    half, transposed = cuda_profile.layers(recorded(once, {"aten::_convolution": launched, "aten::convolution": launched}))
    assert (half.kind, half.kernel, half.stride, half.output_shape) == ("convolution", (3, 1), (2, 2), (2, 8, 4, 5))
    assert half.bytes == 2 * (2 * 4 * 11 * 9 + 8 * 4 * 3 + 8 + 2 * 8 * 4 * 5)
    assert half.seconds == pytest.approx(10e-6)  # of both operators, the outer of which is the convolution
    assert (transposed.kind, transposed.flops) == ("other", 0)


@pytest.mark.cuda
def test_torch_on_cuda_tells_every_convolution() -> None:
    network = Odd().eval().cuda()
    x = torch.from_numpy(images(3)).cuda()

    def once() -> None:
        with torch.inference_mode():
            network(x)

    layers = cuda_profile.profiled(once, RUNS)
    assert convolutions(layers) == wanted(3)
    assert all(layer.seconds > 0 for layer in layers)


# ---- TensorRT


@pytest.mark.parametrize("version", ["10.14", "11.4"])
def test_tensorrt_tells_every_convolution(graph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    standin = install(monkeypatch, version)
    plan = tmp_path / "odd.plan"
    plan.write_bytes(build(graph, {"x": (3, *SIZE)}, (1, 3, 3), EngineOptions(), silent))
    runtime = tensorrt_cuda.CUDA
    assert isinstance(runtime, Profiling)
    for batch in (1, 3):
        job = Job((3, *SIZE), 1, compiled={"tensorrt": Compiled(plan)})
        source, layers = runtime.profile(job, images(batch), RUNS)
        assert source == "TensorRT's profiler and inspector"
        assert convolutions(layers) == wanted(batch)
        assert {layer.implementation for layer in layers if layer.kind == "convolution"} == {"standin_f32f32_implicit_gemm"}
        assert all(layer.seconds > 0 for layer in layers)
        assert head_of(layers).flops == batch * HEAD * 2 * 20
        assert len(standin.executions) >= RUNS
    assert not standin.leaks()
    assert not standin.callback_errors


def test_an_engine_that_tells_names_only() -> None:
    runs = [[("/conv/Conv + /act/Relu", 2e-3), ("Reformatting CopyNode for Input Tensor 0 to /conv/Conv", 1e-3)]] * 2
    layers = tensorrt_profile.joined(runs, ["/conv/Conv + /act/Relu"])
    assert [(layer.kind, layer.seconds, layer.flops) for layer in layers] == [("other", 2e-3, 0), ("reorder", 1e-3, 0)]
    open_size = {
        "Name": "c", "LayerType": "CaskConvolution", "ParameterType": "Convolution", "Kernel": [3, 3], "Groups": 1,
        "Inputs": [{"Name": "x", "Dimensions": [-1, 3, 8, 8]}], "Outputs": [{"Name": "y", "Dimensions": [-1, 4, 6, 6]}],
        "TacticName": "sm80_xmma",
    }  # fmt: skip
    (layer,) = tensorrt_profile.joined([[("c", 1e-3)]], [open_size])
    assert (layer.kind, layer.implementation, layer.flops) == ("convolution", "sm80_xmma", 0)


@pytest.mark.parametrize(
    ("said", "kind"),
    [
        ({"LayerType": "CaskDeconvolution", "ParameterType": "Convolution"}, "other"),
        ({"LayerType": "Reformat", "ParameterType": "Reformat"}, "reorder"),
        ({"LayerType": "gemm"}, "matmul"),
        ({"LayerType": "PointWiseV2", "ParameterType": "PointWise"}, "other"),
    ],
)
def test_kinds_of_layers_by_the_inspectors_words(said: dict[str, str], kind: str) -> None:
    (layer,) = tensorrt_profile.joined([[("a", 1e-3)]], [{"Name": "a", **said}])
    assert layer.kind == kind
