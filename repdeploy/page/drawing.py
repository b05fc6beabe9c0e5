"""Figures as SVG that lives inside a page: text as text, the page's colours and font, the same every time."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from xml.etree import ElementTree

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

COLOURS = ("ink", "quiet", "line", "paper", "good", "bad", "accent", *(f"series-{index}" for index in range(6)))
"""The page's CSS variables that figures are drawn in."""
SERIES = tuple(name for name in COLOURS if name.startswith("series"))
TEXT = 12.0
"""Size of text in CSS pixels, at the size at which a figure was drawn."""
XLINK = "{http://www.w3.org/1999/xlink}href"
SVG = "http://www.w3.org/2000/svg"
COORDINATES = ("d", "x", "y", "transform", "points")
MORE_DECIMALS = re.compile(r"(\.\d\d)\d+")
"""A hundredth of a pixel is enough; the rest would be half of the page."""


@dataclass(frozen=True, slots=True)
class Format:
    """How wide a figure is drawn, in CSS pixels."""

    name: str
    width: int

    @property
    def is_narrow(self) -> bool:
        return self.name == "narrow"


FORMATS = (Format("wide", 880), Format("narrow", 350))
"""Scaling one figure would make its text unreadable on a telephone, so the page holds both and shows the one that fits."""


def colour(name: str) -> str:
    """What stands for a variable of the page while a figure is drawn. Raises ValueError for one that the page does not have."""
    return f"#00{COLOURS.index(name) + 1:02x}01"


@contextmanager
def style() -> Iterator[None]:
    """matplotlib's own defaults, whatever the user's are, and ours on top."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({
            "svg.fonttype": "none", "svg.hashsalt": "repdeploy", "path.simplify": False, "text.parse_math": False,
            "font.family": "DejaVu Sans", "font.size": TEXT, "axes.titlesize": TEXT, "axes.titleweight": "bold",
            "axes.titlelocation": "left",
            "text.color": colour("ink"), "axes.titlecolor": colour("ink"), "axes.labelcolor": colour("quiet"),
            "axes.edgecolor": colour("line"), "xtick.color": colour("line"), "ytick.color": colour("line"),
            "xtick.labelcolor": colour("quiet"), "ytick.labelcolor": colour("ink"), "grid.color": colour("line"),
            "axes.spines.top": False, "axes.spines.right": False, "axes.spines.left": False, "figure.frameon": False,
            "axes.facecolor": "none", "axes.axisbelow": True, "grid.linewidth": 0.8, "ytick.major.size": 0,
            "xtick.minor.size": 0, "ytick.minor.size": 0, "ytick.major.pad": 8,
        })  # fmt: skip
        yield


def sheet(width: float, height: float) -> Figure:
    """An empty figure in CSS pixels."""
    figure = Figure(figsize=(width / 72, height / 72))
    FigureCanvasSVG(figure)
    return figure


def axes_at(figure: Figure, left: float, top: float, width: float, height: float) -> Axes:
    """Axes at a place in CSS pixels, from the upper left corner."""
    whole_width, whole_height = figure.get_size_inches() * 72
    return figure.add_axes(
        (left / whole_width, 1 - (top + height) / whole_height, width / whole_width, height / whole_height)
    )  # fmt: skip


def inline(figure: Figure, name: str, title: str) -> str:
    """A figure as one <svg> element. `name`: unlike every other figure's of the page; `title`: what it shows, in words."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    ElementTree.register_namespace("", SVG)
    root = ElementTree.fromstring(buffer.getvalue())
    _drop(root, lambda element: element.tag in (f"{{{SVG}}}metadata", f"{{{SVG}}}style"))
    used = set(re.findall(r'(?:url\(#|href="#)([^)"]+)', buffer.getvalue()))
    for element in root.iter():
        _adapt(element, name, used)
    for size in ("width", "height"):
        del root.attrib[size]
    root.set("role", "img")
    root.set("aria-labelledby", f"{name}-title")
    heading = ElementTree.Element(f"{{{SVG}}}title", {"id": f"{name}-title"})
    heading.text = title
    root.insert(0, heading)
    return ElementTree.tostring(root, encoding="unicode", short_empty_elements=True)


def _adapt(element: ElementTree.Element, name: str, used: set[str]) -> None:
    """Names of its own, the page's colours and font, short numbers."""
    attributes = element.attrib
    if (target := attributes.pop(XLINK, None)) is not None:
        attributes["href"] = target.replace("#", f"#{name}-")
    if (own := attributes.pop("id", None)) in used:
        attributes["id"] = f"{name}-{own}"
    for key, value in attributes.items():
        value = value.replace("url(#", f"url(#{name}-")
        if key in COORDINATES:
            value = MORE_DECIMALS.sub(r"\1", value)
        for variable in COLOURS:
            value = value.replace(colour(variable), f"var(--{variable})")
        attributes[key] = value
    for part in ("text", "tail"):
        if not (getattr(element, part) or "").strip():
            setattr(element, part, None)


def _drop(element: ElementTree.Element, unwanted: Callable[[ElementTree.Element], bool]) -> None:
    for child in list(element):
        if unwanted(child):
            element.remove(child)
        else:
            _drop(child, unwanted)
