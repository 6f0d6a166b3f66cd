"""How each kind of table module may be sharded. TorchRec's own sharders offer fewer types on a CPU."""

from __future__ import annotations

from torch import nn
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.fbgemm_qcomm_codec import CommType, QCommsConfig, get_qcomm_codecs
from torchrec.distributed.types import (
    CommOp,
    EmbeddingModuleShardingPlan,
    ModuleSharder,
    QuantizedCommCodecs,
    ShardingPlan,
    ShardingType,
)

from flm_torchrec.distributed.managed import ManagedBagSharder, ManagedItemSharder
from flm_torchrec.errors import ConfigError

# Two types are left out, each for a reason that tests/distributed/test_sharding.py shows. data_parallel: its optimizer
# state has other keys, so a run could not resume under another plan (TorchRec issue 2394). grid_shard: TorchRec 1.8
# computes the sum where the pooling is MEAN (ShardedEmbeddingBagCollection divides only after row_wise and
# table_row_wise).
SHARDING_TYPES = [ShardingType.TABLE_WISE.value, ShardingType.ROW_WISE.value, ShardingType.COLUMN_WISE.value]
"""Types of every table."""

BAG_TYPES = [
    *SHARDING_TYPES,
    ShardingType.TABLE_ROW_WISE.value,
    ShardingType.TABLE_COLUMN_WISE.value,
]
"""Types of pooled tables. TorchRec's EmbeddingCollection has only the three above."""

AUTO_TYPES = [ShardingType.TABLE_WISE.value, ShardingType.ROW_WISE.value]
"""Types that the planner may choose by itself. They keep rows undivided, so the choice changes no result."""

WHOLE_ROW_OPTIMIZERS = ("rowwise_adagrad",)
"""Optimizers with one number per row, which need the complete row on one rank."""


class BagSharder(EmbeddingBagCollectionSharder):
    """Offers all row-wise types on a CPU too, where TorchRec's sharder leaves them out."""

    def sharding_types(self, compute_device_type: str) -> list[str]:
        """The same on every device."""
        return BAG_TYPES


class SequenceSharder(EmbeddingCollectionSharder):
    """Offers the types whose results equal those of the unsharded module."""

    def sharding_types(self, compute_device_type: str) -> list[str]:
        """The same on every device."""
        return SHARDING_TYPES


def sharders(collectives: str = "fp32") -> list[ModuleSharder[nn.Module]]:
    """One sharder for each kind of table module.

    Args:
        collectives: what ranks send vectors and their gradients as, `distributed.collectives`.
    """
    codecs = None if collectives == "fp32" else _codecs(CommType(collectives))
    bags, sequences = BagSharder(qcomm_codecs_registry=codecs), SequenceSharder(qcomm_codecs_registry=codecs)
    return [  # type: ignore[list-item]
        bags,
        sequences,
        ManagedBagSharder(bags, qcomm_codecs_registry=codecs),
        ManagedItemSharder(sequences, qcomm_codecs_registry=codecs),
    ]


def _codecs(sent: CommType) -> dict[str, QuantizedCommCodecs]:
    """Of every collective of vectors. TorchRec's `get_qcomm_codecs_registry` takes fp16 in place of bf16 over gloo,
    which sends bf16 as well; gradients would need a scale to be kept in fp16."""
    names = (CommOp.POOLED_EMBEDDINGS_ALL_TO_ALL, CommOp.POOLED_EMBEDDINGS_REDUCE_SCATTER)
    config = QCommsConfig(forward_precision=sent, backward_precision=sent)
    return {op.name: get_qcomm_codecs(config) for op in (*names, CommOp.SEQUENCE_EMBEDDINGS_ALL_TO_ALL)}


def check_whole_rows(plan: ShardingPlan, optimizer: str) -> None:
    """Refuse a plan that divides rows where the optimizer has one number per row.

    Each block of columns would have its own number, from the gradients of its columns. The result would then depend on
    the plan, and the state [rows * blocks] could not be loaded under another plan (TorchRec pull request 2474).

    Raises:
        ConfigError: the plan divides the rows of a table.
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
