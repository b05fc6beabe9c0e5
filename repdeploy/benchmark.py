"""Measure the training-time network against the deploy network, every runtime in a process of its own."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import platform
import subprocess
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from repdeploy.bundle import BENCH, Bundle, write_text
from repdeploy.errors import BackendFailed, BackendMissing, InputError, UsageError
from repdeploy.progress import Progress
from repdeploy.records import BENCH_SCHEMA, Bench, BenchRow, Interval, Timing, to_json, tupled
from repdeploy.runtimes import RUNTIMES, Missing, Runtime
from repdeploy.versions import tool_versions

WIDE_SPREAD = 0.20
"""The middle half of the runs, relative to the median, above which a row is called noisy."""
BUSY = 0.5
"""Load per core, before the benchmark starts, above which the machine is called busy."""


def bench(
    subject: Path,
    image: tuple[int, ...],
    *,
    device: str,
    batches: Sequence[int],
    threads: int,
    seconds: float,
    only: Sequence[str],
    available: Collection[str],
    progress: Progress,
) -> Bench:
    """Measure a bundle (both networks) or a file (just that). Runtimes that are missing are rows that say so.

    `available`: what there is of the subject for runtimes to run (`Runtime.needs`); one that needs something else is left out,
    unless it was asked for by name or nothing else is there.

    Raises BackendMissing when nothing on that device can run, BackendFailed when a runtime asked for by name crashes.
    """
    installed = [item for item in RUNTIMES.working() if item.device == device]
    chosen = [item for item in installed if not only or item.name in only]
    if not chosen:
        names = sorted({item.name for item in installed})
        raise UsageError(
            f"no runtime for {device} is called {', '.join(only)}", hint=f"runtimes for {device}: {', '.join(names)}"
        )
    fed = [item for item in chosen if item.needs in available]
    chosen = chosen if only or not fed else fed
    load_before = os.getloadavg()[0] / (os.cpu_count() or 1)
    rows: list[BenchRow] = []
    total = len(chosen) * len(batches)
    for runtime in chosen:
        absent = runtime.missing()
        if absent is None and runtime.needs not in available:
            absent = Missing(
                f"there is no {runtime.needs} of {subject.name}", f"repdeploy export --to {runtime.needs} writes it"
            )
        if absent is not None:
            rows += [BenchRow(runtime.name, device, batch, missing=absent.what, hint=absent.hint) for batch in batches]
            continue
        request = {
            "runtime": runtime.name, "device": device, "subject": str(subject.resolve()), "image": image,
            "batches": list(batches), "threads": threads, "seconds": seconds,
        }  # fmt: skip
        progress(f"measuring {runtime.name} on {device}", len(rows), total)
        rows += _in_child(runtime, request, progress, len(rows), total, named=bool(only))
    progress("measuring", total, total)
    if not any(row.timings for row in rows):
        looked_for = "; ".join(dict.fromkeys(f"{row.runtime}: {row.missing}" for row in rows))
        hint = next((row.hint for row in rows if row.hint), "")
        if any(row.missing.startswith("failed") for row in rows):
            raise BackendFailed(f"no runtime could run this network on {device}: {looked_for}", hint=hint)
        raise BackendMissing(
            f"nothing here runs on {device}: {looked_for}", hint=f"{hint}; or measure with --device cpu" if hint else ""
        )
    notes = []
    if load_before > BUSY:
        notes.append(f"the machine was busy before the benchmark began: {load_before:.1f} runnable processes per core")
    return Bench(subject.name, tuple(_judged(row) for row in rows), environment(threads), notes=tuple(notes))


def environment(threads: int) -> dict[str, str]:
    """The conditions that every row shares."""
    found = {
        "machine": platform.machine(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "processor": _processor(),
        "cores": str(os.cpu_count()),
        "threads": str(threads),
    }
    if importlib.util.find_spec("torch") is not None:
        import torch

        found["cpu features"] = torch.backends.cpu.get_cpu_capability()
        if torch.cuda.is_available():
            found["gpu"] = torch.cuda.get_device_name(0)
    return {**found, **tool_versions()}


def merge(bundle: Bundle, fresh: Bench) -> None:
    """Write bench.json into a bundle: rows of the same runtime, device, batch and image replace older ones."""
    with bundle.locked():
        _merge(bundle, fresh)


def _merge(bundle: Bundle, fresh: Bench) -> None:
    kept = [row for row in read(bundle.path / BENCH) if _key(row) not in {_key(new) for new in fresh.rows}]
    write_text(bundle.path / BENCH, to_json(replace(fresh, rows=(*kept, *(row for row in fresh.rows if row.timings)))))


def read(path: Path) -> tuple[BenchRow, ...]:
    """The rows of an earlier benchmark; none where there is no file. Raises InputError where it is not understood."""
    if not path.is_file():
        return ()
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["schema"] != BENCH_SCHEMA:
            raise ValueError(f"expected schema {BENCH_SCHEMA}")
        return tuple(row_from_json(item) for item in content["rows"])
    except (ValueError, KeyError, TypeError) as reason:
        raise InputError(f"{path} is no benchmark: {reason}", hint="remove it and run bench again") from reason


def row_from_json(item: Mapping[str, Any]) -> BenchRow:
    """A row as `plain` wrote it."""
    kept = {field.name for field in fields(Timing)}
    timings = tuple(
        Timing(**tupled({key: value for key, value in timing.items() if key in kept})) for timing in item["timings"]
    )
    ratio = item["speedup"]
    interval = Interval(ratio["ratio"], ratio["low"], ratio["high"]) if ratio else None
    return BenchRow(**{**item, "timings": timings, "speedup": interval, "warnings": tuple(item["warnings"])})


def _in_child(
    runtime: Runtime, request: dict[str, Any], progress: Progress, done: int, total: int, named: bool
) -> list[BenchRow]:
    rows: list[BenchRow] = []
    failure = hint = ""
    with subprocess.Popen(
        [sys.executable, "-m", "repdeploy.benchmark_worker"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    ) as child:  # fmt: skip
        assert child.stdin is not None
        assert child.stdout is not None
        assert child.stderr is not None
        with contextlib.suppress(BrokenPipeError):  # a child that died at once says why by its exit status
            child.stdin.write(json.dumps(request))
            child.stdin.flush()
        with contextlib.suppress(BrokenPipeError):
            child.stdin.close()
        for line in child.stdout:
            answer = json.loads(line)
            if "row" in answer:
                rows.append(row_from_json(answer["row"]))
                progress(f"measuring {runtime.name} on {runtime.device}", done + len(rows), total)
            else:
                failure, hint = answer["error"], answer.get("hint", "")
        said = child.stderr.read().strip().splitlines()
    if child.returncode != 0:
        failure = failure or (said[-1] if said else f"exit status {child.returncode}")
        if named:
            raise BackendFailed(f"{runtime.name} on {runtime.device} failed: {failure}", hint=hint)
        missing = request["batches"][len(rows) :]
        rows += [BenchRow(runtime.name, runtime.device, batch, missing=f"failed: {failure}", hint=hint) for batch in missing]
    return rows


def _judged(row: BenchRow) -> BenchRow:
    warnings = []
    for timing in row.timings:
        if timing.spread > WIDE_SPREAD:
            warnings.append(f"{timing.network}: the middle half of the runs spreads over {timing.spread:.0%} of the median")
        if not timing.steady:
            warnings.append(f"{timing.network}: did not become steady during warm-up")
    return replace(row, warnings=tuple(warnings))


def _key(row: BenchRow) -> tuple[object, ...]:
    shape = row.timings[0].input_shape[1:] if row.timings else ()
    return row.runtime, row.device, row.batch, shape, row.timings[0].threads if row.timings else 0


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or "unknown"
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
