"""Which rank reads what of a stream, and when: units of complete users, dealt out to lanes in each epoch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from flm_torchrec.data.loader import Sharing
from flm_torchrec.data.row_groups import units_of
from flm_torchrec.data.survey import EventStream
from flm_torchrec.data.windows import number_of_windows
from flm_torchrec.errors import DataError

LANES = 64
"""Lanes that a global batch is merged from, at any number of ranks. Long data have more, so that more ranks can share
them. Memory is a unit a lane, 25 bytes a row."""
MOST_LANES = 1024


def merged(sizes: np.ndarray, taken: int) -> np.ndarray:
    """[L] sizes of lanes that are merged in proportion → [L] how much of each is among the first `taken` of all.

    Entry i of lane l has position (i + 1/2) / sizes[l]; equal positions are ordered by lane (Webster's method of
    apportionment).
    """
    total = int(sizes.sum())
    counts = np.clip(-((total - 2 * sizes * taken) // (2 * total)), 0, sizes)  # positions below taken / total
    while (missing := taken - int(counts.sum())) > 0:
        counts[np.argmin(np.where(counts < sizes, (2 * counts + 1) / sizes, np.inf))] += 1
    for _ in range(-missing):
        positions = np.where(counts > 0, (2 * counts - 1) / sizes, -np.inf)
        counts[len(sizes) - 1 - np.argmax(positions[::-1])] -= 1
    return counts


@dataclass(frozen=True)
class Deal:
    """The units of each lane in one epoch, in order, and how many windows each unit has."""

    units: list[np.ndarray]  # by lane
    ends: list[np.ndarray]  # by lane, by unit: windows of the lane up to the end of the unit
    sizes: np.ndarray  # [lanes] windows


class LanePlan:
    """How the windows of a stream are shared out over lanes, and lanes over ranks: rank r of W has lanes r, r + W, …

    Args:
        max_history: a window has at most one event more.
    """

    def __init__(self, stream: EventStream, max_history: int, sharing: Sharing) -> None:
        self.stream = stream
        self.max_history = max_history
        self.sharing = sharing
        self.units = units_of(stream.groups, stream.offsets, least=LANES)  # [units + 1]
        windows = number_of_windows(stream.offsets[:-1], stream.train_end, max_history)
        self.windows = np.diff(np.concatenate([[0], np.cumsum(windows)])[self.units])  # [units]
        self.nonempty = np.flatnonzero(self.windows)  # units
        self.lanes = min(len(self.nonempty), max(LANES, min(MOST_LANES, len(self.nonempty) // LANES)))

    @property
    def steps(self) -> int:
        """Steps of an epoch."""
        return -(-int(self.windows.sum()) // self.sharing.batch_size)

    @property
    def own_lanes(self) -> range:
        """The lanes that this rank reads."""
        return range(self.sharing.rank, self.lanes, self.sharing.world_size)

    def deal(self, epoch: int) -> Deal:
        """The units shuffled and dealt out to the lanes; the same on every rank."""
        order = np.random.default_rng([self.sharing.seed, epoch]).permutation(self.nonempty)
        units = [order[lane :: self.lanes] for lane in range(self.lanes)]
        ends = [np.cumsum(self.windows[lane]) for lane in units]
        return Deal(units, ends, np.array([end[-1] for end in ends]))

    def check_ranks(self) -> None:
        """Raise DataError where some ranks would have no lane, and so nothing to learn from, in any epoch."""
        if self.sharing.world_size > self.lanes:
            raise DataError(
                f"{self.stream.groups.path}: streamed, these data are shared out over {self.lanes} ranks at most, not"
                f" {self.sharing.world_size}; set data.stream=false"
            )
