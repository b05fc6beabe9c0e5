"""Options that several commands share, and what they switch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

_state = {"debug": False, "quiet": False, "json": False}


def _remember(name: str) -> object:
    def callback(value: bool) -> bool:
        _state[name] = value
        return value

    return callback


def debugging() -> bool:
    return _state["debug"]


def quiet() -> bool:
    return _state["quiet"]


def as_json() -> bool:
    return _state["json"]


Json = Annotated[
    bool, typer.Option("--json", callback=_remember("json"), is_eager=True, help="Print one JSON document instead of tables.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", callback=_remember("quiet"), is_eager=True, help="No progress.")]
Debug = Annotated[
    bool, typer.Option("--debug", callback=_remember("debug"), is_eager=True, help="Show the whole trace of an error.")
]
CheckpointFile = Annotated[
    Path, typer.Argument(help="Training-time weights: .pth, .pt, .pth.tar, .safetensors, .hdf5 or .h5.", show_default=False)
]
CheckpointOrGraph = Annotated[
    Path,
    typer.Argument(
        help="Training-time weights: .pth, .pt, .pth.tar, .safetensors, .hdf5 or .h5; or a graph: .onnx.", show_default=False
    ),
]
BundleFolder = Annotated[
    Path | None, typer.Argument(help="A bundle; the newest one in this folder when left out.", show_default=False)
]
Family = Annotated[
    str | None,
    typer.Option("--family", "-f", help="Family of the blocks; recognised from the keys when left out.", show_default=False),
]
Weights = Annotated[str, typer.Option(help="Which weights of the file: model or ema.")]
Arch = Annotated[
    str | None, typer.Option(help="An official variant, for example RepVGG-A0; the shapes must agree.", show_default=False)
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="[SCOPE.]NAME=VALUE", help="State a fact that tensors do not tell; repeatable.", show_default=False
    ),
]
Branches = Annotated[
    bool,
    typer.Option("--branches", help="Also compare the branches of every block: share of the fused kernel, similarity, death."),
]
InputShape = Annotated[
    str | None, typer.Option(metavar="NxCxHxW", help="Image batch, for example 1x3x224x224.", show_default=False)
]
