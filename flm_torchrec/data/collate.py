"""Sequences of a prepared data set → `Batch`, with no Python loop over rows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from flm_torchrec.data.batch import Batch
from flm_torchrec.data.dataset import EntityFeatures, PreparedData, Ragged, spans
from flm_torchrec.data.hashing import gap_rows, look_ups
from flm_torchrec.data.negatives import Candidates
from flm_torchrec.data.schema import Feature

GAP_BUCKETS = 32
"""Time since the user's event before, in log2 seconds: 2^31 s are 68 years."""
LEAST_SPREAD = 1e-6
"""Standard deviation of values below which they are all the same."""


@dataclass(frozen=True)
class Events:
    """Interactions that spans point into: all of a data set, or those of one batch of a stream."""

    item: np.ndarray  # [events] int64
    timestamp: np.ndarray  # [events] int64
    event: np.ndarray  # [events] int32
    value: np.ndarray  # [events] float32
    fit: np.ndarray  # [events] bool: may be learnt from
    label: np.ndarray  # [events] float32: 1 or 0, NaN where there is none


@dataclass(frozen=True)
class Known:
    """What training events tell of ids and values: it takes O(items + users), however many the events are."""

    items: np.ndarray  # [items] float32: 1 where an event holds the item
    users: np.ndarray  # [users] float32
    value_mean: float
    value_scale: float
    """1 / standard deviation; 0 where values tell nothing, or must not be shown."""

    @classmethod
    def by(cls, data: PreparedData, known: np.ndarray, values: bool) -> Known:
        """From the events `known` [interactions] bool."""
        spread = float(data.value[known].std()) if values else 0.0
        return cls(
            items=(np.bincount(data.item[known], minlength=data.schema.items) > 0).astype(np.float32),
            users=(np.bincount(data.event_users()[known], minlength=data.schema.users) > 0).astype(np.float32),
            value_mean=float(data.value[known].mean()),
            value_scale=1.0 / spread if spread > LEAST_SPREAD else 0.0,
        )


