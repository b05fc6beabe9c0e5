"""What a benchmark measures: frozen values with their units and conditions, every run kept. JSON both ways."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar

BENCH_SCHEMA = "repdeploy.bench/2"
SUITE_SCHEMA = "repdeploy.suite/1"
TRAIN_SCHEMA = "repdeploy.train-step/1"

PEAK_PRECISION = "float32"
"""Of rooflines: what computes in another precision is not held against them."""
PROFILE_SLACK = 2.5
"""Profiles of networks below a millisecond add up to as much as 2.2 times a run, because looking takes time."""
CLOSE = 0.05
"""An interval as near to 1 as that says that there is no difference; a wider one around 1 says nothing."""
MIN_EFFECT = 0.01
"""A difference below 1 % is none, however narrow its interval."""
BETWEEN_RUNS = 0.05
"""What intervals do not cover: where memory and threads came to lie this time. Medians of one file in five runs of a command
on a shared machine with two cores lay within 2 % of each other, where nothing disturbed them."""
WHEN_UNSTABLE = 1.0
"""Half the speed: less than that is not told from noise where a row came with warnings."""
PERCENTILES = {50: 1, 90: 64, 95: 130, 99: 662}
"""How many runs a percentile takes, so that its distribution-free 95 % interval ends inside the sample, with room."""
LayerKind = Literal["convolution", "matmul", "reorder", "other"]
MemoryMeasure = Literal["saved", "allocated"]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Interval:
    """A ratio of medians with its bootstrap interval (95 %)."""

    ratio: float
    low: float
    high: float

    DERIVED: ClassVar = ("differs",)

    @property
    def differs(self) -> bool:
        """A difference is called one only if the interval excludes 1 and the effect exceeds 1 %."""
        return (self.low > 1 or self.high < 1) and abs(self.ratio - 1) > MIN_EFFECT

    @property
    def is_undecided(self) -> bool:
        """Too wide around 1 to say that there is no difference."""
        return not self.differs and not 1 - CLOSE < self.low <= self.high < 1 + CLOSE


@dataclass(frozen=True, slots=True)
class Timing:
    """Every timed run of one network in one runtime, in seconds, in the order they were made, and the conditions.

    `layout`: of activations as the caller gives them; `enqueue`: CUDA only, the host's seconds until everything was enqueued;
    `l2`: the state of the device's cache between runs.
    """

    network: str
    runtime: str
    device: str
    precision: str
    threads: int
    batch: int
    input_shape: tuple[int, ...]
    seconds: tuple[float, ...]
    warmup_runs: int
    steady: bool
    layout: str = "NCHW"
    enqueue: tuple[float, ...] = ()
    l2: str = "warm"

    DERIVED: ClassVar = ("median", "spread", "images_per_second", "percentiles")

    @property
    def median(self) -> float:
        return quantile(self.seconds, 0.5)

    @property
    def spread(self) -> float:
        """The middle half of the runs, relative to the median."""
        ordered = sorted(self.seconds)
        quarter = len(ordered) // 4
        return (ordered[-1 - quarter] - ordered[quarter]) / self.median

    @property
    def images_per_second(self) -> float:
        return self.batch / self.median

    @property
    def percentiles(self) -> dict[str, float]:
        """Seconds by percentile, as far as the number of runs allows them."""
        allowed = (share for share, least in PERCENTILES.items() if len(self.seconds) >= least)
        return {f"p{share}": quantile(self.seconds, share / 100) for share in allowed}


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes that one network takes in one runtime at one batch size.

    `weights`: stored parameters; `live`: the exact peak of activations that must exist at once, from the graph's liveness, and
    `live_at`: the operator that runs then; `resident`: growth of the process's peak resident set over loading and running it
    (CPU); `allocated`: peak of the allocator (CUDA). None where it was not measured.
    """

    network: str
    weights: int | None = None
    live: int | None = None
    live_at: str = ""
    resident: int | None = None
    allocated: int | None = None


