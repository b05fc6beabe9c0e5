"""The child process in which one runtime is measured: `python -m repdeploy.benchmark.worker`, a task on standard input.

One process per task keeps thread pools, allocators and crashes apart. It writes one JSON object per line, as it goes:
{"answer": a record} or {"error": words, "hint": words}.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from repdeploy.benchmark.subject import Measured, from_request, job_of
from repdeploy.errors import RepDeployError, words
from repdeploy.graph.file_images import float_type
from repdeploy.measurements import BenchRow, Memory, Profile, Timing
from repdeploy.records import plain
from repdeploy.runtimes.interface import ONNX, Enqueuing, Feeds, Job, Profiling, Runtime, Session
from repdeploy.statistics import interleaved, speedup, warm_up

LEAST_RUNS = 12
MOST_RUNS = 2000
PROFILED_RUNS = 9
PR_SET_PDEATHSIG = 1
"""man 2 prctl."""
OUT_OF_MEMORY = ("out of memory", "allocate memory", "bad_alloc", "failed to allocate", "unable to allocate", "memoryerror")
"""How libraries say it, in lower case."""


def main() -> int:
    request = json.loads(sys.stdin.read())
    answers = os.fdopen(os.dup(1), "w")
    _die_with_parent()
    os.dup2(2, 1)  # whatever a runtime prints must not land among the answers
    if request["device"] == "cpu":
        _stay_within_memory()
    try:
        for record in TASKS[request["task"]](request):
            print(json.dumps({"answer": plain(record)}), file=answers, flush=True)
    except RepDeployError as reason:
        print(json.dumps({"error": str(reason), "hint": reason.hint}), file=answers, flush=True)
        return reason.exit_status
    return 0


def timed(request: dict[str, Any]) -> Iterator[BenchRow]:
    """A row per batch size, of {runtime, device, networks, image, batches, threads, seconds}."""
    runtime = _runtime(request)
    with contextlib.ExitStack() as stack:
        jobs = _jobs(request)
        sessions = [(item, job, stack.enter_context(runtime.open(job))) for item, job in jobs]
        for batch in request["batches"]:
            try:
                yield _row(runtime, sessions, batch, request)
            except Exception as reason:  # whatever a runtime raises, the other batch sizes go on
                what, hint = _failed(reason, batch)
                yield BenchRow(runtime.name, runtime.device, batch, missing=what, hint=hint)


def looked_into(request: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Memory and what ran inside one network, per batch size: {batch, memory, profile, why there is none}."""
    runtime, ((item, job),) = _runtime(request), _jobs(request)
    images = _images(job, request)
    _load_libraries(runtime, request["threads"])
    before = _status("VmRSS")
    memories: dict[int, Memory] = {}
    for batch in request["batches"]:  # before anything is profiled, which takes memory too
        with contextlib.suppress(Exception):  # the timed row says why
            memories[batch] = _memory(runtime, item, job, images(batch), before)
    for batch, memory in memories.items():
        profile, why = None, "" if isinstance(runtime, Profiling) else f"{runtime.name} does not tell what ran inside"
        if isinstance(runtime, Profiling):
            try:
                source, layers = runtime.profile(job, images(batch), PROFILED_RUNS)
                profile = Profile(item.name, source, layers)
            except Exception as reason:
                why = f"no profile of {item.name} in {runtime.name}: {words(reason, 200)}"
        yield {"batch": batch, "memory": memory, "profile": profile, "why": why}


def dense(request: dict[str, Any]) -> Iterator[Any]:
    """The density table of one runtime, at the measured peak of the request."""
    from repdeploy import density

    taken = density.setting(request["device"])
    yield density.table(
        _runtime(request), request["threads"], batch=taken.batch, channels=taken.channels, side=taken.side,
        seconds=taken.seconds, peak=request["peak"],
    )  # fmt: skip


def at_best(request: dict[str, Any]) -> Iterator[Any]:
    """The device's roofline."""
    from repdeploy import roofline

    yield roofline.measured(request["device"], request["threads"], request["precision"], request["seconds"])


def train_steps(request: dict[str, Any]) -> Iterator[Any]:
    """Training steps of some networks, resolution by resolution."""
    from repdeploy import training_cost

    yield from training_cost.measured(
        request["models"], request["sides"], request["batch"], device=request["device"], threads=request["threads"],
        seconds=request["seconds"],
    )  # fmt: skip


TASKS: dict[str, Callable[[dict[str, Any]], Iterator[Any]]] = {
    "time": timed, "look inside": looked_into, "density": dense, "roofline": at_best, "train": train_steps,
}  # fmt: skip


def _runtime(request: dict[str, Any]) -> Runtime:
    from repdeploy.runtimes import RUNTIMES

    wanted = request["runtime"], request["device"]
    return next(item for item in RUNTIMES.working() if (item.name, item.device) == wanted)


def _jobs(request: dict[str, Any]) -> list[tuple[Measured, Job]]:
    image = tuple(request["image"])
    items = [from_request(item) for item in request["networks"]]
    return [(item, job_of(item, image, request["threads"])) for item in items]


