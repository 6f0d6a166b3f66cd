"""The losses of pretraining. Each owns its parameters; one that is not used gives them a gradient of zero.

Ranks wait for each other's gradients, so a parameter without one would stop them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flm_torchrec.config.heads import REPRESENTATIONS
from flm_torchrec.config.schema import LossConfig
from flm_torchrec.model.softmax import CandidateVectors, Hidden, inclusion_log_probability, sampled_softmax
from flm_torchrec.model.space import used
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


class Gather(Protocol):
    """What the losses need of the other ranks."""

    @property
    def rank(self) -> int:
        """This rank's number."""

    @property
    def world_size(self) -> int:
        """Number of ranks."""

    def concat(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """[n, …] of each rank → those of all ranks, equally long each, and [ranks * longest] bool: which are real.

        Differentiable: each rank gets back the gradient that all ranks together have for its rows.
        """

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """Sum over the ranks; no gradient."""


class Loss(Protocol):
    """A part of L. Its value is this rank's share of the mean over all ranks."""

    def learned(self) -> dict[str, nn.Parameter | nn.ParameterDict]:
        """What it learns beside tables and tower, by its name in the state of `Dense`."""

    def __call__(self, batch: Batch, encoded: Encoded) -> tuple[Tensor, dict[str, Tensor]]:
        """[] to add to L, weighted; and by name, [] without weight and gradient."""


def make_losses(config: LossConfig, described: bool, gather: Gather) -> tuple[Loss, ...]:
    """The parts of L that a config asks for.

    Args:
        described: items have features. Without any, every item has the same content, which says nothing of its id.
    """
    losses: list[Loss] = [NextItemLoss(config, gather)]
    if config.attribute > 0 and described:
        losses.append(AttributeContrast(config.attribute, gather))
    return tuple(losses)


def unused(losses: Iterable[Loss]) -> Tensor:
    """[] zero, which gives all parameters of these losses a gradient of zero."""
    learned = [value for loss in losses for value in loss.learned().values()]
    parameters = [p for value in learned for p in (value.values() if isinstance(value, nn.ParameterDict) else (value,))]
    return 0.0 * torch.stack(parameters).sum()


class NextItemLoss:
    """sum over representations k of weight_k L_k; L_k is a sampled softmax of the next item, at every token.

    The collaborative head, which sees no order, also predicts each item from all others of its sequence
    (leave-one-out). The items that a user has had are no negatives (`loss.seen`).
    """

    def __init__(self, config: LossConfig, gather: Gather) -> None:
        self.config = config
        self.gather = gather
        start = -math.log(config.temperature)
        self.log_scale = nn.ParameterDict({name: nn.Parameter(torch.tensor(start)) for name in REPRESENTATIONS})

    def learned(self) -> dict[str, nn.Parameter | nn.ParameterDict]:
        """Log of the inverse temperature of each softmax."""
        return {"log_scale": self.log_scale}

    def __call__(self, batch: Batch, encoded: Encoded) -> tuple[Tensor, dict[str, Tensor]]:
        """As of `Loss`."""
        vectors, real = self.gather.concat(encoded.items[batch.candidates])  # [C, S], [C]
        candidate_ids, _ = self.gather.concat(batch.items[batch.candidates])
        log_not_sampled, _ = self.gather.concat(batch.log_not_sampled)
        targets = self.gather.all_reduce_sum(torch.tensor(float(len(batch.targets)), device=vectors.device))
        columns, repeated = columns_of(candidate_ids, real, batch.items)
        log_q = self._log_q(log_not_sampled, targets).masked_fill(repeated | ~real, math.inf)
        wanted = columns[batch.targets]

        def loss(query: Tensor, name: str, hidden: Hidden | None) -> Tensor:
            """Mean over all ranks' targets, this rank's share."""
            scale = self.log_scale[name].clamp(max=MAX_LOG_SCALE).exp()
            candidates = CandidateVectors(used(name, vectors), log_q)
            precision = PRECISIONS[self.config.precision]
            summed = sampled_softmax(used(name, query), candidates, wanted, scale, hidden, precision)
            return summed / targets.clamp(min=1)

        total, losses = vectors.new_zeros(()), {}
        before = self._hidden(batch.lengths, wanted, whole=False)
        for name, query in encoded.representations.items():
            weight = getattr(self.config, name)
            if weight == 0:
                total = total + 0.0 * (query.sum() + self.log_scale[name])
                continue
            value = loss(query, name, before)
            losses[name] = value.detach()
            total = total + weight * value
        weight = self.config.collaborative * self.config.left_out
        if weight > 0 and encoded.left_out is not None:
            others = self._hidden(batch.lengths, wanted, whole=True)
            value = loss(encoded.left_out, "collaborative", others)
            losses["left_out"] = value.detach()
            total = total + weight * value
        return total, losses

    def _hidden(self, lengths: Tensor, columns: Tensor, whole: bool) -> Hidden | None:
        """What `hidden_of` gives; None where the items that a user has had are negatives."""
        return None if self.config.seen == "negatives" else hidden_of(lengths, columns, whole)

    def _log_q(self, log_not_sampled: Tensor, in_batch: Tensor) -> Tensor:
        """[C]; zero where every item is a candidate."""
        if self.config.negatives == "all":
            return torch.zeros_like(log_not_sampled[:, 0])
        return inclusion_log_probability(log_not_sampled, in_batch, self.config.negatives)


class AttributeContrast:
    """InfoNCE between an item's id and its content, among all ranks' targets whose ids have a row that is not zero.

    Aligns the two views of an item that S3-Rec's item-attribute objective predicts from each other (Zhou et al.,
    CIKM 2020), in both directions as CLIP does (Radford et al., ICML 2021).
    """

    def __init__(self, weight: float, gather: Gather) -> None:
        self.weight = weight
        self.gather = gather
        self.scale = nn.Parameter(torch.tensor(ATTRIBUTE_LOG_SCALE))

    def learned(self) -> dict[str, nn.Parameter | nn.ParameterDict]:
        """Log of the inverse temperature."""
        return {"attribute_scale": self.scale}

    def __call__(self, batch: Batch, encoded: Encoded) -> tuple[Tensor, dict[str, Tensor]]:
        """As of `Loss`."""
        mine = torch.unique(batch.targets)
        # An item that came after training has a row of zeros, where the gradient of a unit vector has no bound.
        ids = F.normalize(used("content", encoded.id_items[mine]), dim=1, eps=SHORTEST)
        contents = F.normalize(used("content", encoded.content_items[mine]), dim=1)
        all_ids, real = self.gather.concat(ids)
        all_contents, _ = self.gather.concat(contents)
        keys, _ = self.gather.concat(batch.items[mine])
        position, repeated = columns_of(keys, real, batch.items[mine])
        usable = real & ~repeated & all_ids.any(1)
        log_q = torch.zeros_like(all_ids[:, 0]).masked_fill(~usable, math.inf)
        # An item that several ranks have is a query on the first of them alone.
        start = self.gather.rank * (len(real) // self.gather.world_size)
        first = usable[position] & (position == start + torch.arange(len(mine), device=mine.device))
        scale = self.scale.clamp(max=MAX_LOG_SCALE).exp()
        summed = sampled_softmax(ids[first], CandidateVectors(all_contents, log_q), position[first], scale)
        summed = summed + sampled_softmax(contents[first], CandidateVectors(all_ids, log_q), position[first], scale)
        loss = summed / (2 * usable.sum()).clamp(min=1)
        return self.weight * loss, {"attribute": loss.detach()}


def hidden_of(lengths: Tensor, columns: Tensor, whole: bool) -> Hidden:
    """[B] lengths, [T] columns of the targets → the candidates that the query of each target leaves out.

    Args:
        whole: all items of the target's sequence but the target; else those before it.
    """
    sequence = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)  # [T]
    first = (torch.cumsum(lengths, 0) - lengths)[sequence]
    token = torch.arange(len(sequence), device=lengths.device)
    count = lengths[sequence] if whole else token - first
    row = torch.repeat_interleave(token, count)  # [P]
    nth = torch.arange(len(row), device=lengths.device) - (torch.cumsum(count, 0) - count)[row]
    column = columns[first[row] + nth]
    kept = column != columns[row]
    return Hidden(row[kept], column[kept])


def columns_of(candidates: Tensor, real: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """[n] first column of each wanted id among the candidates, any column where it is none; [C] bool: a later copy.

    Args:
        candidates: [C] ids.
        real: [C] bool, False at padding.
        wanted: [n] ids.
    """
    ordered, order = torch.sort(candidates.masked_fill(~real, torch.iinfo(candidates.dtype).max), stable=True)
    copies = F.pad(ordered[1:] == ordered[:-1], (1, 0))
    repeated = torch.zeros_like(real)
    repeated[order] = copies
    return order[torch.searchsorted(ordered, wanted).clamp(max=len(order) - 1)], repeated
