"""How often a batch of the data looks up each feature: what the planner weighs memory and time by."""

from __future__ import annotations

from collections import Counter
from itertools import islice

from flm_torchrec.data.loader import TrainLoader
from flm_torchrec.distributed.constraints import Lookup

BATCHES = 4


def lookups_of(loader: TrainLoader) -> dict[str, Lookup]:
    """By feature, of one sequence: counted in this rank's first training batches, the same every time."""
    sequences = 0
    ids: Counter[str] = Counter()
    bags: Counter[str] = Counter()
    for batch in islice(loader.epoch(0), BATCHES):
        sequences += len(batch.lengths)
        for features in (batch.item_ids, batch.item_features, batch.users, batch.history):
            for name, count in zip(features.keys(), features.length_per_key(), strict=True):
                ids[name] += count
                bags[name] += features.stride()
    return {name: Lookup(ids[name] / max(1, bags[name]), bags[name] / sequences) for name in ids}
