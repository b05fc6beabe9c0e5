from __future__ import annotations

from repdeploy_cli import options


def inspect(
    checkpoint: options.CheckpointFile,
    family: options.Family = None,
    weights: options.Weights = "model",
    arch: options.Arch = None,
    set: options.Settings = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Say what a checkpoint holds; nothing in it is executed."""
    from repdeploy import pipeline
    from repdeploy_cli.render import show_inspection

    show_inspection(pipeline.inspect(checkpoint, family=family, weights=weights, arch=arch, set=set or ()))