class Assembler:
    """Builds batches from spans of events.

    Args:
        data: the data set.
        fit: [interactions] bool, the training events: ids outside them are unknown to the model.
        item_rows: least stride of `item_features`; ranks that must agree on it over gloo (reduce-scatter of
            row-wise tables) set it to the largest N that can occur.
        labels: [interactions] float32, 1 or 0, NaN where there is none. With labels the values of events, which
            the labels come from, are hidden.
        known: what made ids known to the model, or [interactions] bool, the events that did; None: `fit`.
    """

    def __init__(
        self, data: PreparedData, fit: np.ndarray, item_rows: int = 0, labels: np.ndarray | None = None,
        known: np.ndarray | Known | None = None,
    ) -> None:  # fmt: skip
        self.data = data
        self.item_rows = item_rows
        if not isinstance(known, Known):
            known = Known.by(data, fit if known is None else known, values=labels is None)
        self.known = known
        no_labels = np.full(len(fit), np.nan, np.float32)
        self.events = Events(
            data.item, data.timestamp, data.event, data.value, fit, labels if labels is not None else no_labels
        )
        self.item_features = [f for f in data.schema.features if f.entity == "item" and f.sparse]
        self.user_features = [f for f in data.schema.features if f.entity == "user" and f.sparse]

    def training(
        self, user: np.ndarray, start: np.ndarray, end: np.ndarray, drawn: Candidates, events: Events | None = None,
        begin: np.ndarray | None = None,
    ) -> Batch:  # fmt: skip
        """Learn to predict the events `start[b]:end[b]` of `user[b]`; an empty span is a sequence of no tokens.

        Events of a span that are held out are left out, as if they had not happened.

        Args:
            events: what spans point into, if not all of the data.
            begin: [B] where the user's events begin there; None: as in all of the data.
        """
        events = self.events if events is None else events
        begin = self.data.offsets[user] if begin is None else begin
        positions = spans(start, end - start)
        learnt = events.fit[positions]
        lengths = np.bincount(np.repeat(np.arange(len(user)), end - start)[learnt], minlength=len(user))
        positions = positions[learnt]
        target_items = events.item[positions]
        if drawn.log_not_sampled is None:
            candidates = drawn.items
            log_not_sampled = np.zeros((len(candidates), 2), np.float32)
        else:
            candidates = np.unique(np.concatenate([target_items, drawn.items]))
            log_not_sampled = drawn.log_not_sampled[candidates]
        return self._batch(events, user, begin, lengths, positions, target_items, candidates, log_not_sampled)

    def encoding(self, user: np.ndarray, start: np.ndarray, end: np.ndarray) -> Batch:
        """Represent `user[b]` after the events `start[b]:end[b]`: the last token of each sequence."""
        lengths = end - start + 1
        positions = spans(start, lengths)  # the last of each is the event to come: used for its place alone
        nothing = np.zeros(0, np.int64)
        begin, nobody = self.data.offsets[user], np.zeros((0, 2), np.float32)
        return self._batch(self.events, user, begin, lengths, positions, nothing, nothing, nobody)

    def items(self, ids: np.ndarray) -> Batch:
        """The items named, and one sequence of no tokens: TorchRec's sharded modules refuse a stride of 0."""
        nothing, one = np.zeros(0, np.int64), np.zeros(1, np.int64)
        log_not_sampled = np.zeros((len(ids), 2), np.float32)
        return self._batch(self.events, one, one, one, nothing, nothing, ids, log_not_sampled)

    def _batch(
        self,
        events: Events,
        user: np.ndarray,
        begin: np.ndarray,
        lengths: np.ndarray,
        positions: np.ndarray,
        target_items: np.ndarray,
        candidates: np.ndarray,
        log_not_sampled: np.ndarray,
    ) -> Batch:
        first = np.zeros(len(positions), bool)
        first[(np.cumsum(lengths) - lengths)[lengths > 0]] = True
        shown = positions[:-1][~first[1:]]  # events that are item tokens: each but a sequence's last
        token_items = events.item[shown]
        ids, rows = np.unique(np.concatenate([token_items, target_items, candidates]), return_inverse=True)
        tokens = np.full(len(positions), len(ids))
        tokens[~first] = rows[: len(token_items)]
        value = np.zeros(len(positions), np.float32)
        value[~first] = (events.value[shown] - self.known.value_mean) * self.known.value_scale
        return Batch(
            item_ids=_kjt({"item_id": Ragged(np.arange(len(ids) + 1), ids)}),
            item_features=self._features(self.data.items, self.item_features, ids, self.item_rows),
            item_dense=torch.from_numpy(self.data.items.dense[ids]),
            item_known=torch.from_numpy(self.known.items[ids]),
            users=self._users(user),
            user_dense=torch.from_numpy(self.data.users.dense[user]),
            user_known=torch.from_numpy(self.known.users[user]),
            history=self._history(events, shown, begin, first, lengths),
            value=torch.from_numpy(value),
            time=torch.from_numpy(self._time(events, shown, first, lengths)),
            lengths=torch.from_numpy(lengths),
            tokens=torch.from_numpy(tokens),
            targets=torch.from_numpy(rows[len(token_items) : len(token_items) + len(target_items)]),
            label=torch.from_numpy(events.label[positions[: len(target_items)]]),
            candidates=torch.from_numpy(rows[len(token_items) + len(target_items) :]),
            log_not_sampled=torch.from_numpy(log_not_sampled),
        )

    def _features(
        self, source: EntityFeatures, features: list[Feature], rows: np.ndarray, least: int
    ) -> KeyedJaggedTensor:
        taken = {f.name: self._look_ups(source, f, rows) for f in features}
        short = max(0, least - len(rows))
        if short:
            taken = {
                name: Ragged(np.concatenate([r.offsets, np.full(short, r.offsets[-1])]), r.values)
                for name, r in taken.items()
            }
        return _kjt(taken)

    def _users(self, user: np.ndarray) -> KeyedJaggedTensor:
        known = self.known.users[user] > 0
        ids = look_ups(self.data.schema.table("user_id"), user[known])
        features = {f.name: self._look_ups(self.data.users, f, user) for f in self.user_features}
        return _kjt({"user_id": Ragged(np.concatenate([[0], np.cumsum(known)]), ids), **features})

    def _look_ups(self, source: EntityFeatures, feature: Feature, rows: np.ndarray) -> Ragged:
        taken = source.sparse[feature.name].take(rows)
        return Ragged(taken.offsets, look_ups(self.data.schema.table(feature.table), taken.values))

    def _time(self, events: Events, shown: np.ndarray, first: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """[T] int64; without timestamps all zero."""
        time = np.zeros(len(first), np.int64)
        if self.data.schema.timestamps and len(shown):
            time[~first] = events.timestamp[shown]
            begin = np.minimum(np.cumsum(lengths) - lengths + 1, len(first) - 1)  # the first shown event
            time[~first] -= np.repeat(time[begin], np.maximum(lengths - 1, 0))
        return time

    def _history(
        self, events: Events, shown: np.ndarray, begin: np.ndarray, first: np.ndarray, lengths: np.ndarray
    ) -> KeyedJaggedTensor:
        """Event code + 1 and gap bucket + 1 of each token; 0 at the prefix."""
        event, gap = np.zeros(len(first), np.int64), np.zeros(len(first), np.int64)
        event[~first] = events.event[shown] + 1
        if self.data.schema.timestamps:
            begins = shown == np.repeat(begin, np.maximum(lengths - 1, 0))
            since = np.where(begins, 0, events.timestamp[shown] - events.timestamp[shown - 1])
            gap[~first] = gap_rows(since, GAP_BUCKETS)
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        return _kjt({"event": Ragged(offsets, event), "gap": Ragged(offsets, gap)})


def _kjt(features: dict[str, Ragged]) -> KeyedJaggedTensor:
    def join(parts: list[np.ndarray]) -> Tensor:
        joined = np.concatenate(parts) if parts else np.zeros(0, np.int64)
        return torch.from_numpy(joined.astype(np.int64, copy=False))

    return KeyedJaggedTensor(
        keys=list(features),
        values=join([r.values for r in features.values()]),
        lengths=join([r.lengths for r in features.values()]),
    )
