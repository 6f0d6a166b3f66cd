"""Cells that hold several values: real lists, JSON lists, or text with a separator."""

from __future__ import annotations

import ast
import json
import re
from collections import Counter
from typing import Any

import polars as pl

from flm_torchrec.errors import DataError
from flm_torchrec.prepare.options import TextForm

OTHERS = (",", ";", "|", "/", "\t")
"""Separators to suggest where the given one never occurs."""
LIKE_A_LIST = r"(?s)^\s*\[.*\]\s*$"


class ListCells:
    """Text → lists of text, of a column that is read in parts: lists by their values, other cells by the separator."""

    def __init__(self, form: TextForm, file: str) -> None:
        self.form, self.file = form, file
        self.separated = False
        self.whole: pl.Series | None = None
        """The cells, each once, of the first part that has cells but no list and no separator."""

    def read(self, column: pl.Series) -> pl.Series:
        """[n] text → [n] lists of text: JSON lists (or Python's) by their values, other cells by the list separator.

        Raises:
            DataError: a cell looks like a list and cannot be read as one.
        """
        form, where = self.form, f"{self.file}: column '{column.name}'"
        cells = column.unique().drop_nulls()
        looks = cells.filter(_bracketed(cells)).sort().to_list()
        brackets = {cell: values for cell in looks if (values := _listed(cell, form, where)) is not None}
        plain = cells.filter(~cells.is_in(list(brackets)) & (cells != ""))
        self.separated |= bool(plain.str.contains(form.list_separator, literal=True).any())
        if self.whole is None and len(plain):
            self.whole = plain
        split = column.str.split(form.list_separator)
        if not brackets:
            return split
        lists = pl.Series("list", list(brackets.values()), dtype=pl.List(pl.String))
        by_cell = pl.DataFrame([pl.Series("cell", list(brackets), dtype=pl.String), lists])
        joined = column.to_frame("cell").join(by_cell, "cell", "left", maintain_order="left")
        return joined.with_columns(split=split).select(pl.coalesce("list", "split")).to_series().rename(column.name)

    def notes(self) -> list[str]:
        """A line if the separator never occurred."""
        if self.whole is None or self.separated:
            return []
        return [_never(self.whole.name, self.whole, self.form, self.file)]


def values_of(cell: str, form: TextForm, where: str) -> list[str]:
    """What `ListCells` reads from one cell.

    Args:
        where: names the cell in errors.

    Raises:
        DataError: as of `ListCells.read`.
    """
    values = _listed(cell, form, where) if re.match(LIKE_A_LIST, cell) else None
    return cell.split(form.list_separator) if values is None else values


def _listed(cell: str, form: TextForm, where: str) -> list[str] | None:
    """The values of a cell that looks like a list; None where it is text, to be split by the list separator.

    Raises:
        DataError: it cannot be read as either.
    """
    values = _parsed(cell, form)
    if values is None and "," in cell and form.list_separator not in cell:
        raise DataError(
            f'{where}: {cell[:60]} looks like a list and is not JSON; write it as ["a", "b"], or name the separator'
            " with flm prepare --list-separator"
        )
    return values


def refuse_lists(column: pl.Series, kind: str, file: str) -> None:
    """Check that no cell of a column with one value a row is a list.

    Raises:
        DataError: a cell is a list, as JSON or Python writes it.
    """
    cells = column.drop_nulls()
    for row in cells.filter(_bracketed(cells)).unique(maintain_order=True):
        if _parsed(row, TextForm()) is not None:
            raise DataError(
                f"{file}: column '{column.name}' holds lists, such as {row[:60]}, and kind {kind} has one value a row;"
                f" declare it {column.name}:multi_categorical"
            )


def _bracketed(cells: pl.Series) -> pl.Series:
    return cells.str.contains(LIKE_A_LIST)


def _parsed(cell: str, form: TextForm) -> list[str] | None:
    """The values of a list of plain values, without nulls; None where the text is no such list."""
    point = form.numbers.decimal
    try:
        values = json.loads(cell, parse_int=str, parse_float=lambda text: text.removesuffix(".0").replace(".", point))
    except (ValueError, RecursionError):
        values = _of_python(cell)
    if not isinstance(values, list) or any(isinstance(value, dict | list) for value in values):
        return None
    return [_text(value) for value in values if value is not None]


def _of_python(cell: str) -> Any:
    """The list that Python's `str` wrote, as many tools do in CSV; None where it is none."""
    try:
        return ast.literal_eval(cell.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
        return None


def _text(value: Any) -> str:
    return json.dumps(value) if isinstance(value, bool) else str(value)


def _never(name: str, cells: pl.Series, form: TextForm, file: str) -> str:
    counts = Counter({sign: int(cells.str.contains(sign, literal=True).sum()) for sign in OTHERS})
    sign, times = counts.most_common(1)[0]
    other = f"; '{sign}' occurs in {times} of {len(cells)} different cells" if times else ""
    return (
        f"{file}: --list-separator '{form.list_separator}' never occurs in column '{name}', so each cell is one"
        f" value{other}; name the separator if that is not what you want"
    )
