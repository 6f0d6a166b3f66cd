"""Training batches: windows over the events of each user, shuffled, shared out over the ranks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from itertools import count

import numpy as np

from flm_torchrec.data.batch import Batch
from flm_torchrec.data.collate import Assembler
from flm_torchrec.data.negatives import Candidates, Negatives
from flm_torchrec.data.windows import Windows


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
