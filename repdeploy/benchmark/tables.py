"""Benchmarks that need no bundle: a paper's networks on this device, and what training steps cost."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from repdeploy.benchmark.children import asked
from repdeploy.benchmark.conditions import environment
from repdeploy.benchmark.stage import chosen_runtimes
from repdeploy.benchmark.subject import Measured, with_graphs
from repdeploy.errors import BackendFailed, BackendMissing, RepDeployError, words
from repdeploy.measurements import BenchRow, ExtraMemory, OnlineGain, Suite, SuiteRow, TrainStep, TrainSteps, read_json
from repdeploy.progress import Progress
from repdeploy.runtimes import Runtime
from repdeploy.runtimes.interface import NETWORK, ONNX
from repdeploy.suites import SuiteDefinition, SuiteNetwork, flops, speed_ratios
from repdeploy.training_cost import findings


def suite(
    definition: SuiteDefinition, device: str, batch: int, threads: int, seconds: float, only: Sequence[str], progress: Progress
) -> Suite:
    """Measure every network of a suite in processes of their own. A network that fails is a row that says so.

    Raises BackendMissing where no runtime can run.
    """
    runtimes = chosen_runtimes(device, tuple(only) or ("torch",))
    absent = [(runtime.name, missing) for runtime in runtimes if (missing := runtime.missing()) is not None]
    working = [runtime for runtime in runtimes if runtime.needs in (NETWORK, ONNX) and runtime.missing() is None]
    if not working:
        looked_for = "; ".join(f"{name}: {missing.what}" for name, missing in absent)
        raise BackendMissing(
            f"no runtime here runs this suite on {device}: {looked_for or 'those named need a compiled file'}",
            hint=absent[0][1].hint if absent else "give --runtime torch",
        )
    rows: list[SuiteRow] = []
    total = len(definition.networks) * len(working)
    for network in definition.networks:
        with tempfile.TemporaryDirectory() as scratch:
            for runtime in working:
                progress(f"measuring {network.name} in {runtime.name}", len(rows), total)
                rows.append(_suite_row(definition, network, runtime, batch, threads, seconds, Path(scratch)))
    progress("measuring", total, total)
    if not any(row.timing for row in rows):
        raise BackendFailed(f"no network of {definition.name} ran: {rows[0].missing}", hint="give a smaller --batch")
    notes = [f"{name}: {missing.what}; {missing.hint}" for name, missing in absent]
    return Suite(
        definition.name, tuple(rows), environment(threads), definition.conditions, speed_ratios(rows, definition),
        (*notes, *definition.notes),
    )  # fmt: skip


def _suite_row(
    definition: SuiteDefinition,
    network: SuiteNetwork,
    runtime: Runtime,
    batch: int,
    threads: int,
    seconds: float,
    scratch: Path,
) -> SuiteRow:
    known = SuiteRow(network.name, network.parameters, 0, runtime.name, paper=network.paper.speed)
    item: tuple[Measured, ...] = (Measured(network.name, "suite", "", key=(definition.name, network.name)),)
    try:
        counted = flops(network.build(), definition.image)
        if runtime.needs == ONNX:
            item = with_graphs(item, definition.image, scratch)
        request = {
            "task": "time", "runtime": runtime.name, "device": runtime.device, "networks": [asdict(one) for one in item],
            "image": definition.image, "batches": [batch], "threads": threads, "seconds": seconds,
        }  # fmt: skip
        (answer,) = asked(request)
    except (RepDeployError, MemoryError, RuntimeError) as reason:
        return replace(known, missing=f"failed: {words(reason, 200)}")
    row = read_json(BenchRow, answer.record)
    return replace(known, flops=counted, timing=row.timings[0] if row.timings else None, missing=row.missing)


def train_steps(
    models: Sequence[str], device: str, batch: int, sides: Sequence[int], threads: int, seconds: float, progress: Progress
) -> TrainSteps:
    """Time and memory of training steps, in one process, so that the networks take turns. Raises BackendFailed."""
    request = {
        "task": "train", "device": device, "models": list(models), "sides": list(sides), "batch": batch, "threads": threads,
        "seconds": seconds,
    }  # fmt: skip
    rows: list[TrainStep] = []
    total = len(models) * len(sides)
    progress(f"training at {sides[0]}x{sides[0]}", 0, total)
    for answer in asked(request):
        rows.append(read_json(TrainStep, answer.record))
        following = sides[min(len(rows) // len(models), len(sides) - 1)]
        progress(f"training at {following}x{following}", len(rows), total)
    if all(row.missing for row in rows):
        raise BackendFailed(f"no network could be trained: {rows[0].missing}", hint="give a smaller --batch or --side")
    found = findings(rows)
    return TrainSteps(
        tuple(rows), environment(threads), tuple(item for item in found if isinstance(item, ExtraMemory)),
        tuple(item for item in found if isinstance(item, OnlineGain)),
    )  # fmt: skip
