"""Rows of tables follow their keys, whatever becomes of keys, ranks and sharding in between."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Barrier
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flm_torchrec.distributed import rows
from flm_torchrec.distributed.rows import Held, StoredBlock, TableBlock, move_rows
from flm_torchrec.errors import RunError

DIM = 6


@dataclass
class Threads:
    """Ranks as threads of this process."""

    count: int
    posts: dict[int, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.barrier = Barrier(self.count, timeout=20)

    def run(self, action: Callable[[Rank], None]) -> None:
        with ThreadPoolExecutor(self.count) as pool:
            for done in [pool.submit(action, Rank(self, rank)) for rank in range(self.count)]:
                done.result()


@dataclass
class Rank:
    """What `move_rows` asks of a `Comm`."""

    threads: Threads
    rank: int

    @property
    def world_size(self) -> int:
        return self.threads.count

    def gather(self, value: Any) -> list[Any]:
        self.threads.posts[self.rank] = value
        self.threads.barrier.wait()
        found = [self.threads.posts[rank] for rank in range(self.world_size)]
        self.threads.barrier.wait()
        return found

    def exchange(self, parts: list[Tensor], sizes: list[int]) -> list[Tensor]:
        received = [sent[self.rank] for sent in self.gather(parts)]
        assert [len(part) for part in received] == sizes
        return received


def blocks_of(plan: str, shape: tuple[int, ...], ranks: int, seed: int) -> list[list[TableBlock]]:
    """By rank, the blocks of a table under a plan."""
    size, dim = shape[0], (*shape, 1)[1]
    if plan == "column" and len(shape) == 2 and ranks > 1:
        each = dim // 2
        cuts = [TableBlock((0, n * each), (size, each)) for n in range(2)]
        return [[cuts[rank]] if rank < 2 else [] for rank in range(ranks)]
    if plan == "row":
        each = -(-size // ranks)
        spans = [(rank * each, max(0, min(each, size - rank * each))) for rank in range(ranks)]
    else:
        spans = [(0, size if rank == seed % ranks else 0) for rank in range(ranks)]
    return [[TableBlock((start, *[0] * (len(shape) - 1)), (n, *shape[1:]))] if n else [] for start, n in spans]


def cut(whole: Tensor, block: TableBlock) -> Tensor:
    (first, last), (left, right) = block.rows, block.columns
    return (whole[first:last] if whole.dim() == 1 else whole[first:last, left:right]).clone()


def moved(whole: Tensor, written: list[list[TableBlock]], origin: np.ndarray, plan: list[list[TableBlock]]) -> Tensor:
    """The new table, put together from what each rank holds after the move. Rows that nobody fills are NaN."""
    stored = [StoredBlock(b, whole.dtype, lambda b=b: cut(whole, b)) for own in written for b in own]  # type: ignore[misc]
    found = torch.full((len(origin), *whole.shape[1:]), torch.nan)
    held: list[Held] = [[(b, torch.full(b.sizes, torch.nan)) for b in own] for own in plan]
    threads = Threads(len(plan))
    threads.run(lambda rank: move_rows(stored, origin, held[rank.rank], rank))  # type: ignore[arg-type]
    for block, tensor in (part for own in held for part in own):
        (first, last), (left, right) = block.rows, block.columns
        (found.unsqueeze(1) if found.dim() == 1 else found)[first:last, left:right] = tensor.reshape(last - first, -1)
    return found


CHANGE = st.tuples(
    st.integers(0, 10**6), st.integers(0, 9), st.integers(0, 9), st.sampled_from([1, 2, 4]),
    st.sampled_from(["table", "row", "column"]),
)  # fmt: skip


@settings(max_examples=40)
@given(st.lists(CHANGE, min_size=1, max_size=5), st.integers(1, 20), st.sampled_from([(DIM,), ()]), st.integers(1, 7))
def test_a_row_follows_its_key_through_any_changes(
    changes: list[tuple[int, int, int, int, str]], first: int, width: tuple[int, ...], sent: int
) -> None:
    """Keys come, go and change places, and 1, 2 or 4 ranks shard the table anew each time."""
    keys, values = list(range(first)), {key: torch.rand(width) + 1 for key in range(first)}
    plan, total = blocks_of("table", (first, *width), 1, 0), first
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows, "SENT_ROWS", sent)
        for seed, dropped, added, ranks, kind in changes:
            rng = np.random.default_rng(seed)
            whole = torch.stack([values[key] for key in keys])
            left = list(rng.permutation(keys)[min(dropped, len(keys) - 1) :])
            after = [int(key) for key in rng.permutation([*left, *range(total, total + added)])]
            total += added
            before = {key: row for row, key in enumerate(keys)}
            origin = np.array([before.get(key, -1) for key in after])
            wanted = blocks_of(kind, (len(after), *width), ranks, seed)
            found = moved(whole, plan, origin, wanted)
            for row, key in enumerate(after):
                assert torch.equal(found[row], values.get(key, torch.zeros(width)))
            values = {key: values.get(key, torch.rand(width) + 1) for key in after}  # the new rows learn
            keys, plan = after, wanted


def test_several_new_rows_may_come_from_one_old_row() -> None:
    whole = torch.arange(8.0).reshape(4, 2)
    origin = np.array([3, 3, -1, 0, 3])
    found = moved(whole, blocks_of("row", (4, 2), 2, 0), origin, blocks_of("row", (5, 2), 4, 0))
    assert found.tolist() == [[6, 7], [6, 7], [0, 0], [0, 1], [6, 7]]


def test_a_block_that_one_rank_cannot_read_ends_all_ranks() -> None:
    def fails() -> Tensor:
        raise RunError("part.distcp: no readable block")

    blocks = [TableBlock((0, 0), (2, 2)), TableBlock((2, 0), (2, 2))]
    stored = [
        StoredBlock(blocks[0], torch.float32, lambda: torch.ones(2, 2)),
        StoredBlock(blocks[1], torch.float32, fails),
    ]
    told = []

    def rank(rank: Rank) -> None:
        with pytest.raises(RunError, match=r"part\.distcp") as error:
            move_rows(stored, np.arange(4), [(blocks[rank.rank], torch.zeros(2, 2))], rank)  # type: ignore[arg-type]
        told.append(str(error.value))

    Threads(2).run(rank)
    assert len(told) == 2
