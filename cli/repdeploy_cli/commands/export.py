from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from repdeploy_cli import options


def export(
    bundle: options.BundleFolder = None,
    onnx: Annotated[bool, typer.Option("--onnx", help="Write ONNX; this is the default.")] = False,
    trt: Annotated[bool, typer.Option("--trt", help="Build a TensorRT engine, or write all that its target needs.")] = False,
    input_shape: options.InputShape = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write the ONNX here instead of into the bundle.", show_default=False)
    ] = None,
    dynamic: Annotated[Literal["batch", "none"], typer.Option(help="Which dimensions stay open.")] = "batch",
    fold: Annotated[
        bool, typer.Option("--fold/--no-fold", help="Squeeze norms and scales that the blocks leave, where that is exact.")
    ] = True,
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> int:
    """Write artifacts into a bundle, each proved against the float64 reference."""
    from repdeploy_cli.render import chosen, progress, show_export

    taken = chosen(bundle)
    with progress() as report:
        from repdeploy import pipeline

        result = pipeline.export(
            taken, trt=trt, input_shape=input_shape, output=output, dynamic=dynamic, fold=fold, progress=report
        )
    return show_export(result)
