"""The child process in which one runtime is measured: `python -m repdeploy.benchmark_worker`, a job on standard input.

One process per runtime keeps thread pools, allocators and crashes apart. It writes one JSON object per line: progress,
then a row per batch size.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from repdeploy.bundle import Bundle
from repdeploy.errors import RepDeployError, words
from repdeploy.records import BenchRow, Timing, plain
from repdeploy.runtimes.interface import Job, Runtime, Session
from repdeploy.statistics import interleaved, speedup, warm_up
from repdeploy.vouching import PLAN_SUFFIXES, compiled_files, require_vouched

LEAST_RUNS = 12
MOST_RUNS = 400


def main() -> int:
    request = json.loads(sys.stdin.read())
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a runtime prints must not land among the answers
    try:
        for row in measure(request):
            print(json.dumps({"row": plain(row)}), file=answers, flush=True)
    except RepDeployError as reason:
        print(json.dumps({"error": str(reason), "hint": reason.hint}), file=answers, flush=True)
        return reason.exit_status
    return 0


def measure(request: dict[str, Any]) -> Iterator[BenchRow]:
    """One row per batch size of the request: {runtime, device, subject, image, batches, threads, seconds}."""
    from repdeploy.runtimes import RUNTIMES

    runtime = next(item for item in RUNTIMES.working() if (item.name, item.device) == (request["runtime"], request["device"]))
    image = tuple(request["image"])
    with contextlib.ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        networks = _jobs(Path(request["subject"]), image, request["threads"], scratch, runtime.needs)
        sessions = [(name, job, stack.enter_context(runtime.open(job))) for name, job in networks]
        for batch in request["batches"]:
            try:
                yield _row(runtime, sessions, batch, image, request)
            except (RepDeployError, RuntimeError, MemoryError) as reason:
                yield BenchRow(runtime.name, runtime.device, batch, missing=f"failed: {words(reason, 200)}")


def _jobs(subject: Path, image: Any, threads: int, scratch: Path, needs: str) -> list[tuple[Any, Job]]:
    if subject.suffix in PLAN_SUFFIXES:
        plan = require_vouched(subject, trusted=True)  # whoever asked has vouched, or said that it is trusted
        return [("file", Job(image, threads, compiled={"tensorrt": plan}))]
    if subject.is_file():
        return [("file", _graph_job(subject, image, threads))]
    bundle = Bundle(subject)
    compiled = compiled_files(bundle)
    if needs in compiled:
        name = "deploy" if bundle.manifest.graph is None else "squeezed"
        return [(name, Job(image, threads, compiled=compiled))]
    from repdeploy import registry
    from repdeploy.network import Network
    from repdeploy.rebuild import deploy_network, training_twin

    families = registry.families()
    if bundle.manifest.graph is not None:
        return [
            ("original", _graph_job(bundle.graph_source(), image, threads)),
            ("squeezed", _graph_job(bundle.squeezed_graph(), image, threads)),
        ]

    def onnx_of(name: str, network: Network) -> Path:
        from repdeploy.exporters.folding import folded
        from repdeploy.exporters.onnx_file import write_onnx

        change = folded if name == "deploy" else None  # as export writes it
        write_onnx(network, scratch / f"{name}.onnx", image, batch=None, provenance={}, change=change)
        return scratch / f"{name}.onnx"

    def training(static: bool = False) -> Network:
        return training_twin(bundle, families, image, static=static)

    def deploy() -> Network:
        return deploy_network(bundle, families, image)

    return [
        ("training-time", Job(image, threads, training, onnx=lambda: onnx_of("training", training(static=True)))),
        ("deploy", Job(image, threads, deploy, onnx=lambda: onnx_of("deploy", deploy()))),
    ]


def _graph_job(path: Path, image: Any, threads: int) -> Job:
    """An ONNX file, in onnxruntime or node by node in torch."""

    def module() -> Any:
        from repdeploy.graph.torch_module import GraphModule

        return GraphModule(path)

    def feeds(batch: int) -> Any:
        from repdeploy.graph.onnx_source import read_onnx
        from repdeploy.graph.sample_inputs import of_batch

        return of_batch(read_onnx(path).model.graph, (batch, *image))

    return Job(image, threads, module, onnx=lambda: path, feeds=feeds)


def _row(
    runtime: Runtime, sessions: list[tuple[Any, Job, Session]], batch: int, image: Any, request: dict[str, Any]
) -> BenchRow:
    images = np.random.default_rng(batch).standard_normal((batch, *image), np.float32)
    timers = [session.timer(job.inputs(batch, lambda: images)) for _, job, session in sessions]
    warmups, steady = warm_up(timers)
    runs = interleaved(timers, request["seconds"], LEAST_RUNS, MOST_RUNS, seed=batch)
    timings = tuple(
        Timing(
            name,
            runtime.name,
            runtime.device,
            next((item.precision for kind, item in job.compiled.items() if kind == runtime.needs), runtime.precision),
            request["threads"],
            batch,
            (batch, *image),
            seconds,
            warmups,
            steady,
        )
        for (name, job, _), seconds in zip(sessions, runs, strict=True)
    )
    ratio = speedup(runs[0], runs[1]) if len(runs) == 2 else None
    return BenchRow(runtime.name, runtime.device, batch, timings, ratio)


if __name__ == "__main__":
    sys.exit(main())
