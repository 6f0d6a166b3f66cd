"""The items that a user has had: lists leave them out."""

from __future__ import annotations

import numpy as np

from flm_torchrec.data.dataset import PreparedData, spans
from flm_torchrec.data.splits import Examples

EXAMPLES = 2**14
"""Examples whose known events are looked at together: those of all examples could be all events."""


def known_items(data: PreparedData, examples: Examples) -> tuple[np.ndarray, np.ndarray]:
    """[n] example and [n] item of each known event; events of a kind that is not predicted leave no item out."""
    start = data.offsets[examples.user]
    lengths = examples.end - start
    rows = np.repeat(np.arange(len(examples)), lengths)
    known = spans(start, lengths)
    if data.targets is not None:
        had = data.targets[data.event[known]]
        rows, known = rows[had], known[had]
    return rows, data.item[known]


def had_before(data: PreparedData, examples: Examples) -> np.ndarray:
    """[E] bool: the true item is one of the known items."""
    found = np.zeros(len(examples), bool)
    for first in range(0, len(examples), EXAMPLES):
        part = examples.take(np.arange(first, min(first + EXAMPLES, len(examples))))
        rows, items = known_items(data, part)
        found[first + rows[items == data.item[part.end][rows]]] = True
    return found
