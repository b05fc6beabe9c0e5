from __future__ import annotations

from repdeploy_cli import options


def families(json: options.Json = False, quiet: options.Quiet = False, debug: options.Debug = False) -> None:
    """List the installed families."""
    from repdeploy import pipeline
    from repdeploy_cli.render import show_families

    show_families(pipeline.families())
