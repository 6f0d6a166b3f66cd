"""How each kind of table module may be sharded: TorchRec's sharders, with what they leave out on a CPU."""

from __future__ import annotations

from torch import nn
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.types import EmbeddingModuleShardingPlan, ModuleSharder, ShardingPlan, ShardingType

from flm_torchrec.distributed.managed import ManagedBagSharder
from flm_torchrec.errors import ConfigError

# Left out, each for a reason that tests/test_sharding.py shows. data_parallel: its optimizer state is kept apart and
# keyed otherwise, so a run could not resume under another plan (TorchRec issue 2394). grid_shard: TorchRec 1.8 sums
# where the table's pooling is MEAN (ShardedEmbeddingBagCollection divides after row_wise and table_row_wise alone).
SHARDING_TYPES = [ShardingType.TABLE_WISE.value, ShardingType.ROW_WISE.value, ShardingType.COLUMN_WISE.value]
"""Of every table."""

BAG_TYPES = [
    *SHARDING_TYPES,
    ShardingType.TABLE_ROW_WISE.value,
    ShardingType.TABLE_COLUMN_WISE.value,
]
"""Of pooled tables; TorchRec's EmbeddingCollection has only the three above."""

WHOLE_ROW_OPTIMIZERS = ("rowwise_adagrad",)
"""Optimizers with one number a row, which needs the whole row in one place."""


class BagSharder(EmbeddingBagCollectionSharder):
    """Offers row-wise sharding and its kin on a CPU too, which the stock sharder leaves out."""

    def sharding_types(self, compute_device_type: str) -> list[str]:
        return BAG_TYPES


class SequenceSharder(EmbeddingCollectionSharder):
    """Offers what is proven equal to the unsharded module, on every device."""

    def sharding_types(self, compute_device_type: str) -> list[str]:
        return SHARDING_TYPES


def sharders() -> list[ModuleSharder[nn.Module]]:
    return [BagSharder(), SequenceSharder(), ManagedBagSharder(BagSharder())]  # type: ignore[list-item]


def check_whole_rows(plan: ShardingPlan, optimizer: str) -> None:
    """Refuse a plan that cuts rows apart where the optimizer keeps one number a row.

    Each block of columns would have a number of its own, from its own columns' gradients: the result would depend
    on the plan, and the state [rows * blocks] could not be loaded under another (TorchRec pull request 2474).

    Raises:
        ConfigError: a table's rows are cut apart.
    """
    if optimizer not in WHOLE_ROW_OPTIMIZERS:
        return
    for module in plan.plan.values():
        assert isinstance(module, EmbeddingModuleShardingPlan)
        for table, choice in module.items():
            shards = choice.sharding_spec.shards if choice.sharding_spec else []  # type: ignore[attr-defined]
            blocks = len({shard.shard_offsets[1] for shard in shards})
            if blocks > 1:
                raise ConfigError(
                    f"table '{table}': {choice.sharding_type} cuts its rows into {blocks} blocks, but"
                    f" train.sparse_optimizer={optimizer} needs them whole; use adagrad, or another sharding type"
                )
