"""The pictures of a page, drawn: each as one <svg> per format."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import PathPatch, Rectangle
from matplotlib.path import Path
from matplotlib.ticker import MaxNLocator

from repdeploy.measurements import BenchRow, RanLayer, Roofline, Timing, quantile
from repdeploy.page import quantities
from repdeploy.page.drawing import FORMATS, SERIES, TEXT, Format, axes_at, colour, inline, sheet, style
from repdeploy.page.labels import row_label
from repdeploy.page.pictures import Densities, Latencies, Picture, Roof, Speedups, has_place
from repdeploy.page.scales import logarithmic

MARGIN = 12
LABELS, VALUES = 230, 200
"""Columns beside a wide picture's axes: what a row is called, and its number. A narrow one has both above each row."""
AXIS = 46
"""Below axes: tick labels and what they count."""
TITLE, LEGEND = 26, 24
BAR, GAP = 22, 14
"""Of the density plot: one bar, and what is between groups of them."""
MARKS = {"1x1": ("s", "series-1"), "depthwise": ("^", "series-2"), "other": ("D", "quiet"), "3x3": ("o", "accent")}
"""Of the roofline plot: marker and colour by kind of convolution; 3x3 is filled and on top."""


def drawn(picture: Picture) -> tuple[tuple[str, str], ...]:
    """A picture in every format: the format's name and the <svg>."""
    with style():
        return tuple(
            (form.name, inline(_figure(picture, form), f"{picture.name}-{form.name}", picture.title)) for form in FORMATS
        )


def _figure(picture: Picture, form: Format) -> Figure:
    match picture:
        case Speedups():
            return _speedups(picture, form)
        case Latencies():
            return _latencies(picture, form)
        case Densities():
            return _densities(picture, form)
        case Roof():
            return _roof(picture, form)


def _speedups(picture: Speedups, form: Format) -> Figure:
    rows = [(row, row.speedup) for row in picture.rows if row.speedup is not None]
    figure = sheet(form.width, MARGIN + len(rows) * _row_height(form) + AXIS)
    axes = _rows_axes(figure, form, MARGIN, len(rows))
    low, high = min(1.0, *(ratio.low for _, ratio in rows)), max(1.0, *(ratio.high for _, ratio in rows))
    _scale(axes, low, high, form, quantities.times)
    axes.axvline(1, color=colour("quiet"), linewidth=1.2)
    for place, (row, ratio) in enumerate(rows):
        shade = colour("quiet" if not ratio.differs else "good" if ratio.ratio > 1 else "bad")
        axes.plot((ratio.low, ratio.high), (place, place), color=shade, linewidth=2.5, solid_capstyle="butt")
        face = shade if row.is_stable else colour("paper")
        axes.plot(ratio.ratio, place, "o", markersize=9, markerfacecolor=face, markeredgecolor=shade, markeredgewidth=2)
        value = f"{quantities.times(ratio.ratio)}  ({ratio.low:.2f} to {ratio.high:.2f})"
        _name_row(axes, form, place, row_label(row, picture.rows), value)
    axes.set_xlabel("times as fast")
    return figure


def _latencies(picture: Latencies, form: Format) -> Figure:
    """Axes per batch size: between batch sizes latencies differ by more than anything that is to be seen here."""
    panels: dict[int, list[BenchRow]] = {}
    for row in picture.rows:
        panels.setdefault(row.batch, []).append(row)
    counts = [sum(len(row.timings) for row in rows) for rows in panels.values()]
    heights = [TITLE + count * _row_height(form) + AXIS for count in counts]
    figure = sheet(form.width, sum(heights))
    top = 0
    for (batch, rows), count, height in zip(panels.items(), counts, heights, strict=True):
        axes = _rows_axes(figure, form, top + TITLE, count)
        axes.set_title(f"batch {batch}", x=0 if form.is_narrow else -LABELS / _rows_width(form))
        _batch(axes, rows, form)
        top += height
    return figure


def _batch(axes: Axes, rows: Sequence[BenchRow], form: Format) -> None:
    timings = [timing for row in rows for timing in row.timings]
    before = [row.timings[0] for row in rows if len(row.timings) > 1]
    several = len({row.device for row in rows}) > 1
    every = [seconds for timing in timings for seconds in timing.seconds]
    _scale(axes, min(every), max(every), form, quantities.seconds)
    for place, timing in enumerate(timings):
        _runs(axes, place, timing, colour("quiet" if any(timing is first for first in before) else "accent"))
        device = f" ({timing.device})" if several else ""
        _name_row(axes, form, place, f"{timing.runtime}{device}, {timing.network}", quantities.seconds(timing.median))


