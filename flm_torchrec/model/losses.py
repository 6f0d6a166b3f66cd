"""The losses of pretraining. Each owns its parameters; one that is not used gives them a gradient of zero.

Ranks wait for each other's gradients, so a parameter without one would stop them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flm_torchrec.config.heads import HEADS, REPRESENTATIONS
from flm_torchrec.config.schema import LossConfig
from flm_torchrec.model.responsibility import weights_by_head
from flm_torchrec.model.rows import Gather, Rows, Shared, dealt
from flm_torchrec.model.scale import unit
from flm_torchrec.model.softmax import (
    CandidateVectors,
    Hidden,
    inclusion_log_probability,
    log_probability,
    sampled_softmax,
)
from flm_torchrec.model.space import used_by_each
from flm_torchrec.model.targets import CountedTargets, columns_of, hidden_of
from flm_torchrec.model.tower import Encoded

if TYPE_CHECKING:
    from flm_torchrec.data.batch import Batch

PRECISIONS = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16}
MAX_LOG_SCALE = math.log(100.0)
"""Bound of the learned inverse temperature, as in CLIP (Radford et al. 2021)."""
ATTRIBUTE_LOG_SCALE = 2.0
"""Start of the log inverse temperature of the item-attribute contrast."""


SHORTEST = 0.1
"""Shorter ids are not made longer than by its inverse."""


class Loss(Protocol):
    """A part of L. Its value is this rank's share of the mean over all ranks."""

    learns_fused: bool
    """It reads the representation of the fusion, which training makes for such losses alone."""

    def learned(self) -> dict[str, nn.Parameter | nn.ParameterDict]:
        """What it learns beside tables and tower, by its name in the state of `Dense`."""

    def rows(self, batch: Batch, encoded: Encoded) -> Rows | None:
        """What the same loss of other ranks needs of this rank; None: nothing."""

    def __call__(self, batch: Batch, encoded: Encoded, shared: Shared) -> tuple[Tensor, dict[str, Tensor]]:
        """[] to add to L, weighted; and by name, [] without weight and gradient."""


def make_losses(config: LossConfig, described: bool, gather: Gather, joint: bool = False) -> tuple[Loss, ...]:
    """The parts of L that a config asks for.

    Args:
        described: items have features. Without any, every item has the same content, which says nothing of its id.
        joint: the data have several domains.
    """
    apart = joint and config.domains == "own"
    losses: list[Loss] = [NextItemLoss(config, gather, apart)]
    if config.attribute > 0 and described:
        losses.append(AttributeContrast(config, gather, apart))
    return tuple(losses)


def unused(losses: Iterable[Loss]) -> Tensor:
    """[] zero, which gives all parameters of these losses a gradient of zero."""
    learned = [value for loss in losses for value in loss.learned().values()]
    parameters = [p for value in learned for p in (value.values() if isinstance(value, nn.ParameterDict) else (value,))]
    return 0.0 * torch.stack(parameters).sum()


