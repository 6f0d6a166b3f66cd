"""Which embedding tables a schema needs; `distributed/` says where they go."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig, EmbeddingConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from torchrec.modules.mc_embedding_modules import ManagedCollisionEmbeddingBagCollection
from torchrec.modules.mc_modules import (
    LFU_EvictionPolicy,
    LRU_EvictionPolicy,
    ManagedCollisionCollection,
    ManagedCollisionModule,
    MCHManagedCollisionModule,
)

from flm_torchrec.data.hashing import MANAGED_IDS
from flm_torchrec.data.history import table_rows
from flm_torchrec.data.schema import Feature, Schema
from flm_torchrec.errors import RunError

# Not a string: TorchRec compares with torch.device("meta") to see that there is nothing to copy.
META = torch.device("meta")
EVICTION_INTERVAL = 10
"""Steps after which a managed table replaces ids by new ones."""

Bags = tuple[EmbeddingBagCollection | None, ManagedCollisionEmbeddingBagCollection | None]
"""Pooled tables whose ids have fixed rows, and managed tables, which give rows to ids as they come."""


class ManagedIds(MCHManagedCollisionModule):
    """TorchRec's map of ids to rows, with an error message that says what to do."""

    def validate_state(self) -> None:
        """Check the map after loading: rows may move to fewer ranks, but not be split over more.

        A rank's rows hold ids of its whole range in no order, so no other rank could take a part of them.

        Raises:
            RunError: the number of ranks does not divide the one that wrote the checkpoint.
        """
        try:
            super().validate_state()
        except AssertionError as error:
            raise RunError(
                f"table '{self._name}': managed rows can be read by as many ranks as wrote them, or a divisor of that,"
                " not by these; start as many"
            ) from error


ITEM_TABLES = ("item_id", "item_source", "item_target", "item_context")
"""Tables with a row for each item: what it is; for the collaborative head what it says of a user who has it, and what
is scored; for the sequential head what it says of the events after it."""
STARTS_AT_ZERO = ("item_source", "item_context")
"""What an item says of others starts from nothing, so that an item that few users have says little."""


def item_tables(schema: Schema, dim: int) -> EmbeddingCollection:
    """The tables of item ids, shared by history, positives and negatives. One feature, `item_id`, looks up all."""
    configs = [
        EmbeddingConfig(
            name=name,
            embedding_dim=dim,
            num_embeddings=schema.items,
            feature_names=["item_id"],
            init_fn=nn.init.zeros_ if name in STARTS_AT_ZERO else None,
        )
        for name in ITEM_TABLES
    ]
    return EmbeddingCollection(tables=configs, device=META)


def rows_of(table: str) -> str:
    """Name of a table of `ITEM_TABLES` among the outputs of `item_tables`: the tables share a feature."""
    return f"item_id@{table}"


def item_feature_tables(schema: Schema, dim: int) -> Bags:
    """Tables of the items' sparse features."""
    return _split(_bags(schema, schema.of("item", sparse=True), dim), schema)


def user_tables(schema: Schema, dim: int) -> Bags:
    """The table of user ids, in which an unknown user has no id, and the tables of the users' sparse features."""
    return _split(_user_configs(schema, dim), schema)


def user_weight_names(schema: Schema) -> dict[str, str]:
    """By name of a user table with fixed rows, the name of its weight in the state dict of `user_tables`."""
    fixed = [c for c in _user_configs(schema, dim=1) if schema.table(c.name).kind != "zch"]
    names = EmbeddingBagCollection(tables=fixed, device=META).state_dict() if fixed else {}
    return {config.name: name for config, name in zip(fixed, names, strict=True)}


def history_tables(schema: Schema, dim: int) -> EmbeddingCollection:
    """Tables of an event's kind and of the time since the event before. Row 0 of each is the prefix."""
    return EmbeddingCollection(
        tables=[
            EmbeddingConfig(name=name, embedding_dim=dim, num_embeddings=rows, feature_names=[name])
            for name, rows in table_rows(len(schema.events)).items()
        ],
        device=META,
    )


def _user_configs(schema: Schema, dim: int) -> list[EmbeddingBagConfig]:
    rows = _rows(schema, "user_id", schema.users)
    ids = EmbeddingBagConfig(name="user_id", embedding_dim=dim, num_embeddings=rows, feature_names=["user_id"])
    return [ids, *_bags(schema, schema.of("user", sparse=True), dim)]


def _rows(schema: Schema, name: str, ids: int) -> int:
    table = schema.table(name)
    return ids if table.kind == "direct" else table.rows


def _split(configs: list[EmbeddingBagConfig], schema: Schema) -> Bags:
    fixed = [c for c in configs if schema.table(c.name).kind != "zch"]
    # A row starts from zero whenever a new id takes it.
    managed = [replace(c, init_fn=nn.init.zeros_) for c in configs if schema.table(c.name).kind == "zch"]
    tables = EmbeddingBagCollection(tables=fixed, device=META) if fixed else None
    if not managed:
        return tables, None
    policies = {"lfu": LFU_EvictionPolicy, "lru": LRU_EvictionPolicy}
    modules: dict[str, ManagedCollisionModule] = {
        c.name: ManagedIds(
            name=c.name,
            zch_size=c.num_embeddings,
            device=torch.device("cpu"),  # the map of ids must hold values before it is sharded
            eviction_policy=policies[schema.table(c.name).eviction](),
            eviction_interval=EVICTION_INTERVAL,
            input_hash_size=MANAGED_IDS,
            buckets=c.num_embeddings,  # any number of ranks that divides the rows
        )
        for c in managed
    }
    collection = EmbeddingBagCollection(tables=managed, device=META)
    ids = ManagedCollisionCollection(modules, collection.embedding_bag_configs())
    return tables, ManagedCollisionEmbeddingBagCollection(collection, ids)


def _bags(schema: Schema, features: tuple[Feature, ...], dim: int) -> list[EmbeddingBagConfig]:
    """One table for each name in the schema; features that name the same table share it."""
    by_table: dict[str, list[Feature]] = {}
    for feature in features:
        by_table.setdefault(feature.table, []).append(feature)
    return [
        EmbeddingBagConfig(
            name=table,
            embedding_dim=dim,
            num_embeddings=_rows(schema, table, max(f.cardinality for f in shared)),
            feature_names=[f.name for f in shared],
            pooling=PoolingType.SUM if all(f.kind == "categorical" for f in shared) else PoolingType.MEAN,
        )
        for table, shared in by_table.items()
    ]