def _runs(axes: Axes, place: int, timing: Timing, shade: str) -> None:
    """Every run, the middle half and the median."""
    lines = [point for run in timing.seconds for point in ((run, place - 0.14), (run, place + 0.14))]
    codes = [Path.MOVETO, Path.LINETO] * len(timing.seconds)
    axes.add_patch(PathPatch(Path(lines, codes), edgecolor=shade, facecolor="none", linewidth=0.8, alpha=0.7))
    low, high = (quantile(timing.seconds, part) for part in (0.25, 0.75))
    axes.add_patch(Rectangle((low, place - 0.22), high - low, 0.44, facecolor=shade, edgecolor=shade, alpha=0.45))
    axes.plot((timing.median, timing.median), (place - 0.3, place + 0.3), color=shade, linewidth=2.5, solid_capstyle="butt")


def _densities(picture: Densities, form: Format) -> Figure:
    """Bars grouped by kernel size, one colour per runtime."""
    cells = [cell for density in picture.density for cell in density.cells]
    kernels = sorted({cell.kernel for cell in cells})
    names = [f"{density.runtime}, {density.precision}" for density in picture.density]
    shades = [colour(SERIES[index % len(SERIES)]) for index in range(len(names))]
    group = BAR * len(names) + GAP
    left, right, top, height = 52, 16 if form.is_narrow else 60, _legend_height(form, names) + TITLE, group * len(kernels)
    figure = sheet(form.width, top + height + AXIS)
    axes = axes_at(figure, left, top, form.width - left - right, height)
    axes.set_xlim(0, max(*(cell.gflops for cell in cells), picture.peak or 0) * 1.12)
    axes.set_ylim(height, 0)
    for index, density in enumerate(picture.density):
        for cell in density.cells:
            start = kernels.index(cell.kernel) * group + GAP / 2 + index * BAR
            axes.add_patch(Rectangle((0, start + 2), cell.gflops, BAR - 4, facecolor=shades[index], edgecolor="none"))
            _beside_bar(axes, cell.gflops, start + BAR / 2)
    if picture.peak is not None:
        axes.axvline(picture.peak, color=colour("ink"), linewidth=1.4, linestyle="--")
        side = "right" if picture.peak > 0.8 * axes.get_xlim()[1] else "center"
        axes.annotate(
            f"peak {quantities.number(picture.peak)}", (picture.peak, 1), xycoords=("data", "axes fraction"), xytext=(0, 5),
            textcoords="offset points", ha=side, va="bottom",
        )  # fmt: skip
    middles = [index * group + group / 2 for index in range(len(kernels))]
    axes.set_yticks(middles, [quantities.sizes((kernel, kernel)) for kernel in kernels])
    axes.xaxis.set_major_locator(MaxNLocator(4 if form.is_narrow else 8))
    axes.grid(visible=True, axis="x")
    axes.set_xlabel("GFLOP/s")
    _legend(figure, form, [Rectangle((0, 0), 1, 1, facecolor=shade) for shade in shades], names)
    return figure


def _beside_bar(axes: Axes, end: float, place: float) -> None:
    """A bar's number right of it, or at its inner end where there is no room."""
    is_inside = end > 0.85 * axes.get_xlim()[1]
    axes.annotate(
        quantities.number(end), (end, place), xytext=(-5 if is_inside else 5, 0), textcoords="offset points", zorder=4,
        va="center_baseline", ha="right" if is_inside else "left", color=colour("paper" if is_inside else "ink"),
        bbox=None if is_inside else _blank(),
    )  # fmt: skip


def _roof(picture: Roof, form: Format) -> Figure:
    """Axes per profile, all with the same limits."""
    columns = 1 if form.is_narrow or len(picture.profiles) == 1 else 2
    side, left, gap = (230 if form.is_narrow else 260), 56, 0 if columns == 1 else 20
    across, down = (form.width - MARGIN) / columns, TITLE + side + AXIS
    figure = sheet(form.width, LEGEND + math.ceil(len(picture.profiles) / columns) * down)
    every = [list(filter(has_place, profile.convolutions)) for _, profile in picture.profiles]
    limits = _limits(picture.roofline, [layer for layers in every for layer in layers])
    for index, ((name, profile), layers) in enumerate(zip(picture.profiles, every, strict=True)):
        row, column = divmod(index, columns)
        axes = axes_at(figure, left + column * across, LEGEND + TITLE + row * down, across - left - gap, side)
        axes.set_title(f"{name}, {profile.network}")
        axes.spines["left"].set_visible(True)
        logarithmic(axes, "x", *limits[0], 5, quantities.number)
        logarithmic(axes, "y", *limits[1], 5, quantities.number)
        axes.grid(visible=True)
        axes.set_xlabel("FLOP per byte")
        axes.set_ylabel("GFLOP/s")
        _ceilings(axes, picture.roofline)
        for kind in MARKS:
            found = [layer for layer in layers if _kind(layer) == kind]
            axes.add_line(_mark(kind, [_intensity(layer) for layer in found], [layer.gflops for layer in found]))
    kinds = {_kind(layer) for layers in every for layer in layers}
    shown = [kind for kind in MARKS if kind in kinds]
    _legend(figure, form, [_mark(kind) for kind in shown], shown)
    return figure


