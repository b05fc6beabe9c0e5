"""bench.json: read, merged by key, resumed, and compared with an earlier one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from repdeploy.benchmark import results
from repdeploy.bundle import BENCH
from repdeploy.errors import InputError, UsageError
from repdeploy.measurements import (
    Bench,
    BenchRow,
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
    bench_from_json,
)
from repdeploy.records import plain, to_json

HERE = {"processor": "p", "cores": "2", "machine": "m", "torch": "1"}


def timing(network: str = "deploy", seconds: tuple[float, ...] = (0.1, 0.2), **other: Any) -> Timing:
    given = {"runtime": "torch", "device": "cpu", "precision": "float32", "threads": 2, "batch": 4, "input_shape": (4, 3, 8, 8)}
    return Timing(network, seconds=seconds, warmup_runs=3, steady=True, **{**given, **other})


def row(**other: Any) -> BenchRow:
    first = timing("training-time", **{key: other[key] for key in ("runtime", "batch") if key in other})
    given = {"runtime": "torch", "device": "cpu", "batch": 4, "timings": (first, replace(first, network="deploy"))}
    return BenchRow(**{**given, **other})


def full() -> Bench:
    layer = RanLayer("a", "convolution", "jit:avx512", 1e-3, (3, 3), (1, 1), 1, 8, 8, (1, 8, 8, 8), (1, 8, 8, 8), 1000, 10)
    one = row(
        speedup=Interval(1.5, 1.4, 1.6), warnings=("w",), memory=(Memory("deploy", 1, 2, "at", 3, None),),
        profiles=(Profile("deploy", "ONEDNN_VERBOSE", (layer,)),), findings=(Finding("reorders", "deploy", "e", "r"),),
        watched=Watched((1.0, 2.0), ("t",), 0.5, ("f",)), drift=1e-3,
    )  # fmt: skip
    table = Density("torch", "cpu", "float32", 1, 64, 28, 2, (DensityCell(3, 1e-3, 10.0, 0.5, "jit", "n"),))
    return Bench("a.repdeploy", (one,), HERE, ("note",), (Roofline("cpu", 2, 100.0, "g", 1e9, "b"),), (table,))


def bundle(folder: Path) -> Any:
    """What results need of a bundle: its folder and its lock."""
    import contextlib

    return SimpleNamespace(path=folder, locked=contextlib.nullcontext)


def test_a_benchmark_reads_back_as_it_was_written() -> None:
    assert bench_from_json(to_json(full())) == full()


def test_percentiles_need_enough_runs() -> None:
    assert set(timing(seconds=(1.0,) * 63).percentiles) == {"p50"}
    assert set(timing(seconds=(1.0,) * 64).percentiles) == {"p50", "p90"}
    assert set(timing(seconds=(1.0,) * 130).percentiles) == {"p50", "p90", "p95"}
    runs = tuple(np.random.default_rng(0).exponential(1, 662))
    assert set(timing(seconds=runs).percentiles) == {"p50", "p90", "p95", "p99"}
    assert timing(seconds=runs).percentiles["p99"] == pytest.approx(np.quantile(runs, 0.99))


def test_rows_of_one_key_replace_each_other_and_others_stay(tmp_path: Path) -> None:
    results.merge(bundle(tmp_path), Bench("a", (row(), row(runtime="openvino")), HERE))
    slow = row(timings=(timing(seconds=(9.0, 9.0)),))
    results.merge(bundle(tmp_path), Bench("a", (slow, row(batch=8), BenchRow("gone", "cpu", 4, missing="not there")), HERE))
    kept = results.read(tmp_path).rows
    assert [(item.runtime, item.batch) for item in kept] == [("openvino", 4), ("torch", 4), ("torch", 8), ("gone", 4)]
    assert kept[1] == slow
    back = row(runtime="gone")
    lost = BenchRow("torch", "cpu", 4, missing="failed: whatever")
    results.merge(bundle(tmp_path), Bench("a", (back, lost), HERE))
    kept = results.read(tmp_path).rows
    assert [item for item in kept if item.runtime == "gone"] == [back], "it is not missing any more"
    assert lost not in kept, "numbers are not lost because a runtime failed today"
    assert slow in kept


def test_what_an_older_version_wrote_is_replaced_and_a_damaged_file_is_named(tmp_path: Path) -> None:
    (tmp_path / BENCH).write_text(json.dumps({"schema": "repdeploy.bench/1", "rows": [{}]}))
    results.merge(bundle(tmp_path), Bench("a", (row(),), HERE))
    assert len(results.read(tmp_path / BENCH).rows) == 1
    for text in ("{", "[]", json.dumps({"schema": "repdeploy.bench/2", "rows": [{"runtime": 1}]})):
        (tmp_path / BENCH).write_text(text)
        with pytest.raises(InputError, match="is no benchmark"):
            results.merge(bundle(tmp_path), Bench("a", (row(),), HERE))
    with pytest.raises(UsageError, match="there is no benchmark"):
        results.read(tmp_path / "absent")


def test_only_rows_of_the_same_conditions_are_resumed() -> None:
    old = Bench("a", (row(), row(batch=8), BenchRow("x", "cpu", 4, missing="not there")), HERE)
    kept = results.resumable(old, (3, 8, 8), "cpu", 2, HERE, "")
    assert kept is not None
    assert [(item.runtime, item.batch) for item in kept.rows] == [("torch", 4), ("torch", 8)]
    for image, device, threads in (((3, 9, 8), "cpu", 2), ((3, 8, 8), "cuda", 2), ((3, 8, 8), "cpu", 1)):
        other = results.resumable(old, image, device, threads, HERE, "")
        assert other is not None
        assert other.rows == ()
    assert results.resumable(old, (3, 8, 8), "cpu", 2, {**HERE, "torch": "2"}, "") is None
    assert results.resumable(None, (3, 8, 8), "cpu", 2, HERE, "") is None


def test_a_baseline_judges_what_is_shipped() -> None:
    noise = np.random.default_rng(0).lognormal(0, 0.02, 300)
    old = Bench("a", (row(timings=(timing("training-time"), timing(seconds=tuple(noise[:100])))),), HERE)
    new = Bench(
        "a", (row(timings=(timing("training-time"), timing(seconds=tuple(1.3 * noise[100:200])))),), {**HERE, "torch": "9"}
    )
    (slower,) = results.compared(old, new)
    assert slower.network == "deploy"
    assert slower.is_slower
    assert slower.ratio.low < 1.3 < slower.ratio.high
    (same,) = results.compared(old, replace(old, rows=(row(timings=(timing(seconds=tuple(noise[200:])),)),)))
    assert not same.is_slower
    (faster,) = results.compared(new, old)
    assert faster.ratio.differs
    assert not faster.is_slower


def test_an_unstable_row_is_called_slower_only_by_far() -> None:
    noise = np.random.default_rng(0).lognormal(0, 0.02, 200)
    old = Bench("a", (row(timings=(timing(seconds=tuple(noise[:100])),)),), HERE)
    verdicts = {}
    for factor in (1.03, 1.3, 3.0):
        for warnings in ((), ("busy",)):
            slow = row(timings=(timing(seconds=tuple(factor * noise[100:])),), warnings=warnings)
            (found,) = results.compared(old, replace(old, rows=(slow,)))
            verdicts[factor, bool(warnings)] = found.verdict
    assert verdicts == {
        (1.03, False): "not slower", (1.3, False): "slower", (3.0, False): "slower",
        (1.03, True): "not judged: unstable", (1.3, True): "not judged: unstable", (3.0, True): "slower",
    }  # fmt: skip


def test_a_baseline_from_elsewhere_is_refused() -> None:
    old = Bench("a", (row(),), HERE)
    with pytest.raises(InputError, match="another machine: processor p, here q"):
        results.compared(old, replace(old, environment={**HERE, "processor": "q"}))
    with pytest.raises(InputError, match="no row of the same runtime"):
        results.compared(old, replace(old, rows=(row(runtime="openvino"),)))
    half = replace(old, rows=(row(timings=(timing(precision="float16"),)),))
    with pytest.raises(InputError, match="no row of the same runtime"):
        results.compared(old, half)


def test_nothing_of_another_network_machine_or_version_is_kept_beside_it(tmp_path: Path) -> None:
    roofs = (Roofline("cpu", 1, 50.0, "g", 1e9, "b"), Roofline("cpu", 2, 100.0, "g", 1e9, "b"))
    first = Bench("a", (row(),), HERE, rooflines=roofs, subject_sha256="one")
    for other in (replace(first, subject_sha256="two"), replace(first, environment={**HERE, "torch": "2"})):
        results.merge(bundle(tmp_path), first)
        results.merge(bundle(tmp_path), replace(other, rows=(row(batch=8),), rooflines=roofs[:1]))
        kept = results.read(tmp_path)
        assert [item.batch for item in kept.rows] == [8]
        assert kept.rooflines == roofs[:1]
        (tmp_path / BENCH).unlink()
    results.merge(bundle(tmp_path), first)
    results.merge(bundle(tmp_path), replace(first, rows=(row(batch=8),), environment={**HERE, "threads": "1"}))
    assert len(results.read(tmp_path).rows) == 2, "threads are each row's own"


def test_a_row_is_held_against_the_roof_of_its_threads_and_precision() -> None:
    roofs = (Roofline("cpu", 1, 50.0, "g", 1e9, "b"), Roofline("cpu", 2, 100.0, "g", 1e9, "b"))
    bench = Bench("a", (), HERE, rooflines=roofs)
    assert bench.roof_of(row()) == roofs[1]
    assert bench.roof_of(row(timings=(timing(threads=1),))) == roofs[0]
    assert bench.roof_of(row(timings=(timing(threads=3),))) is None
    assert bench.roof_of(row(timings=(timing(precision="float16"),))) is None


@pytest.mark.parametrize(
    "damaged",
    [
        row(timings=(timing(seconds=()),)),
        row(timings=(timing(seconds=(0.0,)),)),
        row(timings=(timing(seconds=(-1.0,)),)),
        row(timings=(timing(seconds=(float("nan"),)),)),
        row(speedup=Interval(1.0, 0.0, 2.0)),
    ],
)
def test_numbers_that_no_benchmark_writes(damaged: BenchRow, tmp_path: Path) -> None:
    good = to_json(Bench("a", (row(),), HERE))
    document = json.loads(good)
    document["rows"] = [
        plain(replace(damaged, timings=(), speedup=damaged.speedup)) | {"timings": [_told(item) for item in damaged.timings]}
    ]
    (tmp_path / BENCH).write_text(json.dumps(document))
    with pytest.raises(InputError, match="is no benchmark"):
        results.read(tmp_path)


def _told(item: Timing) -> dict[str, Any]:
    return {name: getattr(item, name) for name in item.__dataclass_fields__ if name != "DERIVED"}


def test_a_newer_version_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / BENCH).write_text(json.dumps({"schema": "repdeploy.bench/99", "rows": []}))
    with pytest.raises(InputError, match="expected schema"):
        results.merge(bundle(tmp_path), Bench("a", (row(),), HERE))
