"""Training batches read while training: lanes of shuffled units of whole users, shared out over the ranks."""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, fields

import numpy as np

from flm_torchrec.data.batch import Batch
from flm_torchrec.data.collate import Assembler, Events
from flm_torchrec.data.dataset import spans
from flm_torchrec.data.loader import Loader
from flm_torchrec.data.negatives import Candidates, Negatives
from flm_torchrec.data.prefetch import Prefetch
from flm_torchrec.data.survey import Stream
from flm_torchrec.data.windows import cut, number_of_windows
from flm_torchrec.errors import DataError

LANES = 64
"""Streams that a global batch is merged from, at any number of ranks; more of long data, so that more ranks can share
them."""
MOST_LANES = 1024
MOST_ROWS = 200_000
"""Rows of a unit at most (but for a user with more): a row group of usual size. Memory is a unit a lane, 25 bytes a
row."""


def units_of(stream: Stream) -> np.ndarray:
    """[units + 1] first user of each unit: the users who begin in a row group, or in a part of it.

    A group is parted where it is larger than MOST_ROWS, or there would be fewer units than LANES. Each part is read
    from the group's start, so of data that are larger, row groups should not be.
    """
    starts = stream.groups.starts
    target = min(MOST_ROWS, max(1, stream.groups.rows // LANES))
    rows = [
        np.linspace(start, stop, -(-(stop - start) // target), endpoint=False).astype(np.int64)
        for start, stop in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True)
    ]
    first = np.searchsorted(stream.offsets[:-1], np.concatenate(rows), "left")
    return np.unique(np.concatenate([[0], first, [len(stream.offsets) - 1]]))


def merged(sizes: np.ndarray, taken: int) -> np.ndarray:
    """Of lanes of `sizes` [L], merged in proportion, how much of each is among the first `taken` of all.

    Entry i of lane l has place (i + 1/2) / sizes[l]; equal places go by lane (Webster's method of apportionment).
    """
    total = int(sizes.sum())
    counts = np.clip(-((total - 2 * sizes * taken) // (2 * total)), 0, sizes)  # those of a place below taken / total
    while (missing := taken - int(counts.sum())) > 0:
        counts[np.argmin(np.where(counts < sizes, (2 * counts + 1) / sizes, np.inf))] += 1
    for _ in range(-missing):
        places = np.where(counts > 0, (2 * counts - 1) / sizes, -np.inf)
        counts[len(sizes) - 1 - np.argmax(places[::-1])] -= 1
    return counts


@dataclass(frozen=True)
class Windows:
    """Windows in the order they are learnt from: the events of each in one piece, with the user's event before it."""

    user: np.ndarray  # [windows] int64
    before: np.ndarray  # [windows] int64: 1 if there is an event before, which the first time gap is told from
    offsets: np.ndarray  # [windows + 1] int64
    events: Events

    def __len__(self) -> int:
        return len(self.user)

    def part(self, start: int, stop: int) -> Windows:
        first, last = self.offsets[start], self.offsets[stop]
        of, rows = self.events, slice(first, last)
        events = Events(of.item[rows], of.timestamp[rows], of.event[rows], of.value[rows], of.fit[rows], of.label[rows])
        return Windows(self.user[start:stop], self.before[start:stop], self.offsets[start : stop + 1] - first, events)


def joined(parts: list[Windows]) -> Windows:
    """The windows of all parts, of which there may be none."""
    if not parts:
        none = np.zeros(0, np.int64)
        events = Events(none, none, none.astype(np.int32), none.astype(np.float32), none > 0, none.astype(np.float32))
        return Windows(none, none, np.zeros(1, np.int64), events)
    ends = np.cumsum([0, *(p.offsets[-1] for p in parts)])
    return Windows(
        user=np.concatenate([p.user for p in parts]),
        before=np.concatenate([p.before for p in parts]),
        offsets=np.concatenate([[0], *(p.offsets[1:] + end for p, end in zip(parts, ends[:-1], strict=True))]),
        events=Events(*(np.concatenate([getattr(p.events, f.name) for p in parts]) for f in fields(Events))),
    )


@dataclass(frozen=True)
class Deal:
    """Who reads what in an epoch: the units of each lane in order, and how many windows each has."""

    units: list[np.ndarray]  # by lane
    ends: list[np.ndarray]  # by lane, by unit: windows of the lane up to its end
    sizes: np.ndarray  # [lanes] windows


class StreamLoader(Loader):
    """Batches of data on disk, of which each rank holds a unit per lane of its own.

    Each epoch deals the units out to the lanes anew, and shuffles the windows of a unit. A global batch is merged from
    all lanes and so holds the same sequences at any number of ranks; rank r of W reads lanes r, r + W … alone. Where
    an epoch goes on follows from its step alone. Ranks with fewer sequences in a step get empty ones.
    """

    def __init__(
        self, stream: Stream, assembler: Assembler, negatives: Negatives, max_history: int, batch_size: int, seed: int,
        rank: int = 0, world_size: int = 1,
    ) -> None:  # fmt: skip
        super().__init__(assembler, negatives, batch_size, seed, rank, world_size)
        self.stream = stream
        self.max_history = max_history
        self.units = units_of(stream)
        cuts = number_of_windows(stream.offsets[:-1], stream.train_end, max_history)
        self.windows = np.diff(np.concatenate([[0], np.cumsum(cuts)])[self.units])  # [units]
        self.filled = np.flatnonzero(self.windows)
        self.lanes = min(len(self.filled), max(LANES, min(MOST_LANES, len(self.filled) // LANES)))

    def __len__(self) -> int:
        return -(-int(self.windows.sum()) // self.batch_size)

    def epoch(self, number: int, first: int = 0) -> Iterator[Batch]:
        deal = self._deal(number)
        taken = merged(deal.sizes, first * self.batch_size)
        with closing(iter(Prefetch(self._read(number, deal, taken)))) as ahead:
            lanes = _Lanes(ahead)
            for step in range(first, len(self)):
                upto = merged(deal.sizes, min((step + 1) * self.batch_size, int(deal.sizes.sum())))
                most = max(int((upto - taken)[r :: self.world_size].sum()) for r in range(self.world_size))
                parts = [
                    part
                    for lane in range(self.rank, self.lanes, self.world_size)
                    for part in lanes.take(lane, int(upto[lane] - taken[lane]))
                ]
                taken = upto
                yield self._batch(parts, most, self.drawn(number, step))

    def check_ranks(self) -> None:
        """Raise DataError where some ranks would have nothing to learn from, ever."""
        if self.world_size > self.lanes:
            raise DataError(
                f"{self.stream.groups.path}: streamed, these data are shared out over {self.lanes} ranks at most, not"
                f" {self.world_size}; set data.stream=false"
            )

    def most_sequences(self, epochs: int) -> int:
        """No rank has more sequences in a step of the first epochs: a bound, not the least one."""
        most = 0.0
        for number in range(epochs):
            sizes = self._deal(number).sizes
            # A step moves the place by no more than this, as counts are within 1/2 of place x size each.
            move = (self.batch_size + self.lanes) / sizes.sum()
            of_lane = np.floor(sizes * move) + 1
            most = max(most, *(of_lane[rank :: self.world_size].sum() for rank in range(self.world_size)))
        return min(self.batch_size, int(most))

    def _deal(self, number: int) -> Deal:
        order = np.random.default_rng([self.seed, number]).permutation(self.filled)
        units = [order[lane :: self.lanes] for lane in range(self.lanes)]
        ends = [np.cumsum(self.windows[lane]) for lane in units]
        return Deal(units, ends, np.array([end[-1] for end in ends]))

    def _read(self, number: int, deal: Deal, taken: np.ndarray) -> Iterator[tuple[int, Windows]]:
        """Lane and windows of the units of this rank's lanes, in the order in which they are needed."""
        wanted = []
        for lane in range(self.rank, self.lanes, self.world_size):
            for unit, end in zip(deal.units[lane], deal.ends[lane], strict=True):
                start = int(end - self.windows[unit])
                if end > taken[lane]:
                    skip = max(0, int(taken[lane]) - start)
                    wanted.append(((start + skip + 0.5) / deal.sizes[lane], lane, int(unit), skip))
        for _, lane, unit, skip in sorted(wanted):
            found = self._shuffled(number, unit)
            yield lane, found.part(skip, len(found))

    def _shuffled(self, number: int, unit: int) -> Windows:
        """The windows of a unit in the epoch's order."""
        stream = self.stream
        users = np.arange(self.units[unit], self.units[unit + 1])
        begin, ends = stream.offsets[users], stream.offsets[users + 1]
        rows = stream.groups.read(int(begin[0]), int(ends[-1]))
        spans_ = cut(users, begin, stream.train_end[users], self.max_history)
        order = np.random.default_rng([self.seed, number, 0, unit]).permutation(len(spans_))
        user, start, end = spans_.user[order], spans_.start[order], spans_.end[order]
        before = (start > stream.offsets[user]).astype(np.int64)
        lengths = end - start + before
        places = spans(start - before - begin[0], lengths)
        item = rows["item_id"][places]
        return Windows(
            user=user,
            before=before,
            offsets=np.concatenate([[0], np.cumsum(lengths)]),
            events=Events(
                item=item,
                timestamp=rows["timestamp"][places],
                event=rows["event"][places],
                value=rows["value"][places],
                fit=~stream.held_out(item),
                label=np.broadcast_to(np.float32(np.nan), len(item)),
            ),
        )

    def _batch(self, parts: list[Windows], sequences: int, drawn: Candidates) -> Batch:
        found = joined(parts)
        pad = np.zeros(sequences - len(found), np.int64)
        begin = found.offsets[:-1]
        return self.assembler.training(
            user=np.concatenate([found.user, pad]),
            start=np.concatenate([begin + found.before, pad]),
            end=np.concatenate([found.offsets[1:], pad]),
            drawn=drawn,
            events=found.events,
            begin=np.concatenate([begin, pad]),
        )


class _Lanes:
    """What of each lane has been read and not yet been taken."""

    def __init__(self, source: Iterator[tuple[int, Windows]]) -> None:
        self.source = source
        self.ready: defaultdict[int, deque[Windows]] = defaultdict(deque)
        self.taken: Counter[int] = Counter()
        """Windows that were taken of the first unit of each lane."""

    def take(self, lane: int, windows: int) -> list[Windows]:
        """The next windows of a lane, which may lie in several units."""
        parts = []
        while windows:
            while not self.ready[lane]:
                found, unit = next(self.source)
                self.ready[found].append(unit)
            unit, start = self.ready[lane][0], self.taken[lane]
            stop = min(start + windows, len(unit))
            parts.append(unit.part(start, stop))
            windows -= stop - start
            self.taken[lane] = stop
            if stop == len(unit):
                self.ready[lane].popleft()
                self.taken[lane] = 0
        return parts
