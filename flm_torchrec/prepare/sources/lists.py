"""Cells that hold several values: real lists, JSON lists, or text with a separator."""

from __future__ import annotations

import ast
import json
from collections import Counter
from collections.abc import Callable
from typing import Any

import polars as pl

from flm_torchrec.errors import DataError
from flm_torchrec.prepare.sources.form import Form

OTHERS = (",", ";", "|", "/", "\t")
"""Separators that are looked for where the one that was named never occurs."""


def as_lists(column: pl.Series, form: Form, file: str, tell: Callable[[str], None]) -> pl.Series:
    """[n] text → [n] lists of text: JSON lists (or Python's) by their values, other cells by the list separator.

    Args:
        tell: given a line where the separator never occurs in the column.

    Raises:
        DataError: a cell looks like a list and cannot be read as one.
    """
    cells = column.unique().drop_nulls()
    looks = cells.filter(_bracketed(cells)).to_list()
    brackets = {cell: found for cell in looks if (found := _parsed(cell, form)) is not None}
    odd = [cell for cell in looks if cell not in brackets and "," in cell and form.list_separator not in cell]
    if odd:
        raise DataError(
            f"{file}: column '{column.name}': {min(odd)[:60]} looks like a list and is not JSON; write it as"
            ' ["a", "b"], or name the separator with --list-separator'
        )
    plain = cells.filter(~cells.is_in(list(brackets)) & (cells != ""))
    if len(plain) and not plain.str.contains(form.list_separator, literal=True).any():
        tell(_never(column.name, plain, form, file))
    split = column.str.split(form.list_separator)
    if not brackets:
        return split
    values = pl.Series("list", list(brackets.values()), dtype=pl.List(pl.String))
    known = pl.DataFrame([pl.Series("cell", list(brackets), dtype=pl.String), values])
    joined = column.to_frame("cell").join(known, "cell", "left", maintain_order="left")
    return joined.with_columns(split=split).select(pl.coalesce("list", "split")).to_series().rename(column.name)


def refuse_lists(column: pl.Series, kind: str, file: str) -> None:
    """Raise DataError where a cell is a JSON list, of a column that has one value a row."""
    cells = column.drop_nulls()
    for row in cells.filter(_bracketed(cells)).unique(maintain_order=True):
        if _parsed(row, Form()) is not None:
            raise DataError(
                f"{file}: column '{column.name}' holds lists, such as {row[:60]}, and kind {kind} has one value a row;"
                f" declare it {column.name}:multi_categorical"
            )


def _bracketed(cells: pl.Series) -> pl.Series:
    return cells.str.contains(r"(?s)^\s*\[.*\]\s*$")


def _parsed(cell: str, form: Form) -> list[str] | None:
    """The values of a list of plain values; None where the text is none. What is null is left out."""
    point = form.numbers.decimal
    try:
        found = json.loads(cell, parse_int=str, parse_float=lambda text: text.replace(".", point))
    except (ValueError, RecursionError):
        found = _of_python(cell)
    if not isinstance(found, list) or any(isinstance(value, dict | list) for value in found):
        return None
    return [_text(value) for value in found if value is not None]


def _of_python(cell: str) -> Any:
    """As `str` of a list writes it, which is how many tools write lists into CSV."""
    try:
        return ast.literal_eval(cell.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
        return None


def _text(value: Any) -> str:
    return json.dumps(value) if isinstance(value, bool) else str(value)


def _never(name: str, cells: pl.Series, form: Form, file: str) -> str:
    counts = Counter({sign: int(cells.str.contains(sign, literal=True).sum()) for sign in OTHERS})
    sign, times = counts.most_common(1)[0]
    other = f"; '{sign}' occurs in {times} of {len(cells)} different cells" if times else ""
    return (
        f"{file}: --list-separator '{form.list_separator}' never occurs in column '{name}', so each cell is one"
        f" value{other}; name the separator if that is not what you want"
    )
