"""Bytes that a plan makes a rank send in a step, from the sizes alone (docs/scaling.md derives them)."""

from __future__ import annotations

from torchrec.distributed.planner.types import ShardingOption
from torchrec.distributed.types import ShardingType

from flm_torchrec.planner.estimate import ID_BYTES, LENGTH_BYTES
from flm_torchrec.planner.solve import Solved


def sent_bytes(solved: Solved) -> dict[str, float]:
    """Mean over the ranks of what each sends: ids and lengths on the way to the tables, vectors back and gradients.

    Each kind of sharding sends all it handles but its own 1/W: W ranks, B samples on each, `ids` and `bags` of them.
    """
    total = {"ids": 0.0, "vectors": 0.0}
    for option in solved.options:
        ids, vectors = _table(option, solved)
        total["ids"] += ids
        total["vectors"] += vectors
    return total


def _table(option: ShardingOption, solved: Solved) -> tuple[float, float]:
    ranks, local = solved.topology.world_size, solved.topology.local_world_size
    away = (ranks - 1) / ranks
    per_sample = solved.bags(option.name)
    bags = option.batch_size * sum(per_sample)
    ids = option.batch_size * sum(n * b for n, b in zip(option.input_lengths, per_sample, strict=True))
    made = bags if option.is_pooled else ids
    vectors = 2 * made * option.tensor.shape[1] * option.tensor.element_size()
    if option.sharding_type == ShardingType.ROW_WISE.value:
        # Every rank makes a part of every bag, of all ranks' samples, and tells every rank how long its part is.
        return ID_BYTES * ids * away + LENGTH_BYTES * bags * (ranks - 1), vectors * away * (
            ranks if option.is_pooled else 1
        )
    if option.sharding_type == ShardingType.TABLE_ROW_WISE.value:
        # The same in one node; then each rank has whole bags to hand to the other nodes.
        nodes = ranks / local
        return (ID_BYTES * ids + LENGTH_BYTES * local * bags) * away, vectors * (local - 1 + (nodes - 1) / nodes)
    return option.num_shards * (ID_BYTES * ids + LENGTH_BYTES * bags) * away, vectors * away
