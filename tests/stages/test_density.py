"""Convolutions alone in a runtime by kernel size, and the device's own ceilings."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

from repdeploy import roofline
from repdeploy.density import CPU, FAST_ALGORITHM, KERNELS, PAPER, PEAK_NOISE, depthwise_seconds, setting, table
from repdeploy.errors import BackendFailed, BackendMissing
from repdeploy.graph.single_node import write_single_node
from repdeploy.measurements import LayerKind, RanLayer
from repdeploy.roofline import SIDES, measured
from repdeploy.runtimes import RUNTIMES
from repdeploy.runtimes.interface import NETWORK, Feeds, Job, Missing, Runtime
from repdeploy.runtimes.torch_eager import TorchEager

INSTALLED = tuple(
    runtime
    for runtime in RUNTIMES.working()
    if runtime.device == "cpu" and runtime.needs in ("network", "onnx") and runtime.by_default and runtime.missing() is None
)
SMALL = {"batch": 2, "channels": 6, "side": 5}
"""Operations of a 1x1: 2 x 2 x 6 x 6 x 5 x 5 = 3600."""


@dataclass(frozen=True)
class Told:
    """A runtime whose runs take as long as it is told, by kernel size; it keeps the jobs that it was given."""

    seconds: Mapping[int, tuple[float, ...]]
    layers: tuple[RanLayer, ...] = ()
    jobs: list[Job] = field(default_factory=list)
    name: str = "told"
    device: str = "cpu"
    precision: str = "float32"
    layout: str = "NCHW"
    by_default: bool = True
    needs: str = NETWORK
    profile_environment: Mapping[str, str] = field(default_factory=lambda: {"TOLD_VERBOSE": "1"})

    def missing(self) -> Missing | None:
        return None

    @contextmanager
    def open(self, job: Job) -> Iterator[Told]:
        self.jobs.append(job)
        yield self

    def timer(self, x: Feeds | np.ndarray) -> Callable[[], float]:
        runs = self.seconds[self.jobs[-1].module().weight.shape[-1]]
        order = iter(range(10_000))
        return lambda: runs[next(order) % len(runs)]

    def profile(self, job: Job, x: Feeds | np.ndarray, runs: int) -> tuple[str, tuple[RanLayer, ...]]:
        if not self.layers:
            raise BackendFailed("it wrote nothing")
        return "told", self.layers


def at(rates: Mapping[int, float]) -> dict[int, tuple[float, ...]]:
    """Seconds of SMALL's convolutions at GFLOP/s by kernel size."""
    return {kernel: (3600 * kernel**2 / rate / 1e9,) for kernel, rate in rates.items()}


def layer(kind: LayerKind, implementation: str, seconds: float) -> RanLayer:
    return RanLayer(implementation, kind, implementation, seconds)


@pytest.mark.parametrize("runtime", INSTALLED, ids=lambda runtime: runtime.name)
def test_every_runtime_that_takes_a_network_has_a_table(runtime: Runtime) -> None:
    found = table(runtime, 1, **SMALL, seconds=0.01, peak=100.0)
    assert (found.runtime, found.device, found.precision) == (runtime.name, "cpu", runtime.precision)
    assert (found.batch, found.channels, found.side) == (2, 6, 5)
    assert [cell.kernel for cell in found.cells] == [1, 3, 5, 7]
    for cell in found.cells:
        assert cell.gflops * cell.seconds * 1e9 == pytest.approx(3600 * cell.kernel**2)
        assert cell.share == pytest.approx(cell.gflops / 100)
        assert FAST_ALGORITHM not in cell.note  # so small a convolution reaches a fraction of 100 GFLOP/s


def test_the_runtimes_are_installed_here() -> None:
    assert {"torch", "onnxruntime", "openvino"} <= {runtime.name for runtime in INSTALLED}


