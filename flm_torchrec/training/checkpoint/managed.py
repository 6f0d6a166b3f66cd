"""Rows of a managed table of a checkpoint → rows of the same keys, whose ids and ranks may be others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from flm_torchrec.data.hashing import MANAGED_IDS, HeldIds
from flm_torchrec.distributed.rows import StoredBlock

FREE = np.iinfo(np.int64).max
"""In place of an id: the row is free."""
IDS, ROWS = "_mch_sorted_raw_ids", "_mch_remapped_ids_mapping"
"""TorchRec's names of parts of a map: ids in ascending order, and their rows. Counts and times are in that order."""
PARTS = (IDS, ROWS, "_mch_counts", "_mch_last_access_iter")
SHARING = "_output_segments_tensor"
"""The part of a map that says how a job shares out the rows: its own, whatever a checkpoint says."""


@dataclass(frozen=True)
class Dealt:
    """A table and its map after the rows were dealt out anew."""

    origin: np.ndarray
    """[rows] int64: the old row of each new row, -1 where there is none."""
    parts: dict[str, np.ndarray]
    """By TorchRec's name, [rows] int64: the parts of the map."""


def deal(stored: Mapping[str, Sequence[StoredBlock]], held: HeldIds, ranks: int) -> Dealt:
    """Give each id that holds a row of a stored table a row of the rank that its new id falls to.

    The last row of a rank belongs to all ids without a row. Ids that are too many for their rank lose their rows: those
    with the lowest counts, or the oldest times.

    Args:
        stored: by TorchRec's name, the blocks of each part of the map: one for each rank that wrote it.
        held: what ids of the stored map are called now.
        ranks: that share the table from now on.

    Raises:
        RunError: a block cannot be read.
    """
    old = {name: np.concatenate([b.read().numpy() for b in _in_order(blocks)]) for name, blocks in stored.items()}
    size, writers = len(old[IDS]), len(stored[IDS])
    share, shared_before = size // ranks, size // writers
    origin = np.full(size, -1)
    parts = {name: np.zeros(size, np.int64) for name in old}
    parts[IDS][:] = FREE
    ids = _translated(old[IDS], held)
    importance = next(values for name, values in old.items() if name not in (IDS, ROWS))
    home = ids * held.step // -(-MANAGED_IDS // ranks)  # as TorchRec's RwSparseFeaturesDist
    for rank in range(ranks):
        first, last = rank * share, (rank + 1) * share - 1
        mine = np.flatnonzero((ids != FREE) & (home == rank))
        mine = mine[np.argsort(-importance[mine], kind="stable")][: share - 1]
        mine = mine[np.argsort(ids[mine], kind="stable")]
        place = slice(first, first + len(mine))
        for name, values in parts.items():
            values[place] = ids[mine] if name == IDS else old[name][mine]
        parts[ROWS][first : last + 1] = np.arange(first, last + 1)
        origin[place] = old[ROWS][mine]
        origin[last] = (rank * writers // ranks + 1) * shared_before - 1
    return Dealt(origin, parts)


def _in_order(blocks: Sequence[StoredBlock]) -> list[StoredBlock]:
    return sorted(blocks, key=lambda stored: stored.block.offsets)


def _translated(ids: np.ndarray, held: HeldIds) -> np.ndarray:
    """[n] ids → [n] what they are now; FREE for those that are no more."""
    if not len(held.before):
        return np.full(len(ids), FREE)
    order = np.argsort(held.before)
    place = order[np.searchsorted(held.before, ids, sorter=order).clip(max=len(order) - 1)]
    return np.where(held.before[place] == ids, held.after[place], FREE)
