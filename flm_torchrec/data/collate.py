"""Sequences of a prepared data set → `Batch`, with no Python loop over sequences or events."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from flm_torchrec.data.batch import Batch
from flm_torchrec.data.dataset import EntityFeatures, PreparedData, Ragged, spans
from flm_torchrec.data.hashing import item_lookups, remap_ids
from flm_torchrec.data.history import HISTORY_KEYS, CodedEvents, Events, HistoryCoding
from flm_torchrec.data.negatives import Candidates
from flm_torchrec.data.schema import Feature
from flm_torchrec.data.sketch import Sketches
from flm_torchrec.data.train_stats import TrainStats


@dataclass(frozen=True)
class TrainEvents(Events):
    """Events that spans point into: all of a data set, or those of one batch of a stream."""

    learnable: np.ndarray  # [n] bool: a training event
    label: np.ndarray  # [n, labels] float32: 1 or 0, NaN where there is none
    weight: np.ndarray  # [n] float32: what an event counts as a target, of its kind


@dataclass(frozen=True)
class TokenSpans:
    """The tokens of B sequences, T in all. A sequence's tokens: the prefix, then each event but its last."""

    events: TrainEvents
    user: np.ndarray  # [B] int64
    begin: np.ndarray  # [B] int64: index of the user's first event
    lengths: np.ndarray  # [B] int64: tokens of each sequence
    positions: np.ndarray  # [T] int64: index of the event that follows each token

    @property
    def prefix(self) -> np.ndarray:
        """[T] bool: the first token of each sequence."""
        prefix = np.zeros(len(self.positions), bool)
        prefix[(np.cumsum(self.lengths) - self.lengths)[self.lengths > 0]] = True
        return prefix


