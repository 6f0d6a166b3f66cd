"""Tables past memory: hashed and managed rows, chosen when data is prepared, in one process and over ranks."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from flm_torchrec.config.schema import DistributedConfig, TrainConfig
from flm_torchrec.data.dataset import PreparedData, load_prepared
from flm_torchrec.data.hashing import MANAGED_IDS, mix, remap_ids
from flm_torchrec.data.schema import Feature, Schema, Table
from flm_torchrec.distributed.comm import process_group
from flm_torchrec.distributed.managed import check_managed
from flm_torchrec.distributed.shard import make_optimizer, shard
from flm_torchrec.errors import ConfigError, DataError
from flm_torchrec.model.tables import EVICTION_INTERVAL, item_tables, user_tables
from flm_torchrec.planner.plan import make_plan
from flm_torchrec.planner.workload import Workload
from flm_torchrec.prepare.options import PrepareOptions
from flm_torchrec.prepare.prepare import prepare
from flm_torchrec.prepare.sources import synthetic
from flm_torchrec.prepare.table_options import by_table, parse_tables
from tests.conftest import ROOT
from tests.processes import Forked

CHOICE = "user_id=zch:64,title=zch:32:lru,brand=hash:5"


def prepared(folder: Path) -> PreparedData:
    options = PrepareOptions(tables=parse_tables(CHOICE))
    prepare(synthetic.read(synthetic.Recipe(users=120, items=150, events=12, seed=1)), folder, options)
    return load_prepared(folder)


def test_the_hash_is_the_same_for_ever_and_loses_no_id() -> None:
    # The second is the first output of SplitMix64 from seed 1, of which mix is one step.
    assert mix(np.array([0, 1])).tolist() == [0xE220A8397B1DCDAF, 0x910A2DEC89025CC1]
    ids = np.arange(200_000)
    assert len(np.unique(mix(ids))) == len(np.unique(remap_ids(Table("zch", 10), ids))) == len(ids)


@pytest.mark.parametrize("load", [0.1, 1.0, 5.0])
def test_ids_share_rows_as_often_as_the_formula_says(load: float) -> None:
    rows = 20_000
    n = int(load * rows)
    taken = remap_ids(Table("hash", rows), np.arange(n))
    assert taken.min() >= 0 and taken.max() < rows
    shared = 1 - np.sum(np.bincount(taken) == 1) / n
    assert abs(shared - (1 - (1 - 1 / rows) ** (n - 1))) < 0.01


def test_managed_ids_spread_evenly_over_the_ranges_that_ranks_share_out() -> None:
    asked = remap_ids(Table("zch", 8), np.arange(40_000))
    share = np.bincount(asked // (MANAGED_IDS // 4 + 1), minlength=4) / len(asked)
    assert np.abs(share - 0.25).max() < 0.01


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("user_id", "is not NAME=direct"),
        ("user_id=zch", "is not NAME=direct"),
        ("user_id=hash:9:lru", "is not NAME=direct"),
        ("user_id=zch:1", "at least 2"),
        ("item_id=hash:1", "at least 2"),
        ("item_id=zch:0", "at least 2"),
        ("item_source=hash:9", "no id or sparse feature 'item_source'"),
        ("brnd=hash:9", "did you mean 'brand'"),
        ("price=hash:9", "no id or sparse feature 'price'"),
    ],
)
def test_a_wrong_choice_is_told(text: str, reason: str) -> None:
    features = [
        Feature("brand", "item", "categorical", "brand", table="item_brand", cardinality=20),
        Feature("price", "item", "numeric", "price", width=1),
    ]
    with pytest.raises(DataError, match=reason) as error:
        by_table(parse_tables(text), features)
    assert "\n" not in str(error.value)


def test_the_choice_is_a_field_of_the_schema(tmp_path: Path) -> None:
    schema = prepared(tmp_path / "data").schema
    assert schema.tables == {
        "user_id": Table("zch", 64), "item_title": Table("zch", 32, "lru"), "item_brand": Table("hash", 5)
    }  # fmt: skip
    file = tmp_path / "data" / "schema.yaml"
    written = file.read_text()
    for old, new, reason in [
        ("kind: hash", "kind: heap", "'heap' is not one of direct, hash, zch"),
        ("rows: 5", "rows: five", "not 'five'"),
        ("  item_brand:", "  item_brnd:", "did you mean 'item_brand'"),
    ]:
        file.write_text(written.replace(old, new))
        with pytest.raises(DataError, match=reason):
            load_prepared(tmp_path / "data")


def managed_ids(eviction: str, rows: int = 8):  # type: ignore[no-untyped-def]
    schema = Schema("s", "s", users=10**9, items=1, interactions=1, tables={"user_id": Table("zch", rows, eviction)})  # type: ignore[arg-type]
    fixed, managed = user_tables(schema, dim=4)
    assert fixed is None and managed is not None
    collection = managed._managed_collision_collection

    def rows_of(ids: list[int]) -> list[int]:
        features = KeyedJaggedTensor(["user_id"], torch.tensor(ids), lengths=torch.ones(len(ids), dtype=torch.int64))
        return collection(features).values().tolist()

    return collection, rows_of


@pytest.mark.parametrize(("eviction", "survives"), [("lfu", True), ("lru", False)])
def test_managed_rows_go_to_the_ids_seen_most_or_last(eviction: str, survives: bool) -> None:
    collection, rows_of = managed_ids(eviction)
    often, later = list(range(100, 107)), list(range(200, 207))
    assert set(rows_of(often)) == {7}, "before they are taken in, ids share the last row"
    for _ in range(3 * EVICTION_INTERVAL):
        rows_of(often)
    before = rows_of(often)
    assert len(set(before)) == 7 and 7 not in before
    for _ in range(EVICTION_INTERVAL + 1):
        rows_of(later)
    collection.eval()
    assert (rows_of(often) == before) is survives
    assert (len(set(rows_of(later))) == 7) is not survives


def test_ids_never_seen_change_nothing_outside_training() -> None:
    collection, rows_of = managed_ids("lfu")
    for _ in range(EVICTION_INTERVAL + 1):
        rows_of([1, 2, 3])
    collection.eval()
    known = {name: t.clone() for name, t in collection.state_dict().items()}
    for _ in range(2 * EVICTION_INTERVAL):
        assert set(rows_of(list(range(1000, 1050)))) == {7}
    assert all(torch.equal(t, known[name]) for name, t in collection.state_dict().items())


def test_a_row_that_a_new_id_takes_starts_from_nothing() -> None:
    """Weights and optimizer state: what FBGEMM's kernel does on a GPU and managed.py on a CPU."""
    schema = Schema("s", "s", users=10**9, items=1, interactions=1, tables={"user_id": Table("zch", 8, "lru")})
    config = TrainConfig(sparse_lr=0.1)
    with process_group(DistributedConfig(device="cpu", threads=1)) as comm:
        _, managed = user_tables(schema, dim=4)
        assert managed is not None
        plan = make_plan(
            managed, comm, DistributedConfig(), lambda: Workload(managed, 8, {}, config.sparse_optimizer, 0)
        )
        model = shard(managed, plan, comm, config)
        optimizer = make_optimizer(model, config)

        def look_up(ids: list[int]) -> torch.Tensor:
            lengths = torch.ones(len(ids), dtype=torch.int64)
            return model(KeyedJaggedTensor(["user_id"], torch.tensor(ids), lengths=lengths))[0].to_dict()["user_id"]

        def state() -> torch.Tensor:
            (of_table,) = model.fused_optimizer.state_dict()["state"].values()
            return of_table["user_id.momentum1"].local_shards()[0].tensor[:7].clone()

        for step in range(1, 3 * EVICTION_INTERVAL + 1):
            ids = list(range(100, 107) if step <= 2 * EVICTION_INTERVAL else range(200, 207))
            found = look_up(ids)
            taken_in = step in (EVICTION_INTERVAL, 3 * EVICTION_INTERVAL)
            assert taken_in == (found.abs().max() == 0)
            if taken_in:
                assert state().count_nonzero() == 0
            optimizer.zero_grad()
            (found - 1).square().sum().backward()
            optimizer.step()
        assert state().count_nonzero() == 7


