"""A list of users from a file, with the rule of ids that prepared data have."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import polars as pl
import pyarrow as pa

from flm_torchrec.data.keys import keys
from flm_torchrec.documents import Unreadable, read_text
from flm_torchrec.errors import DataError
from flm_torchrec.prepare.clean import Dropped
from flm_torchrec.prepare.options import EntityTable, TextForm
from flm_torchrec.prepare.sources.entity_tables import read_table
from flm_torchrec.prepare.sources.input_files import kind_of

COLUMN = "user|user_id|user_key"
"""Names that the column of ids may have."""
MOST_BYTES = 2**30
"""Maximum size of a text."""


def read_users(file: str) -> pa.Array:
    """The distinct ids of users of a file, in the order of their first places.

    A file whose name ends as that of a table (`kind_of`), a folder and an address are a table with a column of
    `COLUMN`. Any other file is text with an id a line; blank lines are left out.

    Raises:
        DataError: the file cannot be read, has no such column, names nobody, or a row has no id.
    """
    if kind_of(file) or "://" in file or Path(file).is_dir():
        return distinct_users(read_table(EntityTable("user", file, COLUMN, {}), TextForm(), Dropped())[COLUMN], file)
    try:
        lines = re.split("\r\n|\r|\n", read_text(Path(file), MOST_BYTES))
    except Unreadable as error:
        raise DataError(f"{file}: cannot be read ({error}); give a text file with one id a line, or a table") from error
    named = [(row, line) for row, line in enumerate(lines, 1) if line.strip()]
    column = pl.Series("user", [line for _, line in named], dtype=pl.String)
    return distinct_users(column, file, [row for row, _ in named])


def distinct_users(column: pl.Series, where: str, rows: Sequence[int] | None = None) -> pa.Array:
    """The distinct ids of a column, in the order of their first places.

    Args:
        rows: the number of each row in the file; None: counted from 1.

    Raises:
        DataError: there are none, or a row has none.
    """
    ids = keys(column, where)
    if not len(ids):
        raise DataError(f"{where}: has no ids; give one at least")
    if ids.null_count():
        place = int(ids.is_null().arg_max() or 0)
        raise DataError(f"{where}: row {rows[place] if rows else place + 1} has no id; remove the row")
    return ids.unique(maintain_order=True).to_arrow().cast(pa.string())
