"""The evaluation as tables: on the terminal and in Markdown."""

from __future__ import annotations

from typing import Any

from rich.table import Table
from rich.text import Text

from flm_torchrec.evaluation.evaluate import Evaluation
from flm_torchrec.terminal import PlainConsole


def show(evaluation: Evaluation, console: PlainConsole, oracle: dict[str, Any] | None = None) -> None:
    """Print the table of all examples, then a table for each segment.

    Args:
        oracle: by segment, metrics of the best possible ranking, where the source of the data knows these.
    """
    title = f"{evaluation.split}: {evaluation.users} users, every item ranked, the user's earlier items left out"
    console.print(_table(title, evaluation.table))
    for label, table in evaluation.segments.items():
        rows = dict(table)
        if oracle and label in oracle:
            rows["oracle of the mixture"] = oracle[label]
        console.print(_table(f"of these, '{label}'", rows))


def markdown(evaluation: Evaluation) -> str:
    """The table of all examples as Markdown, then a table for each segment."""
    tables = {evaluation.split: evaluation.table, **evaluation.segments}
    return "\n".join(_markdown(title, rows) for title, rows in tables.items())


def _markdown(title: str, rows: dict[str, dict[str, float]]) -> str:
    columns = list(next(iter(rows.values())))
    lines = [f"| {title} | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, metrics in rows.items():
        lines.append(f"| {name} | " + " | ".join(f"{metrics[c]:.4f}" for c in columns) + " |")
    return "\n".join(lines) + "\n"


def _table(title: str, rows: dict[str, dict[str, float]]) -> Table:
    columns = list(next(iter(rows.values())))
    table = Table(title=title, title_justify="left")
    table.add_column("")
    best = {c: max(metrics.get(c, 0.0) for name, metrics in rows.items() if "oracle" not in name) for c in columns}
    for column in columns:
        table.add_column(column, justify="right")
    for name, metrics in rows.items():
        cells = [f"{metrics[c]:.4f}" if c in metrics else "" for c in columns]
        bold = [c in metrics and metrics[c] == best[c] for c in columns]
        table.add_row(name, *(Text(x, "bold") if b else x for x, b in zip(cells, bold, strict=True)))
    return table
