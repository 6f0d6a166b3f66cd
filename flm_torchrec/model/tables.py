"""Which embedding tables a schema needs; `distributed/` says where they go."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torchrec.modules.embedding_configs import (
    BaseEmbeddingConfig,
    DataType,
    EmbeddingBagConfig,
    EmbeddingConfig,
    PoolingType,
)
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from torchrec.modules.mc_embedding_modules import (
    ManagedCollisionEmbeddingBagCollection,
    ManagedCollisionEmbeddingCollection,
)
from torchrec.modules.mc_modules import (
    LFU_EvictionPolicy,
    LRU_EvictionPolicy,
    ManagedCollisionCollection,
    ManagedCollisionModule,
    MCHManagedCollisionModule,
)
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor

from flm_torchrec.data.hashing import MANAGED_IDS
from flm_torchrec.data.history import table_rows
from flm_torchrec.data.schema import ITEM_TABLES, Feature, Schema
from flm_torchrec.errors import RunError

# Not a string: TorchRec compares with torch.device("meta") to see that there is nothing to copy.
META = torch.device("meta")
EVICTION_INTERVAL = 10
"""Steps after which a managed table replaces ids by new ones."""

Bags = tuple[EmbeddingBagCollection | None, ManagedCollisionEmbeddingBagCollection | None]
"""Pooled tables whose ids have fixed rows, and managed tables, which give rows to ids as they come."""


class ManagedIds(MCHManagedCollisionModule):
    """TorchRec's map of ids to rows, with an error message that says what to do."""

    _current_iter: int

    def profile(self, features: dict[str, JaggedTensor]) -> dict[str, JaggedTensor]:
        """Count ids in training. Ids take rows at multiples of the interval, also where a run goes on in between.

        TorchRec counts the interval from the start of each process: `flm follow`, which builds its model anew for new
        users and items, would never reach its end.
        """
        if self.training and self._current_iter == -1:
            self._current_iter = int(self._current_iter_tensor.item())  # type: ignore[operator]
            self._last_eviction_iter = self._current_iter - self._current_iter % self._eviction_interval
        return super().profile(features)

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


class ManagedItems(ManagedIds):
    """The map of items to rows: of the ids that `data.hashing.managed_items` makes."""

    def profile(self, features: dict[str, JaggedTensor]) -> dict[str, JaggedTensor]:
        """Count the items that events have, in training → all items, by their ids alone."""
        if self.training and self._input_history_buffer_size == -1:
            self._init_history_buffers(features)  # room for every item of a batch, counted or not
        counted = {name: feature.values()[feature.values() % 2 == 1] // 2 for name, feature in features.items()}
        super().profile({n: JaggedTensor(ids, lengths=torch.ones_like(ids)) for n, ids in counted.items()})
        return {
            name: JaggedTensor(feature.values() // 2, lengths=feature.lengths(), weights=feature.weights_or_none())
            for name, feature in features.items()
        }


STARTS_AT_ZERO = ("item_source", "item_context")
"""What an item says of others starts from nothing, so that an item that few users have says little."""


def item_tables(schema: Schema, dim: int) -> EmbeddingCollection | ManagedCollisionEmbeddingCollection:
    """The tables of item ids, shared by history, positives and negatives.

    One feature, `item_id`, looks up all. Managed tables cannot share one: each has a feature of its own name. There, a
    row starts from zero whenever a new item takes it.
    """
    managed = schema.table("item_id").managed
    configs = [
        EmbeddingConfig(
            name=name,
            embedding_dim=dim,
            num_embeddings=_rows(schema, name, schema.items),
            feature_names=[name if managed else "item_id"],
            init_fn=nn.init.zeros_ if managed or name in STARTS_AT_ZERO else None,
        )
        for name in ITEM_TABLES
    ]
    tables = EmbeddingCollection(tables=configs, device=META)
    if not managed:
        return tables
    return ManagedCollisionEmbeddingCollection(tables, _maps(tables.embedding_configs(), schema, ManagedItems))


def item_outputs(schema: Schema) -> dict[str, str]:
    """By name of a table of `ITEM_TABLES`, its name among the outputs of `item_tables`: see there what looks it up."""
    managed = schema.table("item_id").managed
    return {table: table if managed else f"item_id@{table}" for table in ITEM_TABLES}


def item_vectors(tables: nn.Module, features: KeyedJaggedTensor, managed: bool) -> dict[str, JaggedTensor]:
    """What `item_tables` gives for items, by the names of `item_outputs`."""
    found: dict[str, JaggedTensor] = vectors(tables(features), managed)
    return found


def vectors(found: Any, managed: bool) -> Any:
    """Of what tables give: managed ones give their vectors and also the rows of the ids, which are not used."""
    return found[0] if managed else found


LookUp = Callable[[Sequence[tuple[nn.Module, KeyedJaggedTensor]]], list[Any]]
"""Modules that hold tables, and the features to look up in each → their outputs."""


def look_up_in_turn(asked: Sequence[tuple[nn.Module, KeyedJaggedTensor]]) -> list[Any]:
    """The output of each module for its features."""
    return [module(features) for module, features in asked]


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
    """Tables of an event's kind, of the time since the event before, and of its features. Row 0 of each is the prefix.

    Those of features start at zero. Row 0 is also an unknown value there, see `Dense`.
    """
    contexts = [
        EmbeddingConfig(
            name=f.table,
            embedding_dim=dim,
            num_embeddings=f.cardinality + 1,
            feature_names=[f.name],
            init_fn=nn.init.zeros_,
        )
        for f in schema.of("event", sparse=True)
    ]
    return EmbeddingCollection(
        tables=[
            *(
                EmbeddingConfig(name=name, embedding_dim=dim, num_embeddings=rows, feature_names=[name])
                for name, rows in table_rows(len(schema.events)).items()
            ),
            *contexts,
        ],
        device=META,
    )


def hold_in_half(model: nn.Module) -> None:
    """Make all tables float16. What they give is float32 all the same once TorchRec has sharded them."""
    for module in model.modules():
        if isinstance(module, EmbeddingBagCollection | EmbeddingCollection):
            bags = isinstance(module, EmbeddingBagCollection)
            for config in module.embedding_bag_configs() if bags else module.embedding_configs():
                config.data_type = DataType.FP16
            module.half()


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
    collection = EmbeddingBagCollection(tables=managed, device=META)
    ids = _maps(collection.embedding_bag_configs(), schema, ManagedIds)
    return tables, ManagedCollisionEmbeddingBagCollection(collection, ids)


def _maps(configs: Sequence[BaseEmbeddingConfig], schema: Schema, kind: type[ManagedIds]) -> ManagedCollisionCollection:
    """The maps of ids to the rows of managed tables."""
    policies = {"lfu": LFU_EvictionPolicy, "lru": LRU_EvictionPolicy}
    modules: dict[str, ManagedCollisionModule] = {
        c.name: kind(
            name=c.name,
            zch_size=c.num_embeddings,
            device=torch.device("cpu"),  # the map of ids must hold values before it is sharded
            eviction_policy=policies[schema.table(c.name).eviction](),
            eviction_interval=EVICTION_INTERVAL,
            input_hash_size=MANAGED_IDS,
            buckets=c.num_embeddings,  # any number of ranks that divides the rows
        )
        for c in configs
    }
    return ManagedCollisionCollection(modules, configs)


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
