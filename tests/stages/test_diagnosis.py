"""Why a network is not faster: said where the evidence is there, and only there."""

from __future__ import annotations

from dataclasses import replace

import pytest

from repdeploy.benchmark import diagnosis
from repdeploy.measurements import BenchRow, Interval, Profile, RanLayer, Roofline, Timing

ROOF = Roofline("cpu", 2, 100.0, "gemm", 10e9, "copy")
"""Ridge: ten operations per byte."""


def layer(seconds: float, kind: str = "convolution", flops: int = 0, moved: int = 1, **other: object) -> RanLayer:
    given = {"implementation": "brgconv:avx512_core", "kernel": (3, 3), "inputs": 8, "outputs": 8, **other}
    return RanLayer("l", kind, seconds=seconds, flops=flops, bytes=moved, **given)  # type: ignore[arg-type]


def timing(seconds: float = 1e-3, network: str = "deploy", **other: object) -> Timing:
    given = {"runtime": "torch", "device": "cpu", "precision": "float32", "threads": 2, **other}
    return Timing(network, batch=1, input_shape=(1, 3, 8, 8), seconds=(seconds,) * 9, warmup_runs=1, steady=True, **given)  # type: ignore[arg-type]


def row(*layers: RanLayer, **other: object) -> BenchRow:
    given = {"timings": (timing(2e-3, "training-time"), timing()), "profiles": (Profile("deploy", "ONEDNN_VERBOSE", layers),)}
    return BenchRow("torch", "cpu", 1, **{**given, **other})  # type: ignore[arg-type]


def kinds(item: BenchRow, roof: Roofline | None = ROOF, cores: int = 2) -> list[str]:
    return [finding.kind for finding in diagnosis.findings(item, roof, cores)]


BUSY = layer(1e-3, flops=90_000_000, moved=1_000_000)
"""A convolution at 90 % of the peak."""


def test_a_healthy_network_has_nothing_to_explain() -> None:
    assert kinds(row(BUSY)) == []
    assert kinds(BenchRow("torch", "cpu", 1, missing="not there")) == []


def test_threads_beyond_the_cores() -> None:
    found = diagnosis.findings(row(BUSY, timings=(timing(threads=8),)), ROOF, 2)
    assert [finding.kind for finding in found] == ["oversubscribed"]
    assert "8 threads share 2 cores" in found[0].evidence
    assert found[0].remedy == "measure with --threads 2"


def test_reorders_and_their_share() -> None:
    assert kinds(row(BUSY, layer(1.0e-4, "reorder"))) == [], "a tenth is no burden"
    (found,) = diagnosis.findings(row(BUSY, layer(5e-4, "reorder"), layer(5e-4, "reorder")), ROOF, 2)
    assert found.kind == "reorders"
    assert found.evidence.startswith("2 changes of memory layout take 50% of the time")


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, ["gemm fallback"]),
        ({"implementation": "ref:any"}, ["gemm fallback"]),
        ({"implementation": "jit_dw:avx512_core"}, []),
        ({"implementation": "brgemm_dw:avx512_core"}, []),
        ({"kernel": (3, 3)}, []),
        ({"groups": 1}, []),
        ({"seconds": 5e-5}, []),
    ],
)
def test_large_depthwise_kernels_that_fall_back(changed: dict[str, object], expected: list[str]) -> None:
    given = {"seconds": 1e-3, "implementation": "x64:gemm:jit", "kernel": (31, 31), "groups": 8, "flops": 30_000_000}
    assert kinds(row(BUSY, layer(**{**given, **changed}))) == expected  # type: ignore[arg-type]


def test_launch_bound_needs_the_hosts_own_time() -> None:
    gpu = timing(1e-3, device="cuda", enqueue=(0.9e-3,) * 5)
    assert kinds(row(BUSY, timings=(gpu,))) == ["launch-bound"]
    assert kinds(row(BUSY, timings=(replace(gpu, enqueue=(0.5e-3,) * 5),))) == []
    assert kinds(row(BUSY, timings=(replace(gpu, enqueue=()),))) == []


