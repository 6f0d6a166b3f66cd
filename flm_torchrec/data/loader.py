"""Training batches: windows over the events of each user, shuffled, shared out over the ranks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count

import numpy as np

from flm_torchrec.data.batch import Batch
from flm_torchrec.data.collate import Assembler
from flm_torchrec.data.domain_shares import DomainShares
from flm_torchrec.data.negatives import Candidates, Negatives
from flm_torchrec.data.windows import Windows


@dataclass(frozen=True)
class Sharing:
    """How sequences are shuffled and shared out over the ranks."""

    batch_size: int
    """Sequences of a step, of all ranks together."""
    seed: int
    rank: int = 0
    world_size: int = 1
    moved: bool = False
    """Each epoch cuts the events of a user into windows elsewhere."""


class Loader(ABC):
    """This rank's batches, epoch after epoch."""

    def __init__(self, assembler: Assembler, negatives: Negatives, sharing: Sharing) -> None:
        self.assembler = assembler
        self.negatives = negatives
        self.sharing = sharing

    def drawn(self, number: int, step: int) -> Candidates:
        """This rank's share of the negatives of a step. They depend on seed, epoch and step alone."""
        rng = np.random.default_rng([self.sharing.seed, number, step])
        return self.negatives.draw(rng, self.sharing.rank, self.sharing.world_size)

    @abstractmethod
    def __len__(self) -> int:
        """Steps of an epoch, the same on every rank."""

    @abstractmethod
    def epoch(self, number: int, first: int = 0) -> Iterator[Batch]:
        """Batches of an epoch from step `first` on; they do not depend on the steps before."""

    def after(self, steps: int) -> Iterator[Batch]:
        """Batches without end, from step `steps` of the run on: so a run resumes, at any number of ranks."""
        epoch, first = divmod(steps, len(self))
        yield from self.epoch(epoch, first)
        for number in count(epoch + 1):
            yield from self.epoch(number)

    def check_ranks(self) -> None:  # noqa: B027 - a default, not a gap
        """Raise DataError where some rank would have nothing to learn from. By default, every rank has something."""


class TrainLoader(Loader):
    """Batches of data that are all in memory.

    The order depends on seed and epoch alone: a global batch holds the same sequences and drawn negatives
    at any number of ranks, and rank r of W takes every W-th of them. The last batch of an epoch may be short.

    Args:
        shares: of the domains of joint data; None: an epoch has each window once.
    """

    def __init__(
        self,
        windows: Windows,
        assembler: Assembler,
        negatives: Negatives,
        sharing: Sharing,
        shares: DomainShares | None = None,
    ) -> None:
        super().__init__(assembler, negatives, sharing)
        self.windows = windows
        self.shares = shares

    def __len__(self) -> int:
        return -(-len(self.windows) // self.sharing.batch_size)

    def epoch(self, number: int, first: int = 0) -> Iterator[Batch]:
        """Batches of an epoch from step `first` on."""
        rng = np.random.default_rng([self.sharing.seed, number])
        order = rng.permutation(len(self.windows)) if self.shares is None else self.shares.order(rng)
        windows = self.windows.moved(self.sharing.seed, number) if self.sharing.moved else self.windows
        size = self.sharing.batch_size
        for step in range(first, len(self)):
            user, start, end = self._share(windows, order[step * size : (step + 1) * size])
            yield self.assembler.training(user, start, end, self.drawn(number, step))

    def _share(self, windows: Windows, batch: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """User, start and end of this rank's windows of a global batch.

        Empty spans are added so that every rank has equally many: pooling of sharded tables needs one stride.
        """
        world_size = self.sharing.world_size
        own = batch[self.sharing.rank :: world_size]
        user, start, end = windows.user[own], windows.start[own], windows.end[own]
        missing = -(-len(batch) // world_size) - len(own)
        user, start, end = shortest_first(missing, user, start, end)
        return user, start, end


def shortest_first(
    empty: int, user: np.ndarray, start: np.ndarray, end: np.ndarray, *more: np.ndarray
) -> list[np.ndarray]:
    """Numbers [n] of each span of events → [empty + n], as a batch holds them: attention need not sort their tokens.

    Args:
        empty: spans without events that are added, whose numbers are 0.
    """
    pad = np.zeros(empty, np.int64)
    order = np.argsort(np.concatenate([end - start, pad]), kind="stable")
    return [np.concatenate([part, pad])[order] for part in (user, start, end, *more)]
