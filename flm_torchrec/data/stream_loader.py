"""Training batches read while training: each rank reads its lanes of shuffled units of complete users."""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass

import numpy as np

from flm_torchrec.data.batch import Batch
from flm_torchrec.data.collate import Assembler, TrainEvents
from flm_torchrec.data.columns import EventBlock
from flm_torchrec.data.dataset import spans
from flm_torchrec.data.event_files import WEIGHT, context_columns
from flm_torchrec.data.lanes import Deal, LanePlan, merged
from flm_torchrec.data.loader import Loader, shortest_first
from flm_torchrec.data.negatives import Candidates, Negatives
from flm_torchrec.data.prefetch import Prefetch
from flm_torchrec.data.windows import cut


@dataclass(frozen=True)
class LoadedWindows:
    """Windows in the order they are learnt from, with their events in one piece.

    Before a window's events stands the user's event before the window, if there is one: it gives the first time gap.
    """

    user: np.ndarray  # [windows] int64
    before: np.ndarray  # [windows] int64: 1 if there is an event before the window, else 0
    offsets: np.ndarray  # [windows + 1] int64, into `events`
    events: TrainEvents

    def __len__(self) -> int:
        return len(self.user)

    def part(self, start: int, stop: int) -> LoadedWindows:
        """The windows `start:stop`."""
        first, last = self.offsets[start], self.offsets[stop]
        return LoadedWindows(
            user=self.user[start:stop],
            before=self.before[start:stop],
            offsets=self.offsets[start : stop + 1] - first,
            events=self.events.take(slice(first, last)),
        )


def joined(parts: list[LoadedWindows], none: TrainEvents) -> LoadedWindows:
    """The windows of all parts. Where there is no part, their events are `none`."""
    if not parts:
        nobody = np.zeros(0, np.int64)
        return LoadedWindows(nobody, nobody, np.zeros(1, np.int64), none)
    ends = np.cumsum([0, *(p.offsets[-1] for p in parts)])
    return LoadedWindows(
        user=np.concatenate([p.user for p in parts]),
        before=np.concatenate([p.before for p in parts]),
        offsets=np.concatenate([[0], *(p.offsets[1:] + end for p, end in zip(parts, ends[:-1], strict=True))]),
        events=TrainEvents.concat([p.events for p in parts]),
    )


