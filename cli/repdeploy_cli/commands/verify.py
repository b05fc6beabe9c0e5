from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from repdeploy_cli import options


def verify(
    bundle: options.BundleFolder = None,
    other: Annotated[
        Path | None, typer.Argument(help="A second bundle or .onnx file: compare the two.", show_default=False)
    ] = None,
    against: Annotated[
        Path | None, typer.Option(help="The checkpoint: run all gates anew on other images.", show_default=False)
    ] = None,
    input_shape: options.InputShape = None,
    seed: Annotated[int, typer.Option(help="Seed of the images.")] = 1,
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> int:
    """Replay the recorded references against every artifact of a bundle."""
    from repdeploy_cli.render import chosen, progress, show_verification

    taken = chosen(bundle)
    with progress() as report:
        from repdeploy import pipeline

        verification = pipeline.verify(taken, other, against=against, input_shape=input_shape, seed=seed, progress=report)
    return show_verification(verification)