@dataclass(frozen=True, slots=True)
class RanLayer:
    """One operator as a runtime really ran it, in its order. `implementation`: the kernel's own name, as the runtime gives it.

    Of convolutions `kernel` (height, width), `stride`, `groups`, `inputs` and `outputs` (channels), `input_shape` and
    `output_shape` (batch, channels, height, width); `flops`: additions and multiplications of the direct algorithm;
    `bytes`: inputs, weights and outputs, each once. `seconds`: median over the profiled runs.
    """

    name: str
    kind: LayerKind
    implementation: str
    seconds: float
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    groups: int = 1
    inputs: int = 0
    outputs: int = 0
    input_shape: tuple[int, ...] = ()
    output_shape: tuple[int, ...] = ()
    flops: int = 0
    bytes: int = 0

    DERIVED: ClassVar = ("gflops", "is_depthwise")

    @property
    def gflops(self) -> float:
        """Thousand millions of operations per second."""
        return self.flops / self.seconds / 1e9 if self.seconds > 0 else 0.0

    @property
    def is_depthwise(self) -> bool:
        return self.kind == "convolution" and self.groups > 1 and self.groups == self.inputs


@dataclass(frozen=True, slots=True)
class Profile:
    """What ran inside one network. `source`: how that is known, in words ("ONEDNN_VERBOSE", "onnxruntime's profile")."""

    network: str
    source: str
    layers: tuple[RanLayer, ...]

    DERIVED: ClassVar = ("seconds", "share_3x3_flops", "share_3x3_time", "share_reorder_time")

    @property
    def seconds(self) -> float:
        return sum(layer.seconds for layer in self.layers)

    @property
    def convolutions(self) -> tuple[RanLayer, ...]:
        return tuple(layer for layer in self.layers if layer.kind == "convolution")

    @property
    def share_3x3_flops(self) -> float:
        """Of the operations of all convolutions and matrix products."""
        return share(self.of_3x3(), self.layers, "flops")

    @property
    def share_3x3_time(self) -> float:
        """Of the time of all layers."""
        return share(self.of_3x3(), self.layers, "seconds")

    @property
    def share_reorder_time(self) -> float:
        return share((layer for layer in self.layers if layer.kind == "reorder"), self.layers, "seconds")

    def of_3x3(self) -> tuple[RanLayer, ...]:
        return tuple(layer for layer in self.convolutions if layer.kernel == (3, 3))


@dataclass(frozen=True, slots=True)
class Finding:
    """Why a network is not faster, or what would make it so: one sentence of evidence, one of remedy. `kind`: a stable name."""

    kind: str
    network: str
    evidence: str
    remedy: str


@dataclass(frozen=True, slots=True)
class Watched:
    """What the machine did while a row was measured. `None` and empty: not told by this machine.

    `clock_mhz`: lowest and highest seen; `throttled`: new thermal throttling events, or the GPU's reasons; `load`: what
    others took of all cores, as a share; `foreign`: other processes on the GPU.
    """

    clock_mhz: tuple[float, ...] = ()
    throttled: tuple[str, ...] = ()
    load: float | None = None
    foreign: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class BenchRow:
    """One runtime at one batch size: both networks and their ratio, or why there is none.

    `drift`: of a runtime that computes in less than float32, the largest error of the deploy network beside float32, relative
    to the largest output; `warnings`: what makes the numbers doubtful; `artifact`: the sha256 of a compiled file.
    """

    runtime: str
    device: str
    batch: int
    timings: tuple[Timing, ...] = ()
    speedup: Interval | None = None
    missing: str = ""
    hint: str = ""
    warnings: tuple[str, ...] = ()
    memory: tuple[Memory, ...] = ()
    profiles: tuple[Profile, ...] = ()
    findings: tuple[Finding, ...] = ()
    watched: Watched | None = None
    drift: float | None = None
    artifact: str = ""

    @property
    def is_stable(self) -> bool:
        return not self.warnings

    def fits(self, profile: Profile) -> bool:
        """Whether what was seen inside a network adds up to about what a run of it takes: looking slows small ones down, but a
        profile far off was disturbed."""
        run = next((timing.median for timing in self.timings if timing.network == profile.network), None)
        return run is None or run / PROFILE_SLACK < profile.seconds < run * PROFILE_SLACK


@dataclass(frozen=True, slots=True)
class Roofline:
    """What this device reaches at best: `gflops` of the best matrix product and which it was; `bandwidth` (bytes per second) of
    the best copy and which it was; `cache`: bytes of the last level of caches, where the system tells."""

    device: str
    threads: int
    gflops: float
    gflops_by: str
    bandwidth: float
    bandwidth_by: str
    cache: int | None = None


