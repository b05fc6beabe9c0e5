"""From a bundle's records to the page that is handed on."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from repdeploy.benchmark import results
from repdeploy.bundle import Bundle, write_text
from repdeploy.errors import BackendMissing
from repdeploy.page.content import document
from repdeploy.page.markdown import markdown

PAGE = "report.html"
NEEDED = ("matplotlib", "jinja2")
"""What an HTML page takes beyond the library itself."""


@dataclass(frozen=True, slots=True)
class Report:
    """What `report` made. `file`: where it was written; `text`: Markdown that was written nowhere; `measured`: whether the
    bundle had a benchmark to tell of."""

    bundle: Path
    form: Literal["html", "markdown"]
    file: Path | None
    measured: bool
    text: str = ""
    schema: str = "repdeploy.report/1"


def report(bundle: Bundle, output: Path | None, as_markdown: bool) -> Report:
    """Write report.html into the bundle, or what was asked for where it was asked for.

    Raises BackendMissing where a library for pictures is missing, InputError for a benchmark that is not understood, UsageError
    for a place that cannot be written.
    """
    bench = results.stored(bundle)
    content = document(bundle.manifest, bench, bundle.path.resolve().name)
    if as_markdown:
        text = markdown(content)
        if output is None:
            return Report(bundle.path, "markdown", None, bench is not None, text)
    else:
        _require_libraries()
        from repdeploy.page.html import html

        text = html(content)
    file = output if output is not None else bundle.path / PAGE
    write_text(file, text)
    return Report(bundle.path, "markdown" if as_markdown else "html", file, bench is not None)


def _require_libraries() -> None:
    """Raises BackendMissing."""
    absent = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if absent:
        raise BackendMissing(
            f"an HTML page needs {' and '.join(absent)}",
            hint="pip install repdeploy[report], or take repdeploy report --markdown, which needs neither",
        )
