from __future__ import annotations

from repdeploy_cli import options


def inspect(
    checkpoint: options.CheckpointFile,
    family: options.Family = None,
    weights: options.Weights = "model",
    arch: options.Arch = None,
    set: options.Settings = None,
    branches: options.Branches = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Say what a checkpoint holds; nothing in it is executed."""
    from repdeploy import pipeline
    from repdeploy_cli.render import progress, show_inspection

    with progress() as report:
        found = pipeline.inspect(
            checkpoint, family=family, weights=weights, arch=arch, set=set or (), branches=branches, progress=report
        )
    show_inspection(found)
