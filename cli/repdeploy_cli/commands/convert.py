from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

import typer

from repdeploy_cli import options


def convert(
    checkpoint: options.CheckpointOrGraph,
    family: options.Family = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="The bundle to write; <stem>.repdeploy here when left out.", show_default=False),
    ] = None,
    weights: options.Weights = "model",
    arch: options.Arch = None,
    set: options.Settings = None,
    input_shape: options.InputShape = None,
    expect: Annotated[
        Path | None,
        typer.Option(
            help="An .npz with input and output recorded by your training code: anchors the verdict.", show_default=False
        ),
    ] = None,
    gates: Annotated[Literal["all", "blocks"], typer.Option(help="blocks: prove the blocks only, not the network.")] = "all",
    dtype: Annotated[Literal["float32", "float64"], typer.Option(help="Type of the written weights.")] = "float32",
    seed: Annotated[int, typer.Option(help="Seed of the gates' images.")] = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Recognise and describe; write nothing.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a bundle of another source.")] = False,
    keep_failed: Annotated[bool, typer.Option("--keep-failed", help="Keep what failed verification, for a look.")] = False,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="MODULE:FACTORY",
            help="Build your own network and squeeze its graph; also FILE.py:FACTORY and timm:NAME. Runs that code.",
            show_default=False,
        ),
    ] = None,
    model_args: Annotated[
        str | None, typer.Option(metavar="JSON", help='Keyword arguments of --model, as {"depth": 18}.', show_default=False)
    ] = None,
    explain: Annotated[
        bool, typer.Option("--explain", help="Of a graph: why each linear operator that stays was not squeezed.")
    ] = False,
    force_squeeze: Annotated[
        bool, typer.Option("--force-squeeze", help="Of a graph: squeeze what would cost more operations, too.")
    ] = False,
    prune_dead: Annotated[
        bool,
        typer.Option("--prune-dead", help="Also remove every channel that is a constant everywhere, or that nothing reads."),
    ] = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Fuse a training checkpoint or squeeze an ONNX graph, prove the result, write a bundle."""
    from repdeploy_cli.render import progress, show_conversion

    # hashing and writing share the cores with the fusion: idle OpenMP threads must sleep, not spin (before torch loads)
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    with progress() as report:
        from repdeploy import pipeline

        conversion = pipeline.convert(
            checkpoint, family=family, output=output, weights=weights, arch=arch, set=set or (), input_shape=input_shape,
            expect=expect, gates=gates, dtype=dtype, seed=seed, dry_run=dry_run, force=force, keep_failed=keep_failed,
            model=model, model_args=model_args, force_squeeze=force_squeeze, prune_dead=prune_dead, progress=report,
        )  # fmt: skip
    show_conversion(conversion, explain=explain)
