"""A list of users from a file, with the rule of ids that prepared data have."""

from __future__ import annotations

from pathlib import Path

import polars as pl
import pyarrow as pa

from flm_torchrec.data.keys import keys
from flm_torchrec.errors import DataError
from flm_torchrec.prepare.clean import Dropped
from flm_torchrec.prepare.options import EntityTable, TextForm
from flm_torchrec.prepare.sources.entity_tables import read_table

COLUMN = "user|user_id|user_key"
"""Names that the column of ids may have."""


def read_users(file: str) -> pa.Array:
    """The distinct ids of users of a file: text with an id a line (.txt), or a table with a column of `COLUMN`.

    Raises:
        DataError: the file cannot be read, has no such column, or a row has no id.
    """
    if file.endswith(".txt"):
        try:
            column = pl.Series("user", Path(file).read_text(encoding="utf-8").splitlines(), dtype=pl.String)
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{file}: cannot be read ({error}); give a text file with an id a line") from error
    else:
        column = read_table(EntityTable("user", file, COLUMN, {}), TextForm(), Dropped())[COLUMN]
    return distinct_users(column, file)


def distinct_users(column: pl.Series, where: str) -> pa.Array:
    """The distinct ids of a column, in the order of their first places.

    Raises:
        DataError: there are none, or a row has none.
    """
    ids = keys(column, where)
    if not len(ids):
        raise DataError(f"{where}: has no ids; give one at least")
    if ids.null_count():
        raise DataError(f"{where}: row {ids.is_null().arg_max() + 1} has no id; remove the row")  # type: ignore[operator]
    return ids.unique(maintain_order=True).to_arrow().cast(pa.string())