@dataclass(frozen=True, slots=True)
class DensityCell:
    """One convolution of the density table: kernel x kernel, stride 1, same padding. `gflops`: of the direct algorithm, so
    above the peak where a fast one (Winograd, FFT) ran; `share`: of the roofline's peak."""

    kernel: int
    seconds: float
    gflops: float
    share: float
    implementation: str = ""
    note: str = ""


@dataclass(frozen=True, slots=True)
class Density:
    """Computational density by kernel size at equal channels (RepVGG, table 1), in one runtime."""

    runtime: str
    device: str
    precision: str
    batch: int
    channels: int
    side: int
    threads: int
    cells: tuple[DensityCell, ...]


@dataclass(frozen=True, slots=True)
class Comparison:
    """One row beside the same row of an earlier benchmark. `ratio`: new over old, so above 1 is slower."""

    runtime: str
    device: str
    batch: int
    network: str
    ratio: Interval
    is_stable: bool = True

    DERIVED: ClassVar = ("is_slower", "verdict")

    @property
    def verdict(self) -> str:
        if self.is_slower:
            return "slower"
        if not self.is_stable:
            return "not judged: unstable"
        return "faster" if self.ratio.differs and self.ratio.ratio < 1 else "not slower"

    @property
    def is_slower(self) -> bool:
        """By more than two runs of one network differ; where a row was unstable, by more than noise explains."""
        return self.ratio.low > 1 and self.ratio.ratio > 1 + (BETWEEN_RUNS if self.is_stable else WHEN_UNSTABLE)


@dataclass(frozen=True, slots=True)
class Bench:
    """The benchmark of one bundle or file on one machine. `subject_sha256`: what tells a bundle's network from another."""

    subject: str
    rows: tuple[BenchRow, ...]
    environment: Mapping[str, str]
    notes: tuple[str, ...] = ()
    rooflines: tuple[Roofline, ...] = ()
    density: tuple[Density, ...] = ()
    baseline: tuple[Comparison, ...] = ()
    subject_sha256: str = ""
    schema: str = BENCH_SCHEMA

    def roof(self, device: str) -> Roofline | None:
        """What that device reaches at best, on as many threads as were measured last."""
        return next((item for item in reversed(self.rooflines) if item.device == device), None)

    def roof_of(self, row: BenchRow) -> Roofline | None:
        """What a row's device reaches at best on its threads; None where the row computes in another precision."""
        last = row.timings[-1]
        fitting = (item for item in self.rooflines if (item.device, item.threads) == (row.device, last.threads))
        return next(fitting, None) if last.precision == PEAK_PRECISION else None


@dataclass(frozen=True, slots=True)
class SuiteRow:
    """One network of a suite. `paper`: images per second that the paper gives, on its device and batch size."""

    network: str
    parameters: int
    flops: int
    runtime: str
    timing: Timing | None = None
    paper: float | None = None
    missing: str = ""


@dataclass(frozen=True, slots=True)
class SpeedRatio:
    """How many times as fast as the `reference` a network of a suite is: in the `paper`, and `measured` in one runtime (None
    where one of the two did not run). `source`: where the paper compares them."""

    network: str
    reference: str
    runtime: str
    source: str
    paper: float
    measured: Interval | None


@dataclass(frozen=True, slots=True)
class Suite:
    """A paper's table, measured on this device. `paper_conditions`: how the paper measured, in words."""

    name: str
    rows: tuple[SuiteRow, ...]
    environment: Mapping[str, str]
    paper_conditions: str
    ratios: tuple[SpeedRatio, ...] = ()
    notes: tuple[str, ...] = ()
    schema: str = SUITE_SCHEMA


@dataclass(frozen=True, slots=True)
class TrainStep:
    """One training step (forward, loss, backward, optimizer) of one network at one resolution.

    `saved`: bytes that the forward pass keeps for the backward pass, each storage once, parameters left out; `allocated`: the
    allocator's peak (CUDA).
    """

    network: str
    block: str
    device: str
    batch: int
    side: int
    parameters: int
    seconds: tuple[float, ...]
    saved: int
    allocated: int | None = None
    missing: str = ""

    DERIVED: ClassVar = ("median",)

    @property
    def median(self) -> float:
        return quantile(self.seconds, 0.5) if self.seconds else float("nan")


