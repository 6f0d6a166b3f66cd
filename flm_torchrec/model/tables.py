"""Which embedding tables a schema needs. Says what they are; `distributed/` says where they go."""

from __future__ import annotations

import torch
from torchrec.modules.embedding_configs import EmbeddingBagConfig, EmbeddingConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection

from flm_torchrec.data.assemble import GAP_BUCKETS
from flm_torchrec.data.schema import Feature, Schema

# A string here would not do: TorchRec compares with torch.device("meta") to know that there is nothing to copy.
META = torch.device("meta")


def item_id_table(schema: Schema, dim: int) -> EmbeddingCollection:
    """The one table of item ids, shared by history, positives and negatives."""
    config = EmbeddingConfig(name="item_id", embedding_dim=dim, num_embeddings=schema.items, feature_names=["item_id"])
    return EmbeddingCollection(tables=[config], device=META)


def item_feature_tables(schema: Schema, dim: int) -> EmbeddingBagCollection | None:
    """Tables of the items' sparse features, or None where there are none."""
    features = schema.of("item", sparse=True)
    return EmbeddingBagCollection(tables=_bags(features, dim), device=META) if features else None


def user_tables(schema: Schema, dim: int) -> EmbeddingBagCollection:
    """The table of user ids, which an unknown user leaves out, and those of the users' sparse features."""
    ids = EmbeddingBagConfig(name="user_id", embedding_dim=dim, num_embeddings=schema.users, feature_names=["user_id"])
    return EmbeddingBagCollection(tables=[ids, *_bags(schema.of("user", sparse=True), dim)], device=META)


def history_tables(schema: Schema, dim: int) -> EmbeddingCollection:
    """What is known of an event beside its item: its kind, the time since the one before. Row 0 is the prefix."""
    sizes = {"event": len(schema.events) + 1, "gap": GAP_BUCKETS + 1}
    return EmbeddingCollection(
        tables=[
            EmbeddingConfig(name=name, embedding_dim=dim, num_embeddings=rows, feature_names=[name])
            for name, rows in sizes.items()
        ],
        device=META,
    )


def _bags(features: tuple[Feature, ...], dim: int) -> list[EmbeddingBagConfig]:
    """One table for each name in the schema; features that name the same table share it."""
    by_table: dict[str, list[Feature]] = {}
    for feature in features:
        by_table.setdefault(feature.table, []).append(feature)
    return [
        EmbeddingBagConfig(
            name=table,
            embedding_dim=dim,
            num_embeddings=max(f.cardinality for f in shared),
            feature_names=[f.name for f in shared],
            pooling=PoolingType.SUM if all(f.kind == "categorical" for f in shared) else PoolingType.MEAN,
        )
        for table, shared in by_table.items()
    ]
