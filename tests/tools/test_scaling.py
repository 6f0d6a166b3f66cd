"""The scaling study, on two real ranks: what the plan says of memory and of bytes sent is what is counted."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest

from flm_torchrec.data.dataset import PreparedData
from flm_torchrec.distributed.sharders import BagSharder
from flm_torchrec.planner.capacity import plan_on, report
from flm_torchrec.planner.constraints import Rules
from flm_torchrec.planner.hardware import make_cluster
from flm_torchrec.planner.loss_work import LossWork
from flm_torchrec.planner.plan import pipeline_of
from flm_torchrec.planner.spec import Spec, TableSpec, workload_of_spec
from flm_torchrec.planner.volume import sent_bytes
from tests.tools.test_tools import study


@pytest.mark.slow
def test_estimates_are_near_what_is_counted(small: PreparedData, tmp_path: Path) -> None:
    output = tmp_path / "study"
    options = ["--output", str(output), "--ranks", "2", "--steps", "3", "--batch", "32"]
    settings = ["--", f"data.path={small.path}", "model.dim=32"]
    done = study("scaling_study.py", *options, *settings)
    assert done.returncode == 0, done.stderr
    written = json.loads((output / "study.json").read_text())
    for run in written["runs"]:
        said = found = 0.0
        for planned, counted in zip(run["planned"]["ranks"], run["measured"], strict=True):
            device = planned["device"]
            assert (device["weights"], device["optimizer"]) == (counted["weights"], counted["optimizer"])
            assert device["dense"] == 20 * counted["dense_parameters"]
            said += device["weights"] + device["optimizer"] + device["input_output"]
            found += counted["weights"] + counted["optimizer"]
            found += counted["input"] + counted["lengths"] + counted["output"]
        assert said == pytest.approx(found, rel=0.1)
        sent = run["planned"]["sent"]
        for expected, part in ((sent["ids"] + sent["vectors"], "tables"), (sent["dense"], "dense")):
            assert expected == pytest.approx(sum(rank["sent"][part] for rank in run["measured"]) / 2, rel=0.1)
        for kind, measured in run["by_kind"].items():
            # Of the losses: counts, which local does not need, rows, gradients. DDP: in the first step two more.
            assert {rank["calls"]["loss"] for rank in measured} == {2 if kind == "local" else 3}
            assert max(rank["calls"]["dense"] for rank in measured) <= 2
            counted = ("targets", "items", "candidates")
            work = LossWork(32, 2048, *(sum(rank[n] for rank in measured) / 2 for n in counted))
            assert work.sent(kind, 2, 2) == pytest.approx(sum(rank["sent"]["loss"] for rank in measured) / 2, rel=0.15)
            assert work.flop(kind, 2, 2) == pytest.approx(sum(rank["loss_flop"] for rank in measured) / 2, rel=0.15)
    larger = written["larger"]
    assert [row["ranks"] for row in larger] == [8, 16, 32, 64, 128, 256, 512, 1024]
    few, many = larger[0]["loss"], larger[-1]["loss"]
    assert many["global"]["sent"] > 50 * few["global"]["sent"] and many["global"]["flop"] > 10 * few["global"]["flop"]
    assert many["node"]["flop"] == few["node"]["flop"] and many["local"]["flop"] == few["local"]["flop"]
    assert many["local"]["sent"] == pytest.approx(few["local"]["sent"] * 8 / 7, rel=0.02)
    assert (output / "study.svg").stat().st_size > 1000 and "| 1024 |" in done.stdout


@pytest.mark.parametrize(
    ("pooled", "sharding", "ids", "vectors"),
    [
        # 4 ranks, 10 samples each, 3 ids a sample, 8 float32: all but a rank's own quarter leaves it.
        (False, "table_wise", 8 * (30 + 10) * 0.75, 2 * 30 * 32 * 0.75),
        (True, "table_wise", 8 * (30 + 10) * 0.75, 2 * 10 * 32 * 0.75),
        (False, "row_wise", 8 * (30 * 0.75 + 10 * 3), 2 * 30 * 32 * 0.75),
        # Each rank makes its part of all ranks' bags: a reduce-scatter, and an all-gather back.
        (True, "row_wise", 8 * (30 * 0.75 + 10 * 3), 2 * 10 * 32 * 3),
    ],
)
def test_bytes_sent_by_hand(pooled: bool, sharding: str, ids: float, vectors: float) -> None:
    table = TableSpec(name="t", rows=100, dim=8, pooling=3, pooled=pooled)
    workload = workload_of_spec(Spec(tables=(table,), batch_size=10))
    rules = Rules(sharding_types=(sharding,))
    solved = plan_on(workload, make_cluster("h100", 1, 4), rules, pipeline_of("cuda"))
    assert sent_bytes(solved) == {"ids": ids, "vectors": vectors}


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_bf16_halves_what_vectors_and_gradients_send(precision: Literal["fp32", "fp16"]) -> None:
    """A spec says so; the vectors of fp16 tables are as narrow already."""

    def planned(collectives: Literal["fp32", "bf16"]) -> dict[str, Any]:
        tables = (TableSpec(name="t", rows=100, dim=8, pooling=3),)
        spec = Spec(tables, 1000, precision=precision, collectives=collectives, dense_parameters=1000)
        workload = workload_of_spec(spec)
        cluster, pipeline = make_cluster("h100", 2, 2), pipeline_of("cuda")
        return report(workload, cluster, plan_on(workload, cluster, Rules(), pipeline), pipeline)

    whole, half = planned("fp32"), planned("bf16")
    assert half["sent"]["ids"] == whole["sent"]["ids"] and 2 * half["sent"]["dense"] == whole["sent"]["dense"]
    assert half["sent"]["vectors"] == whole["sent"]["vectors"] / (2 if precision == "fp32" else 1)
    assert half["step_ms"]["dense_all_reduce"] == whole["step_ms"]["dense_all_reduce"] / 2
    if precision == "fp32":
        assert half["step_ms"]["communication"] < 0.9 * whole["step_ms"]["communication"]
    for kind in ("global", "node", "local"):
        work = LossWork(32, 2048, 500, 300)
        vectors = work.sent(kind, 16, 8) - replace(work, dim=0).sent(kind, 16, 8)
        narrow = replace(work, collectives="bf16")
        assert work.sent(kind, 16, 8) - narrow.sent(kind, 16, 8) == pytest.approx(vectors / 2)


def test_bytes_sent_within_nodes_and_between_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two nodes of two ranks: each bag is summed on the two ranks of one node, and half of the bags go to the other."""
    monkeypatch.setattr(BagSharder, "sharding_types", lambda self, device: ["table_wise", "table_row_wise"])
    workload = workload_of_spec(Spec(tables=(TableSpec(name="t", rows=100, dim=8, pooling=3),), batch_size=10))
    rules = Rules(sharding_types=("table_row_wise",))
    solved = plan_on(workload, make_cluster("h100", 2, 2), rules, pipeline_of("cuda"))
    assert sent_bytes(solved) == {"ids": 8 * (30 + 2 * 10) * 0.75, "vectors": 2 * 10 * 32 * (1 + 0.5)}
