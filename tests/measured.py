"""A benchmark as records: RepVGG-A0's 22 convolutions in three runtimes, with everything that a page can be asked to show."""

from __future__ import annotations

import math
import random
from dataclasses import replace

from repdeploy.measurements import (
    Bench,
    BenchRow,
    Comparison,
    Density,
    DensityCell,
    Finding,
    Interval,
    Memory,
    Profile,
    RanLayer,
    Roofline,
    Timing,
    Watched,
)  # fmt: skip

PEAK, BANDWIDTH = 143.2, 21.4e9
WIDTHS, DEPTHS = (48, 48, 96, 192, 1280), (1, 2, 4, 14, 1)
SPEEDS = {"torch": (0.046, 1.42), "onnxruntime": (0.034, 1.71), "openvino": (0.027, 1.0)}
"""Seconds of the deploy network for one image, and how much slower the training-time network is."""
KERNELS = {"torch": "jit:avx512_core", "onnxruntime": "MlasConvNchwc", "openvino": "brgconv_avx512_f32"}


def convolutions(runtime: str, batch: int, kernels: tuple[int, ...], seconds: float) -> tuple[RanLayer, ...]:
    """One convolution per kernel size and block, which share the time by their operations."""
    layers: list[RanLayer] = []
    side, inputs = 224, 3
    for stage, (width, depth) in enumerate(zip(WIDTHS, DEPTHS, strict=True)):
        for block in range(depth):
            stride = 2 if block == 0 else 1
            out = side // stride
            for kernel in kernels:
                flops = 2 * batch * width * inputs * kernel * kernel * out * out
                moved = 4 * (batch * inputs * side * side + width * inputs * kernel * kernel + batch * width * out * out)
                limit = min(PEAK, flops / moved * BANDWIDTH / 1e9)
                layers.append(
                    RanLayer(
                        f"stage{stage}.{block}.conv{kernel}x{kernel}", "convolution", f"{KERNELS[runtime]}_{kernel}x{kernel}",
                        flops / limit / 1e9 * (1.3 + 0.1 * stage), (kernel, kernel), (stride, stride), 1, inputs, width,
                        (batch, inputs, side, side), (batch, width, out, out), flops, moved,
                    )
                )  # fmt: skip
            side, inputs = out, width
    total = sum(layer.seconds for layer in layers) / seconds / 0.93
    return tuple(replace(layer, seconds=layer.seconds / total) for layer in layers)


def timing(network: str, runtime: str, batch: int, median: float, runs: int, noise: float = 0.02) -> Timing:
    chance = random.Random(f"{network} {runtime} {batch}")
    seconds = tuple(
        median * math.exp(abs(chance.gauss(0, noise)) + (0.3 if chance.random() < 0.01 else 0)) for _ in range(runs)
    )
    return Timing(network, runtime, "cpu", "float32", 2, batch, (batch, 3, 224, 224), seconds, 24, noise < 0.1)


def row(runtime: str, batch: int, runs: int) -> BenchRow:
    single, factor = SPEEDS[runtime]
    deploy = single * batch * (0.9 if batch > 1 else 1)
    noise = 0.2 if (runtime, batch) == ("torch", 8) else 0.02
    timings = tuple(
        timing(network, runtime, batch, median, runs, noise)
        for network, median in (("training-time", deploy * factor), ("deploy", deploy))
    )
    ratio = timings[0].median / timings[1].median
    reorder = RanLayer("reorder", "reorder", "simple:any", deploy * 0.03)
    profiles = tuple(
        Profile(network, "ONEDNN_VERBOSE", (*convolutions(runtime, batch, kernels, seconds), reorder))
        for network, kernels, seconds in (("training-time", (3, 1), deploy * factor), ("deploy", (3,), deploy))
    )
    finding = Finding(
        "fused-already",
        "deploy",
        "the runtime fused the branches of the training-time network itself: 22 convolutions ran in both networks",
        "nothing to do; compare with a runtime that does not",
    )
    return BenchRow(
        runtime,
        "cpu",
        batch,
        timings,
        Interval(ratio, ratio * (1 - noise / 2), ratio * (1 + noise / 2)),
        warnings=("deploy: the middle half of the runs spreads over 27% of the median",) if noise > 0.1 else (),
        memory=(
            Memory("training-time", 36_440_000, 4_816_896 * batch, "stage1.0.add", 181_000_000),
            Memory("deploy", 33_240_000, 2_408_448 * batch, "stage1.0.conv3x3", 142_000_000),
        ),
        profiles=profiles,
        findings=(finding,) if runtime == "openvino" else (),
        watched=Watched((2600.0, 3100.0), (), 0.4),
    )


def density(runtime: str, shares: tuple[float, ...]) -> Density:
    cells = tuple(
        DensityCell(kernel, kernel**2 * 1e-3 / share, PEAK * share, share, f"{KERNELS[runtime]}_{kernel}x{kernel}")
        for kernel, share in zip((1, 3, 5, 7), shares, strict=True)
    )
    return Density(runtime, "cpu", "float32", 1, 128, 56, 2, cells)


def bench(runs: int = 130) -> Bench:
    """Three runtimes at two batch sizes, one of them unstable; a runtime that is missing."""
    rows = tuple(row(runtime, batch, runs) for runtime in SPEEDS for batch in (1, 8))
    absent = tuple(
        BenchRow("torch.compile", "cpu", batch, missing="there is no C++ compiler", hint="apt install g++") for batch in (1, 8)
    )
    return Bench(
        "repvgg.repdeploy",
        (*rows, *absent),
        {"processor": "Example CPU 2.6 GHz", "cores": "2", "threads": "2", "torch": "2.13.0", "onnxruntime": "1.31.1"},
        notes=("the machine was busy before the benchmark began: 0.8 runnable processes per core",),
        rooflines=(Roofline("cpu", 2, PEAK, "product of 2048 x 2048 in torch", BANDWIDTH, "a copy of 256 MB by 2 threads"),),
        density=(density("torch", (0.55, 0.82, 0.78, 0.74)), density("openvino", (0.71, 1.06, 0.9, 0.88))),
        baseline=(
            Comparison("torch", "cpu", 1, "deploy", Interval(1.08, 1.05, 1.11)),
            Comparison("openvino", "cpu", 1, "deploy", Interval(1.003, 0.99, 1.02)),
        ),
    )