@pytest.mark.slow
def test_a_churn_of_new_ids_stays_in_its_memory_and_spares_the_regular_ones() -> None:
    options = ["--ids", "200000", "--rows", "10000", "--regulars", "5000", "--batch", "2048"]
    churn = Forked([str(ROOT / "tools" / "faults" / "churn.py"), *options])
    told, error = churn.communicate(timeout=200)
    assert churn.poll() == 0, error[-2000:]
    rows = re.findall(r"\| ([a-z ]+) \| (\d+) MiB \| (\d+) MiB \| ([\d.]+)% \| (\d+) \|", told)
    found = {name: (int(after) - int(before), float(own), int(evicted)) for name, before, after, own, evicted in rows}
    assert list(found) == ["hash", "zch lfu", "zch lru"]
    assert all(grown < 20 for grown, _, _ in found.values())
    assert found["zch lfu"][1] > 90 > 70 > found["hash"][1]
    assert found["zch lru"][2] > 100_000 > 0 == found["hash"][2]


FLM = ["-m", "flm_torchrec", "--"]


def test_managed_and_hashed_tables_train_on_two_ranks_and_are_read_by_one(ranks, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    prepared(tmp_path / "data")
    run = tmp_path / "run"
    small = ["--model.dim=16", "--train.batch_size=32", "--data.max_history=6", "--train.epochs=3",
             "--distributed.threads=1"]  # fmt: skip
    ranks(2, [*FLM, "train", f"--data.path={tmp_path / 'data'}", f"--train.run={run}", *small])
    ranks(1, [*FLM, "evaluate", "--run", str(run)])
    assert json.loads((run / "evaluation-test.json").read_text())["users"] == 120
    with pytest.raises(AssertionError, match="managed rows can be read by as many ranks as wrote them"):
        ranks(4, [*FLM, "evaluate", "--run", str(run)])


def test_sharded_rows_fixed_and_managed_side_by_side_are_pooled_right(ranks, small: PreparedData) -> None:  # type: ignore[no-untyped-def]
    printed = ranks(2, [str(ROOT / "tests" / "distributed" / "managed_job.py"), str(small.path)])
    assert printed.count("equal") == 4


@pytest.mark.parametrize(
    ("ranks", "sharding", "reason"),
    [
        (3, "auto", "64 managed rows do not divide by 3"),
        (64, "auto", "64 ranks would have one managed row each"),
        (2, "table_wise", "does not go with the managed table"),
    ],
)
def test_what_managed_tables_cannot_do_is_told(ranks: int, sharding: str, reason: str) -> None:
    chosen = dict.fromkeys(("user_id", "item_id"), Table("zch", 64))
    schema = Schema("s", "s", users=9, items=1, interactions=1, tables=chosen)
    for managed in (user_tables(schema, dim=4)[1], item_tables(schema, dim=4)):
        assert managed is not None
        check_managed(managed, 2, "row_wise")
        with pytest.raises(ConfigError, match=reason):
            check_managed(managed, ranks, sharding)
