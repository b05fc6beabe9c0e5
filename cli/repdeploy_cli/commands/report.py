from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from repdeploy_cli import options


def report(
    bundle: options.BundleFolder = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Write it here instead of into the bundle.", show_default=False),
    ] = None,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="GitHub-flavoured Markdown, on stdout unless --output says where.")
    ] = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Write one self-contained page about a bundle: verdict, artifacts, benchmark."""
    from repdeploy_cli.render import chosen
    from repdeploy_cli.terminal import printed, stdout

    taken = chosen(bundle)
    from repdeploy import pipeline

    result = pipeline.report(taken, output=output, markdown=markdown)
    if printed(result):
        return
    if result.file is None:
        print(result.text)
        return
    stdout().print(f"wrote {result.file}", soft_wrap=True)
    if not result.measured:
        stdout().print("nothing was measured yet: repdeploy bench fills the page's second half", soft_wrap=True)
