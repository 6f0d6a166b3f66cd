"""Training batches: windows over the events of each user, shuffled, shared out over the ranks."""

from __future__ import annotations

import queue
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from itertools import count
from typing import Generic, Literal, TypeVar

import numpy as np

from flm_torchrec.data.batch import Batch
from flm_torchrec.data.collate import Assembler, Candidates
from flm_torchrec.data.dataset import PreparedData
from flm_torchrec.data.splits import Splits


@dataclass(frozen=True)
class Windows:
    """Spans of training events: each event is the target of exactly one."""

    user: np.ndarray  # [windows] int64
    start: np.ndarray  # [windows] int64
    end: np.ndarray  # [windows] int64

    def __len__(self) -> int:
        return len(self.user)


def windows(data: PreparedData, splits: Splits, max_history: int) -> Windows:
    """Cut each user's training events into spans of at most `max_history` + 1, counted from the newest."""
    return cut(np.arange(data.schema.users), data.offsets[:-1], splits.train_end, max_history)


def cut(users: np.ndarray, start: np.ndarray, end: np.ndarray, max_history: int) -> Windows:
    """Windows of the events `start[u]:end[u]` of each of `users`."""
    span = max_history + 1
    counts = number_of_windows(start, end, max_history)
    row = np.repeat(np.arange(len(users)), counts)
    nth = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
    ends = end[row] - nth * span
    return Windows(users[row], np.maximum(ends - span, start[row]), ends)


def number_of_windows(start: np.ndarray, end: np.ndarray, max_history: int) -> np.ndarray:
    """[users]: into how many windows each user's events are cut."""
    return -(-(end - start) // (max_history + 1))


class Negatives:
    """Draws negatives by popularity ** power, the same for any number of ranks."""

    def __init__(self, counts: np.ndarray, number: int | Literal["all"], power: float) -> None:
        self.number = number
        self.items = len(counts)
        weights = np.where(counts > 0, counts, 0).astype(np.float64) ** power * (counts > 0)
        self.cumulative = np.cumsum(weights / weights.sum())
        popularity = counts / counts.sum()
        # An item that is all of the data would be absent with probability 0; a bound keeps the logarithm finite.
        absent = np.log1p(-np.minimum(np.stack([popularity, weights / weights.sum()], 1), 1 - 1e-6))
        self.log_not_sampled = absent.astype(np.float32)

    def draw(self, rng: np.random.Generator, rank: int, world_size: int) -> Candidates:
        if self.number == "all":
            return Candidates(np.arange(rank, self.items, world_size), None)
        drawn = np.searchsorted(self.cumulative, rng.random(self.number), side="right")
        return Candidates(np.minimum(drawn, self.items - 1)[rank::world_size], self.log_not_sampled)


class Loader(ABC):
    """This rank's batches, epoch after epoch."""

    def __init__(
        self, assembler: Assembler, negatives: Negatives, batch_size: int, seed: int, rank: int, world_size: int
    ) -> None:
        self.assembler = assembler
        self.negatives = negatives
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size

    def drawn(self, number: int, step: int) -> Candidates:
        """This rank's share of the negatives of a step, which depend on seed, epoch and step alone."""
        rng = np.random.default_rng([self.seed, number, step])
        return self.negatives.draw(rng, self.rank, self.world_size)

    @abstractmethod
    def __len__(self) -> int:
        """Steps of an epoch, the same on every rank."""

    @abstractmethod
    def epoch(self, number: int, first: int = 0) -> Iterator[Batch]:
        """Batches of an epoch from the `first` on, the same ones whatever came before."""

    def after(self, steps: int) -> Iterator[Batch]:
        """Batches without end, those of the first `steps` steps left out: how a run resumes, at any number of ranks."""
        epoch, first = divmod(steps, len(self))
        yield from self.epoch(epoch, first)
        for number in count(epoch + 1):
            yield from self.epoch(number)


class TrainLoader(Loader):
    """Batches of data that are all in memory.

    The order depends on seed and epoch alone: a global batch holds the same sequences and drawn negatives
    at any number of ranks, and rank r of W takes every W-th of them. The last batch of an epoch may be short.
    """

    def __init__(
        self,
        spans: Windows,
        assembler: Assembler,
        negatives: Negatives,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        super().__init__(assembler, negatives, batch_size, seed, rank, world_size)
        self.spans = spans

    def __len__(self) -> int:
        return -(-len(self.spans) // self.batch_size)

    def epoch(self, number: int, first: int = 0) -> Iterator[Batch]:
        order = np.random.default_rng([self.seed, number]).permutation(len(self.spans))
        for step in range(first, len(self)):
            rows = order[step * self.batch_size : (step + 1) * self.batch_size]
            user, start, end = self._share(rows)
            yield self.assembler.training(user, start, end, self.drawn(number, step))

    def _share(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Rank's rows, with empty spans so that every rank has equally many: sharded pooling needs one stride."""
        mine = rows[self.rank :: self.world_size]
        user, start, end = self.spans.user[mine], self.spans.start[mine], self.spans.end[mine]
        short = -(-len(rows) // self.world_size) - len(mine)
        pad = np.zeros(short, np.int64)
        return np.concatenate([user, pad]), np.concatenate([start, pad]), np.concatenate([end, pad])


T = TypeVar("T")


class Prefetch(Generic[T]):
    """Runs an iterator in a thread, `depth` items ahead; an exception there is raised here."""

    def __init__(self, source: Iterator[T], depth: int = 2) -> None:
        self.source = source
        self.buffer: queue.Queue[T | BaseException | None] = queue.Queue(depth)
        self.stopped = threading.Event()
        self.waited = 0.0
        """Seconds that were spent waiting for items."""

    def __iter__(self) -> Generator[T, None, None]:
        thread = threading.Thread(target=self._fill, daemon=True)
        thread.start()
        try:
            while (item := self._get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            self.stopped.set()
            thread.join()  # a thread still inside PyTorch when the interpreter ends would abort the process

    def _get(self) -> T | BaseException | None:
        began = time.monotonic()
        item = self.buffer.get()
        self.waited += time.monotonic() - began
        return item

    def _fill(self) -> None:
        try:
            for item in self.source:
                if not self._put(item):
                    return
            self._put(None)
        except BaseException as error:
            self._put(error)

    def _put(self, item: T | BaseException | None) -> bool:
        while not self.stopped.is_set():
            try:
                self.buffer.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False
