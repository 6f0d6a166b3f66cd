"""Sharding of managed (zero-collision hashing, ZCH) tables: TorchRec's, plus eviction on a CPU, which FBGEMM lacks."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torchrec.distributed.mc_embedding import (
    ManagedCollisionEmbeddingCollectionSharder,
    ShardedManagedCollisionEmbeddingCollection,
)
from torchrec.distributed.mc_embedding_modules import BaseShardedManagedCollisionEmbeddingCollection
from torchrec.distributed.mc_embeddingbag import (
    ManagedCollisionEmbeddingBagCollectionSharder,
    ShardedManagedCollisionEmbeddingBagCollection,
)
from torchrec.distributed.types import ParameterSharding, ShardingEnv
from torchrec.modules.embedding_configs import BaseEmbeddingConfig
from torchrec.modules.mc_embedding_modules import (
    BaseManagedCollisionEmbeddingCollection,
    ManagedCollisionEmbeddingBagCollection,
    ManagedCollisionEmbeddingCollection,
)

from flm_torchrec.errors import ConfigError


class _Resets(BaseShardedManagedCollisionEmbeddingCollection):  # type: ignore[type-arg]
    def _evict(self, evictions_per_table: dict[str, Tensor | None]) -> None:
        """Set rows of new ids to zero, weights and optimizer state, as FBGEMM's kernel does on a GPU."""
        if self._device.type != "cpu":
            super()._evict(evictions_per_table)
            return
        for table, rows in evictions_per_table.items():
            if rows is None:
                continue
            lookup, index = self._table_to_tbe_and_index[table]
            with torch.no_grad():
                lookup.split_embedding_weights()[int(index)][rows] = 0
                for state in lookup.split_optimizer_states()[int(index)]:
                    state[rows] = 0


class _ShardedBags(_Resets, ShardedManagedCollisionEmbeddingBagCollection):
    pass


class _ShardedItems(_Resets, ShardedManagedCollisionEmbeddingCollection):
    """Tables in which ids without a row get zeros: before each look-up, the row that they share is set to zero."""

    def _evict(self, evictions_per_table: dict[str, Tensor | None]) -> None:
        maps = self._managed_collision_collection._managed_collision_modules
        reset: dict[str, Tensor | None] = {}
        for table, rows in evictions_per_table.items():
            shared = torch.tensor([maps[table].output_size() - 1], device=self._device)  # type: ignore[operator]
            reset[table] = shared if rows is None else torch.cat([rows, shared])
        super()._evict(reset)


class ManagedBagSharder(ManagedCollisionEmbeddingBagCollectionSharder):
    """Shards managed tables row-wise, the only way that TorchRec offers for them."""

    def shard(
        self,
        module: ManagedCollisionEmbeddingBagCollection,
        params: dict[str, ParameterSharding],
        env: ShardingEnv,
        device: torch.device | None = None,
        module_fqn: str | None = None,
    ) -> _ShardedBags:
        """The sharded module; see TorchRec's `ModuleSharder.shard`."""
        assert device is not None
        return _ShardedBags(
            module,
            params,
            ebc_sharder=self._e_sharder,  # type: ignore[arg-type]
            mc_sharder=self._mc_sharder,
            env=env,
            device=device,
        )


class ManagedItemSharder(ManagedCollisionEmbeddingCollectionSharder):
    """The same for the managed tables of items."""

    def shard(
        self,
        module: ManagedCollisionEmbeddingCollection,
        params: dict[str, ParameterSharding],
        env: ShardingEnv,
        device: torch.device | None = None,
        module_fqn: str | None = None,
    ) -> _ShardedItems:
        """The sharded module; see TorchRec's `ModuleSharder.shard`."""
        assert device is not None
        return _ShardedItems(
            module,
            params,
            ec_sharder=self._e_sharder,  # type: ignore[arg-type]
            mc_sharder=self._mc_sharder,
            env=env,
            device=device,
        )


def check_managed(model: nn.Module, ranks: int, sharding: str) -> None:
    """Refuse managed tables that TorchRec cannot shard.

    Raises:
        ConfigError: as of `check_rows_shared`; or the sharding is not row-wise.
    """
    check_rows_shared(model, ranks)
    for table in _managed_tables(model):
        if sharding not in ("auto", "row_wise"):
            raise ConfigError(
                f"distributed.sharding: '{sharding}' does not go with the managed table '{table.name}', which is"
                " row_wise alone; use auto or row_wise"
            )


def check_rows_shared(model: nn.Module, ranks: int) -> None:
    """Refuse managed tables whose rows the ranks do not share evenly.

    Raises:
        ConfigError: the rows of a managed table do not divide by the ranks, or leave a rank none to give to an id.
    """
    for table in _managed_tables(model):
        if table.num_embeddings % ranks:
            raise ConfigError(
                f"table '{table.name}': its {table.num_embeddings} managed rows do not divide by {ranks} ranks;"
                " prepare the data with a multiple of them in --tables"
            )
        if table.num_embeddings == ranks:
            raise ConfigError(
                f"table '{table.name}': {ranks} ranks would have one managed row each, which ids without a row"
                " share; prepare the data with a larger multiple of the ranks in --tables"
            )


def _managed_tables(model: nn.Module) -> Iterator[BaseEmbeddingConfig]:
    for module in model.modules():
        if isinstance(module, BaseManagedCollisionEmbeddingCollection):
            yield from module._managed_collision_collection.embedding_configs()