def test_both_forms_of_a_job_are_one_convolution_of_harmless_numbers() -> None:
    told = Told(at(dict.fromkeys(KERNELS, 1.0)))
    channels, side = 16, 9
    with_file = []

    class Reader(Told):
        """Runs the ONNX file while it is there."""

        @contextmanager
        def open(self, job: Job) -> Iterator[Told]:
            self.jobs.append(job)
            with_file.append(onnxruntime.InferenceSession(str(job.onnx()), providers=["CPUExecutionProvider"]))
            yield self

    table(Reader(told.seconds, jobs=told.jobs), 1, batch=2, channels=channels, side=side, seconds=0.0, peak=1.0)
    images = np.random.default_rng(3).standard_normal((2, channels, side, side), np.float32)
    for job, session in zip(told.jobs[: len(KERNELS)], with_file, strict=True):
        (found,) = session.run(None, {"x": images})
        module = job.module()
        assert not module.training
        assert found.shape == images.shape == (2, *job.image)
        assert np.allclose(found, module(torch.from_numpy(images)).numpy(), atol=1e-4)
        assert 0.3 < found.std() < 3
        smallest = module.weight.abs().min()
        assert smallest * np.abs(images).min() > np.finfo(np.float32).tiny


def test_a_rate_that_the_direct_algorithm_cannot_have_is_noted() -> None:
    """Of a peak of 100 GFLOP/s: beyond its noise, and for most of the runs."""
    noise = 100 * (1 + PEAK_NOISE)
    seconds = at({1: 60, 3: 250, 5: noise * 0.99, 7: noise * 1.01})
    notes = {cell.kernel: cell.note for cell in table(Told(seconds), 1, **SMALL, seconds=0.0, peak=100.0).cells}
    assert notes == {1: "", 3: FAST_ALGORITHM, 5: "", 7: FAST_ALGORITHM}
    wide = seconds | {3: (*seconds[3], *at({3: 90})[3])}  # every other run takes longer
    assert table(Told(wide), 1, **SMALL, seconds=0.0, peak=100.0).cells[1].note == ""
    low = table(Told(seconds), 1, **SMALL, seconds=0.0, peak=20.0)  # measured while something else ran: the 1x1 says so
    assert [cell.note for cell in low.cells] == ["", FAST_ALGORITHM, FAST_ALGORITHM, FAST_ALGORITHM]
    assert low.cells[0].share == pytest.approx(3)


def test_a_cell_names_what_ran_where_the_process_was_made_to_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = at(dict.fromkeys(KERNELS, 1.0))
    layers = (layer("reorder", "jit:reorder", 9.0), layer("convolution", "first", 1.0), layer("matmul", "longest", 2.0))
    quiet = table(Told(seconds, layers), 1, **SMALL, seconds=0.0, peak=1.0)
    assert {cell.implementation for cell in quiet.cells} == {""}
    monkeypatch.setenv("TOLD_VERBOSE", "1")
    told = table(Told(seconds, layers), 1, **SMALL, seconds=0.0, peak=1.0)
    assert {cell.implementation for cell in told.cells} == {"longest"}
    assert {cell.note for cell in told.cells} == {""}
    failed = table(Told(seconds), 1, **SMALL, seconds=0.0, peak=1.0)
    assert {(cell.implementation, cell.note) for cell in failed.cells} == {("", "what ran is not known: it wrote nothing")}


def test_a_runtime_of_compiled_files_has_none() -> None:
    compiled = Told({}, name="tensorrt", needs="tensorrt")
    with pytest.raises(BackendFailed, match="tensorrt runs compiled files"):
        table(compiled, 1, **SMALL, seconds=0.0, peak=1.0)
    with pytest.raises(BackendFailed, match="tensorrt runs compiled files"):
        depthwise_seconds(compiled, 1, kernel=3, **SMALL, seconds=0.0)


def test_a_depthwise_convolution_is_one() -> None:
    told = Told({31: (0.5, 0.25, 0.125)})
    assert depthwise_seconds(told, 1, kernel=31, channels=8, side=7, batch=2, seconds=0.0) == 0.25
    module = told.jobs[0].module()
    assert (module.groups, module.in_channels, module.kernel_size, module.padding) == (8, 8, (31, 31), (15, 15))
    for runtime in INSTALLED:
        assert 0 < depthwise_seconds(runtime, 1, kernel=5, channels=8, side=7, batch=2, seconds=0.01) < 1


def test_a_cpu_is_measured_at_what_it_can_finish() -> None:
    assert setting("cpu") == CPU
    work = 2 * CPU.batch * (CPU.channels * CPU.side) ** 2 * sum(kernel**2 for kernel in KERNELS)
    assert work == pytest.approx(34.5e9, rel=0.01)  # 75 ms at 460 GFLOP/s