class NextItemLoss:
    """sum over representations k of weight_k L_k; L_k is a sampled softmax of the next item, at every token.

    The collaborative head, which sees no order, also predicts each item from all others of its sequence
    (leave-one-out). The items that a user has had are no negatives (`loss.seen`). A target may count more for the heads
    that are sure of it (`loss.mixture`, see `responsibility`).

    Each L_k is a mean over the targets by their weights: sum of weight x loss, divided by the sum of weights. Targets
    of weight 0 are candidates and history alone; an item of a kind of event that is not predicted has not been had.

    Args:
        by_domain: a target's candidates are the items of its own domain.
    """

    def __init__(self, config: LossConfig, gather: Gather, by_domain: bool = False) -> None:
        self.config = config
        self.learns_fused = config.fused > 0
        self.gather = gather
        self.by_domain = by_domain
        self.drawn = 0 if config.negatives == "all" else config.negatives
        self.apart = gather.alone and config.negatives != "all"
        """The targets of this rank are candidates here alone. If every item is a candidate, all are shared anyhow."""
        start = -math.log(config.temperature)
        self.log_scale = nn.ParameterDict({name: nn.Parameter(torch.tensor(start)) for name in REPRESENTATIONS})

    def learned(self) -> dict[str, nn.Parameter | nn.ParameterDict]:
        """Log of the inverse temperature of each softmax."""
        return {"log_scale": self.log_scale}

    def rows(self, batch: Batch, encoded: Encoded) -> Rows:
        """The candidates of this rank; where each rank has its own targets, its part of the drawn negatives."""
        ids = batch.items[batch.candidates]
        # Where all items are candidates, each is one once, in the same order.
        every = self.config.negatives == "all" and len(ids) == len(batch.items)
        vectors = encoded.items if every else F.embedding(batch.candidates, encoded.items)
        numbers = self._numbers(batch)
        if not self.apart:
            return Rows(vectors, ids, numbers)
        own = len(ids) - self._drawn_here()
        return Rows(vectors[own:], ids[own:], numbers[own:], total=self.drawn)

    def __call__(self, batch: Batch, encoded: Encoded, shared: Shared) -> tuple[Tensor, dict[str, Tensor]]:
        """As of `Loss`."""
        candidates = self._candidates(batch, encoded, shared)
        columns, repeated = columns_of(candidates.ids, candidates.real, batch.items)
        log_q = self._log_q(candidates.numbers, shared.near).masked_fill(repeated | ~candidates.real, math.inf)
        wanted = columns[batch.targets]
        counted = CountedTargets.of(batch.weight)
        count = torch.where(shared.weight > 0, shared.weight, 1.0)
        domain = candidates.numbers[:, -1].contiguous() if self.by_domain else None
        own = used_by_each(candidates.vectors)
        before = self._hidden(batch, wanted, whole=False)

        def question(query: Tensor, name: str, hidden: Hidden | None) -> _Question:
            scale = self.log_scale[name].clamp(max=MAX_LOG_SCALE).exp()
            items = CandidateVectors(own[name], log_q, domain, PRECISIONS[self.config.precision])
            return _Question(name, items, scale, *counted.only(query, wanted, hidden))

        total, asked = candidates.vectors.new_zeros(()), dict[str, _Question]()
        for name, query in encoded.queries.items():
            if getattr(self.config, name) == 0:
                total = total + 0.0 * (query.sum() + self.log_scale[name])
                continue
            asked[name] = question(query, name, before)
        if self.config.collaborative * self.config.left_out > 0 and encoded.left_out is not None:
            asked["left_out"] = question(encoded.left_out, "collaborative", self._hidden(batch, wanted, whole=True))
        by_head, losses = self._by_head(asked), dict[str, Tensor]()
        for name, one in asked.items():
            value = one.loss(_product(counted.weight, by_head.get(one.representation))) / count
            losses[name] = value.detach()
            weight = getattr(self.config, one.representation) * (self.config.left_out if name == "left_out" else 1.0)
            total = total + weight * value
        return total, losses

    def _by_head(self, asked: Mapping[str, _Question]) -> dict[str, Tensor]:
        """By head, [t] what the targets count for it; empty where all count alike.

        How sure the collaborative head is of a target is read from all others of its sequence, if that is learned: from
        earlier items it knows the targets by heart.
        """
        if self.config.mixture == 0:
            return {}
        sure = {name: asked[name] for name in HEADS if name in asked}
        if "left_out" in asked:
            sure["collaborative"] = asked["left_out"]
        return weights_by_head({name: one.log_probability() for name, one in sure.items()}, self.config.mixture)

    def _numbers(self, batch: Batch) -> Tensor:
        """[C, 2] `log_not_sampled`; [C, 3] with the candidate's domain last, where that counts."""
        if not self.by_domain:
            return batch.log_not_sampled
        domain = batch.item_domain[batch.candidates].to(batch.log_not_sampled.dtype)
        return torch.cat([batch.log_not_sampled, domain[:, None]], 1)

    def _drawn_here(self) -> int:
        """Drawn negatives that this rank looks up."""
        return dealt(self.drawn, self.gather.place, self.gather.ranks)

    def _candidates(self, batch: Batch, encoded: Encoded, shared: Shared) -> Shared:
        """All candidates of this rank's queries."""
        if not self.apart:
            return shared
        own = batch.candidates[: len(batch.candidates) - self._drawn_here()]
        return replace(
            shared,
            vectors=torch.cat([F.embedding(own, encoded.items), shared.vectors]),
            ids=torch.cat([batch.items[own], shared.ids]),
            numbers=torch.cat([self._numbers(batch)[: len(own)], shared.numbers]),
            real=torch.cat([torch.ones_like(own, dtype=torch.bool), shared.real]),
        )

    def _hidden(self, batch: Batch, columns: Tensor, whole: bool) -> Hidden | None:
        """What `hidden_of` gives; None where the items that a user has had are negatives."""
        return None if self.config.seen == "negatives" else hidden_of(batch.lengths, columns, whole, batch.predicted)

    def _log_q(self, log_not_sampled: Tensor, in_batch: Tensor) -> Tensor:
        """[C]; zero where every item is a candidate."""
        if self.config.negatives == "all":
            return torch.zeros_like(log_not_sampled[:, 0])
        return inclusion_log_probability(log_not_sampled, in_batch, self.config.negatives)


