"""Ids → what an embedding table is asked for: the row itself, a hashed row, or a hashed id that TorchRec remaps."""

from __future__ import annotations

import numpy as np

from flm_torchrec.data.schema import Table

MANAGED_IDS = 2**63 - 1
"""Managed tables are asked for hashed ids below this. Hashes are evenly spread, and ranks share them out by range."""


def mix(ids: np.ndarray) -> np.ndarray:
    """[n] int64 → [n] uint64, one to one, the same everywhere (the finaliser of SplitMix64: Steele et al., 2014)."""
    x = ids.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
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
