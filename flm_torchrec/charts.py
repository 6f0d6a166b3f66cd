"""Curves and histograms as inline SVG. Titles and names of lines are HTML, so that a browser wraps and shapes them."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import matplotlib
import numpy as np
from matplotlib import dates
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

from flm_torchrec.safe_text import escape

INK = "#010203"
"""The colour that matplotlib draws in. The page replaces it by its colour of text, light or dark."""
COLOURS = ("#3b82f6", "#f97316", "#10b981", "#a855f7", "#ef4444", "#ca8a04", "#0d9488", "#7c8798")
DECADES = 2
"""An axis is logarithmic if its positive values span more powers of ten than this."""
DAY = 86_400
TIMES = {1: "1 s", 60: "1 min", 3600: "1 h", DAY: "1 d", 30 * DAY: "30 d", 365 * DAY: "1 y", 3650 * DAY: "10 y"}
"""Marks of a logarithmic axis in seconds."""


@dataclass(frozen=True)
class Curves:
    """Lines over x: by name, x values [n] (numbers, or datetime64) and y values [n]. Axes have names with units."""

    title: str
    x: str
    y: str
    lines: Mapping[str, tuple[Sequence[float] | np.ndarray, Sequence[float]]]


@dataclass(frozen=True)
class Histogram:
    """Heights [n] over bins with edges [n + 1]."""

    title: str
    x: str
    y: str
    edges: Sequence[float] | np.ndarray
    heights: Sequence[float] | np.ndarray
    log: bool = False
    """The axis of the bins is logarithmic; all edges are above 0 then."""
    seconds: bool = False
    """Marks on this axis are times."""


def wide(values: Sequence[float] | np.ndarray) -> bool:
    """Whether values, none of them negative, are so far apart that only a logarithmic axis shows them all."""
    numbers = np.asarray(values, float)
    positive = numbers[numbers > 0]
    return len(positive) > 0 and bool((numbers >= 0).all()) and bool(positive.max() > 10**DECADES * positive.min())


def draw(chart: Curves | Histogram) -> str:
    """The chart as an HTML figure: title, SVG, and the names of several lines."""
    colours = dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "axes.edgecolor"), INK)
    settings: Any = {
        "text.parse_math": False,
        "svg.fonttype": "none",
        "svg.hashsalt": "flm",
        "font.family": "sans-serif",
        "font.size": 9,
        **colours,
    }
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(5.2, 2.9), layout="constrained")
        axes = figure.subplots()
        axes.set_facecolor("none")
        axes.spines[["top", "right"]].set_visible(False)
        if isinstance(chart, Histogram):
            _histogram(axes, chart)
        else:
            _curves(axes, chart)
        text = io.StringIO()
        left_out = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(text, format="svg", transparent=True, metadata=left_out)
    drawn = text.getvalue()
    svg = drawn[drawn.index("<svg") :].replace(INK, "currentColor")
    described = f'<svg role="img" aria-label="{escape(f"{chart.title}: {chart.y} over {chart.x}")}"'
    names = list(chart.lines) if isinstance(chart, Curves) and len(chart.lines) > 1 else []
    legend = "".join(
        f'<li><i style="background:{COLOURS[n % len(COLOURS)]}"></i><bdi>{escape(name)}</bdi></li>'
        for n, name in enumerate(names)
    )
    legend = f"<ul>{legend}</ul>" if legend else ""
    return f"<figure><figcaption>{escape(chart.title)}</figcaption>{svg.replace('<svg', described, 1)}{legend}</figure>"


def _curves(axes: Axes, chart: Curves) -> None:
    for number, (x, y) in enumerate(chart.lines.values()):
        axes.plot(x, y, marker="o" if len(x) < 3 else None, linewidth=1.4, color=COLOURS[number % len(COLOURS)])
    if any(np.asarray(x).dtype.kind == "M" for x, _ in chart.lines.values()):
        places = dates.AutoDateLocator(minticks=2, maxticks=6)
        axes.xaxis.set_major_locator(places)
        axes.xaxis.set_major_formatter(dates.ConciseDateFormatter(places, show_offset=False))
        axes.set_xlabel(chart.x)
    else:
        _scale(axes, "x", chart.x, log=False)
    values = [value for _, y in chart.lines.values() for value in y]
    _scale(axes, "y", chart.y, wide(values) and max(values) > 1)  # shares stay beside 0 and 1


def _histogram(axes: Axes, chart: Histogram) -> None:
    edges, heights = np.asarray(chart.edges, float), np.asarray(chart.heights, float)
    log = wide(heights)
    bottom = heights[heights > 0].min() / 2 if log else 0.0
    shown = np.clip(heights - bottom, 0, None)
    axes.bar(edges[:-1], shown, np.diff(edges), bottom, align="edge", color=COLOURS[0], edgecolor="none")
    _scale(axes, "x", chart.x, chart.log)
    _scale(axes, "y", chart.y, log)
    if chart.seconds:
        axes.xaxis.set_major_locator(FixedLocator([t for t in TIMES if edges[0] <= t <= edges[-1]]))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda seconds, _: TIMES.get(round(seconds), "")))


def _scale(axes: Axes, which: Literal["x", "y"], name: str, log: bool) -> None:
    """Give an axis of numbers its name, its scale, and at most seven marks."""
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_label_text(f"{name} (log scale)" if log else name)
    if log:
        (axes.set_xscale if which == "x" else axes.set_yscale)("log")
        low, high = axis.get_view_interval()
        axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 10**3 * low else (1,), numticks=7))
        axis.set_minor_locator(NullLocator())
    else:
        axis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    axis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))


def short(value: float) -> str:
    """A mark of an axis: 1.5, 20k, 3M."""
    for letter, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:g}{letter}"
    return f"{value:.6g}"
