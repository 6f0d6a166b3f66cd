"""Findings, tables and plots: as one self-contained HTML page, and without the plots on a terminal."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from rich import box
from rich.table import Table as RichTable

from flm_torchrec.safe_text import escape, visible
from flm_torchrec.terminal import PlainConsole

INK = "#010203"
"""The colour that matplotlib draws in. The page replaces it by its colour of text, light or dark."""
COLOURS = ("#3b82f6", "#f97316", "#10b981", "#a855f7", "#ef4444", "#eab308", "#14b8a6", "#94a3b8")
STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem;
  background: light-dark(#fff, #15181c); color: light-dark(#1b1f24, #dfe3e8); }
h2 { margin-top: 2.5rem; border-bottom: 1px solid light-dark(#d5d9de, #3a4048); }
table { border-collapse: collapse; margin: .5rem 0 1.5rem; display: block; overflow-x: auto; }
caption { text-align: left; font-weight: 600; padding: .3rem 0; }
th, td { padding: .2rem .8rem; text-align: right; border-bottom: 1px solid light-dark(#e6e9ed, #2a3037); }
th:first-child, td:first-child { text-align: left; }
ul.findings { background: light-dark(#fff4e5, #3a2a12); padding: .8rem 2rem; border-radius: .4rem; }
svg { width: min(100%, 32rem); height: auto; margin: .5rem 1rem .5rem 0; }
"""


@dataclass(frozen=True)
class PageTable:
    """A table of text cells [rows, columns] under a header [columns]."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Curves:
    """Lines over x: by name, x values [n] and y values [n]."""

    title: str
    x: str
    lines: Mapping[str, tuple[Sequence[float], Sequence[float]]]


@dataclass(frozen=True)
class Bars:
    """A bar chart: labels [n] and heights [n]."""

    title: str
    labels: Sequence[str]
    heights: Sequence[float]


@dataclass(frozen=True)
class Section:
    """A part of the page: notes, then tables and plots."""

    title: str
    notes: Sequence[str] = ()
    parts: Sequence[PageTable | Curves | Bars] = ()


def html(title: str, findings: Sequence[str], sections: Sequence[Section], none: str = "") -> str:
    """The page as HTML, with no script and no other file.

    Args:
        findings: problems, one line each, shown first.
        none: the text where there are no findings.
    """
    top = "".join(f"<li>{escape(line)}</li>" for line in findings)
    top = f'<ul class="findings">{top}</ul>' if top else f"<p>{escape(none)}</p>"
    body = "".join(
        f"<h2>{escape(s.title)}</h2>"
        + "".join(f"<p>{escape(note)}</p>" for note in s.notes)
        + "".join(_table(part) if isinstance(part, PageTable) else _plot(part) for part in s.parts)
        for s in sections
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body><h1>{escape(title)}</h1>{top}{body}"
        "</body></html>\n"
    )


def show(findings: Sequence[str], sections: Sequence[Section], console: PlainConsole) -> None:
    """Print the notes and tables of all sections, then the findings."""
    for section in sections:
        console.rule(section.title, align="left", style="dim")
        for note in section.notes:
            console.print(note, soft_wrap=True)
        for grid in section.parts:
            if isinstance(grid, PageTable):
                console.print(_rich(grid))
    for line in findings:
        console.print(f"problem: {line}", style="yellow", soft_wrap=True)


def _rich(grid: PageTable) -> RichTable:
    table = RichTable(title=grid.title, title_justify="left", box=box.SIMPLE)
    for number, name in enumerate(grid.header):
        table.add_column(name, justify="right" if number else "left")
    for row in grid.rows:
        table.add_row(*row)
    return table


def _table(grid: PageTable) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in grid.header)
    rows = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in grid.rows)
    caption = f"<caption>{escape(grid.title)}</caption>" if grid.title else ""
    head = f"<tr>{head}</tr>" if any(grid.header) else ""
    return f"<table>{caption}{head}{rows}</table>"


def _plot(plot: Curves | Bars) -> str:
    """The plot as inline SVG."""
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
        figure = Figure(figsize=(5.6, 2.8), layout="constrained")
        axes = figure.subplots()
        axes.set_facecolor("none")
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_title(visible(plot.title), loc="left")
        if isinstance(plot, Bars):
            axes.bar(range(len(plot.labels)), plot.heights, color=COLOURS[0])
            turned = 60 if max(map(len, plot.labels), default=0) > 4 else 0
            axes.set_xticks(range(len(plot.labels)), [visible(label) for label in plot.labels], rotation=turned)
        else:
            for number, (name, (x, y)) in enumerate(plot.lines.items()):
                colour, marker = COLOURS[number % len(COLOURS)], "o" if len(x) < 3 else None
                axes.plot(x, y, marker=marker, linewidth=1.4, color=colour, label=visible(name))
            axes.set_xlabel(plot.x)
            if len(plot.lines) > 1:
                axes.legend(frameon=False, fontsize=8)
        text = io.StringIO()
        left_out = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(text, format="svg", transparent=True, metadata=left_out)
    drawn = text.getvalue()
    return drawn[drawn.index("<svg") :].replace(INK, "currentColor")
