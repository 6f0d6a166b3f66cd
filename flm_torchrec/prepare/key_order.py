"""The order of users and of items, which their ids follow: by the text before the number at a key's end, then by it."""

NUMBER = r"^([^\n]*?)([0-9]{1,18})$"
"""The text of a key, and the number at its end."""


def order_sql(column: str) -> str:
    """The order as SQL that DuckDB and Spark run alike, to stand behind ORDER BY.

    A key without a number comes before those with one. Two keys such as 7 and 07 tie by number; the key itself decides.
    """
    number = f"regexp_extract({column}, '{NUMBER}', 2)"
    before = f"substr({column}, 1, length({column}) - length({number}))"
    return f"{before}, CASE WHEN {number} = '' THEN -1 ELSE CAST({number} AS BIGINT) END, {column}"
