"""Planning for clusters that are not there, plans as files, constraints: figures checked by hand, bad input named."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from fbgemm_gpu.split_embedding_configs import EmbOptimType, SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
    EmbeddingLocation,
    SplitTableBatchedEmbeddingBagsCodegen,
)
from torchrec.distributed.types import PipelineType

from flm_torchrec.cli import main
from flm_torchrec.config.schema import DistributedConfig
from flm_torchrec.data.dataset import PreparedData
from flm_torchrec.distributed.comm import Comm
from flm_torchrec.planner.capacity import plan_on, report
from flm_torchrec.planner.constraints import Lookup, Rules, constraints, read_rules
from flm_torchrec.planner.estimate import state_bytes
from flm_torchrec.planner.hardware import make_cluster
from flm_torchrec.planner.plan import pipeline_of
from flm_torchrec.planner.plan_file import _misplaced
from flm_torchrec.planner.solve import Infeasible
from flm_torchrec.planner.spec import read_spec, workload_of_spec
from flm_torchrec.planner.whatif import Question, remedies, smallest
from flm_torchrec.planner.workload import Workload
from tests.conftest import ROOT

TEN_BILLION = ROOT / "configs" / "plans" / "ten_billion.yaml"
GIB = 2**30
PIPELINE = pipeline_of("cuda")


def spec(folder: Path, **changes: object) -> Path:
    """A small spec with changes laid over it."""
    tables = [
        {"name": "item", "rows": 1000, "dim": 16, "pooling": 20, "pooled": False},
        {"name": "tags", "rows": 100, "dim": 16, "pooling": 3, "features": 2},
    ]
    file = folder / "spec.yaml"
    file.write_text(yaml.safe_dump({"batch_size": 32, "tables": tables, **changes}))
    return file


def question(file: Path, **rules: object) -> Question:
    workload = workload_of_spec(read_spec(file))
    return Question(lambda _: workload, Rules(**rules), PIPELINE)  # type: ignore[arg-type]


def test_ten_billion_rows_do_not_fit_two_nodes_and_what_would() -> None:
    asked, cluster = question(TEN_BILLION), make_cluster("h100", 2, 0)
    with pytest.raises(Infeasible) as error:
        asked.report(cluster)
    # A sixteenth of 10^10 x (64 x 4 bytes + 4 of row-wise Adagrad), beside 85 % of 80 GiB less the dense part.
    room = 0.85 * 80 * GIB - 20 * 10_000_000
    assert error.value.table == "item_id"
    assert error.value.gap == pytest.approx(10**10 / 16 * 260 - room, rel=1e-3)
    assert f"{error.value.gap / GIB:.2f} GiB too much" in str(error.value)
    found = {remedy.name: remedy for remedy in remedies(asked, cluster)}
    assert {name for name, remedy in found.items() if remedy.fits} == {
        "UVM caching", "UVM", "int8 tables", "fp16 tables, UVM caching",
    }  # fmt: skip
    assert found["fp16 tables"].gap == pytest.approx(10**10 / 16 * 132 - room, rel=1e-2)
    assert found["UVM"].step_ms > found["UVM caching"].step_ms  # type: ignore[operator]
    least = smallest(asked, cluster)
    # 260 bytes a row of the two large tables over 8 ranks a node: 4 nodes are too few, 5 are enough.
    assert least == 40 and 10.05e9 * 260 / 32 > room > 10.05e9 * 260 / 40


def test_memory_is_what_the_sizes_say(tmp_path: Path) -> None:
    made = question(spec(tmp_path), sharding_types=("row_wise",)).report(make_cluster("h100", 1, 2))
    # Half of the rows each; a look-up's ids and lengths are 8 bytes, vectors 16 float32, of both ranks' 32 samples.
    ids, out = 32 * 20 + 2 * 3 * 32, 32 * 20 + 2 * 2 * 32
    for rank in made["ranks"]:
        assert rank["device"]["weights"] == 550 * 16 * 4
        assert rank["device"]["optimizer"] == 550 * 4
        assert rank["device"]["input_output"] == ids * 8 + out * 64 + 3 * 64 * 8
        assert rank["device"]["pipeline"] == ids * 8  # TrainPipelineSparseDist holds the next batch's ids too
    assert made["balance"]["memory"] == pytest.approx(1.0)


@pytest.mark.parametrize(("hardware", "place"), [("h100", "host"), ("xeon-8480", "device")])
def test_sketches_are_in_host_memory(tmp_path: Path, hardware: str, place: str) -> None:
    cluster, asked = make_cluster(hardware, 1, 2), question(spec(tmp_path))
    work = replace(asked.workload(2), sketch_bytes=2**28)
    without, made = asked.report(cluster), replace(asked, workload=lambda _: work).report(cluster)
    assert [rank[place]["sketches"] for rank in made["ranks"]] == [2**28] * 2
    assert without["for_tables"] - made["for_tables"] == (2**28 if place == "device" else 0)
    room = cluster.topology().devices[0].storage.ddr
    full = replace(work, sketch_bytes=room)
    rules = Rules(kernels=["fused_uvm"] if place == "host" else ["fused"])
    with pytest.raises(Infeasible, match="host memory"):
        replace(asked, workload=lambda _: full, rules=rules).report(cluster)


def test_rows_that_are_looked_up_more_weigh_on_their_rank(tmp_path: Path) -> None:
    asked = question(spec(tmp_path), sharding_types=("row_wise",))
    even = asked.workload(2)
    # Nine tenths of the ids of "item" are in the first half of its 1000 rows.
    seen = np.repeat([3, 700], [9, 1])
    skewed = replace(even, lookups={**even.lookups, "item": Lookup(pooling=20, seen=seen)})

    def report_on(workload: Workload) -> dict[str, Any]:
        return replace(asked, workload=lambda _: workload).report(make_cluster("h100", 1, 2))

    reports = [report_on(even), report_on(skewed)]
    usual, found = ([rank["device"]["input_output"] for rank in made["ranks"]] for made in reports)
    more = (0.9 - 0.5) * 2 * 32 * 20 * (8 + 64)
    assert found == [usual[0] + more, usual[1] - more]


@pytest.mark.parametrize(
    ("name", "kind"),
    [("rowwise_adagrad", EmbOptimType.EXACT_ROWWISE_ADAGRAD), ("adagrad", EmbOptimType.EXACT_ADAGRAD)],
)
def test_state_is_what_fbgemm_allocates(name: str, kind: EmbOptimType) -> None:
    place = (100, 16, EmbeddingLocation.HOST, ComputeDevice.CPU)
    module = SplitTableBatchedEmbeddingBagsCodegen([place], optimizer=kind, weights_precision=SparseType.FP16)
    state = module.momentum1_host
    assert state.numel() * state.element_size() == state_bytes(name, 100, 16)


def test_prefetching_moves_the_cost_of_misses_out_of_the_look_up() -> None:
    kernels = ("fused_uvm_caching",)
    cluster = make_cluster("h100", 2, 0)
    plain = question(TEN_BILLION, kernels=kernels).report(cluster)
    ahead = replace(question(TEN_BILLION, kernels=kernels), pipeline=PipelineType.TRAIN_PREFETCH_SPARSE_DIST)
    made = ahead.report(cluster)
    assert plain["step_ms"]["prefetch"] == 0 < made["step_ms"]["prefetch"]
    assert made["step_ms"]["compute"] < plain["step_ms"]["compute"] / 5
    # Of item_id alone: 16 x 1024 x 50 ids, hardly two alike, four fifths of them missed, a sixteenth on each rank.
    least = 1024 * 50 * 0.8 * 256 / (64e9 / 1e3)
    assert least <= made["step_ms"]["prefetch"] < 2 * least
    assert made["ranks"][0]["device"]["pipeline"] > plain["ranks"][0]["device"]["pipeline"]


@pytest.mark.parametrize(("optimizer", "per_row"), [("sgd", 0), ("rowwise_adagrad", 4), ("adagrad", 64), ("adam", 128)])
def test_optimizer_state_is_float32_even_of_fp16_tables(tmp_path: Path, optimizer: str, per_row: int) -> None:
    asked = question(spec(tmp_path, optimizer=optimizer, precision="fp16"), sharding_types=("row_wise",))
    device = asked.report(make_cluster("a100-80", 1, 2))["ranks"][0]["device"]
    assert (device["weights"], device["optimizer"]) == (550 * 16 * 2, 550 * per_row)


def test_time_follows_the_hardware_given(tmp_path: Path) -> None:
    def step(*values: str) -> dict[str, float]:
        return question(spec(tmp_path), sharding_types=("row_wise",)).report(make_cluster("h100", 2, 4, values))[
            "step_ms"
        ]

    usual, slow_net, slow_memory = step(), step("inter_gbps=25"), step("hbm_gbps=335")
    assert slow_net["communication"] > 1.3 * usual["communication"] and slow_net["compute"] == usual["compute"]
    assert slow_memory["compute"] == pytest.approx(10 * usual["compute"])


def test_a_table_no_rank_can_hold_is_named_with_its_gap(tmp_path: Path) -> None:
    tables = [{"name": "small", "rows": 10, "dim": 16}, {"name": "huge", "rows": 2 * 10**9, "dim": 64}]
    asked = question(spec(tmp_path, tables=tables, optimizer="adam"), sharding_types=("table_wise",))
    with pytest.raises(Infeasible, match=r"table 'huge' needs 1,430\.\d\d GiB of HBM on a rank") as error:
        asked.report(make_cluster("h100", 4, 8))
    assert error.value.table == "huge"
    assert smallest(asked, make_cluster("h100", 1, 0)) is None
    fitting = {remedy.name for remedy in remedies(asked, make_cluster("h100", 4, 8)) if remedy.fits}
    assert "table-wise or row-wise as the planner likes" in fitting and "fp16 tables" not in fitting


def test_three_tables_that_fit_two_ranks_only_in_sum(tmp_path: Path) -> None:
    tables = [{"name": f"t{n}", "rows": 160_000_000, "dim": 64} for n in range(3)]
    asked = question(spec(tmp_path, tables=tables, optimizer="sgd"), sharding_types=("table_wise",))
    with pytest.raises(Infeasible, match="no way to share them out") as error:
        asked.report(make_cluster("h100", 1, 2))
    assert error.value.gap == pytest.approx(2 * 160_000_000 * 256 - 0.85 * 80 * GIB, rel=1e-3)


def test_part_of_a_node_and_whole_ones() -> None:
    cluster = make_cluster("a100-80", 2, 4)
    assert [(c.nodes, c.per_node) for c in map(cluster.of_size, (2, 4, 8, 12))] == [(1, 2), (1, 4), (2, 4), (3, 4)]
    assert cluster.of_size(2).describe()["per_node"] == 2
    host = make_cluster("xeon-8480", 1, 0)  # its ranks share the host's memory
    assert (host.capacity, host.of_size(1).capacity) == (512 * GIB, 1024 * GIB)


def test_host_memory_can_be_what_is_missing() -> None:
    asked, cluster = question(TEN_BILLION, kernels=("fused", "fused_uvm")), make_cluster("h100", 2, 0, ["host_gib=800"])
    with pytest.raises(Infeasible, match=r"'item_id' needs 151\.\d\d GiB of host memory on a rank, .* 100\.00 GiB"):
        asked.report(cluster)


def flm(*arguments: str, seed: int = 0) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": str(seed), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "flm_torchrec", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)


@pytest.mark.slow
def test_plans_are_the_same_bytes_on_repeat(small: PreparedData, tmp_path: Path) -> None:
    """Another seed of Python's string hashes: TorchRec would then list a table's options in another order."""
    found = []
    for seed in (1, 2):
        output = tmp_path / str(seed)
        command = ["plan", "--data.path", str(small.path), "--nodes", "2", "--sweep", "4", "--output", str(output)]
        done = flm(*command, seed=seed)
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        files = {file.name: file.read_bytes() for file in sorted(output.iterdir())}
        found.append((done.stdout, files))
    assert found[0] == found[1]
    assert set(found[0][1]) == {"plan.json", "report.json", "report.txt", "report.html"}


def test_look_ups_come_from_the_data(small: PreparedData, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["plan", "--data.path", str(small.path), "--per-node", "1", "--sweep", "--json"]
    assert main(command) == 0
    looked = {t["name"]: t["ids_per_sample"] for t in json.loads(capsys.readouterr().out)["report"]["tables"]}
    tags = small.users.sparse["interests"].lengths.mean()
    assert looked["user_interests"] == pytest.approx(tags, rel=0.1)
    events = len(small.item) / small.schema.users - 2  # less the held-out two
    assert looked["event"] == pytest.approx(events, rel=0.1)
    titles = small.items.sparse["title"].lengths.mean()
    assert looked["item_title"] == pytest.approx(titles * looked["item_id"], rel=0.1)


def test_infeasible_is_one_line_after_what_would_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["plan", "--spec", str(TEN_BILLION), "--nodes", "2", "--sweep", "32", "64", "--output", str(tmp_path)]
    assert main(command) == 2
    said = capsys.readouterr()
    assert said.err.count("\n") == 1 and "'item_id'" in said.err and "83.54 GiB too much" in said.err
    assert "UVM caching" in said.out and "40 ranks (5 nodes)" in said.out
    written = json.loads((tmp_path / "report.json").read_text())
    assert written["table"] == "item_id" and [row["fits"] for row in written["sweep"]] == [False, True]
    assert not (tmp_path / "plan.json").exists() and "<table>" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batchsize": 3}, "unknown key 'batchsize'; did you mean 'batch_size'?"),
        (
            {"tables": [{"name": "t", "rows": 0, "dim": 8}]},
            "table 't': rows: Input should be greater than or equal to 1",
        ),
        ({"tables": [{"name": "t", "rows": -5, "dim": 8}]}, "table 't': rows"),
        ({"tables": [{"name": "t", "rows": 5, "dim": 6}]}, "table 't': dim: Input should be a multiple of 4, not 6"),
        ({"tables": [{"name": "t", "rows": 5, "dim": 8, "poling": 2}]}, "did you mean 'pooling'?"),
        ({"tables": [{"name": "t", "rows": 5}]}, "table 't': dim: Field required"),
        ({"tables": [{"name": "t", "rows": 5, "dim": 8}] * 2}, "two tables are named 't'"),
        ({"tables": [{"name": "items", "rows": 5, "dim": 8}]}, "table 'items': PyTorch keeps this name to itself"),
        ({"tables": {}}, "'tables' must be a list"),
        (
            {"tables": [{"name": "t", "rows": 10**21, "dim": 8}]},
            "table 't': rows: Input should be less than or equal to",
        ),
        ({"tables": [{"name": "t", "rows": 2**63 - 1, "dim": 8}]}, "table 't': rows: Input should be less than or eq"),
        ({"tables": [{"name": "t", "rows": 5, "dim": 2**40}]}, "table 't': dim: Input should be less than or equal to"),
        ({"tables": [{"name": "", "rows": 5, "dim": 8}]}, "name: String should have at least 1 character"),
        ({"tables": [{"name": " ", "rows": 5, "dim": 8}]}, "has no letters that can be shown"),
        ({"tables": [{"name": "a\nb", "rows": 5, "dim": 8}]}, "has no letters that can be shown"),
        ({"tables": [{"name": "t", "rows": 5, "dim": 8, "features": 10**9}]}, "features: Input should be less than"),
        ({"tables": [{"name": "t", "rows": 5, "dim": 8, "pooling": 1e300}]}, "pooling: Input should be less than"),
        (
            {"tables": [{"name": "t", "rows": 5, "dim": 8, "pooling": float("nan")}]},
            "pooling: Input should be",
        ),
        ({"batch_size": 10**30}, "batch_size: Input should be less than or equal to"),
        ({"dense_parameters": 10**30}, "dense_parameters: Input should be less than or equal to"),
        ({"dense_parameters": float("inf")}, "dense_parameters: Input should be a finite number"),
        ({"optimizer": "lion"}, "optimizer: Input should be 'rowwise_adagrad'"),
        ({"collectives": "fp8"}, "collectives: Input should be 'fp32' or 'bf16'"),
    ],
)
def test_a_wrong_spec_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, object], message: str
) -> None:
    assert main(["plan", "--spec", str(spec(tmp_path, **changes))]) == 2
    error = capsys.readouterr().err
    assert message in error and "spec.yaml" in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--hardware", "h1000"], "no preset 'h1000'; did you mean 'h100'?"),
        (["--set", "hbm_gb=3"], "no value 'hbm_gb' of hardware; did you mean 'hbm_gib'?"),
        (["--set", "intra_gbps=0"], "intra_gbps: Input should be greater than 0"),
        (["--nodes", "0"], "at least one node"),
        (["--nodes", "100000"], "--nodes: 800,000 ranks; 'flm plan' plans 4,096 at most"),
        (["--nodes", "1" + "0" * 30], "4,096 at most"),
        (["--per-node", "5000"], "per_node: Input should be less than or equal to 4096"),
        (["--sweep", "8", "100000"], "--sweep: 100,000 ranks; 'flm plan' plans 4,096 at most"),
        (["--set", "hbm_gib=1e300"], "hbm_gib: Input should be less than or equal to 1000000"),
        (["--set", "hbm_gib=nan"], "hbm_gib: Input should be a finite number"),
        (["--set", "host_gib=inf"], "host_gib: Input should be a finite number"),
        (["--set", "hbm_gib=0"], "a GPU has memory"),
        (["--set", "inter_gbps=1e-300"], "inter_gbps: 1e-300 is less than 0.001"),
        (["--set", "per_node=2.5"], "per_node: Input should be a valid integer"),
        (["--set", "hbm_gib"], "write it as NAME=VALUE"),
        (["--kernels", "uvm"], "no kernel 'uvm'; did you mean 'fused_uvm'?"),
        (["--sweep", "0"], "at least 1"),
        (["--distributed.plan", "plan.json"], "compare two plans with --diff"),
        (["--distributed.memory_gib", "3"], "--set hbm_gib=N"),
        (["--train.epochs", "3"], "leave train.epochs=3 out"),
        (["--distributed.collectives", "bf16"], "leave distributed.collectives=bf16 out"),
        (["--hardware", "xeon-8480", "--kernels", "fused_uvm"], "none of its sharding types and kernels"),
    ],
)
def test_a_wrong_option_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert main(["plan", "--spec", str(spec(tmp_path)), *options]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_constraints_of_single_tables(tmp_path: Path) -> None:
    file = tmp_path / "rules.yaml"
    file.write_text(
        "tags: {sharding_types: [row_wise], pooling_factors: [4, 0.5]}\nitem: {compute_kernels: [fused_uvm]}"
    )
    workload: Workload = workload_of_spec(read_spec(spec(tmp_path)))
    rules = read_rules(DistributedConfig(constraints=str(file)), ["item", "tags"])
    cluster = make_cluster("h100", 1, 4)
    made = report(workload, cluster, plan_on(workload, cluster, rules, PIPELINE), PIPELINE)
    tables = {table["name"]: table for table in made["tables"]}
    assert (tables["tags"]["sharding_type"], tables["tags"]["kernel"]) == ("row_wise", "fused")
    assert tables["tags"]["ids_per_sample"] == 4.5 and tables["item"]["kernel"] == "fused_uvm"
    assert sum(rank["host"]["weights"] for rank in made["ranks"]) == 1000 * 16 * 4
    assert constraints(workload.model, rules, workload.lookups)["item"].pooling_factors == [20]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("itm: {}", "no table 'itm'; did you mean 'item'?"),
        ("item: {sharding_type: [row_wise]}", "unknown key 'sharding_type'; did you mean 'sharding_types'?"),
        ("item: {sharding_types: [rowwise]}", "sharding_types: no 'rowwise'; did you mean 'row_wise'?"),
        ("item: {compute_kernels: [uvm]}", "compute_kernels: no 'uvm'; did you mean 'fused_uvm'?"),
        ("item: {pooling_factors: [1, 2]}", "has 1 features (item), but 2 pooling_factors"),
        ("item: {min_partition: 0}", "min_partition: Input should be greater than or equal to 4"),
        ("item: 3", "must hold keys and values, not 3"),
        ("- item", "must hold names and values, not a list"),
        ("item: {", "not YAML"),
    ],
)
def test_wrong_constraints_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, message: str
) -> None:
    file = tmp_path / "rules.yaml"
    file.write_text(content)
    command = ["plan", "--spec", str(spec(tmp_path)), "--distributed.constraints", str(file), "--sweep"]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert main([*command[:-2], str(tmp_path / "none.yaml"), "--sweep"]) == 2


TINY = ["--model.dim", "16", "--train.batch_size", "32", "--data.max_history", "8", "--train.max_steps", "2"]


def test_the_plan_made_is_the_plan_trained_by(  # type: ignore[no-untyped-def]
    ranks, small: PreparedData, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Made for two CPU ranks with constraints, used by two real ones, evaluated on one; another one differs."""
    data = ["--data.path", str(small.path)]
    rules = tmp_path / "rules.yaml"
    rules.write_text(
        "user_id: {sharding_types: [row_wise]}\nitem_id: {sharding_types: [column_wise], min_partition: 8}"
    )
    # Columns may be cut apart where the optimizer does not need whole rows.
    settings = [*TINY, "--train.sparse_optimizer", "adagrad"]
    plan = ["plan", *data, *settings, "--hardware", "xeon-8480", "--sweep", "--output"]
    assert main([*plan, str(tmp_path / "made"), "--distributed.constraints", str(rules)]) == 0
    assert main([*plan, str(tmp_path / "free"), "--distributed.sharding", "table_wise"]) == 0
    made = json.loads((tmp_path / "made" / "plan.json").read_text())
    kinds = {name: table["sharding_type"] for name, table in made["tables"].items()}
    assert (kinds["user_id"], kinds["item_id"]) == ("row_wise", "column_wise")
    assert [shard["size"] for shard in made["tables"]["item_id"]["shards"]] == [[small.schema.items, 8]] * 2

    run = tmp_path / "run"
    by = ["--distributed.plan", str(tmp_path / "made" / "plan.json")]
    ranks(2, ["-m", "flm_torchrec", "--", "train", *data, *settings, "--train.run", str(run), *by])
    assert (run / "plan.json").read_bytes() == (tmp_path / "made" / "plan.json").read_bytes()
    assert main(["evaluate", "--run", str(run)]) == 0

    capsys.readouterr()
    assert main(["plan", "--diff", str(run / "plan.json"), str(tmp_path / "made" / "plan.json")]) == 0
    assert capsys.readouterr().out == "the plans are the same\n"
    assert main(["plan", "--diff", str(run / "plan.json"), str(tmp_path / "free" / "plan.json")]) == 0
    assert "user_id: sharding_type: row_wise -> table_wise" in capsys.readouterr().out
    tool = ROOT / "tools" / "plan_capacity.py"
    monkeypatch.setattr(sys, "argv", [str(tool), "--diff", *[str(run / "plan.json")] * 2])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(tool), run_name="__main__")
    assert (stop.value.code, capsys.readouterr().out) == (0, "the plans are the same\n")