def _limits(roofline: Roofline, layers: Sequence[RanLayer]) -> tuple[tuple[float, float], tuple[float, float]]:
    """FLOP per byte and GFLOP/s: all layers, and enough of both ceilings to see where they meet."""
    ridge = _ridge(roofline)
    intensities = [ridge, ridge / 3, *(_intensity(layer) for layer in layers)]
    speeds = [roofline.gflops, *(layer.gflops for layer in layers)]
    return (min(intensities) / 1.5, max(intensities) * 1.5), (min(speeds) / 1.6, max(speeds) * 1.8)


def _ceilings(axes: Axes, roofline: Roofline) -> None:
    """Memory's slope and arithmetic's flat line, with what they are."""
    (low, high), ridge = axes.get_xlim(), _ridge(roofline)
    slope = roofline.bandwidth / 1e9
    axes.plot((low, ridge, high), (low * slope, roofline.gflops, roofline.gflops), color=colour("ink"), linewidth=1.6)
    words: dict[str, Any] = {"textcoords": "offset points", "va": "bottom", "ha": "right", "color": colour("quiet")}
    axes.annotate(f"{quantities.number(roofline.gflops)} GFLOP/s", (high, roofline.gflops), xytext=(-4, 4), **words)
    beside = ridge / 1.3
    axes.annotate(f"{quantities.number(slope)} GB/s", (beside, beside * slope), xytext=(-6, 2), **words)


def _ridge(roofline: Roofline) -> float:
    """FLOP per byte from which on arithmetic is the limit."""
    return roofline.gflops * 1e9 / roofline.bandwidth


def _mark(kind: str, across: Sequence[float] = (), up: Sequence[float] = ()) -> Line2D:
    marker, shade = MARKS[kind]
    return Line2D(
        across, up, linestyle="none", marker=marker, markersize=7, markeredgecolor=colour(shade), markeredgewidth=1.3,
        markerfacecolor=colour(shade) if kind == "3x3" else "none", alpha=0.8,
    )  # fmt: skip


def _kind(layer: RanLayer) -> str:
    kernel = quantities.sizes(layer.kernel)
    return "depthwise" if layer.is_depthwise else kernel if kernel in MARKS else "other"


def _intensity(layer: RanLayer) -> float:
    return layer.flops / layer.bytes


def _row_height(form: Format) -> int:
    return 46 if form.is_narrow else 32


def _rows_width(form: Format) -> int:
    return form.width - 2 * MARGIN - (0 if form.is_narrow else LABELS + VALUES)


def _rows_axes(figure: Figure, form: Format, top: int, count: int) -> Axes:
    """Axes with one row per place, the first one on top."""
    left = MARGIN + (0 if form.is_narrow else LABELS)
    axes = axes_at(figure, left, top, _rows_width(form), count * _row_height(form))
    above = 0.85 if form.is_narrow else 0.5
    axes.set_ylim(count - above, -above)
    axes.set_yticks([])
    return axes


def _scale(axes: Axes, low: float, high: float, form: Format, words: Any) -> None:
    room = (high / low) ** 0.04 * 1.01
    logarithmic(axes, "x", low / room, high * room, 4 if form.is_narrow else 7, words)
    axes.grid(visible=True, axis="x")


def _name_row(axes: Axes, form: Format, place: int, label: str, value: str) -> None:
    """What a row is called and its number: at its sides, or above it where there is no room beside it."""
    where: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
    if form.is_narrow:
        where |= {"xytext": (0, 15), "va": "baseline", "bbox": _blank()}
        axes.annotate(label, (0, place), ha="left", **where)
        axes.annotate(value, (1, place), ha="right", fontweight="bold", **where)
    else:
        where["va"] = "center_baseline"
        axes.annotate(label, (0, place), xytext=(-LABELS, 0), ha="left", **where)
        axes.annotate(value, (1, place), xytext=(14, 0), ha="left", fontweight="bold", **where)


def _blank() -> dict[str, Any]:
    """Paper behind a text, so that no line runs through it."""
    return {"facecolor": colour("paper"), "edgecolor": "none", "pad": 1.5}


def _legend_columns(form: Format, names: Sequence[str]) -> int:
    """How many names stand side by side."""
    longest = max(map(len, names)) * TEXT * 0.6 + 40
    return max(1, min(len(names), int(form.width // longest)))


def _legend_height(form: Format, names: Sequence[str]) -> int:
    return LEGEND * math.ceil(len(names) / _legend_columns(form, names))


def _legend(figure: Figure, form: Format, marks: Sequence[Any], names: Sequence[str]) -> None:
    figure.legend(
        marks, names, loc="upper left", ncols=_legend_columns(form, names), frameon=False, borderpad=0, borderaxespad=0.2,
        labelcolor=colour("ink"), handlelength=1.2, columnspacing=1.6,
    )  # fmt: skip
