"""One rank's share of a step, as tensors: what the loader yields and the model takes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from torchrec.streamable import Pipelineable


@dataclass
class Batch(Pipelineable):
    """B sequences over N different items, T tokens and C candidates.

    Every item that occurs, as history, target or candidate, is looked up once: the other fields are indices into
    those N items. A sequence of n targets has n tokens: the user's prefix token, then the n - 1 items before the last
    target. Token t predicts target t.
    """

    items: Tensor  # [N] int64: the items
    item_ids: KeyedJaggedTensor  # what to look up in the tables of items, see `item_lookups`; stride N, every length 1
    item_features: KeyedJaggedTensor  # one key per sparse item feature, stride N
    item_dense: Tensor  # [N, F_item]
    item_sketch: Tensor  # [N, D] fixed vectors of what the features say, see `sketch.Sketches`
    item_domain: Tensor  # [N] int64: number of the item's domain in joint data; [0] in other data
    item_known: Tensor  # [N] float: 1 where a training event has the item, else 0: then its id says nothing
    users: KeyedJaggedTensor  # key user_id and one key per sparse user feature, stride B
    user_dense: Tensor  # [B, F_user]
    user_known: Tensor  # [B] float: 1 where a training event has the user, else 0
    history: KeyedJaggedTensor  # keys event and gap, stride B, lengths as below
    value: Tensor  # [T] float: standardised value of the event, 0 at the prefix
    time: Tensor  # [T] seconds since the first event of the sequence, 0 at the prefix
    lengths: Tensor  # [B] tokens of each sequence; their sum is T
    tokens: Tensor  # [T] index of the item, or N at the prefix
    targets: Tensor  # [T] index of the next item; empty where there is nothing to learn
    label: Tensor  # [T, labels] float: 1 or 0 for a target that has a label, else NaN; no labels in pretraining
    candidates: Tensor  # [C] indices of the items that the softmax runs over; `DrawnShare.apart`: targets, then drawn
    log_not_sampled: Tensor  # [C, 2] log-probability that one in-batch negative, and one drawn, is not this item
    weight: Tensor | None = None  # [T] what each target counts in the losses; None: all count 1
    predicted: Tensor | None = None  # [T] bool: the target is of a kind that is predicted; None: all are

    def to(self, device: torch.device, non_blocking: bool = False) -> Batch:
        """A copy of the batch on the device."""
        return Batch(**{name: part.to(device, non_blocking=non_blocking) for name, part in self.parts()})

    def record_stream(self, stream: torch.Stream) -> None:
        """Tell the allocator that `stream` uses the tensors, so that their memory is not reused too early."""
        for _, part in self.parts():
            part.record_stream(stream)

    def pin_memory(self) -> Batch:
        """A copy in pinned memory, which copies to a GPU without blocking."""
        return Batch(**{name: part.pin_memory() for name, part in self.parts()})

    def parts(self) -> Iterator[tuple[str, Any]]:
        """Names and contents of the fields that the batch has."""
        return ((f.name, part) for f in fields(self) if (part := getattr(self, f.name)) is not None)