def test_a_product_of_one_node_is_the_product(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    weight, x = (generator.standard_normal(shape, np.float32) for shape in ((4, 3), (5, 4)))
    path = write_single_node(tmp_path / "product.onnx", "MatMul", weight, (5, 4), (5, 3))
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert np.allclose(session.run(None, {"x": x})[0], x @ weight, atol=1e-5)


def test_the_ceilings_are_measured_and_say_by_what() -> None:
    threads = torch.get_num_threads()
    found = measured("cpu", 1, "float32", 0.2)
    assert torch.get_num_threads() == threads
    backend, sides = found.gflops_by.split(", ")
    assert backend in ("torch.matmul", "onnxruntime MatMul", "openvino MatMul", "numpy matmul")
    assert sides in [f"{side} x {side} x {side}" for side in SIDES]
    assert found.bandwidth_by.split(", ")[0] in ("torch copy_", "numpy copyto")
    assert found.device == "cpu"
    assert 1 < found.gflops < 1e6  # between a slow core and the largest machine there is
    assert 1e8 < found.bandwidth < 1e14


def test_a_peak_is_the_best_of_all_backends_and_sides_that_it_has_time_for() -> None:
    tried: list[tuple[str, int]] = []

    def backend(name: str, rate: float) -> roofline._Backend:
        @contextmanager
        def opened(side: int) -> Iterator[Callable[[], float]]:
            tried.append((name, side))
            yield lambda: 2 * side**3 / rate

        return roofline._Backend(name, opened)

    def broken(side: int) -> contextmanager:
        raise BackendFailed("it has no such product")

    backends = [backend("slow", 1e9), roofline._Backend("broken", broken), backend("fast", 1e14)]
    best = roofline._best_product(backends, "float32", 0.3)
    assert best.rate == pytest.approx(1e14)
    assert best.by.startswith("fast, ")
    assert [side for name, side in tried if name == "slow"] == [512]  # one more would take longer than there is
    assert tuple(side for name, side in tried if name == "fast") == SIDES
    with pytest.raises(BackendMissing, match="broken: it has no such product"):
        roofline._best_product(backends[1:2], "float32", 0.01)


def test_numpy_counts_only_with_as_many_threads_as_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    cores = os.cpu_count() or 1
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)  # threadpoolctl is not installed
    assert roofline._numpy_threads(cores) is not None
    assert roofline._numpy_threads(cores + 1) is None


def test_the_last_level_cache_is_all_of_it(tmp_path: Path) -> None:
    """Two groups of two cores, each with a cache of its own; a fifth core tells nothing."""
    for core, shared in enumerate(("0-1", "0-1", "2-3", "2-3")):
        for index, (level, size, owners) in enumerate((("1", "32K", str(core)), ("3", "16384K", shared))):
            folder = tmp_path / f"cpu{core}" / "cache" / f"index{index}"
            folder.mkdir(parents=True)
            for name, text in (("level", level), ("size", size), ("shared_cpu_list", owners)):
                (folder / name).write_text(f"{text}\n")
    (tmp_path / "cpu4" / "cache" / "index0").mkdir(parents=True)
    assert roofline._last_level_cache(tmp_path) == 2 * (16 << 20)
    assert roofline._last_level_cache(tmp_path / "nowhere") is None


def test_where_nothing_multiplies_it_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BackendMissing, match="neither cpu nor cuda"):
        measured("npu", 1, "float32", 0.01)
    with pytest.raises(BackendMissing, match="nothing here multiplies matrices in int4"):
        measured("cpu", 1, "int4", 0.01)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BackendMissing, match="CUDA") as failure:
        measured("cuda", 1, "float32", 0.01)
    assert failure.value.hint


@pytest.mark.cuda
def test_a_gpu_has_ceilings_and_a_table() -> None:
    narrow, full = (measured("cuda", 1, precision, 2.0) for precision in ("float16", "float32"))
    assert narrow.gflops > full.gflops
    chosen = setting("cuda")
    assert (chosen.channels, chosen.side) == (PAPER.channels, PAPER.side)
    found = table(TorchEager("cuda"), 1, batch=1, channels=256, side=56, seconds=0.1, peak=full.gflops)
    assert all(cell.gflops > 0 for cell in found.cells)
