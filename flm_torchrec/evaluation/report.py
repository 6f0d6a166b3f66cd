"""The evaluation as tables: on the terminal and in Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from statistics import mean, stdev

from rich.table import Table
from rich.text import Text

from flm_torchrec.evaluation.evaluate import Evaluation
from flm_torchrec.evaluation.paired import Comparison, Difference
from flm_torchrec.terminal import PlainConsole

Metrics = dict[str, float]
ORACLE = "oracle of the mixture"
LISTS = "what is recommended"
"""Title of the table of lists."""
MORE = ", further columns"
WIDE = 10_000
"""Columns of text that every table fits into."""


def show(evaluation: Evaluation, console: PlainConsole, oracle: dict[str, Metrics] | None = None) -> None:
    """Print the table of all examples, then a table for each segment.

    Args:
        oracle: metrics of the best possible ranking of these examples: "all", and by segment. None: not known.
    """
    title = f"{evaluation.split}: {evaluation.ranked}, the user's earlier items left out"
    _print(console, title, _with_oracle(evaluation.table, oracle, "all"))
    for label, table in evaluation.segments.items():
        _print(console, f"of these, '{label}'", _with_oracle(table, oracle, label))
    if evaluation.lists:
        _print(console, LISTS, evaluation.lists, best=False)
    for note in evaluation.notes:
        console.print(note)


def markdown(evaluation: Evaluation, oracle: dict[str, Metrics] | None = None) -> str:
    """The table of all examples as Markdown, then a table for each segment; `oracle` as in `show`."""
    tables = {evaluation.split: _with_oracle(evaluation.table, oracle, "all")}
    tables |= {label: _with_oracle(table, oracle, label) for label, table in evaluation.segments.items()}
    if evaluation.lists:
        tables[LISTS] = evaluation.lists
    notes = [f"{note}\n" for note in evaluation.notes]
    return "\n".join([*(markdown_metrics(title, rows) for title, rows in tables.items()), *notes])


def show_comparison(comparison: Comparison, console: PlainConsole) -> None:
    """Print how each row differs, over all users and by segment, in bold where the interval is on one side of zero."""
    for title, part in _compared(comparison):
        columns = list(next(iter(part.rows.values())))
        rows = {
            name: [Text(_interval(row[c]), "bold" if row[c].clear else "") for c in columns]
            for name, row in part.rows.items()
        }
        _print_cells(console, title, columns, rows)


def markdown_comparison(comparison: Comparison) -> str:
    """How each row differs, as Markdown, as in `show_comparison`."""
    tables = []
    for title, part in _compared(comparison):
        columns = list(next(iter(part.rows.values())))
        rows = {
            name: [f"**{_interval(row[c])}**" if row[c].clear else _interval(row[c]) for c in columns]
            for name, row in part.rows.items()
        }
        tables.append(_markdown(title, columns, rows))
    return "\n".join(tables)


def _compared(comparison: Comparison) -> Iterator[tuple[str, Comparison]]:
    """Titles and what they are of: all examples, then each segment."""
    users = f"95 % interval of a paired bootstrap over {comparison.users} users"
    yield f"less {comparison.against}, {users}", comparison
    for label, part in comparison.segments.items():
        yield f"less {part.against}, of these, '{label}': {part.users} users", part


def _interval(found: Difference) -> str:
    return f"{found.mean:+.4f} [{found.low:+.4f}, {found.high:+.4f}]"


def _with_oracle(table: dict[str, Metrics], oracle: dict[str, Metrics] | None, label: str) -> dict[str, Metrics]:
    return {**table, ORACLE: oracle[label]} if oracle and label in oracle else table


def _markdown(title: str, columns: list[str], rows: dict[str, list[str]]) -> str:
    lines = [f"| {title} | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    lines += [f"| {name} | " + " | ".join(cells) + " |" for name, cells in rows.items()]
    return "\n".join(lines) + "\n"


def markdown_metrics(title: str, rows: Mapping[str, Metrics], seeds: Sequence[Mapping[str, Metrics]] = ()) -> str:
    """A table with a row for each name, and a column for each metric; of several seeds, for those of the first row.

    Args:
        seeds: the same rows of other seeds; the numbers are then means with their deviation.
    """
    if not seeds:
        columns = list(dict.fromkeys(metric for row in rows.values() for metric in row))
        return _markdown(title, columns, {name: _cells(metrics, columns) for name, metrics in rows.items()})
    columns = list(next(iter(rows.values())))
    cells = {name: [mean_and_deviation([t[name][c] for t in (rows, *seeds)]) for c in columns] for name in rows}
    return _markdown(title, columns, cells)


def mean_and_deviation(values: Sequence[float]) -> str:
    """Mean and, of several values that differ, ± the sample standard deviation."""
    spread = f" ± {stdev(values):.4f}" if len(set(values)) > 1 else ""
    return f"{mean(values):.4f}{spread}"


def _cells(metrics: Metrics, columns: list[str]) -> list[str]:
    return [f"{metrics[c]:.4f}" if c in metrics else "" for c in columns]


def _print(console: PlainConsole, title: str, rows: dict[str, Metrics], best: bool = True) -> None:
    """Print a table, with the largest number of each column in bold if that is the best one."""
    columns = list(next(iter(rows.values())))
    largest = {c: max(metrics.get(c, 0.0) for name, metrics in rows.items() if name != ORACLE) for c in columns}
    cells = {}
    for name, metrics in rows.items():
        bold = [best and c in metrics and metrics[c] == largest[c] for c in columns]
        cells[name] = [Text(x, "bold" if b else "") for x, b in zip(_cells(metrics, columns), bold, strict=True)]
    _print_cells(console, title, columns, cells)


def _print_cells(console: PlainConsole, title: str, columns: list[str], rows: dict[str, list[Text]]) -> None:
    """Print a table of cells; one that is wider than the console in several parts, as rich would cut the numbers."""
    first = 0
    while first < len(columns):
        fitting = _part(title, columns, rows, slice(first, first + 1))
        last = first + 1
        while last < len(columns):
            wider = _part(title, columns, rows, slice(first, last + 1))
            if console.measure(wider, options=console.options.update_width(WIDE)).maximum > console.width:
                break
            fitting, last = wider, last + 1
        console.print(fitting)
        first, title = last, f"{title.removesuffix(MORE)}{MORE}"


def _part(title: str, columns: list[str], rows: dict[str, list[Text]], some: slice) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for column in columns[some]:
        table.add_column(column, justify="right")
    for name, cells in rows.items():
        table.add_row(name, *cells[some])
    return table
