"""The complete model: batch → (loss, outputs). The only place where data, tables and tower meet."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor, KeyedTensor

from flm_torchrec.config.heads import HEADS
from flm_torchrec.config.schema import LossConfig, ModelConfig
from flm_torchrec.data.batch import Batch
from flm_torchrec.data.history import HISTORY_KEYS
from flm_torchrec.data.schema import Schema
from flm_torchrec.mixture import Mixture
from flm_torchrec.model.fusion import LateFusion, SumFusion
from flm_torchrec.model.linear import narrow
from flm_torchrec.model.losses import MAX_LOG_SCALE, make_losses
from flm_torchrec.model.rows import Gather, share
from flm_torchrec.model.tables import (
    LookUp,
    history_tables,
    item_feature_tables,
    item_outputs,
    item_tables,
    look_up_in_turn,
    user_tables,
    user_weight_names,
    vectors,
)
from flm_torchrec.model.tower import EmbeddingOutputs, Encoded, Tower, Widths


@dataclass
class Outputs:
    """Of one batch."""

    encoded: Encoded
    losses: dict[str, Tensor]
    """By name of a representation or of another part of L, []: this rank's share of the mean over all ranks."""
    sequences: int
    """Sequences of this rank that had something to learn."""
    logits: Tensor | None = None
    """[T, labels] of the label task."""


class Dense(nn.Module):
    """Everything after the look-ups; a module of its own, so that the input pipeline can trace the model."""

    def __init__(self, schema: Schema, model: ModelConfig, loss: LossConfig, max_tokens: int, gather: Gather) -> None:
        super().__init__()
        self.gather = gather
        self.item_outputs = item_outputs(schema)
        self.item_keys = [f.name for f in schema.of("item", sparse=True)]
        self.contexts = [f.name for f in schema.of("event", sparse=True)]
        self.user_keys = ["user_id", *(f.name for f in schema.of("user", sparse=True))]
        widths = Widths(
            item_features=len(self.item_keys),
            item_dense=sum(f.width for f in schema.of("item", sparse=False)),
            user_features=len(self.user_keys) - 1,
            user_dense=sum(f.width for f in schema.of("user", sparse=False)),
            history=len(HISTORY_KEYS),
            max_tokens=max_tokens,
            timed=schema.timestamps,
        )
        described = widths.item_features + widths.item_dense > 0
        losses = make_losses(loss, described, gather, joint=len(schema.domains) > 1)
        self.tower = Tower(widths, model, learns_fused=any(part.learns_fused for part in losses))
        if loss.precision == "bf16":
            narrow(self.tower)
        self.losses = losses
        # What the losses learn is registered here, so that checkpoints know it by these names.
        for part in self.losses:
            for name, value in part.learned().items():
                setattr(self, name, value)

    def forward(
        self,
        batch: Batch,
        items: dict[str, JaggedTensor],
        item_features: list[KeyedTensor],
        users: list[KeyedTensor],
        history: dict[str, JaggedTensor],
    ) -> tuple[Tensor, Outputs]:
        """What the tables gave for the batch → the loss and what led to it; in evaluation the loss is 0."""
        rows = {table: items[output].values() for table, output in self.item_outputs.items()}
        ids = rows["item_id"]
        features = _join(item_features, self.item_keys)[: len(ids)] if item_features else ids[:, :0]
        embedded = EmbeddingOutputs(
            **rows,
            item_features=features,
            user=_join(users, self.user_keys)[: len(batch.lengths)],
            history=torch.cat([history[key].values() for key in HISTORY_KEYS], 1),
            context=self._context(batch, history),
        )
        return self._result(batch, self.tower(embedded, batch))

    def _context(self, batch: Batch, history: dict[str, JaggedTensor]) -> Tensor | None:
        """[T, D] sum over the features of a token's event; an unknown value adds nothing. None without features."""
        total: Tensor | None = None
        for key in self.contexts:
            known = (batch.history[key].values() > 0).unsqueeze(1)
            rows = history[key].values() * known
            total = rows if total is None else total + rows
        return total

    def _result(self, batch: Batch, encoded: Encoded) -> tuple[Tensor, Outputs]:
        if not self.training:
            return encoded.items.new_zeros(()), Outputs(encoded, {}, 0)
        total, losses = encoded.items.new_zeros(()), dict[str, Tensor]()
        seen = share([loss.rows(batch, encoded) for loss in self.losses], batch.targets, self.gather, batch.weight)
        for loss, shared in zip(self.losses, seen, strict=True):
            weighted, told = loss(batch, encoded, shared)
            total, losses = total + weighted, {**losses, **told}
        return total * self.gather.world_size, Outputs(encoded, losses, int((batch.lengths > 0).sum()))


