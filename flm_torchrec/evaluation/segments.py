"""Kinds of examples, by which results are broken down: popular, rare and repeated items, new and old users."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from flm_torchrec.data.dataset import PreparedData
from flm_torchrec.data.splits import Examples
from flm_torchrec.evaluation.known_items import had_before

HEAD = 0.2
"""The share of the items with training events, the most popular ones, that are head items."""

NO_EVENTS = "items without training events"


def labels_by(
    by: Sequence[str], data: PreparedData, examples: Examples, train_mask: np.ndarray
) -> Iterator[np.ndarray]:
    """[E] str labels of the examples: those of the split or the data, if there are any, then one array for each `by`.

    Of joint data, the domains of the next items come first.

    Args:
        train_mask: [interactions] bool, the events that were learned from.
    """
    if data.item_domain is not None:
        yield np.array(data.schema.domains)[data.item_domain[data.item[examples.end]]]
    if examples.label is not None:
        yield examples.label
    elif data.segment is not None:
        yield data.segment[examples.end]
    for one in by:
        yield BY[one](data, examples, train_mask)


def _by_items(data: PreparedData, examples: Examples, train_mask: np.ndarray) -> np.ndarray:
    """By the training events of the next item. Items with equally many events are in one segment, the head."""
    events = data.item_counts(train_mask)
    known = np.sort(events[events > 0])[::-1]
    least = known[max(0, round(HEAD * len(known)) - 1)] if len(known) else 1
    found = events[data.item[examples.end]]
    return np.select([found == 0, found >= least], [NO_EVENTS, "head items"], "tail items")


def _by_users(data: PreparedData, examples: Examples, train_mask: np.ndarray) -> np.ndarray:
    """By the training events of the user: none, at most the median of the users who have some, or more."""
    events = data.user_counts(train_mask)
    found = events[examples.user]
    middle = int(np.median(events[events > 0])) if events.any() else 0
    few, many = f"users of at most {middle} training events", f"users of more than {middle} training events"
    return np.select([found == 0, found <= middle], ["new users, without training events", few], many)


def _by_events(data: PreparedData, examples: Examples, train_mask: np.ndarray) -> np.ndarray:
    """By the kind of the next event."""
    return np.array(data.schema.events)[data.event[examples.end]]


def _by_repeats(data: PreparedData, examples: Examples, train_mask: np.ndarray) -> np.ndarray:
    """By whether the user has had the next item."""
    return np.where(had_before(data, examples), "had before", "new to the user")


BY = {"items": _by_items, "users": _by_users, "events": _by_events, "repeats": _by_repeats}
"""What `flm evaluate --by` can break results down by."""
