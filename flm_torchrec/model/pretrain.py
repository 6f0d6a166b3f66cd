"""The whole model: batch → (loss, outputs). The only place where data, tables and tower meet."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor, KeyedTensor

from flm_torchrec.config.schema import LossConfig, ModelConfig
from flm_torchrec.data.batch import Batch
from flm_torchrec.data.schema import Schema
from flm_torchrec.model.softmax import inclusion_log_probability, sampled_softmax
from flm_torchrec.model.tables import history_tables, item_feature_tables, item_id_table, user_tables
from flm_torchrec.model.tower import REPRESENTATIONS, Encoded, Looked, Tower, Widths

HISTORY_KEYS = ("event", "gap")
PRECISIONS = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16}
MAX_LOG_SCALE = math.log(100.0)
"""Bound of the learned inverse temperature, as in CLIP (Radford et al. 2021)."""
ATTRIBUTE_LOG_SCALE = 2.0
"""Start of the item-attribute contrast's own."""


class Gather(Protocol):
    """What the loss needs of the other ranks."""

    @property
    def rank(self) -> int: ...

    @property
    def world_size(self) -> int: ...

    def concat(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """[n, …] of each rank → those of all ranks, equally long each, and [ranks * longest] bool: which are real.

        Differentiable: each rank gets back the gradient that all ranks together have for its rows.
        """

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """Sum over the ranks; no gradient."""


@dataclass
class Outputs:
    """Of one batch."""

    encoded: Encoded
    losses: dict[str, Tensor]
    """By name of REPRESENTATIONS, and "attribute", []: this rank's share of the mean over all ranks, no gradient."""
    sequences: int
    """Sequences of this rank that had something to learn."""
    logits: Tensor | None = None
    """[T] of the label task."""


class Dense(nn.Module):
    """Everything after the look-ups. Apart from the tables, so that the input pipeline can trace the model."""

    def __init__(self, schema: Schema, model: ModelConfig, loss: LossConfig, max_tokens: int, gather: Gather) -> None:
        super().__init__()
        self.gather = gather
        self.config = loss
        self.item_keys = [f.name for f in schema.of("item", sparse=True)]
        self.user_keys = ["user_id", *(f.name for f in schema.of("user", sparse=True))]
        widths = Widths(
            dim=model.dim,
            item_features=len(self.item_keys),
            item_dense=sum(f.width for f in schema.of("item", sparse=False)),
            user_features=len(self.user_keys) - 1,
            user_dense=sum(f.width for f in schema.of("user", sparse=False)),
            history=len(HISTORY_KEYS),
            max_tokens=max_tokens,
        )
        self.tower = Tower(
            widths,
            layers=model.layers,
            attention_heads=model.attention_heads,
            dropout=model.dropout,
            item_id_dropout=model.id_dropout,
            user_id_dropout=model.user_id_dropout,
            fusion=model.fusion,
            block=model.block,
            relative_bias=model.relative_bias,
            cosine=model.similarity == "cosine",
        )
        # Without features every item has the same content, which says nothing of its id.
        self.attribute = loss.attribute if widths.item_features + widths.item_dense else 0.0
        if self.attribute > 0:
            self.attribute_scale = nn.Parameter(torch.tensor(ATTRIBUTE_LOG_SCALE))
        start = -math.log(loss.temperature)
        self.log_scale = nn.ParameterDict({name: nn.Parameter(torch.tensor(start)) for name in REPRESENTATIONS})

    def forward(
        self,
        batch: Batch,
        item_id: dict[str, JaggedTensor],
        item_features: list[KeyedTensor],
        users: list[KeyedTensor],
        history: dict[str, JaggedTensor],
    ) -> tuple[Tensor, Outputs]:
        ids = item_id["item_id"].values()
        features = _join(item_features, self.item_keys)[: len(ids)] if item_features else ids[:, :0]
        looked = Looked(
            item_id=ids,
            item_features=features,
            user=_join(users, self.user_keys),
            history=torch.cat([history[key].values() for key in HISTORY_KEYS], 1),
        )
        encoded = self.tower(
            looked,
            item_dense=batch.item_dense,
            item_known=batch.item_known,
            user_dense=batch.user_dense,
            user_known=batch.user_known,
            value=batch.value,
            lengths=batch.lengths,
            tokens=batch.tokens,
            time=batch.time,
        )
        return self._result(batch, encoded)

    def _result(self, batch: Batch, encoded: Encoded) -> tuple[Tensor, Outputs]:
        if not self.training:
            return encoded.items.new_zeros(()), Outputs(encoded, {}, 0)
        return self._loss(batch, encoded)

    def _loss(self, batch: Batch, encoded: Encoded) -> tuple[Tensor, Outputs]:
        item_ids = batch.item_ids.values()
        vectors, real = self.gather.concat(encoded.items[batch.candidates])  # [C, D], [C]
        candidate_ids, _ = self.gather.concat(item_ids[batch.candidates])
        log_absent, _ = self.gather.concat(batch.log_absent)
        targets = self.gather.all_reduce_sum(torch.tensor(float(len(batch.targets)), device=vectors.device))
        place, repeated = _first_places(candidate_ids, real, item_ids[batch.targets])
        log_q = self._log_q(log_absent, targets).masked_fill(repeated | ~real, math.inf)

        total, losses = vectors.new_zeros(()), {}
        for name, query in encoded.representations.items():
            weight = getattr(self.config, name)
            if weight == 0:
                # Every parameter must have a gradient, or the ranks would wait for each other.
                total = total + 0.0 * (query.sum() + self.log_scale[name])
                continue
            scale = self.log_scale[name].clamp(max=MAX_LOG_SCALE).exp()
            summed = sampled_softmax(query, vectors, place, log_q, scale, PRECISIONS[self.config.precision])
            loss = summed / targets.clamp(min=1)
            losses[name] = loss.detach()
            total = total + weight * loss
        if self.attribute > 0:
            loss = self._attribute_contrast(batch, encoded)
            losses["attribute"] = loss.detach()
            total = total + self.attribute * loss
        return total * self.gather.world_size, Outputs(encoded, losses, int((batch.lengths > 0).sum()))

    def _attribute_contrast(self, batch: Batch, encoded: Encoded) -> Tensor:
        """This rank's share of the mean InfoNCE between an item's id and its content, among all ranks' targets.

        Aligns the two views of an item that S3-Rec's item-attribute objective predicts from each other (Zhou et al.,
        CIKM 2020), in both directions as CLIP does (Radford et al., ICML 2021).
        """
        mine = torch.unique(batch.targets)
        ids = F.normalize(encoded.item_ids[mine], dim=1)
        contents = F.normalize(encoded.content_items[mine], dim=1)
        all_ids, real = self.gather.concat(ids)
        all_contents, _ = self.gather.concat(contents)
        keys, _ = self.gather.concat(batch.item_ids.values()[mine])
        place, repeated = _first_places(keys, real, batch.item_ids.values()[mine])
        log_q = torch.zeros_like(all_ids[:, 0]).masked_fill(repeated | ~real, math.inf)
        # An item that several ranks have is a query on the first of them alone.
        start = self.gather.rank * (len(real) // self.gather.world_size)
        first = place == start + torch.arange(len(mine), device=mine.device)
        scale = self.attribute_scale.clamp(max=MAX_LOG_SCALE).exp()
        summed = sampled_softmax(ids[first], all_contents, place[first], log_q, scale)
        summed = summed + sampled_softmax(contents[first], all_ids, place[first], log_q, scale)
        return summed / (2 * (real & ~repeated).sum()).clamp(min=1)

    def _log_q(self, log_absent: Tensor, in_batch: Tensor) -> Tensor:
        """[C]; zero where every item is a candidate."""
        if self.config.negatives == "all":
            return torch.zeros_like(log_absent[:, 0])
        return inclusion_log_probability(log_absent, in_batch, self.config.negatives)


class PretrainModel(nn.Module):
    """Tables, tower and loss of one schema.

    Args:
        schema: what the data holds.
        model, loss: settings.
        max_tokens: longest sequence, prefix included.
        gather: access to the other ranks' candidates.
    """

    dense_kind: type[Dense] = Dense

    def __init__(self, schema: Schema, model: ModelConfig, loss: LossConfig, max_tokens: int, gather: Gather) -> None:
        super().__init__()
        self.item_id = item_id_table(schema, model.dim)
        self.item_features, self.managed_item_features = item_feature_tables(schema, model.dim)
        self.users, self.managed_users = user_tables(schema, model.dim)
        self.history = history_tables(schema, model.dim)
        self.dense = self.dense_kind(schema, model, loss, max_tokens, gather)

    def forward(self, batch: Batch) -> tuple[Tensor, Outputs]:
        """The loss to minimise, averaged over all ranks' targets, and what led to it.

        The loss is scaled such that the mean of its gradients over the ranks is the gradient of the global mean.
        """
        item_id = self.item_id(batch.item_ids)
        features = pooled(self.item_features, self.managed_item_features, batch.item_features)
        users = pooled(self.users, self.managed_users, batch.users)
        history = self.history(batch.history)
        return self.dense(batch, item_id, features, users, history)


def pooled(fixed: nn.Module | None, managed: nn.Module | None, features: KeyedJaggedTensor) -> list[KeyedTensor]:
    """What the tables give for their keys; a managed one also tells which rows, which nobody asks."""
    found = [] if fixed is None else [fixed(features)]
    return found if managed is None else [*found, managed(features)[0]]


def _join(features: list[KeyedTensor], keys: list[str]) -> Tensor:
    """[rows, len(keys) * D] in the order of keys, which a sharding plan may have changed."""
    parts = {key: values for tables in features for key, values in tables.to_dict().items()}
    return torch.cat([parts[key] for key in keys], 1)


def _first_places(candidates: Tensor, real: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Where each wanted id stands first among the candidates' ids [C], and [C] bool: a later copy of an id."""
    order = torch.argsort(candidates.masked_fill(~real, torch.iinfo(candidates.dtype).max), stable=True)
    ordered = candidates.masked_fill(~real, torch.iinfo(candidates.dtype).max)[order]
    copies = F.pad(ordered[1:] == ordered[:-1], (1, 0))
    repeated = torch.zeros_like(real)
    repeated[order] = copies
    return order[torch.searchsorted(ordered, wanted)], repeated
