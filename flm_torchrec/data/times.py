"""Times of events: seconds since 1970, from whatever a source writes, within bounds that all readers share."""

from __future__ import annotations

import numpy as np
import polars as pl

from flm_torchrec.data.keys import as_text
from flm_torchrec.errors import DataError

UNITS = {"s": 1, "ms": 1_000, "us": 1_000_000, "ns": 1_000_000_000}
"""How many of a unit are a second."""
LATEST = 2**33
"""Seconds: what is after it, in March 2242, was given in another unit. Milliseconds pass it from April 1970 on."""
TOO_LATE = "timestamp after the year 2242: is it in another --time-unit?"
DAY_NUMBERS = (
    "timestamp // 10000 BETWEEN 1900 AND 2100 AND timestamp // 100 % 100 BETWEEN 1 AND 12"
    " AND timestamp % 100 BETWEEN 1 AND 31"
)
"""SQL: whether the seconds `timestamp`, all of 1970, are a day such as 20240331. Where all are, they are no seconds."""
NO_SECONDS = "all timestamps are days written as numbers such as 20240331, but were taken as seconds, of the year 1970"
WRITTEN = (
    r"^(\d{4}-\d\d-\d\d)"
    r"(?:(?:\s*T\s*|\s+)(\d\d:\d\d)(?::(\d\d)(?:[.,]\d+)?)?\s*(?:Z|UTC|GMT|([+-])(\d\d)(?::?([0-5]\d))?)?)?$"
)
"""ISO 8601 and what PostgreSQL and BigQuery write: groups are date, hour and minute, second, and the zone's sign, hours
and minutes."""
FARTHEST = 18
"""Hours that a zone may be away from UTC (ISO 8601 knows no bound; zones in use are within 14)."""


def seconds(column: pl.Series, unit: str) -> pl.Series:
    """[n] values → [n] int64 seconds since 1970, rounded down; null where there is no time that can be read.

    Args:
        column: Arrow dates or timestamps, which know their unit; numbers; or text of either form (`WRITTEN`). Times
            that name no zone are UTC.
        unit: of numbers, one of UNITS.

    Raises:
        DataError: values of this type are never times.
    """
    kind = column.dtype
    if isinstance(kind, pl.Datetime | pl.Date):
        return column.dt.epoch("s")
    if kind.is_numeric():
        return _whole(column, unit)
    if kind not in (pl.String, pl.Binary, pl.Categorical, pl.Enum):
        raise DataError(f"column '{column.name}' is {kind}, not a time; map timestamp to another column")
    text = as_text(column).str.strip_chars()
    numbers = [_whole(text.cast(number, strict=False), unit) for number in (pl.Int64, pl.Float64)]
    frame = pl.DataFrame({"exact": numbers[0], "number": numbers[1], "written": _written(text)})
    return frame.select(pl.coalesce("exact", "number", "written").alias(column.name)).to_series()


def check_unit(column: pl.Series, unit: str, found: pl.Series) -> None:
    """Raise DataError where most of the times found were taken in a unit too coarse; fewer are left to be counted.

    Args:
        column: what was read; Arrow's own times are always taken in their unit.
        found: [n] seconds, as `seconds` has made them.
    """
    late = (found > LATEST).fill_null(False)
    if isinstance(column.dtype, pl.Datetime | pl.Date) or 2 * int(late.sum()) <= int(found.is_not_null().sum()):
        return
    shown, taken = as_text(column).filter(late)[0], int(found.filter(late)[0])
    finer = [name for name, size in UNITS.items() if size > UNITS[unit] and taken * UNITS[unit] // size <= LATEST]
    if finer:
        raise DataError(
            f"column '{column.name}' has the time {shown}, which in {unit} is in the year {year(taken)}; is it in"
            f" {finer[0]}? Then give --time-unit {finer[0]}"
        )


def year(taken: int) -> int:
    """The year of a time in seconds, however far away."""
    return 1970 + int(np.datetime64(taken, "s").astype("datetime64[Y]").astype(np.int64))


def _whole(column: pl.Series, unit: str) -> pl.Series:
    if column.dtype.is_float():
        return (column // UNITS[unit]).cast(pl.Int64, strict=False)
    return column.cast(pl.Int64, strict=False) // UNITS[unit]


def _written(text: pl.Series) -> pl.Series:
    """[n] text → [n] seconds; null where it is not WRITTEN so."""
    part = text.str.to_uppercase().str.extract_groups(WRITTEN).struct.unnest()
    part.columns = ["date", "minute", "second", "sign", "hours", "minutes"]
    local = pl.concat_str(
        pl.col("date"), pl.lit(" "), pl.col("minute").fill_null("00:00"), pl.lit(":"), pl.col("second").fill_null("00")
    ).str.to_datetime("%Y-%m-%d %H:%M:%S", time_unit="us", strict=False)
    hours, minutes = (pl.col(name).cast(pl.Int64).fill_null(0) for name in ("hours", "minutes"))
    ahead = (3600 * hours + 60 * minutes) * pl.when(pl.col("sign") == "-").then(-1).otherwise(1)
    known = pl.col("date").is_not_null() & (hours <= FARTHEST)
    return part.select(pl.when(known).then(local.dt.epoch("s") - ahead)).to_series()
