"""A document as one HTML file that needs nothing else: no network, no script, no font."""

from __future__ import annotations

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from repdeploy.page.document import Document
from repdeploy.page.pictures import Picture
from repdeploy.page.plots import drawn


def html(document: Document) -> str:
    """The same bytes for the same document. Every text of it is escaped by the templates."""
    environment = Environment(
        loader=PackageLoader("repdeploy.page"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["drawn"] = _drawn
    return environment.get_template("page.html").render(document=document).strip()


def _drawn(picture: Picture) -> list[tuple[str, Markup]]:
    return [(name, Markup(svg)) for name, svg in drawn(picture)]  # the XML writer has escaped it
