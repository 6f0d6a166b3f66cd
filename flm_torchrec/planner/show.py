"""A plan for people: text for a terminal, one HTML file with a plot. The same report gives the same bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from flm_torchrec.planner.whatif import Remedy
from flm_torchrec.safe_text import escape
from flm_torchrec.terminal import PlainConsole

MOST_RANKS_SHOWN = 16
PARTS = {
    "weights": "weights", "optimizer": "optimizer", "input_output": "in/out", "pipeline": "pipeline", "dense": "dense",
}  # fmt: skip
STYLE = "body{font:15px system-ui;max-width:60em;margin:2em auto}td,th{padding:2px 10px;text-align:right}"


@dataclass(frozen=True)
class Grid:
    """One table."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


def summary(made: dict[str, Any]) -> list[str]:
    """What to know first."""
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
    ]


def grids(made: dict[str, Any]) -> list[Grid]:
    """A plan's tables and ranks."""
    tables = [
        [t["name"], f"{t['rows']:,}", str(t["dim"]), size(t["bytes"]), f"{t['ids_per_sample']:.2f}",
         t["sharding_type"], t["kernel"], str(t["ranks"])]
        for t in made["tables"]
    ]  # fmt: skip
    shown = made["ranks"][:MOST_RANKS_SHOWN]
    ranks = [
        [str(r["rank"]), *(size(r["device"][name]) for name in PARTS), size(sum(r["device"].values())),
         size(sum(r["host"].values())), *(f"{r['ms'][name]:.3f}" for name in ("compute", "communication", "prefetch"))]
        for r in shown
    ]  # fmt: skip
    of = f" (the first {len(shown)} of {len(made['ranks'])})" if len(shown) < len(made["ranks"]) else ""
    header = ["rank", *PARTS.values(), "device", "host (UVM)", "compute ms", "comm. ms", "prefetch ms"]
    return [
        Grid("tables", ["table", "rows", "dim", "weights", "ids/sample", "sharding", "kernel", "ranks"], tables),
        Grid(f"ranks{of}", header, ranks),
    ]


def remedy_grid(found: Sequence[Remedy]) -> Grid:
    rows = [
        [r.name, "fits" if r.fits else f"{size(r.gap)} too much", f"{r.step_ms:.3f}" if r.step_ms else "", r.note]
        for r in found
    ]
    return Grid("what would make it fit", ["change", "on this cluster", "step ms", ""], rows)


def sweep_grid(rows: Sequence[dict[str, Any]]) -> Grid:
    found = []
    for row in rows:
        head = [str(row["ranks"]), str(row["nodes"])]
        if not row["fits"]:
            found.append([*head, f"no: {row['table']} {size(row['gap'])} too much", *[""] * 6])
            continue
        step = row["step_ms"]
        found.append(
            [*head, "yes", size(row["memory_max"]), f"{step['compute']:.3f}", f"{step['communication']:.3f}",
             f"{step['prefetch']:.3f}", f"{step['total']:.3f}", f"{row['balance']['time']:.2f}"]
        )  # fmt: skip
    header = ["ranks", "nodes", "fits", "device", "compute ms", "comm. ms", "prefetch ms", "step ms", "time balance"]
    return Grid("other numbers of ranks", header, found)


def text(lines: Sequence[str], tables: Sequence[Grid]) -> str:
    """As wide as it needs to be, whatever the terminal."""
    console = PlainConsole(width=160, no_color=True)
    with console.capture() as capture:
        for line in lines:
            console.print(line, soft_wrap=True)
        for grid in tables:
            drawn = Table(title=grid.title, title_justify="left")
            for name in grid.header:
                drawn.add_column(name, justify="left" if name in ("table", "change", "") else "right")
            for row in grid.rows:
                drawn.add_row(*row)
            console.print(drawn)
    return "\n".join(line.rstrip() for line in capture.get().splitlines()) + "\n"


def html(lines: Sequence[str], tables: Sequence[Grid], sweep: Sequence[dict[str, Any]]) -> str:
    body = [f"<p>{escape(line)}</p>" for line in lines] + [_html(grid) for grid in tables]
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
    """Bytes for people."""
    for unit, power in (("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if abs(amount) >= 2**power:
            return f"{amount / 2**power:,.2f} {unit}"
    return f"{amount:.0f} B"


def _html(grid: Grid) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in grid.header)
    rows = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in grid.rows)
    return f"<h2>{escape(grid.title)}</h2><table><tr>{head}</tr>{rows}</table>"


def _plot(title: str, ranks: Sequence[int], values: Sequence[float]) -> str:
    """A line over the numbers of ranks, evenly spaced."""
    width, height, edge = 560, 220, 50
    top = max(values) or 1.0
    across = (width - 2 * edge) / (len(ranks) - 1)
    points = [(edge + n * across, height - edge - value / top * (height - 2 * edge)) for n, value in enumerate(values)]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    marks = "".join(
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3"/><text x="{x:.1f}" y="{y - 8:.1f}">{value:.3g}</text>'
        f'<text x="{x:.1f}" y="{height - edge + 18}">{count}</text>'
        for (x, y), value, count in zip(points, values, ranks, strict=True)
    )
    return (
        f'<svg width="{width}" height="{height}" font-size="11" text-anchor="middle"><text x="{width / 2}" y="16">'
        f'{escape(title)}</text><polyline points="{line}" fill="none" stroke="currentColor"/>{marks}'
        f'<text x="{width / 2}" y="{height - 8}">ranks</text></svg>'
    )
