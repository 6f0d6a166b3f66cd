"""Findings, tables and charts: as one self-contained HTML page, and without the charts on a terminal."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import groupby

from rich import box
from rich.table import Table as RichTable

from flm_torchrec.charts import Curves, Histogram, draw
from flm_torchrec.safe_text import escape
from flm_torchrec.terminal import PlainConsole

TEXT = ' class="text"'
LONG = 20
"""Rows above which a table opens on demand."""
CONTENTS = 4
"""Sections from which the page begins with links to them."""
STYLE = """
:root { color-scheme: light dark; --ink: light-dark(#1b1f24, #dfe3e8); --muted: light-dark(#57606a, #9aa4af);
  --paper: light-dark(#fff, #15181c); --soft: light-dark(#f3f5f8, #1e2329); --line: light-dark(#d5d9de, #3a4048);
  --accent: light-dark(#1d4ed8, #93b4ff); }
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 0 auto; padding: 1.5rem 1rem 4rem;
  background: var(--paper); color: var(--ink); overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0 0 1rem; }
h2 { font-size: 1.15rem; margin: 2.5rem 0 .5rem; padding-bottom: .2rem; border-bottom: 1px solid var(--line); }
p { margin: .5rem 0; max-width: 65ch; } .muted { color: var(--muted); font-size: .85rem; }
a { color: var(--accent); } :focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
nav { display: flex; flex-wrap: wrap; gap: .2rem 1rem; margin: 1rem 0; font-size: .9rem; }
.scroll { overflow-x: auto; margin: .6rem 0 1.5rem; max-width: 100%; width: fit-content; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
caption, figcaption { text-align: left; font-weight: 600; padding: .3rem 0; }
th, td { padding: .25rem .8rem; text-align: right; border-bottom: 1px solid var(--line); font-weight: normal;
  overflow-wrap: break-word; max-width: 26rem; vertical-align: top; }
thead th { color: var(--muted); font-size: .85rem; vertical-align: bottom; }
th:first-child, .text { text-align: left; } th:first-child { padding-left: 0; min-width: 7rem; }
td b { font-weight: 700; } td.text { min-width: 5.5rem; }
.tables { display: flex; flex-wrap: wrap; gap: 0 2.5rem; align-items: flex-start; } details { margin: .6rem 0; }
summary { cursor: pointer; font-weight: 600; } details, .scroll { min-width: 0; }
.findings { background: light-dark(#fff4e5, #3a2a12); padding: .8rem 1rem .8rem 2rem; border-radius: .5rem; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 15rem), 1fr)); gap: .8rem;
  margin: 1rem 0; }
.figures div { background: var(--soft); border-radius: .6rem; padding: .8rem 1rem; }
.figures dt { color: var(--muted); font-size: .85rem; } .figures dd { margin: 0; }
.figures dd:nth-of-type(1) { font-size: 1.7rem; line-height: 1.3; font-weight: 650;
  font-variant-numeric: tabular-nums; }
.figures dd:nth-of-type(2) { color: var(--muted); font-size: .85rem; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 1.2rem;
  align-items: start; }
figure { margin: 0; min-width: 0; } svg { width: 100%; max-width: 34rem; height: auto; display: block; }
figure ul { list-style: none; display: flex; flex-wrap: wrap; gap: .1rem .9rem; margin: .2rem 0 0; padding: 0;
  font-size: .85rem; }
figure i { display: inline-block; width: .7rem; height: .7rem; border-radius: 50%; margin-right: .35rem; }
.bars { width: 100%; max-width: 34rem; } .bars th, .bars td { border: 0; padding: .12rem .6rem .12rem 0; }
.bars td:nth-child(2) { width: 45%; } .bars th:first-child { max-width: 14rem; overflow-wrap: anywhere; }
.bars i { display: block; height: .8rem; margin-top: .35rem; border-radius: 2px; background: #3b82f6; min-width: 1px; }
"""


@dataclass(frozen=True)
class PageTable:
    """A table of text cells [rows, columns] under a header [columns]. The first column names the row."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    strong: Collection[tuple[int, int]] = ()
    """Row and column of each cell in bold."""


@dataclass(frozen=True)
class Bars:
    """A bar for each label [n], as long as its height [n] is large: for names, of which any number may be long."""

    title: str
    labels: Sequence[str]
    heights: Sequence[float]
    x: str = ""
    """What the labels are."""
    y: str = "events"
    """What is counted."""


@dataclass(frozen=True)
class Figure:
    """One large number: what it is, the number, and what else is to know of it."""

    name: str
    number: str
    note: str = ""


Part = PageTable | Curves | Histogram | Bars


@dataclass(frozen=True)
class Section:
    """A part of the page: notes, then large numbers, then tables and charts."""

    title: str
    notes: Sequence[str] = ()
    parts: Sequence[Part] = ()
    figures: Sequence[Figure] = ()


def html(title: str, findings: Sequence[str], sections: Sequence[Section], none: str = "", first: int = 0) -> str:
    """The page as HTML, with no script and no other file.

    Args:
        findings: problems, one line each.
        none: the text where there are no findings.
        first: number of sections before the findings, which otherwise are first.
    """
    problems = "".join(f"<li>{escape(line)}</li>" for line in findings)
    problems = f'<ul class="findings">{problems}</ul>' if problems else f"<p>{escape(none)}</p>" if none else ""
    links = "".join(f'<a href="#{_anchor(n)}">{escape(s.title)}</a>' for n, s in enumerate(sections))
    links = f'<nav aria-label="Contents">{links}</nav>' if len(sections) >= CONTENTS else ""
    made = [_section(n, section) for n, section in enumerate(sections)]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body><h1><bdi>{escape(title)}</bdi></h1>"
        f"{links}<main>{''.join(made[:first])}{problems}{''.join(made[first:])}</main></body></html>\n"
    )


def _anchor(number: int) -> str:
    return f"section-{number + 1}"


def _section(number: int, section: Section) -> str:
    notes = "".join(f"<p>{escape(note)}</p>" for note in section.notes)
    figures = "".join(
        f"<div><dt>{escape(f.name)}</dt><dd><bdi>{escape(f.number)}</bdi></dd><dd>{escape(f.note)}</dd></div>"
        for f in section.figures
    )
    figures = f'<dl class="figures">{figures}</dl>' if figures else ""
    body = [_group(kind, list(parts)) for kind, parts in groupby(section.parts, lambda part: type(part) is PageTable)]
    return f'<section id="{_anchor(number)}"><h2>{escape(section.title)}</h2>{figures}{notes}{"".join(body)}</section>'


def _group(tables: bool, parts: Sequence[Part]) -> str:
    """Tables or charts that follow each other, side by side where there is room."""
    if tables:
        return f'<div class="tables">{"".join(_table(part) for part in parts if isinstance(part, PageTable))}</div>'
    made = [_bars(p) if isinstance(p, Bars) else draw(p) for p in parts if not isinstance(p, PageTable)]
    return f'<div class="charts">{"".join(made)}</div>'


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
    columns = [[row[n] for row in grid.rows] for n in range(len(grid.header))]
    named = any(grid.header)
    text = [n == 0 or not named or not all(map(_is_number, column)) for n, column in enumerate(columns)]
    head = "".join(
        f'<th scope="col"{TEXT if left else ""}>{escape(name)}</th>'
        for name, left in zip(grid.header, text, strict=True)
    )
    head = f"<thead><tr>{head}</tr></thead>" if named else ""
    rows = "".join(f"<tr>{_cells(n, row, text, grid.strong)}</tr>" for n, row in enumerate(grid.rows))
    name = escape(grid.title)
    long = len(grid.rows) > LONG
    caption = f"<caption>{name}</caption>" if grid.title and not long else ""
    made = (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{name or "table"}">'
        f"<table>{caption}{head}<tbody>{rows}</tbody></table></div>"
    )
    return f"<details><summary>{name or 'table'} ({len(grid.rows)} rows)</summary>{made}</details>" if long else made


def _cells(number: int, row: Sequence[str], text: Sequence[bool], strong: Collection[tuple[int, int]]) -> str:
    first = "".join(f'<th scope="row"><bdi>{escape(cell)}</bdi></th>' for cell in row[:1])
    for n, cell in enumerate(row[1:], 1):
        shown = f"<b>{escape(cell)}</b>" if (number, n) in strong else escape(cell)
        first += f"<td{TEXT}><bdi>{shown}</bdi></td>" if text[n] else f"<td>{shown}</td>"
    return first


def _is_number(cell: str) -> bool:
    return re.fullmatch(r"([-+]?\d[\d,.]*( ?%| ?\w?i?B| \(.*\))?)?", cell) is not None


def _bars(bars: Bars) -> str:
    """The chart as a table, in which a bar stands beside each label: text of any script wraps as it should."""
    most = max(bars.heights, default=0) or 1
    rows = "".join(
        f'<tr><th scope="row"><bdi>{escape(label)}</bdi></th><td><i style="width:{100 * height / most:.1f}%"></i></td>'
        f"<td>{height:,.10g}</td></tr>"
        for label, height in zip(bars.labels, bars.heights, strict=True)
    )
    head = (
        f'<thead><tr><th scope="col">{escape(bars.x)}</th><td></td><th scope="col">{escape(bars.y)}</th></tr></thead>'
    )
    caption = f"<caption>{escape(bars.title)}</caption>"
    return f'<figure><table class="bars">{caption}{head}<tbody>{rows}</tbody></table></figure>'
