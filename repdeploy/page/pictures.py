"""What the pictures of a page show: data only, so that a page without pictures needs no library that draws."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from repdeploy.measurements import BenchRow, Density, Profile, RanLayer, Roofline


@dataclass(frozen=True, slots=True)
class Speedups:
    """A dot and an interval per row that has a speed-up."""

    rows: tuple[BenchRow, ...]
    name: ClassVar = "speed-ups"
    title: ClassVar = "Speed-up with its 95 % interval, per runtime and batch size"


@dataclass(frozen=True, slots=True)
class Latencies:
    """Every timed run of every row."""

    rows: tuple[BenchRow, ...]
    name: ClassVar = "latencies"
    title: ClassVar = "Latency of every timed run, per runtime, network and batch size"


@dataclass(frozen=True, slots=True)
class Densities:
    """GFLOP/s by kernel size, `peak` being the device's best."""

    density: tuple[Density, ...]
    peak: float | None
    name: ClassVar = "densities"
    title: ClassVar = "GFLOP/s of one convolution by kernel size and runtime"


@dataclass(frozen=True, slots=True)
class Roof:
    """One dot per convolution of each profile, below the device's two ceilings."""

    roofline: Roofline
    profiles: tuple[tuple[str, Profile], ...]
    name: ClassVar = "roofline"
    title: ClassVar = "Roofline: GFLOP/s of every convolution over its operations per byte"


def has_place(layer: RanLayer) -> bool:
    """Whether a layer can stand in a roofline plot."""
    return layer.flops > 0 and layer.bytes > 0 and layer.seconds > 0


Picture = Speedups | Latencies | Densities | Roof
