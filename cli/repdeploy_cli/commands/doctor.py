from __future__ import annotations

from repdeploy_cli import options


def doctor(json: options.Json = False, quiet: options.Quiet = False, debug: options.Debug = False) -> None:
    """Say what is installed, what is missing and how to get it."""
    from repdeploy import pipeline
    from repdeploy_cli.render import show_doctor

    show_doctor(pipeline.doctor())
