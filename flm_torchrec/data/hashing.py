"""Ids → what a table is asked for: the row itself, a hashed row, or a hashed id that TorchRec gives a row."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from flm_torchrec.data.schema import Feature, Table
from flm_torchrec.errors import DataError
from flm_torchrec.names import nearest

MANAGED_IDS = 2**63 - 1
"""Managed tables are asked for hashed ids below this. Evenly spread: ranks share them out by range."""


def mix(ids: np.ndarray) -> np.ndarray:
    """[n] int64 → [n] uint64, one to one, the same everywhere (the finaliser of SplitMix64: Steele et al., 2014)."""
    x = ids.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def look_ups(table: Table, ids: np.ndarray) -> np.ndarray:
    """[n] int64 ids → [n] int64 to look up in the table.

    Hashing n ids into M rows, an id shares its row with probability 1 - (1 - 1/M)^(n - 1), about 1 - e^(-n/M).
    """
    if table.kind == "direct":
        return ids
    size = table.rows if table.kind == "hash" else MANAGED_IDS
    return (mix(ids) % np.uint64(size)).astype(np.int64)


def gap_rows(since: np.ndarray, buckets: int) -> np.ndarray:
    """[n] seconds since the event before → [n] rows of the table of gaps, by log2; row 0 is the prefix's."""
    return np.minimum(np.log2(since + 1).astype(np.int64), buckets - 2) + 1


def parse_tables(text: str) -> dict[str, Table]:
    """`user_id=zch:100000,brand=hash:5000,tags=zch:5000:lru` → by name.

    Raises:
        DataError: not written so.
    """
    tables = {}
    for part in filter(None, text.split(",")):
        match = re.fullmatch(r"([^=]+)=(?:direct|(hash):(\d+)|(zch):(\d+)(?::(lfu|lru))?)", part)
        if not match:
            raise DataError(f"--tables: '{part}' is not NAME=direct, NAME=hash:ROWS or NAME=zch:ROWS[:lfu|lru]")
        name, hashed, hash_rows, managed, zch_rows, eviction = match.groups()
        kind, rows = hashed or managed or "direct", int(hash_rows or zch_rows or 0)
        try:
            tables[name] = Table(kind, rows, eviction or "lfu")  # type: ignore[arg-type]
        except ValueError as error:
            raise DataError(f"--tables: '{part}': {error}") from error
    return tables


def by_table(chosen: dict[str, Table], features: Sequence[Feature]) -> dict[str, Table]:
    """What was chosen for "user_id" or for features by their names, by the tables that these name.

    Raises:
        DataError: there is no such feature, or its ids cannot be shared out otherwise.
    """
    if "item_id" in chosen:
        raise DataError("--tables: 'item_id' is direct always: negatives, ranking and export go through its rows")
    names = {"user_id": "user_id", **{n: f.table for f in features if f.sparse for n in (f.name, f.table)}}
    for name in chosen:
        if name not in names:
            raise DataError(f"--tables: no id or sparse feature '{name}'; {nearest(name, names)}")
    return {names[name]: table for name, table in chosen.items() if table.kind != "direct"}