def test_memory_bound_only_near_the_bandwidth() -> None:
    moving = layer(1e-3, flops=1_000_000, moved=6_000_000)
    crawling = layer(1e-3, flops=1_000_000, moved=600_000)
    assert "memory-bound" in kinds(row(moving, layer(1e-5, flops=90_000_000)))
    assert "memory-bound" not in kinds(row(crawling, layer(1e-5, flops=90_000_000))), "something else holds it up"
    assert "memory-bound" not in kinds(row(BUSY, layer(1e-4, flops=1_000_000, moved=600_000)))
    assert "memory-bound" not in kinds(row(moving), roof=None)


def test_too_few_operations_for_the_time_they_take() -> None:
    assert kinds(row(layer(1e-3, flops=1_000_000, moved=1000))) == ["too few FLOPs"]


def test_fusing_that_saved_no_operations() -> None:
    profiles = (Profile("training-time", "p", (BUSY, layer(1e-6))), Profile("deploy", "p", (BUSY,)))
    alike = row(profiles=profiles, speedup=Interval(1.01, 0.99, 1.03))
    assert kinds(alike) == ["alike"]
    assert kinds(replace(alike, speedup=Interval(1.5, 1.4, 1.6))) == [], "it is faster all the same"
    more = Profile("training-time", "p", (BUSY, BUSY))
    assert kinds(replace(alike, profiles=(more, profiles[1]))) == []


def test_layouts_are_advised_only_where_both_were_measured() -> None:
    wide = replace(BUSY, kernel=(31, 31), groups=8, seconds=45e-3)
    here = row(wide, timings=(timing(50e-3),))
    there = replace(row(replace(wide, seconds=1e-3), timings=(timing(5e-3),)), runtime="torch-channels-last")
    (advised, untouched) = diagnosis.with_layouts([here, there])
    (finding,) = advised.findings
    assert finding.evidence == (
        "in channels_last it takes 5 ms instead of 50 ms (10.0x); a depthwise 31x31 convolution alone 45.0x"
    )
    assert untouched.findings == ()
    assert diagnosis.with_layouts([here])[0].findings == ()
    slower = replace(there, timings=(timing(70e-3),))
    assert [[item.kind for item in entry.findings] for entry in diagnosis.with_layouts([here, slower])] == [[], ["layout"]]
    close = replace(there, timings=(timing(49e-3),))
    assert all(not entry.findings for entry in diagnosis.with_layouts([here, close]))


def test_nothing_is_said_where_the_evidence_is_missing() -> None:
    uncounted = layer(2e-3, "other")
    assert kinds(row(layer(1e-4, flops=1_000_000, moved=1000), uncounted)) == [], "who knows what that layer computes"
    cached = layer(1e-3, flops=1_000_000, moved=20_000_000)
    assert kinds(row(cached, layer(1e-5, flops=90_000_000))) == [], "twice the bandwidth of memory comes from a cache"
    short = layer(1e-3, flops=1_000_000, moved=6_000_000)
    assert "memory-bound" not in kinds(row(short, timings=(timing(2.2e-3),))), "most of the run is elsewhere"
    profiles = (Profile("a.onnx", "p", (BUSY,)), Profile("b.onnx", "p", (BUSY,)))
    files = (timing(1e-3, "a.onnx"), timing(1e-3, "b.onnx"))
    assert kinds(row(profiles=profiles, timings=files, speedup=Interval(1.0, 0.99, 1.01))) == [], (
        "nobody fused one into the other"
    )
    fused = (Profile("training-time", "p", (BUSY,)), Profile("deploy", "p", (BUSY,)))
    assert kinds(row(profiles=fused, speedup=Interval(0.5, 0.4, 0.6))) == [], "slower is not alike"


def test_nothing_is_concluded_from_disturbed_measurements() -> None:
    slow = row(BUSY, layer(5e-4, "reorder"))
    assert kinds(slow) == ["reorders"]
    assert kinds(replace(slow, warnings=("noisy",))) == []
    assert kinds(replace(slow, timings=(timing(2e-3, "training-time"), timing(1e-2)))) == [], (
        "layers that take a tenth of a run"
    )
    oversubscribed = replace(slow, timings=(timing(threads=8),), warnings=("noisy",))
    assert kinds(oversubscribed) == ["oversubscribed"], "that is known without measuring"
    small = Roofline("cpu", 2, 100.0, "gemm", 10e9, "copy", cache=32 << 20)
    moving = row(layer(1e-3, flops=1_000_000, moved=6_000_000), layer(1e-5, flops=90_000_000))
    assert "memory-bound" in kinds(moving)
    assert "memory-bound" not in kinds(moving, small), "that fits into the cache"
