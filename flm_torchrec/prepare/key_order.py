"""The order of users and of items, which their ids follow: by the text before the number at a key's end, then by it.

One rule in two forms: for a table in memory, and as SQL that DuckDB and Spark run alike.
"""

from __future__ import annotations

import polars as pl

NUMBER = r"^([^\n]*?)([0-9]{1,18})$"
"""The text of a key, and the number at its end."""


def ordered(rows: pl.DataFrame, column: str) -> pl.DataFrame:
    """Rows in the order of a column of keys."""
    before, number = (pl.col(column).str.extract(NUMBER, group) for group in (1, 2))
    # Two keys such as 7 and 07 tie by number; the key itself decides.
    return rows.sort(pl.coalesce(before, column), number.cast(pl.Int64), column)


def order_sql(column: str) -> str:
    """The same order, to stand behind ORDER BY; a key without a number comes before those with one."""
    number = f"regexp_extract({column}, '{NUMBER}', 2)"
    before = f"substr({column}, 1, length({column}) - length({number}))"
    return f"{before}, CASE WHEN {number} = '' THEN -1 ELSE CAST({number} AS BIGINT) END, {column}"