def cut(shard: dict[str, Any], *rows: int) -> list[dict[str, Any]]:
    """The shard in blocks of so many rows, all on its rank."""
    ends = np.cumsum([0, *rows]).tolist()
    return [{**shard, "offset": [first, 0], "size": [n, 16]} for first, n in zip(ends, rows, strict=False)]


def columns(shard: dict[str, Any], *widths: int) -> list[dict[str, Any]]:
    ends = np.cumsum([0, *widths]).tolist()
    return [{**shard, "offset": [0, first], "size": [149, n]} for first, n in zip(ends, widths, strict=False)]


@pytest.mark.parametrize(
    ("kind", "shards", "message"),
    [
        # 10 rows of 8 on 2 nodes of 2 ranks; TorchRec finds row r on rank r // 3.
        ("row_wise", [(0, 0, 3), (1, 3, 3), (2, 6, 3), (3, 9, 1)], ""),
        ("row_wise", [(0, 0, 4), (1, 4, 2), (2, 6, 2), (3, 8, 2)], "blocks of 3 rows"),
        ("row_wise", [(1, 0, 3), (0, 3, 3), (2, 6, 3), (3, 9, 1)], "the ranks 0 … 3, in their order"),
        ("row_wise", [(0, 0, 5), (1, 5, 5)], "the ranks 0 … 3, in their order"),
        ("row_wise", [(0, 0, 3), (1, 2, 3), (2, 6, 3), (3, 9, 1)], "the shard on rank 1 is not where"),
        ("table_row_wise", [(2, 0, 5), (3, 5, 5)], ""),
        ("table_row_wise", [(1, 0, 5), (2, 5, 5)], "the ranks of one node"),
        ("table_row_wise", [(3, 0, 5), (2, 5, 5)], "the ranks 2 … 3, in their order"),
        ("table_row_wise", [(2, 0, 7), (3, 7, 3)], "blocks of 5 rows"),
        ("table_wise", [(3, 0, 10)], ""),
    ],
)
def test_rows_lie_where_look_ups_find_them(kind: str, shards: list[tuple[int, int, int]], message: str) -> None:
    table = {
        "sharding_type": kind,
        "shards": [{"rank": rank, "offset": [first, 0], "size": [rows, 8]} for rank, first, rows in shards],
    }
    found = _misplaced(table, (10, 8), Comm(0, 4, 2, torch.device("cpu")))
    assert (message in found) if message else not found