class AttributeContrast:
    """InfoNCE between an item's id and its content, among the sharing ranks' targets whose ids have a row not zero.

    Aligns the two views of an item that S3-Rec's item-attribute objective predicts from each other (Zhou et al.,
    CIKM 2020), in both directions as CLIP does (Radford et al., ICML 2021).

    Args:
        by_domain: an item is told from those of its own domain alone.
    """

    learns_fused = False

    def __init__(self, config: LossConfig, gather: Gather, by_domain: bool = False) -> None:
        self.weight = config.attribute
        self.precision = PRECISIONS[config.precision]
        self.gather = gather
        self.by_domain = by_domain
        self.scale = nn.Parameter(torch.tensor(ATTRIBUTE_LOG_SCALE))

    def learned(self) -> dict[str, nn.Parameter | nn.ParameterDict]:
        """Log of the inverse temperature."""
        return {"attribute_scale": self.scale}

    def rows(self, batch: Batch, encoded: Encoded) -> Rows | None:
        """Ids and contents of the items that this rank's targets are, one beside the other."""
        return None if self.gather.alone else self._own(batch, encoded)

    def __call__(self, batch: Batch, encoded: Encoded, shared: Shared) -> tuple[Tensor, dict[str, Tensor]]:
        """As of `Loss`. The mean over the items of the sharing ranks counts as much as these ranks have targets."""
        if self.gather.alone:
            own = self._own(batch, encoded)
            real = torch.ones_like(own.ids, dtype=torch.bool)
            shared = replace(shared, vectors=own.vectors, ids=own.ids, numbers=own.numbers, real=real)
        all_ids, all_contents = shared.vectors.chunk(2, 1)
        _, repeated = columns_of(shared.ids, shared.real, shared.ids)
        usable = shared.real & ~repeated & all_ids.any(1)
        log_q = torch.zeros_like(all_ids[:, 0]).masked_fill(~usable, math.inf)
        # An item that several ranks have is a query on the first of them alone.
        ranks, place = (1, 0) if self.gather.alone else (self.gather.ranks, self.gather.place)
        here = torch.zeros_like(usable).view(ranks, len(usable) // ranks)
        here[place] = True
        position = (usable & here.flatten()).nonzero().flatten()
        scale = self.scale.clamp(max=MAX_LOG_SCALE).exp()
        domain = shared.numbers[:, 0].contiguous() if self.by_domain else None
        contents, ids = (CandidateVectors(x, log_q, domain, self.precision) for x in (all_contents, all_ids))
        summed = sampled_softmax(all_ids[position], contents, position, scale)
        summed = summed + sampled_softmax(all_contents[position], ids, position, scale)
        mean = summed / (2 * usable.sum()).clamp(min=1)
        loss = mean * (shared.near / shared.targets.clamp(min=1))
        return self.weight * loss, {"attribute": loss.detach()}

    def _own(self, batch: Batch, encoded: Encoded) -> Rows:
        mine = torch.unique(batch.targets)
        # An item that came after training has a row of zeros, where the gradient of a unit vector has no bound.
        ids = F.normalize(F.embedding(mine, encoded.ids), dim=1, eps=SHORTEST)
        contents = unit(F.embedding(mine, encoded.contents))
        domain = batch.item_domain[mine, None].to(ids.dtype) if self.by_domain else ids.new_zeros(len(mine), 0)
        return Rows(torch.cat([ids, contents], 1), batch.items[mine], domain)


@dataclass(frozen=True)
class _Question:
    """Which items follow, asked of a representation."""

    representation: str
    items: CandidateVectors
    scale: Tensor  # []
    query: Tensor  # [t, D]
    target: Tensor  # [t] column among the items
    hidden: Hidden | None

    def loss(self, weight: Tensor | None) -> Tensor:
        """[] sum over the targets of weight x loss; weight [t], None: 1."""
        return sampled_softmax(self.query, self.items, self.target, self.scale, self.hidden, weight)

    def log_probability(self) -> Tensor:
        """[t] of the targets, without gradient."""
        return log_probability(self.query, self.items, self.target, self.scale, self.hidden)


def _product(left: Tensor | None, right: Tensor | None) -> Tensor | None:
    """[t] of two weights of which None is 1."""
    return left if right is None else right if left is None else left * right
