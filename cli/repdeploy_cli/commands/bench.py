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
    other: Annotated[
        Path | None, typer.Argument(help="Another .onnx file, measured beside the first.", show_default=False)
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
    seconds: Annotated[float, typer.Option(help="Time spent on timed runs, per runtime and batch size.")] = 4.0,
    runtime: Annotated[
        list[str] | None, typer.Option("--runtime", "-r", help="Only this runtime; repeatable.", show_default=False)
    ] = None,
    trust_engine: Annotated[
        bool,
        typer.Option("--trust-engine", help="Load a plan that no manifest vouches for: that can run its author's code."),
    ] = False,
    latency_only: Annotated[
        bool, typer.Option("--latency-only", help="No memory, nothing from inside the networks, no density table.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Keep rows that bench.json has from this machine and these versions.")
    ] = False,
    baseline: Annotated[
        Path | None,
        typer.Option(help="An earlier bench.json or bundle: exit 8 where this is slower.", show_default=False),
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Exit 7 where a row is too unstable to be trusted.")] = False,
    layers: Annotated[bool, typer.Option("--layers", help="Print every convolution of every network.")] = False,
    suite: Annotated[
        str | None, typer.Option(help="Measure a paper's networks instead: repvgg-paper.", show_default=False)
    ] = None,
    train_step: Annotated[
        bool, typer.Option("--train-step", help="Measure training steps instead: time and memory by block kind.")
    ] = False,
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="For --train-step: module:factory of a network to train; repeatable. ResNet-18 of every block kind "
            "when left out.",
            show_default=False,
        ),
    ] = None,
    side: Annotated[
        list[int] | None,
        typer.Option(help="For --train-step: height and width of images; repeatable, at least two.", show_default=False),
    ] = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> int:
    """Measure the training-time network against the deploy network, and say why it is as fast as it is."""
    from repdeploy_cli.bench_tables import show_bench, show_suite, show_train_steps
    from repdeploy_cli.render import chosen, progress

    if suite is not None and train_step:
        raise typer.BadParameter("--suite and --train-step are two benchmarks: give one of them")
    if suite is not None or train_step:
        _refuse("is about a bundle or file, not about --suite or --train-step", {
            "SUBJECT": subject, "--input-shape": input_shape, "--baseline": baseline, "--resume": resume, "--strict": strict,
            "--layers": layers, "--latency-only": latency_only, "--trust-engine": trust_engine,
        })  # fmt: skip
    _refuse("is for --train-step", {} if train_step else {"--model": model, "--side": side})
    _refuse("is not for --train-step, which torch does", {"--runtime": runtime} if train_step else {})
    if suite is not None:
        with progress() as report:
            from repdeploy import pipeline

            table = pipeline.bench_suite(
                suite, device=device, batch=batch, threads=threads, seconds=seconds, runtime=runtime or (), progress=report
            )
        return show_suite(table)
    if train_step:
        with progress() as report:
            from repdeploy import pipeline

            steps = pipeline.train_step(
                model or (), device=device, batch=batch, sides=side, threads=threads, seconds=seconds, progress=report
            )
        return show_train_steps(steps)
    taken = chosen(subject)
    with progress() as report:
        from repdeploy import pipeline

        result = pipeline.bench(
            taken, other, device=device, batch=batch, input_shape=input_shape, threads=threads, seconds=seconds,
            runtime=runtime or (), trust_engine=trust_engine, latency_only=latency_only, resume=resume, baseline=baseline,
            progress=report,
        )  # fmt: skip
    return show_bench(result, layers=layers, strict=strict)


def _refuse(why: str, given: dict[str, object]) -> None:
    """What one kind of benchmark would leave unread."""
    for name, value in given.items():
        if value:
            raise typer.BadParameter(f"{name} {why}")
