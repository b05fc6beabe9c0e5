from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from repdeploy_cli import options


def bench(
    subject: Annotated[
        Path | None,
        typer.Argument(
            help="A bundle, an .onnx file or a .plan; the newest bundle in this folder when left out.", show_default=False
        ),
    ] = None,
    device: Annotated[Literal["cpu", "cuda"], typer.Option(help="Where to measure.")] = "cpu",
    batch: Annotated[
        list[int] | None,
        typer.Option(
            "--batch", "-b", help="Batch size; repeatable. 1 and 8 when left out, or a graph's own.", show_default=False
        ),
    ] = None,
    input_shape: options.InputShape = None,
    threads: Annotated[
        int | None, typer.Option(help="Threads per runtime; all cores when left out.", show_default=False)
    ] = None,
    seconds: Annotated[float, typer.Option(help="Time spent per runtime and batch size.")] = 4.0,
    runtime: Annotated[
        list[str] | None, typer.Option("--runtime", "-r", help="Only this runtime; repeatable.", show_default=False)
    ] = None,
    trust_engine: Annotated[
        bool,
        typer.Option("--trust-engine", help="Load a plan that no manifest vouches for: that can run its author's code."),
    ] = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Measure the training-time network against the deploy network."""
    from repdeploy_cli.render import chosen, progress, show_bench

    taken = chosen(subject)
    with progress() as report:
        from repdeploy import pipeline

        result = pipeline.bench(
            taken, device=device, batch=batch, input_shape=input_shape, threads=threads, seconds=seconds,
            runtime=runtime or (), trust_engine=trust_engine, progress=report,
        )  # fmt: skip
    show_bench(result)
