"""How often a batch of the data looks up each feature: what the planner weighs memory and time by."""

from __future__ import annotations

from flm_torchrec.data.loader import TrainLoader
from flm_torchrec.distributed.constraints import Lookup


def lookups_of(loader: TrainLoader) -> dict[str, Lookup]:
    """By feature, of one sequence: counted in this rank's first training batch, the same every time."""
    batch = next(loader.epoch(0))
    sequences = len(batch.lengths)
    found = {}
    for features in (batch.item_ids, batch.item_features, batch.users, batch.history):
        bags = features.stride()
        if not features.keys():
            continue
        for name, ids in zip(features.keys(), features.length_per_key(), strict=True):
            found[name] = Lookup(pooling=ids / max(1, bags), bags=bags / sequences)
    return found