class PretrainModel(nn.Module):
    """Tables, tower and loss of one schema.

    Args:
        schema: what the data holds.
        model, loss: settings.
        max_tokens: longest sequence, prefix included.
        gather: access to the other ranks' candidates.
        dense: makes everything after the look-ups, of the arguments before.
    """

    def __init__(
        self,
        schema: Schema,
        model: ModelConfig,
        loss: LossConfig,
        max_tokens: int,
        gather: Gather,
        dense: Callable[..., Dense] = Dense,
    ) -> None:
        super().__init__()
        self.item_id, self.managed_items = item_tables(schema, model.dim), schema.table("item_id").managed
        self.item_features, self.managed_item_features = item_feature_tables(schema, model.dim)
        self.users, self.managed_users = user_tables(schema, model.dim)
        self.history = history_tables(schema, model.dim)
        self.look_up: LookUp = look_up_in_turn
        """`distributed/` may put another in its place."""
        self.dense = dense(schema, model, loss, max_tokens, gather)

    @property
    def tower(self) -> Tower:
        """The dense part that represents items and users."""
        return self.dense.tower

    def temperatures(self) -> list[float]:
        """By head of HEADS, the factor of its scores in the softmax that it learned by."""
        scales: Mapping[str, Tensor] = dict(self.dense.log_scale.items())  # type: ignore[operator, union-attr, arg-type]
        return [float(scales[head].detach().clamp(max=MAX_LOG_SCALE).exp()) for head in HEADS]

    def set_fusion(self, weights: Tensor, mixture: Mixture | None) -> None:
        """Set the weights [heads] of a summed fusion, in the order of HEADS, and the mixture of a late fusion."""
        fusion = self.tower.fusion
        assert isinstance(fusion, SumFusion)
        fusion.set_weights(weights)
        if isinstance(fusion, LateFusion):
            fusion.set_mixture(mixture)

    def forward(self, batch: Batch) -> tuple[Tensor, Outputs]:
        """The loss to minimise, averaged over all ranks' targets, and what led to it.

        The loss is scaled such that the mean of its gradients over the ranks is the gradient of the global mean.
        """
        asked = {
            "item_id": batch.item_ids,
            "history": batch.history,
            "item_features": batch.item_features,
            "managed_item_features": batch.item_features,
            "users": batch.users,
            "managed_users": batch.users,
        }
        held = [name for name in asked if getattr(self, name) is not None]
        found = dict(zip(held, self.look_up([(getattr(self, name), asked[name]) for name in held]), strict=True))
        items = vectors(found["item_id"], self.managed_items)
        features, users = (
            [vectors(found[name], name.startswith("managed_")) for name in names if name in found]
            for names in (("item_features", "managed_item_features"), ("users", "managed_users"))
        )
        return self.dense(batch, items, features, users, found["history"])


def user_weights(schema: Schema) -> dict[str, str]:
    """By name of a table that says something of users, the name of its weight [rows, D] in a `PretrainModel`'s state.

    These are user tables with fixed rows, and the tables of the features of events.
    """
    contexts = {f.table: f"history.embeddings.{f.table}.weight" for f in schema.of("event", sparse=True)}
    return {table: f"users.{name}" for table, name in user_weight_names(schema).items()} | contexts


def pooled(fixed: nn.Module | None, managed: nn.Module | None, features: KeyedJaggedTensor) -> list[KeyedTensor]:
    """Outputs of the tables for their keys."""
    outputs = [] if fixed is None else [fixed(features)]
    return outputs if managed is None else [*outputs, vectors(managed(features), managed=True)]


def _join(features: list[KeyedTensor], keys: list[str]) -> Tensor:
    """[n, len(keys) * D] in the order of `keys`; a sharding plan may have changed the order of the tables."""
    parts = {key: values for tables in features for key, values in tables.to_dict().items()}
    return torch.cat([parts[key] for key in keys], 1)
