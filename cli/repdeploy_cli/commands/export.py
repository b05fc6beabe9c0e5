from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from repdeploy_cli import options

PrecisionName = Literal["fp32", "fp16", "bf16"]


def export(
    bundle: options.BundleFolder = None,
    onnx: Annotated[bool, typer.Option("--onnx", help="Write ONNX; this is the default.")] = False,
    trt: Annotated[bool, typer.Option("--trt", help="Build a TensorRT engine, or write all that its target needs.")] = False,
    openvino: Annotated[bool, typer.Option("--openvino", help="Write OpenVINO's IR: model.xml and model.bin.")] = False,
    torch: Annotated[bool, typer.Option("--torch", help="Write a torch.export program (.pt2).")] = False,
    to: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="An exporter by name, for example ncnn; repeatable.", show_default=False),
    ] = None,
    precision: Annotated[PrecisionName, typer.Option(help="Of the graph itself; every target follows it.")] = "fp32",
    input_shape: options.InputShape = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write the ONNX here instead of into the bundle.", show_default=False)
    ] = None,
    dynamic: Annotated[
        Literal["batch", "spatial", "none"], typer.Option(help="Which axes stay open; spatial: batch, height and width.")
    ] = "batch",
    opset: Annotated[int | None, typer.Option(min=1, help="ONNX opset, 11 to 23.", show_default=False)] = None,
    fold: Annotated[
        bool,
        typer.Option(
            "--fold/--no-fold",
            help="Squeeze norms and scales that the blocks leave, where that is exact.",
        ),
    ] = True,
    simplify: Annotated[bool, typer.Option("--simplify", help="Run onnxsim; its result is verified again.")] = False,
    input_name: Annotated[str | None, typer.Option(help="Name of the input.", show_default=False)] = None,
    fold_normalize: Annotated[
        str | None,
        typer.Option(
            metavar="MEAN,STD",
            help="Take raw images: means, then deviations (one or one per channel), or imagenet.",
            show_default=False,
        ),
    ] = None,
    softmax: Annotated[bool, typer.Option("--softmax", help="End in probabilities.")] = False,
    io_dtype: Annotated[PrecisionName, typer.Option(help="Of inputs and outputs, where the graph is fp16 or bf16.")] = "fp32",
    keep_fp32: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN",
            help="Operator, layer or regular expression that stays in fp32; repeatable; none: not even the usual operators.",
            show_default=False,
        ),
    ] = None,
    sample: Annotated[
        Path | None,
        typer.Option(help="fp16: .npz with images (input) that show what float16 cannot hold.", show_default=False),
    ] = None,
    smallest: Annotated[int | None, typer.Option("--min", help="TensorRT: smallest batch (1).", show_default=False)] = None,
    optimal: Annotated[int | None, typer.Option("--opt", help="TensorRT: batch to tune for (4).", show_default=False)] = None,
    largest: Annotated[int | None, typer.Option("--max", help="TensorRT: largest batch (16).", show_default=False)] = None,
    timing_cache: Annotated[
        Path | None,
        typer.Option(help="TensorRT: file of measured kernels, read and extended.", show_default=False),
    ] = None,
    workspace: Annotated[
        int | None, typer.Option(metavar="MIB", help="TensorRT: most memory for the build.", show_default=False)
    ] = None,
    optimization_level: Annotated[
        int | None, typer.Option(help="TensorRT: level 0 to 5; its own is 3.", show_default=False)
    ] = None,
    tf32: Annotated[bool, typer.Option("--tf32", help="TensorRT: let float32 layers use TF32.")] = False,
    hardware_compatible: Annotated[
        bool, typer.Option("--hardware-compatible", help="TensorRT: run on Ampere and later GPUs.")
    ] = False,
    version_compatible: Annotated[
        bool, typer.Option("--version-compatible", help="TensorRT: run on later versions of it.")
    ] = False,
    strip_weights: Annotated[
        bool, typer.Option("--strip-weights", help="TensorRT: leave the weights out of the plan; refit it later.")
    ] = False,
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
            taken,
            trt=trt,
            openvino=openvino,
            torch=torch,
            to=to or (),
            precision=precision,
            input_shape=input_shape,
            output=output,
            dynamic=dynamic,
            opset=opset,
            fold=fold,
            simplify=simplify,
            input_name=input_name,
            fold_normalize=fold_normalize,
            softmax=softmax,
            io_dtype=io_dtype,
            keep_fp32=keep_fp32 or (),
            sample=sample,
            batches=pipeline.profile(smallest, optimal, largest),
            timing_cache=timing_cache,
            workspace=workspace,
            optimization_level=optimization_level,
            tf32=tf32,
            hardware_compatible=hardware_compatible,
            version_compatible=version_compatible,
            strip_weights=strip_weights,
            progress=report,
        )
    return show_export(result)
