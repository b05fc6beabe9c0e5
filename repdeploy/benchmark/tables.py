"""Benchmarks that need no bundle: a paper's networks on this device, and what training steps cost."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from repdeploy.benchmark.children import asked
from repdeploy.benchmark.conditions import environment
from repdeploy.benchmark.stage import chosen_runtimes
from repdeploy.benchmark.subject import Measured, with_graphs
from repdeploy.errors import BackendFailed, BackendMissing, RepDeployError, words
from repdeploy.measurements import BenchRow, ExtraMemory, OnlineGain, Suite, SuiteRow, Timing, TrainStep, TrainSteps, read_json
from repdeploy.progress import Progress
from repdeploy.runtimes import Runtime
from repdeploy.runtimes.interface import NETWORK, ONNX
from repdeploy.suites import SuiteDefinition, flops, speed_ratios
from repdeploy.training_cost import findings


def suite(
    definition: SuiteDefinition, device: str, batch: int, threads: int, seconds: float, only: Sequence[str], progress: Progress
) -> Suite:
    """Measure the networks of a suite side by side, one process per runtime. A network that fails is a row that says so.

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
    notes = [f"{name}: {missing.what}; {missing.hint}" for name, missing in absent]
    steps = len(working) + 1
    progress("building the networks", 0, steps)
    known = tuple(
        SuiteRow(item.name, item.parameters, flops(item.build(), definition.image), "", paper=item.paper.speed)
        for item in definition.networks
    )
    items = tuple(Measured(item.name, "suite", "", key=(definition.name, item.name)) for item in definition.networks)
    with tempfile.TemporaryDirectory() as scratch:
        for number, runtime in enumerate(working, 1):
            progress(f"measuring in {runtime.name}", number, steps)
            ready = with_graphs(items, definition.image, Path(scratch)) if runtime.needs == ONNX else items
            times = partial(_times, runtime, image=definition.image, batch=batch, threads=threads, seconds=seconds)
            try:
                timed = times(ready)
            except RepDeployError as reason:
                notes.append(f"{runtime.name} could not hold all networks at once ({words(reason, 120)}): measured one by one")
                timed = {}
                for item in ready:
                    progress(f"measuring {item.name} in {runtime.name}", number, steps)
                    try:
                        timed |= times((item,))
                    except RepDeployError as alone:
                        timed[item.name] = f"failed: {words(alone, 200)}"
            for row in known:
                found = timed[row.network]
                own = {"missing": found} if isinstance(found, str) else {"timing": found}
                rows.append(replace(row, runtime=runtime.name, **own))
    progress("measuring", steps, steps)
    if not any(row.timing for row in rows):
        raise BackendFailed(f"no network of {definition.name} ran: {rows[0].missing}", hint="give a smaller --batch")
    return Suite(
        definition.name, tuple(rows), environment(threads), definition.conditions, speed_ratios(rows, definition),
        (*notes, *definition.notes),
    )  # fmt: skip


def _times(
    runtime: Runtime, items: Sequence[Measured], *, image: tuple[int, ...], batch: int, threads: int, seconds: float
) -> dict[str, Timing | str]:
    """All networks in rounds of random order, in one child: what slows the machine down hits all. Raises BackendFailed."""
    request = {
        "task": "time", "runtime": runtime.name, "device": runtime.device, "networks": [asdict(item) for item in items],
        "image": image, "batches": [batch], "threads": threads, "seconds": seconds * len(items),
    }  # fmt: skip
    (answer,) = asked(request)
    row = read_json(BenchRow, answer.record)
    if row.missing:
        raise BackendFailed(row.missing.removeprefix("failed: "), hint=row.hint)
    return {timing.network: timing for timing in row.timings}


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
