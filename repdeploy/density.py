"""What a kernel size costs: convolutions of 1x1 to 7x7 at equal channels, alone in a runtime, beside the device's peak.

Source: RepVGG, arXiv:2101.03697, section 3.1 and table 1 (batch 32, 2048 channels, 56 x 56, stride 1, on a GTX 1080 Ti): a 3x3
convolution did four times as many operations per second there as any other, for Winograd's algorithm runs it.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from repdeploy.errors import BackendFailed, words
from repdeploy.graph.single_node import write_single_node
from repdeploy.measurements import Density, DensityCell, quantile
from repdeploy.runtimes.interface import NETWORK, ONNX, Job, Profiling, Runtime
from repdeploy.statistics import interleaved, warm_up

KERNELS = (1, 3, 5, 7)
FAST_ALGORITHM = "above the measured peak: a fast algorithm (Winograd or FFT) ran"
LOW_PEAK = "above the measured peak by a direct algorithm: the peak was disturbed"
FAST_NAMES = re.compile("wino|fft", re.IGNORECASE)
LEAST_RUNS, MOST_RUNS = 5, 400
"""Per kernel size: five have a middle half that is not their ends."""
PROFILED_RUNS = 3
PEAK_NOISE = 0.1
"""How far above a measured peak the direct algorithm may come. A peak is only ever too low: on two cores with AVX-512, repeated
peaks differed by 5 %, and oneDNN's direct convolutions, named by its own log, came 3 % above the one measured before them."""


@dataclass(frozen=True, slots=True)
class Setting:
    """Images, channels in and out, height and width, and the seconds to time for."""

    batch: int
    channels: int
    side: int
    seconds: float


CPU = Setting(batch=1, channels=256, side=56, seconds=0.75)
"""The paper's map with an eighth of its channels: enough for every kernel to be limited by arithmetic (61 operations per byte
in the 1x1), and all four together take 75 ms where two cores make 460 GFLOP/s, so that the table is there in 2.5 s."""
PAPER = Setting(batch=32, channels=2048, side=56, seconds=2.0)
"""The paper's, for GPUs."""


