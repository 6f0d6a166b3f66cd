"""How often a batch looks up each feature: the planner estimates memory and time from these counts."""

from __future__ import annotations

from collections import Counter, defaultdict
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from flm_torchrec.data.loader import Loader
from flm_torchrec.data.vocabulary import ENTITIES
from flm_torchrec.planner.constraints import Lookup

BATCHES = 4
"""Batches that are counted."""


def lookups_of(loader: Loader) -> dict[str, Lookup]:
    """By feature, the look-ups of one sequence, counted in this rank's first training batches: the same every time."""
    sequences, managed = 0, _managed(loader)
    bags: Counter[str] = Counter()
    ids_of: defaultdict[str, list[Tensor]] = defaultdict(list)
    for batch in islice(loader.epoch(0), BATCHES):
        sequences += len(batch.lengths)
        for features in (batch.item_ids, batch.item_features, batch.users, batch.history):
            for name, ids in features.to_dict().items():
                ids_of[name].append(ids.values())
                bags[name] += features.stride()
    rows = {name: np.sort(torch.cat(parts).numpy()) for name, parts in ids_of.items()}
    return {
        name: Lookup(len(ids) / max(1, bags[name]), bags[name] / sequences, None if name in managed else ids)
        for name, ids in rows.items()
    }


def _managed(loader: Loader) -> set[str]:
    """What a batch looks up in managed tables: hashed ids, which are no rows."""
    schema = loader.assembler.data.schema
    table_of = {name: name for name in ENTITIES} | {f.name: f.table for f in schema.features if f.sparse}
    return {name for name, table in table_of.items() if schema.table(table).managed}
