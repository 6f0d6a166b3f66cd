"""Names of columns as people give them → columns that a file has."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from flm_torchrec.errors import DataError
from flm_torchrec.names import LISTED, closest
from flm_torchrec.safe_text import visible

SEPARATORS = ";\t|,"
"""Signs that separate the columns of files called CSV."""


def alternatives(wanted: str) -> tuple[str, ...]:
    """`uid|user_id` → the complete text, since a column may have that name, then each of its parts in order."""
    return tuple(dict.fromkeys((wanted, *filter(None, map(str.strip, wanted.split("|"))))))


def find(wanted: str, present: Sequence[str], note: Callable[[str], None]) -> str | None:
    """The first alternative that is present; else the only column that differs from one in nothing but case or blanks.

    Args:
        note: takes a line where the names differ.
    """
    names = alternatives(wanted)
    for name in names:
        if name in present:
            return name
    for name in names:
        alike = [column for column in present if column.strip().casefold() == name.casefold()]
        if len(alike) == 1:
            note(f"column '{name}' is read from '{alike[0]}', which differs in case or blanks alone")
            return alike[0]
    return None


def find_all(columns: Sequence[str], present: Sequence[str], where: str, note: Callable[[str], None]) -> dict[str, str]:
    """By each name wanted, the column of the file that has it.

    Raises:
        DataError: no column has it (the line names the nearest column and all others), or two columns have one name.
    """
    by_name = {wanted: find(wanted, present, note) for wanted in columns}
    for wanted, column in by_name.items():
        if column is None:
            raise no_column(where, wanted, present)
        if list(present).count(column) > 1:
            raise DataError(f"{where}: two columns are named '{column}'; rename one")
    return {wanted: column for wanted, column in by_name.items() if column is not None}


def no_column(where: str, wanted: str, present: Sequence[str]) -> DataError:
    """The error of a column that is missing: the nearest name, or the sign that separates columns, and all names."""
    parts = alternatives(wanted)
    close = [name for part in parts for name in closest(part, present)]
    signs = [sign for sign in SEPARATORS if sign in present[0]] if len(present) == 1 else []
    if signs:
        hint = f" read it with its separator (--separator '{visible(signs[0])}'). It"
    else:
        hint = f" did you mean '{close[0]}'? It" if close else " it"
    listed = ", ".join(present[:LISTED]) + (f" and {len(present) - LISTED} more" if len(present) > LISTED else "")
    return DataError(f"{where}: no column '{wanted}';{hint} has: {listed or 'none'}")
