"""Every sharding type that is offered equals the unsharded tables, in real processes over gloo."""

from __future__ import annotations

from pathlib import Path

import pytest

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


@pytest.mark.parametrize(("count", "on_a_host"), [(1, 1), (2, 2), (4, 2)])
def test_outputs_steps_and_resharding_equal_the_unsharded_tables(ranks, tmp_path: Path, count: int, on_a_host: int):  # type: ignore[no-untyped-def]
    """fp32, 1e-5: outputs, weights and optimizer state; see equality_job.py."""
    printed = ranks(count, [JOB, str(tmp_path), str(on_a_host)])
    assert {line for line in printed.splitlines() if line.startswith("equal")} == EQUAL