def test_a_table_with_fewer_rows_than_ranks_has_empty_shards_at_the_end() -> None:
    shards = [{"rank": n, "offset": [min(n, 3), 0], "size": [int(n < 3), 8]} for n in range(5)]
    table = {"sharding_type": "row_wise", "shards": shards}
    assert not _misplaced(table, (3, 8), Comm(0, 5, 5, torch.device("cpu")))


@pytest.mark.parametrize(
    ("hardware", "parameters", "said"),
    [
        (
            "h100",
            7_000_000_000,
            ["parameters need 130.39 GiB", "26.08 GiB of weights", "80.00 GiB of HBM"],
        ),
        ("v100", 2_000_000_000, ["37.25 GiB on every rank", "14.90 GiB of AdamW's two moments", "10.05 GiB too much"]),
        ("epyc-9654", 10**12, ["768.00 GiB of host memory"]),
    ],
)
def test_a_dense_part_that_does_not_fit_is_told_as_such(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], hardware: str, parameters: int, said: list[str]
) -> None:
    file = spec(tmp_path, dense_parameters=parameters)
    assert main(["plan", "--spec", str(file), "--hardware", hardware, "--sweep", "8"]) == 2
    told = capsys.readouterr()
    assert told.err.count("\n") == 1 and "the dense part does not fit" in told.err and " 0.00 GiB" not in told.err
    assert all(part in told.err for part in said), told.err
    assert "no: the dense part" in told.out and "what would make it fit" not in told.out


