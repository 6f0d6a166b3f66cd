"""Rows of stored tables → their places in new tables, under any old and new plan of sharding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.distributed._shard.sharded_tensor import ShardedTensor

from flm_torchrec.distributed.comm import Comm
from flm_torchrec.errors import RunError

SENT_ROWS = 65536
"""Rows of a stored block that a rank sends at once."""


@dataclass(frozen=True)
class TableBlock:
    """A part of a tensor [rows, D] or [rows]."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def rows(self) -> tuple[int, int]:
        """First row, and the row after the last."""
        return self.offsets[0], self.offsets[0] + self.sizes[0]

    @property
    def columns(self) -> tuple[int, int]:
        """First column, and the column after the last; one column where there are rows alone."""
        if len(self.sizes) == 1:
            return 0, 1
        return self.offsets[1], self.offsets[1] + self.sizes[1]


@dataclass(frozen=True)
class StoredBlock:
    """A block of a tensor on disk, as one rank wrote it."""

    block: TableBlock
    dtype: torch.dtype
    read: Callable[[], Tensor]
    """Reads the block into memory; raises RunError."""


Held = list[tuple[TableBlock, Tensor]]
"""The parts of a tensor that a rank holds, each with its memory."""


def held_by_rank(tensor: Tensor | ShardedTensor | None) -> Held:
    """This rank's parts of a tensor: its shards, or all of it where the tensor is not sharded; None: nothing."""
    if tensor is None:
        return []
    if not isinstance(tensor, ShardedTensor):
        return [(TableBlock((0,) * tensor.dim(), tuple(tensor.shape)), tensor.detach())]
    return [
        (TableBlock(tuple(shard.metadata.shard_offsets), tuple(shard.metadata.shard_sizes)), shard.tensor.detach())
        for shard in tensor.local_shards()
    ]


def move_rows(stored: Sequence[StoredBlock], origin: np.ndarray, held: Held, comm: Comm) -> None:
    """Fill a table with rows of a stored table. Rows without an origin become zero. Collective.

    One rank reads a block, once, and sends its rows to the ranks that hold them in the new table. A rank has in memory
    its part of the new table and one block of the old one, never a whole table that several ranks have written.

    Args:
        stored: the blocks of the old table, the same on every rank.
        origin: [rows] int64, the old row of each new row; -1 where there is none.
        held: this rank's parts of the new table.

    Raises:
        RunError: a block cannot be read; on every rank.
    """
    for _, tensor in held:
        tensor.zero_()
    mover = _Mover(origin, comm.gather([block for block, _ in held]), held, comm)
    for first in range(0, len(stored), comm.world_size):
        mover.move(stored[first : first + comm.world_size])


class _Mover:
    """Moves blocks of one table.

    Args:
        blocks: by rank, the parts of the new table that the rank holds.
        held: the parts of this rank.
    """

    def __init__(self, origin: np.ndarray, blocks: list[list[TableBlock]], held: Held, comm: Comm) -> None:
        self.blocks = blocks
        self.held = held
        self.comm = comm
        order = np.argsort(origin, kind="stable")
        self.new, self.old = order, origin[order]

    def move(self, stored: Sequence[StoredBlock]) -> None:
        """Move up to one block for each rank, which reads the block of its number."""
        mine = self._read(stored)
        most = max(one.block.sizes[0] for one in stored)
        for start in range(0, most, SENT_ROWS):
            parts = [_part(one.block, start) for one in stored]
            sent = [torch.zeros(0, dtype=stored[0].dtype)] * self.comm.world_size
            if mine is not None:
                part, values = parts[self.comm.rank], mine[start : start + SENT_ROWS]
                sent = [self._cut(part, values, blocks) for blocks in self.blocks]
            expected = [[self._meeting(part, block) for block, _ in self.held] for part in parts]
            sizes = [sum(len(m.new) * m.width for m in meetings) for meetings in expected]
            sizes += [0] * (self.comm.world_size - len(sizes))
            for meetings, received in zip(expected, self.comm.exchange(sent, sizes), strict=False):
                self._put(meetings, received)

    def _read(self, stored: Sequence[StoredBlock]) -> Tensor | None:
        """This rank's block, [rows, columns]."""
        values, problem = None, ""
        if self.comm.rank < len(stored):
            try:
                values = stored[self.comm.rank].read()
            except RunError as error:
                problem = str(error)
        for other in self.comm.gather(problem):
            if other:
                raise RunError(other)
        return _matrix(values) if values is not None else None

    def _meeting(self, part: TableBlock, block: TableBlock) -> _Meeting:
        """What a part of the old table has for a block of the new one."""
        first, last = np.searchsorted(self.old, part.rows)
        new, old = self.new[first:last], self.old[first:last]
        inside = (new >= block.rows[0]) & (new < block.rows[1])
        columns = max(part.columns[0], block.columns[0]), min(part.columns[1], block.columns[1])
        if columns[0] >= columns[1]:
            inside[:] = False
        return _Meeting(old[inside], new[inside], columns)

    def _cut(self, part: TableBlock, values: Tensor, blocks: list[TableBlock]) -> Tensor:
        """[n] values of a part for all blocks of a rank, one after the other."""
        cuts = [torch.zeros(0, dtype=values.dtype)]
        for meeting in (self._meeting(part, block) for block in blocks):
            first, last = (column - part.columns[0] for column in meeting.columns)
            cuts.append(values[torch.from_numpy(meeting.old - part.rows[0]), first:last].flatten())
        return torch.cat(cuts)

    def _put(self, meetings: list[_Meeting], received: Tensor) -> None:
        """Write what came from a rank into this rank's blocks."""
        cuts = received.split([len(m.new) * m.width for m in meetings])
        for meeting, (block, tensor), values in zip(meetings, self.held, cuts, strict=True):
            if not len(values):
                continue
            rows = torch.from_numpy(meeting.new - block.rows[0]).to(tensor.device)
            first, last = (column - block.columns[0] for column in meeting.columns)
            _matrix(tensor)[rows, first:last] = values.reshape(len(rows), -1).to(tensor.device, tensor.dtype)


@dataclass(frozen=True)
class _Meeting:
    """Rows and columns that a part of the old table and a block of the new one share."""

    old: np.ndarray  # [n] int64: old rows
    new: np.ndarray  # [n] int64: their new rows
    columns: tuple[int, int]

    @property
    def width(self) -> int:
        return max(0, self.columns[1] - self.columns[0])


def _matrix(values: Tensor) -> Tensor:
    """[rows] or [rows, columns] → [rows, columns], the same memory."""
    return values.unsqueeze(1) if values.dim() == 1 else values


def _part(block: TableBlock, start: int) -> TableBlock:
    """The rows of a block from its row `start` on, at most SENT_ROWS."""
    rows = max(0, min(SENT_ROWS, block.sizes[0] - start))
    return TableBlock((block.offsets[0] + start, *block.offsets[1:]), (rows, *block.sizes[1:]))
