"""How each kind of table module may be sharded: TorchRec's sharders, with what they leave out on a CPU."""

from __future__ import annotations

from torch import nn
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.types import ModuleSharder, ShardingType

# data_parallel is left out: its optimizer state is keyed otherwise, so a run could not resume under another plan.
SHARDING_TYPES = [ShardingType.TABLE_WISE.value, ShardingType.ROW_WISE.value, ShardingType.COLUMN_WISE.value]


class BagSharder(EmbeddingBagCollectionSharder):
    """Offers row-wise sharding on a CPU too, which the stock sharder leaves out."""

    def sharding_types(self, compute_device_type: str) -> list[str]:
        return SHARDING_TYPES


class SequenceSharder(EmbeddingCollectionSharder):
    """Offers row-wise sharding on a CPU too, which the stock sharder leaves out."""

    def sharding_types(self, compute_device_type: str) -> list[str]:
        return SHARDING_TYPES


def sharders() -> list[ModuleSharder[nn.Module]]:
    return [BagSharder(), SequenceSharder()]  # type: ignore[list-item]