@dataclass(frozen=True, slots=True)
class _Convolution:
    """Stride 1, same padding, no bias, as many channels out as in, at a fixed batch size."""

    kernel: int
    channels: int
    groups: int
    side: int
    batch: int

    @property
    def operations(self) -> int:
        """Additions and multiplications of the direct algorithm."""
        return 2 * self.batch * self.kernel**2 * self.channels * (self.channels // self.groups) * self.side**2

    @property
    def image(self) -> tuple[int, int, int]:
        return self.channels, self.side, self.side

    def images(self) -> np.ndarray:
        return np.random.default_rng(0).standard_normal((self.batch, *self.image), np.float32)

    def weight(self) -> np.ndarray:
        """Such that what comes out is of the size of what goes in: nothing overflows, in float16 either, or is denormal."""
        shape = (self.channels, self.channels // self.groups, self.kernel, self.kernel)
        drawn = np.random.default_rng(self.kernel).standard_normal(shape, np.float32)
        return drawn / np.float32(np.sqrt(np.prod(shape[1:])))

    def module(self) -> nn.Module:
        layer = nn.Conv2d(
            self.channels, self.channels, self.kernel, padding=self.kernel // 2, groups=self.groups, bias=False
        ).eval()
        layer.weight = nn.Parameter(torch.from_numpy(self.weight()), requires_grad=False)
        return layer

    def onnx(self, folder: Path) -> Path:
        path = folder / f"{self.kernel}x{self.kernel}.onnx"
        shape = (self.batch, *self.image)
        border = [self.kernel // 2] * 4
        return write_single_node(path, "Conv", self.weight(), shape, shape, pads=border, group=self.groups)

    def job(self, threads: int, folder: Path) -> Job:
        return Job(self.image, threads, module=self.module, onnx=lambda: self.onnx(folder))


def setting(device: str) -> Setting:
    """What to measure on a device, "cpu" or "cuda": the paper's sizes on a GPU, with as few images as its memory asks for."""
    if device != "cuda":
        return CPU
    free, _ = torch.cuda.mem_get_info()
    maps = (len(KERNELS) + 2) * 4 * PAPER.channels * PAPER.side**2  # an input per kernel, an output, and one laid out anew
    weights = 2 * 4 * PAPER.channels**2 * sum(kernel**2 for kernel in KERNELS)  # and laid out anew
    batch = PAPER.batch
    while batch > 1 and batch * maps + weights > free:
        batch //= 2
    return Setting(batch, PAPER.channels, PAPER.side, PAPER.seconds)


def table(runtime: Runtime, threads: int, *, batch: int, channels: int, side: int, seconds: float, peak: float) -> Density:
    """Time all kernel sizes in turn in one runtime. `seconds`: to time for, without loading; `peak`: measured, in GFLOP/s.

    A cell says that a fast algorithm ran where its rate is above the peak beyond noise: three quarters of its runs are, and by
    more than PEAK_NOISE, and above the fastest run of the 1x1 as well, for which there is no fast algorithm.
    Raises BackendFailed where the runtime takes neither a network nor ONNX, or fails.
    """
    convolutions = [_Convolution(kernel, channels, 1, side, batch) for kernel in KERNELS]
    with tempfile.TemporaryDirectory() as scratch:
        jobs = [convolution.job(threads, Path(scratch)) for convolution in convolutions]
        images = convolutions[0].images()
        with _timers(runtime, jobs, images) as timers:
            warm_up(timers, seconds)
            runs = interleaved(timers, seconds, LEAST_RUNS, MOST_RUNS)
        ran = [_implementation(runtime, job, images) for job in jobs]
    work = [convolution.operations / 1e9 for convolution in convolutions]
    ceiling = max(peak, work[0] / min(runs[0])) * (1 + PEAK_NOISE)
    cells = []
    for kernel, operations, seen, (implementation, note) in zip(KERNELS, work, runs, ran, strict=True):
        rate = operations / quantile(seen, 0.5)
        noted = _above(implementation) if operations / quantile(seen, 0.75) > ceiling else note
        cells.append(DensityCell(kernel, quantile(seen, 0.5), rate, rate / peak, implementation, noted))
    return Density(runtime.name, runtime.device, runtime.precision, batch, channels, side, threads, tuple(cells))


def depthwise_seconds(
    runtime: Runtime, threads: int, *, kernel: int, channels: int, side: int, batch: int, seconds: float
) -> float:
    """The median seconds of one depthwise convolution, stride 1, same padding, alone in a runtime, timed for `seconds`.

    Raises BackendFailed as `table` does.
    """
    convolution = _Convolution(kernel, channels, channels, side, batch)
    with tempfile.TemporaryDirectory() as scratch:
        jobs = [convolution.job(threads, Path(scratch))]
        with _timers(runtime, jobs, convolution.images()) as timers:
            warm_up(timers, seconds)
            return quantile(interleaved(timers, seconds, LEAST_RUNS, MOST_RUNS)[0], 0.5)


def run_smallest(runtime: Runtime, threads: int) -> None:
    """One convolution of one pixel, once: what a runtime's libraries do when they are first used. Raises BackendFailed."""
    convolution = _Convolution(1, 1, 1, 1, 1)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        (timer,) = stack.enter_context(_timers(runtime, [convolution.job(threads, folder)], convolution.images()))
        timer()


@contextmanager
def _timers(runtime: Runtime, jobs: Sequence[Job], images: np.ndarray) -> Iterator[list[Callable[[], float]]]:
    if runtime.needs not in (NETWORK, ONNX):
        raise BackendFailed(
            f"{runtime.name} runs compiled files ({runtime.needs}) only, and a convolution alone is none",
            hint="measure it in a runtime that takes networks or ONNX files",
        )
    with ExitStack() as stack:
        yield [stack.enter_context(runtime.open(job)).timer(images) for job in jobs]


def _above(implementation: str) -> str:
    """What a rate above the peak means: no direct algorithm reaches it, so if one ran, the peak was measured too low."""
    return FAST_ALGORITHM if not implementation or FAST_NAMES.search(implementation) else LOW_PEAK


def _implementation(runtime: Runtime, job: Job, images: np.ndarray) -> tuple[str, str]:
    """The kernel that ran, and why it is not known where the runtime could not tell; both empty where it is not made to."""
    if not isinstance(runtime, Profiling):
        return "", ""
    if any(os.environ.get(name) != value for name, value in runtime.profile_environment.items()):
        return "", ""
    try:
        _, layers = runtime.profile(job, images, PROFILED_RUNS)
    except BackendFailed as reason:
        return "", f"what ran is not known: {words(reason, 120)}"
    convolutions = [layer for layer in layers if layer.kind in ("convolution", "matmul")]  # a 1x1 may run as a product
    longest = max(convolutions, key=lambda layer: layer.seconds, default=None)
    return (longest.implementation, "") if longest is not None else ("", "")