class Assembler:
    """Builds batches from spans of events.

    Args:
        data: the data set.
        train_mask: [interactions] bool, the training events.
        stats: of the training events; None: those of `train_mask`. The model knows no id outside of them.
        labels: [interactions, labels] float32, 1 or 0, NaN where there is none. With labels, `stats` should hide the
            values, which the labels come from.
        kind_weights: [kinds of events] float32: what a target of each counts; None: 1, of every kind.
        sketches: of items, of the width `model.dim`; None: for batches that no model takes.
    """

    def __init__(
        self,
        data: PreparedData,
        train_mask: np.ndarray,
        stats: TrainStats | None = None,
        labels: np.ndarray | None = None,
        kind_weights: np.ndarray | None = None,
        sketches: Sketches | None = None,
    ) -> None:
        self.data = data
        self.sketches = Sketches(data, 0) if sketches is None else sketches
        self.stats = TrainStats.of(data, train_mask, values=labels is None) if stats is None else stats
        self.contexts = [f.name for f in data.schema.of("event", sparse=True)]
        self.coding = HistoryCoding(
            self.stats.value_mean, self.stats.value_scale, data.schema.timestamps, features=len(self.contexts)
        )
        if labels is None:
            labels = np.zeros((len(train_mask), 0), np.float32)
        if kind_weights is None and data.targets is not None:
            kind_weights = data.targets.astype(np.float32)
        self.kind_weights = kind_weights
        weight = np.broadcast_to(np.float32(1), len(train_mask)) if data.weight is None else data.weight
        self.events = TrainEvents(**vars(data.events), learnable=train_mask, label=labels, weight=weight)
        self.item_domain = np.zeros(0, np.int64) if data.item_domain is None else data.item_domain.astype(np.int64)
        self.item_features = [f for f in data.schema.features if f.entity == "item" and f.sparse]
        self.user_features = [f for f in data.schema.features if f.entity == "user" and f.sparse]

    def training(
        self,
        user: np.ndarray,
        start: np.ndarray,
        end: np.ndarray,
        drawn: Candidates,
        events: TrainEvents | None = None,
        begin: np.ndarray | None = None,
    ) -> Batch:
        """Learn to predict the events `start[b]:end[b]` of `user[b]`; an empty span is a sequence of no tokens.

        Events of a span that are held out are left out, as if they had not happened.

        Args:
            events: what spans point into; None: all events of the data.
            begin: [B] index of each user's first event; None: as in all events of the data.
        """
        events = self.events if events is None else events
        begin = self.data.offsets[user] if begin is None else begin
        positions = spans(start, end - start)
        learnable = events.learnable[positions]
        lengths = np.bincount(np.repeat(np.arange(len(user)), end - start)[learnable], minlength=len(user))
        positions = positions[learnable]
        targets = events.item[positions]
        if drawn.log_not_sampled is None:
            candidates = drawn.items
            log_not_sampled = np.zeros((len(candidates), 2), np.float32)
        else:
            joined = [np.unique(targets), drawn.items]
            candidates = np.concatenate(joined) if drawn.apart else np.unique(np.concatenate(joined))
            log_not_sampled = drawn.log_not_sampled[candidates]
        return self._batch(TokenSpans(events, user, begin, lengths, positions), targets, candidates, log_not_sampled)

    def encoding(self, user: np.ndarray, start: np.ndarray, end: np.ndarray) -> Batch:
        """Represent `user[b]` after the events `start[b]:end[b]`: the last token of each sequence."""
        lengths = end - start + 1
        positions = spans(start, lengths)  # the last of each sequence is the event to come, which is not read
        nothing = np.zeros(0, np.int64)
        tokens = TokenSpans(self.events, user, self.data.offsets[user], lengths, positions)
        return self._batch(tokens, nothing, nothing, np.zeros((0, 2), np.float32))

    def items(self, ids: np.ndarray) -> Batch:
        """The items named, and one sequence of no tokens, as of `encoding`."""
        nothing, one = np.zeros(0, np.int64), np.zeros(1, np.int64)
        tokens = TokenSpans(self.events, one, one, one, nothing)
        return self._batch(tokens, nothing, ids, np.zeros((len(ids), 2), np.float32))

    def _batch(
        self, tokens: TokenSpans, targets: np.ndarray, candidates: np.ndarray, log_not_sampled: np.ndarray
    ) -> Batch:
        """The batch of B sequences.

        Args:
            targets: [T] items to predict, or [0] where there is nothing to learn.
            candidates: [C] items of the softmax.
            log_not_sampled: [C, 2] float32, see `Batch`.
        """
        prefix = tokens.prefix
        shown = tokens.positions[:-1][~prefix[1:]]  # events that are item tokens: each but a sequence's last
        events = tokens.events.take(shown)
        coded = self._coded(tokens, shown, events)
        ids, index = np.unique(np.concatenate([events.item, targets, candidates]), return_inverse=True)
        # Where there is no item, one is looked up all the same: TorchRec's sharded modules refuse a stride of 0.
        ids = ids if len(ids) else np.zeros(1, np.int64)
        item_index, target_index, candidate_index = np.split(index, np.cumsum([len(shown), len(targets)]))
        seen = np.zeros(len(ids), bool)
        seen[item_index] = seen[target_index] = True
        lookups = item_lookups(self.data.schema.table("item_id"), ids, seen)

        def at_tokens(values: np.ndarray, at_prefix: int = 0) -> np.ndarray:
            """[shown] values of the events shown → [T], with `at_prefix` at the prefix tokens."""
            filled = np.full(len(prefix), at_prefix, values.dtype)
            filled[~prefix] = values
            return filled

        offsets = np.concatenate([[0], np.cumsum(tokens.lengths)])
        weight, predicted = self._weights(tokens, len(targets))
        history = {key: getattr(coded, key) for key in HISTORY_KEYS}
        history |= dict(zip(self.contexts, coded.context.T, strict=True))
        return Batch(
            items=torch.from_numpy(ids),
            item_ids=_kjt({key: Ragged(np.arange(len(ids) + 1), asked) for key, asked in lookups.items()}),
            item_features=self._item_features(ids),
            item_dense=torch.from_numpy(self.data.items.dense[ids]),
            item_sketch=torch.from_numpy(self.sketches.of(ids)),
            item_domain=torch.from_numpy(self.item_domain[ids] if len(self.item_domain) else self.item_domain),
            item_known=torch.from_numpy(self.stats.items[ids]),
            users=self._users(tokens.user),
            user_dense=torch.from_numpy(self.data.users.dense[tokens.user]),
            user_known=torch.from_numpy(self.stats.users[tokens.user]),
            history=_kjt({key: Ragged(offsets, at_tokens(rows)) for key, rows in history.items()}),
            value=torch.from_numpy(at_tokens(coded.value)),
            time=torch.from_numpy(at_tokens(coded.time)),
            lengths=torch.from_numpy(tokens.lengths),
            tokens=torch.from_numpy(at_tokens(item_index, at_prefix=len(ids))),
            targets=torch.from_numpy(target_index),
            label=torch.from_numpy(tokens.events.label[tokens.positions[: len(targets)]]),
            candidates=torch.from_numpy(candidate_index),
            log_not_sampled=torch.from_numpy(log_not_sampled),
            weight=weight,
            predicted=predicted,
        )

    def _weights(self, tokens: TokenSpans, targets: int) -> tuple[Tensor | None, Tensor | None]:
        """[T] `weight` and `predicted` of `Batch`: the event's own weight times that of its kind."""
        if not self.data.schema.weights and self.kind_weights is None:
            return None, None
        positions = tokens.positions[:targets]
        weight, kind = tokens.events.weight[positions], tokens.events.event[positions]
        if self.kind_weights is not None:
            weight = weight * self.kind_weights[kind]
        predicted = None if self.data.targets is None else torch.from_numpy(self.data.targets[kind])
        return torch.from_numpy(weight), predicted

    def _coded(self, tokens: TokenSpans, shown: np.ndarray, events: Events) -> CodedEvents:
        """The n events at the positions `shown` [n], each but the last of every sequence, as the model takes them."""
        timestamp = tokens.events.timestamp
        counts = np.maximum(tokens.lengths - 1, 0)  # [B] events shown
        users_first = shown == np.repeat(tokens.begin, counts)
        previous = np.where(users_first, events.timestamp, timestamp[shown - 1])
        starts = np.repeat(np.cumsum(counts) - counts, counts)  # [n] index of the first event of the same sequence
        return self.coding.code(events, previous, events.timestamp[starts])

    def _item_features(self, ids: np.ndarray) -> KeyedJaggedTensor:
        """Sparse features of the items."""
        return _kjt({f.name: self._remapped(self.data.items, f, ids) for f in self.item_features})

    def _users(self, user: np.ndarray) -> KeyedJaggedTensor:
        """The ids of the users that training events hold, and the sparse features of all."""
        known = self.stats.users[user] > 0
        ids = remap_ids(self.data.schema.table("user_id"), user[known])
        features = {f.name: self._remapped(self.data.users, f, user) for f in self.user_features}
        return _kjt({"user_id": Ragged(np.concatenate([[0], np.cumsum(known)]), ids), **features})

    def _remapped(self, source: EntityFeatures, feature: Feature, rows: np.ndarray) -> Ragged:
        taken = source.sparse[feature.name].take(rows)
        return Ragged(taken.offsets, remap_ids(self.data.schema.table(feature.table), taken.values))


def _kjt(features: dict[str, Ragged]) -> KeyedJaggedTensor:
    def join(parts: list[np.ndarray]) -> Tensor:
        joined = np.concatenate(parts) if parts else np.zeros(0, np.int64)
        return torch.from_numpy(joined.astype(np.int64, copy=False))

    return KeyedJaggedTensor(
        keys=list(features),
        values=join([r.values for r in features.values()]),
        lengths=join([r.lengths for r in features.values()]),
    )
