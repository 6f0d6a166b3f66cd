"""Names of columns as people give them → columns that a file has."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from flm_torchrec.errors import DataError
from flm_torchrec.names import LISTED, closest


def alternatives(wanted: str) -> tuple[str, ...]:
    """`uid|user_id` → the whole text, in case a column is named so, and each of its parts, in the order given."""
    return tuple(dict.fromkeys((wanted, *filter(None, map(str.strip, wanted.split("|"))))))


def find(wanted: str, present: Sequence[str], tell: Callable[[str], None]) -> str | None:
    """The first alternative that is there; else the one column that differs from one in case or blanks alone.

    Args:
        tell: given a line where the names differ.
    """
    names = alternatives(wanted)
    for name in names:
        if name in present:
            return name
    for name in names:
        alike = [column for column in present if column.strip().casefold() == name.casefold()]
        if len(alike) == 1:
            tell(f"column '{name}' is read from '{alike[0]}', which differs in case or blanks alone")
            return alike[0]
    return None


def found(columns: Sequence[str], present: Sequence[str], where: str, tell: Callable[[str], None]) -> dict[str, str]:
    """By each name wanted, the column of the file that has it.

    Raises:
        DataError: none has; the line names the nearest column and those that there are.
    """
    by_name = {wanted: find(wanted, present, tell) for wanted in columns}
    for wanted, column in by_name.items():
        if column is None:
            raise no_column(where, wanted, present)
        if list(present).count(column) > 1:
            raise DataError(f"{where}: two columns are named '{column}'; rename one")
    return {wanted: column for wanted, column in by_name.items() if column is not None}


def no_column(where: str, wanted: str, present: Sequence[str]) -> DataError:
    """The error of a name that is not there."""
    parts = alternatives(wanted)
    close = [name for part in parts for name in closest(part, present)]
    hint = f" did you mean '{close[0]}'?" if close else ""
    listed = ", ".join(present[:LISTED]) + (f" and {len(present) - LISTED} more" if len(present) > LISTED else "")
    return DataError(f"{where}: no column '{wanted}';{hint} It has: {listed or 'none'}")
