"""`--tables`: how the ids of a table share its rows."""

from __future__ import annotations

import re
from collections.abc import Sequence

from flm_torchrec.data.schema import Feature, Table
from flm_torchrec.errors import DataError
from flm_torchrec.names import nearest


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
    """What was chosen for "user_id", "item_id" or features by their names, by the tables that these name.

    Raises:
        DataError: there is no such feature, or its ids cannot be shared out otherwise.
    """
    sparse = {name: f.table for f in features if f.sparse for name in (f.name, f.table)}
    names = {"user_id": "user_id", "item_id": "item_id", **sparse}
    for name in chosen:
        if name not in names:
            raise DataError(f"--tables: no id or sparse feature '{name}'; {nearest(name, names)}")
    return {names[name]: table for name, table in chosen.items() if table.kind != "direct"}
