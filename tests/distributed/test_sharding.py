"""Every sharding type that is offered equals the unsharded tables, in real processes over gloo."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from flm_torchrec.distributed.shard import BLOCK_ROWS, _blocks
from tests.conftest import ROOT

JOB = str(ROOT / "tests" / "distributed" / "equality_job.py")
BAGS = ["table_wise", "row_wise", "column_wise", "table_row_wise", "table_column_wise"]
EQUAL = {
    f"equal {rows} {kind} {dim} {sharding} {optimizer}"
    for rows, dims in (("many", (8, 64)), ("few", (8,)))
    for kind, types in (("bags", BAGS), ("sequence", BAGS[:3]))
    for dim in dims
    for sharding in types
    for optimizer in ("adagrad", *(() if "column" in sharding else ("rowwise_adagrad",)))
}


@pytest.mark.parametrize(
    ("count", "on_a_host"), [*(pytest.param(ranks, ranks, marks=pytest.mark.slow) for ranks in (1, 2)), (4, 2)]
)
def test_outputs_steps_and_resharding_equal_the_unsharded_tables(ranks, tmp_path: Path, count: int, on_a_host: int):  # type: ignore[no-untyped-def]
    """fp32, 1e-5: outputs, weights and optimizer state; see equality_job.py."""
    printed = ranks(count, [JOB, str(tmp_path), str(on_a_host)])
    assert {line for line in printed.splitlines() if line.startswith("equal")} == EQUAL


@pytest.mark.parametrize("dim", [1, 3, 24, 64])
def test_a_row_begins_with_the_same_values_however_long_its_table_is_and_whatever_shard_holds_it(dim: int) -> None:
    """A part of a block is drawn as the beginning of the whole block."""

    def drawn(start: int, end: int) -> torch.Tensor:
        parts = [block[max(0, start - first) : end - first] for first, block in _blocks("t", 0, start, end, dim)]
        return torch.cat(parts)

    whole = drawn(0, 2 * BLOCK_ROWS)
    assert len(whole) == 2 * BLOCK_ROWS and not torch.equal(whole[:9], whole[BLOCK_ROWS:][:9])
    for start, end in ((0, 1), (0, 7), (3, 150), (17, 33), (BLOCK_ROWS - 3, BLOCK_ROWS + 5), (BLOCK_ROWS + 1, 70_001)):
        assert torch.equal(drawn(start, end), whole[start:end])