def test_a_plan_that_does_not_fit_is_refused(
    small: PreparedData, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = ["--data.path", str(small.path)]
    file = tmp_path / "plan.json"
    assert (
        main(["plan", *data, *TINY, "--hardware", "xeon-8480", "--per-node", "1", "--sweep", "--output", str(tmp_path)])
        == 0
    )
    good = json.loads(file.read_text())

    def refused(content: str, *more: str) -> str:
        file.write_text(content)
        capsys.readouterr()
        command = ["train", *data, *TINY, "--train.run", str(tmp_path / "run"), "--distributed.plan", str(file), *more]
        assert main(command) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "plan.json" in error
        return error

    def changed(**values: object) -> str:
        return json.dumps({**good, "tables": {**good["tables"], "item_id": {**good["tables"]["item_id"], **values}}})

    whole = json.dumps(good)
    assert "not JSON, perhaps cut short" in refused(whole[: len(whole) // 2])
    assert "no plan (world_size: Field required" in refused("{}")
    assert "is a plan for 2 ranks, not 1" in refused(json.dumps({**good, "world_size": 2}))
    other = {("itemid" if name == "item_id" else name): table for name, table in good["tables"].items()}
    assert "no table 'itemid'; did you mean 'item_id'?" in refused(json.dumps({**good, "tables": other}))
    fewer = {name: table for name, table in good["tables"].items() if name != "item_id"}
    assert "has no table 'item_id', which the model has" in refused(json.dumps({**good, "tables": fewer}))
    assert "rows of 16, in the model" in refused(whole, "--model.dim", "8")
    shard = good["tables"]["item_id"]["shards"][0]
    assert "a shard is on rank 3, outside 0 … 0" in refused(changed(shards=[{**shard, "rank": 3}]))
    assert f"its shards hold {2 * small.schema.items * 16} numbers of" in refused(changed(shards=[shard, shard]))
    assert "no sharding_type 'rowwise' is offered here; did you mean 'row_wise'?" in refused(
        changed(sharding_type="rowwise")
    )
    assert "no kernel 'fused_uvm' is offered here" in refused(changed(kernel="fused_uvm"))  # on a CPU
    assert "shards.0.offset: List should have at least 2 items" in refused(changed(shards=[{**shard, "offset": [0]}]))
    for change, message in (
        ({"shards": [{**shard, "rank": "0"}]}, "shards.0.rank: Input should be a valid integer, not '0'"),
        ({"shards": [{**shard, "rank": True}]}, "shards.0.rank: Input should be a valid integer, not True"),
        ({"shards": [{**shard, "size": [150.0, 16]}]}, "shards.0.size.0: Input should be a valid integer, not 150.0"),
        ({"shards": [{**shard, "offset": [-1, 0]}]}, "greater than or equal to 0, not -1"),
        ({"shards": [{**shard, "size": [2**63, 16]}]}, "should be less than"),
        ({"shards": []}, "shards: List should have at least 1 item"),
        ({"shards": {}}, "shards: Input should be a valid list"),
        ({"shards": [{**shard, "rnk": 0}]}, "shards.0.rnk: Extra inputs are not permitted"),
        ({"kernel": None}, "kernel: Input should be a valid string"),
        ({"sharding_type": "row_wise", "shards": cut(shard, 50, 99)}, "a shard on each of the ranks 0 … 0"),
        ({"shards": cut(shard, 149, 0)}, "it is table_wise, which is one shard, but has 2"),
        ({"shards": cut(shard, 100, 49)}, "it is table_wise, which is one shard, but has 2"),
        ({"sharding_type": "table_row_wise"}, "no sharding_type 'table_row_wise' is offered here"),
        ({"sharding_type": "table_column_wise"}, "no sharding_type 'table_column_wise' is offered here"),
        ({"sharding_type": "column_wise", "shards": columns(shard, 6, 10)}, "a multiple of 4 each"),
        ({"sharding_type": "column_wise", "shards": columns(shard, 16, 0)}, "a multiple of 4 each"),
    ):
        assert message in refused(changed(**change)), change
    assert "'world_size' is there twice" in refused(whole[:-1] + ', "world_size": 1}')
    assert "world_size: Input should be a valid integer, not inf" in refused(json.dumps({**good, "world_size": 1e999}))
    assert "in module 'users', in the model in 'item_id'" in refused(changed(module="users"))
    file.unlink()
    assert main(["train", *data, *TINY, "--train.run", str(tmp_path / "r"), "--distributed.plan", str(file)]) == 2
