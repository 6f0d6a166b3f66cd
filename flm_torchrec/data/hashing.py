"""Ids → what an embedding table is asked for: the row itself, a hashed row, or a hashed id that TorchRec remaps."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from flm_torchrec.data.schema import ITEM_TABLES, Table

MANAGED_IDS = 2**63 - 1
"""Managed tables are asked for hashed ids below this. Hashes are evenly spread, and ranks share them out by range."""
GOLDEN = 0x9E3779B97F4A7C15
"""2^64 by the golden ratio, and odd: its multiples are evenly spread (Knuth, TAOCP 3, section 6.4)."""


def mix(ids: np.ndarray) -> np.ndarray:
    """[n] int64 → [n] uint64, one to one, the same everywhere (the finaliser of SplitMix64: Steele et al., 2014)."""
    x = ids.astype(np.uint64) + np.uint64(GOLDEN)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def remap_ids(table: Table, ids: np.ndarray) -> np.ndarray:
    """[n] int64 ids → [n] int64 what to look up in the table: rows, or hashed ids of a managed table.

    Hashing n ids into M rows, an id shares its row with probability 1 - (1 - 1/M)^(n - 1), about 1 - e^(-n/M).
    """
    if table.kind == "direct":
        return ids
    size = table.rows if table.kind == "hash" else MANAGED_IDS
    return (mix(ids) % np.uint64(size)).astype(np.int64)


def item_lookups(table: Table, ids: np.ndarray, counted: np.ndarray) -> dict[str, np.ndarray]:
    """[n] items → by key of a batch's `item_ids`, [n] int64 what to look up in the tables of items.

    TorchRec's managed tables cannot share a key, so each of them has its own.

    Args:
        counted: [n] bool: a managed table counts the item as seen. Drawn negatives must not earn a row.
    """
    if not table.managed:
        return {"item_id": remap_ids(table, ids)}
    return dict.fromkeys(ITEM_TABLES, managed_items(ids, counted))


def managed_items(ids: np.ndarray, counted: np.ndarray) -> np.ndarray:
    """[n] items below 2^62 → [n] int64 hashed ids below `MANAGED_IDS`, whose last bit says whether they are counted.

    The other bits are a multiple of the id by an odd number, modulo 2^62: no two items share one.
    """
    hashed = (ids.astype(np.uint64) * np.uint64(GOLDEN)) % np.uint64(2**62)
    return (2 * hashed.astype(np.int64)) | counted


@dataclass(frozen=True)
class HeldIds:
    """Ids of two data sets that name the same keys, as the map of a managed table holds them."""

    before: np.ndarray  # [n] int64
    after: np.ndarray  # [n] int64
    step: int
    """What is looked up is the id times this number, and one more where the last bit is a mark."""

    @classmethod
    def of(cls, name: str, before: np.ndarray, after: np.ndarray) -> HeldIds:
        """Of the table of this name, for the numbers [n] of its keys before and after."""
        if name in ITEM_TABLES:
            unmarked = np.zeros(len(before), bool)
            return cls(managed_items(before, unmarked) // 2, managed_items(after, unmarked) // 2, step=2)
        return cls(remap_ids(Table("zch", 2), before), remap_ids(Table("zch", 2), after), step=1)
