"""A plan as text for a terminal and as one HTML file with plots. The same report gives the same bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from flm_torchrec.planner.step import PARTS as PARTS_OF_STEP
from flm_torchrec.planner.whatif import Remedy
from flm_torchrec.safe_text import escape
from flm_torchrec.terminal import PlainConsole

MOST_RANKS_SHOWN = 16
PARTS = {
    "weights": "weights",
    "optimizer": "optimizer",
    "input_output": "in/out",
    "pipeline": "pipeline",
    "dense": "dense",
}
"""Parts of a rank's memory and their column headers; sketches, which are in host memory, come after them."""
TIMES = ("compute", "communication", "prefetch")
TABLE_HEADER = ("table", "rows", "dim", "weights", "ids/sample", "sharding", "kernel", "ranks")
STYLE = "body{font:15px system-ui;max-width:60em;margin:2em auto}td,th{padding:2px 10px;text-align:right}"


@dataclass(frozen=True)
class TextTable:
    """A table of text cells, such as of ranks; not an embedding table."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


def summary(made: dict[str, Any]) -> list[str]:
    """The most important numbers of a plan, as lines of text."""
    cluster, balance = made["cluster"], made["balance"]
    step, slowest, sent = made["step_ms"], made["critical_rank"], made["sent"]
    return [
        f"{cluster['nodes']} x {cluster['per_node']} {cluster['name']}: fits; fullest rank {size(made['memory_max'])}"
        f" of {size(made['capacity'])}, of which {size(made['for_tables'])} may hold tables;"
        f" {made['batch_size']} samples a rank and step",
        f"tables' part of a step: {step['total']:.3f} ms on rank {slowest}, the critical one: compute"
        f" {step['compute']:.3f}, communication {step['communication']:.3f}, prefetch {step['prefetch']:.3f};"
        f" all-reduce of the dense part {step['dense_all_reduce']:.3f} ms more",
        f"a rank sends in a step, on average: ids {size(sent['ids'])}, vectors and their gradients"
        f" {size(sent['vectors'])}, dense gradients {size(sent['dense'])}",
        f"balance (largest / mean over the ranks): memory {balance['memory']:.2f}, time {balance['time']:.2f}",
        *([] if made["whole_step"] is None else [_whole_step(made["whole_step"])]),
    ]


def _whole_step(whole: dict[str, Any]) -> str:
    """What a step is made of beside the tables."""
    ms, work = whole["ms"], whole["work"]
    parts = ", ".join(f"{PARTS_OF_STEP[name]} {ms[name]:.3f}" for name in PARTS_OF_STEP)
    return f"a step of all, nothing hidden, loss.candidates {work['candidates']}: {ms['total']:.3f} ms: {parts}"


def epoch_line(epoch: dict[str, float]) -> str:
    """How long an epoch is, and its price if that was asked for."""
    price = f", price {epoch['price']:,.2f}" if "price" in epoch else ""
    return f"an epoch: {epoch['steps']:,.0f} steps, {epoch['seconds']:,.1f} s{price}"


def weak_table(rows: Sequence[dict[str, Any]]) -> TextTable:
    """Weak scaling: milliseconds of the parts of a step by setting of `loss.candidates` and number of ranks."""
    header = ["loss.candidates", "ranks", "efficiency", *PARTS_OF_STEP.values(), "step ms"]
    cells = [
        [row["candidates"], f"{row['ranks']:,}", f"{row['efficiency']:.0%}"]
        + [f"{row['step_ms'][name]:.3f}" for name in (*PARTS_OF_STEP, "total")]
        for row in rows
    ]
    return TextTable("weak scaling: the work of a rank stays the same", header, cells)


def tables_of(made: dict[str, Any]) -> list[TextTable]:
    """The embedding tables and the ranks of a plan."""
    shown = made["ranks"][:MOST_RANKS_SHOWN]
    of = f" (the first {len(shown)} of {len(made['ranks'])})" if len(shown) < len(made["ranks"]) else ""
    header = ["rank", *PARTS.values(), "sketches", "device", "host", "compute ms", "comm. ms", "prefetch ms"]
    return [
        TextTable("tables", TABLE_HEADER, [_table_cells(table) for table in made["tables"]]),
        TextTable(f"ranks{of}", header, [_rank_cells(rank) for rank in shown]),
    ]


def _table_cells(table: dict[str, Any]) -> list[str]:
    shape = [f"{table['rows']:,}", str(table["dim"]), size(table["bytes"])]
    ids = f"{table['ids_per_sample']:.2f}"
    return [table["name"], *shape, ids, table["sharding_type"], table["kernel"], str(table["ranks"])]


def _rank_cells(rank: dict[str, Any]) -> list[str]:
    parts = [size(rank["device"][name]) for name in PARTS]
    parts.append(size(sum(rank[memory]["sketches"] for memory in ("device", "host"))))
    totals = [size(sum(rank[memory].values())) for memory in ("device", "host")]
    return [str(rank["rank"]), *parts, *totals, *(f"{rank['ms'][name]:.3f}" for name in TIMES)]


def remedy_table(remedies: Sequence[Remedy]) -> TextTable:
    """Each change that was tried, and whether the tables then fit."""
    rows = [
        [r.name, "fits" if r.fits else f"{size(r.gap)} too much", f"{r.step_ms:.3f}" if r.step_ms else "", r.note]
        for r in remedies
    ]
    return TextTable("what would make it fit", ["change", "on this cluster", "step ms", ""], rows)


def sweep_table(rows: Sequence[dict[str, Any]]) -> TextTable:
    """Memory and times by number of ranks."""
    cells = []
    for row in rows:
        head = [str(row["ranks"]), str(row["nodes"])]
        if not row["fits"]:
            cells.append([*head, f"no: {row['table']} {size(row['gap'])} too much", *[""] * 6])
            continue
        times = [f"{row['step_ms'][name]:.3f}" for name in (*TIMES, "total")]
        cells.append([*head, "yes", size(row["memory_max"]), *times, f"{row['balance']['time']:.2f}"])
    header = ["ranks", "nodes", "fits", "device", "compute ms", "comm. ms", "prefetch ms", "step ms", "time balance"]
    return TextTable("other numbers of ranks", header, cells)


def text(lines: Sequence[str], tables: Sequence[TextTable]) -> str:
    """Lines and tables as text, of a width that does not depend on the terminal."""
    console = PlainConsole(width=160, no_color=True)
    with console.capture() as capture:
        for line in lines:
            console.print(line, soft_wrap=True)
        for table in tables:
            drawn = Table(title=table.title, title_justify="left")
            for name in table.header:
                drawn.add_column(name, justify="left" if name in ("table", "change", "") else "right")
            for row in table.rows:
                drawn.add_row(*row)
            console.print(drawn)
    return "\n".join(line.rstrip() for line in capture.get().splitlines()) + "\n"


def html(lines: Sequence[str], tables: Sequence[TextTable], sweep: Sequence[dict[str, Any]]) -> str:
    """The same as one HTML page, with plots over the numbers of ranks where several of them fit."""
    body = [f"<p>{escape(line)}</p>" for line in lines] + [_html(table) for table in tables]
    fitting = [row for row in sweep if row["fits"]]
    if len(fitting) > 1:
        ranks = [row["ranks"] for row in fitting]
        body.append(_plot("GiB of device memory, fullest rank", ranks, [row["memory_max"] / 2**30 for row in fitting]))
        body.append(_plot("ms, tables' part of a step", ranks, [row["step_ms"]["total"] for row in fitting]))
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>flm plan</title><style>{STYLE}</style>'
        f"<h1>Sharding plan</h1>{''.join(body)}</html>\n"
    )


def size(amount: float) -> str:
    """A number of bytes with its unit."""
    for unit, power in (("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if abs(amount) >= 2**power:
            return f"{amount / 2**power:,.2f} {unit}"
    return f"{amount:.0f} B"


def _html(table: TextTable) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in table.header)
    rows = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in table.rows)
    return f"<h2>{escape(table.title)}</h2><table><tr>{head}</tr>{rows}</table>"


def _plot(title: str, ranks: Sequence[int], values: Sequence[float]) -> str:
    """An SVG line over the numbers of ranks, evenly spaced."""
    width, height, margin = 560, 220, 50
    top = max(values) or 1.0
    across = (width - 2 * margin) / (len(ranks) - 1)
    points = [
        (margin + n * across, height - margin - value / top * (height - 2 * margin)) for n, value in enumerate(values)
    ]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    marks = "".join(
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3"/><text x="{x:.1f}" y="{y - 8:.1f}">{value:.3g}</text>'
        f'<text x="{x:.1f}" y="{height - margin + 18}">{count}</text>'
        for (x, y), value, count in zip(points, values, ranks, strict=True)
    )
    return (
        f'<svg width="{width}" height="{height}" font-size="11" text-anchor="middle"><text x="{width / 2}" y="16">'
        f'{escape(title)}</text><polyline points="{line}" fill="none" stroke="currentColor"/>{marks}'
        f'<text x="{width / 2}" y="{height - 8}">ranks</text></svg>'
    )