def _images(job: Job, request: dict[str, Any]) -> Callable[[int], Feeds | np.ndarray]:
    """What a job is fed, by batch size: the same numbers for every network and runtime."""

    def images(batch: int) -> np.ndarray:
        return np.random.default_rng(batch).standard_normal((batch, *request["image"]), np.float32)

    return lambda batch: job.inputs(batch, lambda: images(batch))


def _row(runtime: Runtime, sessions: list[tuple[Measured, Job, Session]], batch: int, request: dict[str, Any]) -> BenchRow:
    fed = [_images(job, request)(batch) for _, job, _ in sessions]
    timers = [session.timer(x) for (_, _, session), x in zip(sessions, fed, strict=True)]
    warmups, steady = warm_up(timers)
    runs = interleaved(timers, request["seconds"], LEAST_RUNS, MOST_RUNS, seed=batch)
    timings = tuple(
        Timing(
            item.name, runtime.name, runtime.device, _precision(runtime, job), request["threads"], batch,
            (batch, *request["image"]), seconds, warmups, steady, runtime.layout,
            session.enqueue(x) if isinstance(session, Enqueuing) else (),
        )
        for (item, job, session), x, seconds in zip(sessions, fed, runs, strict=True)
    )  # fmt: skip
    ratio = speedup(runs[0], runs[1]) if len(runs) == 2 else None
    item, job, session = sessions[-1]
    return BenchRow(runtime.name, runtime.device, batch, timings, ratio, drift=_drift(runtime, item, job, session, fed[-1]))


def _precision(runtime: Runtime, job: Job) -> str:
    if job.onnx is not None and runtime.needs == ONNX and runtime.precision == "float32":
        return float_type(job.onnx())
    return next((item.precision for kind, item in job.compiled.items() if kind == runtime.needs), runtime.precision)


def _drift(runtime: Runtime, item: Measured, job: Job, session: Any, x: Feeds | np.ndarray) -> float | None:
    """Of a runtime that computes in less than float32 by itself: its largest error beside float32, over the largest output."""
    if runtime.precision == "float32" or job.onnx is None or not hasattr(session, "outputs"):
        return None
    from repdeploy.runtimes.onnx_runtime import OnnxSession

    exact = OnnxSession(job.onnx(), job.threads).outputs(x)
    found = session.outputs(x)
    largest = max(float(np.abs(array).max()) for array in exact)
    return max(float(np.abs(a - b).max()) for a, b in zip(exact, found, strict=True)) / largest if largest else None


def _load_libraries(runtime: Runtime, threads: int) -> None:
    """Run next to nothing once, so that what the libraries themselves take is not taken for the network's."""
    with contextlib.suppress(Exception):  # a runtime of compiled files, or no torch: then libraries are counted in
        from repdeploy.density import run_smallest

        run_smallest(runtime, threads)


def _memory(runtime: Runtime, item: Measured, job: Job, x: Feeds | np.ndarray, before: int | None) -> Memory:
    """Load and run a network once, and see how far the process grew over what it was `before` any network."""
    if runtime.device == "cuda":
        return _device_memory(runtime, item, job, x)
    told = _forget_peak()
    with runtime.open(job) as session:
        session.timer(x)()
    peak = _status("VmHWM")
    return Memory(item.name, resident=peak - before if told and before is not None and peak is not None else None)


def _device_memory(runtime: Runtime, item: Measured, job: Job, x: Feeds | np.ndarray) -> Memory:
    if not runtime.name.startswith("torch"):
        return Memory(item.name)
    import torch

    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with runtime.open(job) as session:
        session.timer(x)()
        torch.cuda.synchronize()
        return Memory(item.name, allocated=torch.cuda.max_memory_allocated() - before)


def _forget_peak() -> bool:
    """Set the peak of the resident set back to what is resident now, where the system does that."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # man 5 proc: reset the peak resident set size
    except OSError:
        return False
    return True


def _status(name: str) -> int | None:
    """A line of /proc/self/status in bytes."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), None)


def _die_with_parent() -> None:
    """Measure no longer than somebody waits for it, even where the parent was killed. Linux only."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _stay_within_memory() -> None:
    """Let an allocation beyond the free memory fail, so that a row can say so: otherwise the system kills processes."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
        resource.setrlimit(resource.RLIMIT_DATA, (free, resource.getrlimit(resource.RLIMIT_DATA)[1]))
    except (OSError, StopIteration, ValueError):
        return


def _failed(reason: Exception, batch: int) -> tuple[str, str]:
    """What happened, and what to do."""
    said = words(reason, 200) or type(reason).__name__
    if isinstance(reason, MemoryError) or any(phrase in f"{type(reason).__name__} {said}".lower() for phrase in OUT_OF_MEMORY):
        return f"failed: a batch of {batch} does not fit into memory ({said})", "give a smaller --batch"
    return f"failed: {said}", reason.hint if isinstance(reason, RepDeployError) else ""


if __name__ == "__main__":
    sys.exit(main())
