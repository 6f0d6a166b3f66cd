"""Bytes that a rank sends in a step under a plan, from the sizes alone (docs/scaling.md derives the formulas)."""

from __future__ import annotations

from torchrec.distributed.planner.types import ShardingOption
from torchrec.distributed.types import ShardingType

from flm_torchrec.planner.estimate import ID_BYTES, LENGTH_BYTES
from flm_torchrec.planner.loss_work import SENT_BYTES
from flm_torchrec.planner.solve import PlannedTables


def sent_bytes(planned: PlannedTables, collectives: str = "fp32") -> dict[str, float]:
    """Bytes that a rank sends, mean over the ranks: `ids` with lengths to the tables, `vectors` with gradients back.

    With W ranks, each kind of sharding sends all ids and bags of the B samples of a rank, except its own share 1/W.

    Args:
        collectives: what vectors are sent as, `distributed.collectives`; those of fp16 and int8 tables are no wider.
    """
    total = {"ids": 0.0, "vectors": 0.0}
    for option in planned.options:
        ids, vectors = _table(option, planned, SENT_BYTES[collectives])
        total["ids"] += ids
        total["vectors"] += vectors
    return total


def _table(option: ShardingOption, planned: PlannedTables, number: int) -> tuple[float, float]:
    ranks, local = planned.topology.world_size, planned.topology.local_world_size
    away = (ranks - 1) / ranks
    per_sample = planned.bags(option.name)
    bags = option.batch_size * sum(per_sample)
    ids = option.batch_size * sum(n * b for n, b in zip(option.input_lengths, per_sample, strict=True))
    made = bags if option.is_pooled else ids
    vectors = 2 * made * option.tensor.shape[1] * min(number, option.tensor.element_size())
    if option.sharding_type == ShardingType.ROW_WISE.value:
        # Every rank computes a part of every bag of all ranks, and sends the length of its part to every rank.
        return ID_BYTES * ids * away + LENGTH_BYTES * bags * (ranks - 1), vectors * away * (
            ranks if option.is_pooled else 1
        )
    if option.sharding_type == ShardingType.TABLE_ROW_WISE.value:
        # The same inside one node; then each rank sends complete bags to the other nodes.
        nodes = ranks / local
        return (ID_BYTES * ids + LENGTH_BYTES * local * bags) * away, vectors * (local - 1 + (nodes - 1) / nodes)
    return option.num_shards * (ID_BYTES * ids + LENGTH_BYTES * bags) * away, vectors * away