class StreamLoader(Loader):
    """Batches of data on disk, of which each rank holds a unit per lane of its own.

    Each epoch deals the units out to the lanes again, and shuffles the windows of a unit. A global batch is merged
    from all lanes and so holds the same sequences at any number of ranks. Where an epoch resumes follows from the step
    alone. Ranks with fewer sequences in a step get empty ones.
    """

    def __init__(self, plan: LanePlan, assembler: Assembler, negatives: Negatives) -> None:
        super().__init__(assembler, negatives, plan.sharing)
        self.plan = plan

    def __len__(self) -> int:
        return self.plan.steps

    def check_ranks(self) -> None:
        """Raise DataError where some ranks would have nothing to learn from, in any epoch."""
        self.plan.check_ranks()

    def epoch(self, number: int, first: int = 0) -> Iterator[Batch]:
        """Batches of an epoch from step `first` on."""
        deal = self.plan.deal(number)
        size, ranks = self.sharing.batch_size, self.sharing.world_size
        taken = merged(deal.sizes, first * size)
        with closing(iter(Prefetch(self._read(number, deal, taken)))) as ahead:
            lanes = _Lanes(ahead)
            for step in range(first, len(self)):
                upto = merged(deal.sizes, min((step + 1) * size, int(deal.sizes.sum())))
                most = max(int((upto - taken)[r::ranks].sum()) for r in range(ranks))
                parts = [p for lane in self.plan.own_lanes for p in lanes.take(lane, int(upto[lane] - taken[lane]))]
                taken = upto
                yield self._batch(parts, most, self.drawn(number, step))

    def _read(self, number: int, deal: Deal, taken: np.ndarray) -> Iterator[tuple[int, LoadedWindows]]:
        """Lane and windows of the units of this rank's lanes, in the order in which they are needed."""
        needed = []
        for lane in self.plan.own_lanes:
            for unit, end in zip(deal.units[lane], deal.ends[lane], strict=True):
                start = int(end - self.plan.windows[unit])
                if end > taken[lane]:
                    skip = max(0, int(taken[lane]) - start)
                    needed.append(((start + skip + 0.5) / deal.sizes[lane], lane, int(unit), skip))
        for _, lane, unit, skip in sorted(needed):
            windows = self._shuffled(number, unit)
            yield lane, windows.part(skip, len(windows))

    def _shuffled(self, number: int, unit: int) -> LoadedWindows:
        """The windows of a unit in the epoch's order."""
        plan, stream = self.plan, self.plan.stream
        users = np.arange(plan.units[unit], plan.units[unit + 1])
        begin = stream.offsets[users]
        events = self._events(EventBlock(int(users[0]), stream.offsets[plan.units[unit] : plan.units[unit + 1] + 1]))
        windows = cut(users, begin, stream.train_end[users], plan.max_history)
        if self.sharing.moved:
            windows = windows.moved(self.sharing.seed, number)
        order = np.random.default_rng([self.sharing.seed, number, 0, unit]).permutation(len(windows))
        user, start, end = windows.user[order], windows.start[order], windows.end[order]
        before = (start > stream.offsets[user]).astype(np.int64)
        lengths = end - start + before
        positions = spans(start - before - begin[0], lengths)
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        return LoadedWindows(user, before, offsets, events.take(positions))

    def _events(self, block: EventBlock) -> TrainEvents:
        """All events of neighbouring users."""
        stream, rows = self.plan.stream, block.rows
        if stream.rule is None:
            return self.assembler.events.take(rows)
        columns = stream.groups.read(rows.start, rows.stop, stream.columns)
        held = stream.rule.held_out(block.users, columns["item_id"], columns["event"])
        names = context_columns(self.assembler.data.schema)
        return TrainEvents(
            item=columns["item_id"],
            timestamp=columns["timestamp"],
            event=columns["event"],
            value=columns["value"],
            learnable=~held,
            label=np.zeros((len(held), 0), np.float32),
            weight=columns.get(WEIGHT, np.broadcast_to(np.float32(1), len(held))),
            context=np.stack([columns[name] for name in names], 1) if names else np.zeros((len(held), 0), np.int32),
        )

    def _batch(self, parts: list[LoadedWindows], sequences: int, drawn: Candidates) -> Batch:
        """The batch of all parts, with empty sequences beside them up to `sequences`."""
        windows = joined(parts, self.assembler.events.take(slice(0, 0)))
        first = windows.offsets[:-1]
        user, start, end, begin = shortest_first(
            sequences - len(windows), windows.user, first + windows.before, windows.offsets[1:], first
        )
        return self.assembler.training(user, start, end, drawn=drawn, events=windows.events, begin=begin)


class _Lanes:
    """The units of each lane that have been read and not yet been taken."""

    def __init__(self, source: Iterator[tuple[int, LoadedWindows]]) -> None:
        self.source = source
        self.ready: defaultdict[int, deque[LoadedWindows]] = defaultdict(deque)
        self.taken: Counter[int] = Counter()
        """By lane, the windows that were taken of its first unit."""

    def take(self, lane: int, windows: int) -> list[LoadedWindows]:
        """The next windows of a lane, which may lie in several units."""
        parts = []
        while windows:
            while not self.ready[lane]:
                read_lane, unit = next(self.source)
                self.ready[read_lane].append(unit)
            unit, start = self.ready[lane][0], self.taken[lane]
            stop = min(start + windows, len(unit))
            parts.append(unit.part(start, stop))
            windows -= stop - start
            self.taken[lane] = stop
            if stop == len(unit):
                self.ready[lane].popleft()
                self.taken[lane] = 0
        return parts