@dataclass(frozen=True, slots=True)
class ExtraMemory:
    """What a block kind takes beyond the plain network, in bytes per resolution (`sides` ascending).

    `measure`: which field of `TrainStep` was compared. `exponent`: `extra` grows like the number of pixels to that power, so 0
    is flat and 1 in proportion to height x width; None where one resolution cannot tell.
    """

    network: str
    block: str
    device: str
    batch: int
    measure: MemoryMeasure
    sides: tuple[int, ...]
    extra: tuple[int, ...]

    DERIVED: ClassVar = ("growth", "pixels", "exponent", "is_flat")

    @property
    def growth(self) -> float | None:
        """Of the extra bytes, from the smallest resolution to the largest."""
        return self.extra[-1] / self.extra[0] if len(self.sides) > 1 and min(self.extra) > 0 else None

    @property
    def pixels(self) -> float:
        """Growth of height x width."""
        return (self.sides[-1] / self.sides[0]) ** 2

    @property
    def exponent(self) -> float | None:
        return None if self.growth is None else math.log(self.growth) / math.log(self.pixels)

    @property
    def is_flat(self) -> bool | None:
        """Nearer to not growing at all than to growing with the pixels."""
        return None if self.exponent is None else self.exponent < 0.5


@dataclass(frozen=True, slots=True)
class OnlineGain:
    """What generating kernels online (OREPA) gains over running every branch (DBB), at one resolution.

    `online`, `offline`: bytes that each takes beyond the plain network, by `measure`; `faster`: DBB's step over OREPA's, None
    where steps were not timed together. `paper_saved`, `paper_faster`: the range that the paper reports.
    """

    network: str
    device: str
    batch: int
    side: int
    measure: MemoryMeasure
    offline: int
    online: int
    faster: Interval | None
    paper_saved: tuple[float, float]
    paper_faster: tuple[float, float]

    DERIVED: ClassVar = ("saved", "break_even")

    @property
    def saved(self) -> float | None:
        """The share of DBB's extra bytes that OREPA does without; negative where it takes more."""
        return (self.offline - self.online) / self.offline if self.offline > 0 else None

    @property
    def break_even(self) -> float | None:
        """Images per step at which both take the same, as DBB's bytes grow with the batch and OREPA's do not."""
        return self.batch * self.online / self.offline if self.offline > 0 else None


@dataclass(frozen=True, slots=True)
class TrainSteps:
    """Training cost by block kind and resolution (OREPA, section 4)."""

    rows: tuple[TrainStep, ...]
    environment: Mapping[str, str]
    extra: tuple[ExtraMemory, ...] = ()
    gains: tuple[OnlineGain, ...] = ()
    notes: tuple[str, ...] = ()
    schema: str = TRAIN_SCHEMA


def quantile(values: tuple[float, ...], share: float) -> float:
    """By linear interpolation between order statistics."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def share(part: Any, whole: Any, field: str) -> float:
    """What a part of some layers has of a field of all of them; 0 where there is nothing to share."""
    total = sum(getattr(layer, field) for layer in whole)
    return float(sum(getattr(layer, field) for layer in part) / total) if total else 0.0


def read_json(kind: type[T], item: Any) -> T:
    """A record of this module from what `records.plain` made of it. Raises ValueError where it is none."""
    import cattrs

    converter = cattrs.Converter()
    try:
        return converter.structure(item, kind)
    except Exception as reason:  # cattrs groups whatever went wrong, field by field
        raise ValueError("; ".join(cattrs.transform_error(reason))) from reason


def bench_from_json(text: str) -> Bench:
    """Read bench.json back. Raises ValueError where the text is none."""
    content = json.loads(text)
    if not isinstance(content, dict) or content.get("schema") != BENCH_SCHEMA:
        raise ValueError(f"expected schema {BENCH_SCHEMA}")
    found = read_json(Bench, content)
    numbers = [value for row in found.rows for timing in row.timings for value in (*timing.seconds, *timing.enqueue)]
    numbers += [value for row in found.rows if row.speedup for value in (row.speedup.ratio, row.speedup.low, row.speedup.high)]
    numbers += [value for roof in found.rooflines for value in (roof.gflops, roof.bandwidth)]
    numbers += [cell.seconds for table in found.density for cell in table.cells]
    if not all(0 < value < float("inf") for value in numbers):
        raise ValueError("a time, a ratio or a rate is not a positive number")
    if any(not timing.seconds for row in found.rows for timing in row.timings) or any(
        not table.cells for table in found.density
    ):
        raise ValueError("a measurement has no numbers")
    return found
