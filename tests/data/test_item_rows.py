"""Items past memory: item ids that share rows by a hash, or that hold managed rows, from preparation to export."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from flm_torchrec.cli import main
from flm_torchrec.config import load_config
from flm_torchrec.data.dataset import PreparedData, load_prepared
from flm_torchrec.data.hashing import MANAGED_IDS, item_lookups, managed_items, remap_ids
from flm_torchrec.data.schema import ITEM_TABLES, Table
from flm_torchrec.data.splits import everyone
from flm_torchrec.export.parts import read_part
from flm_torchrec.model.tables import EVICTION_INTERVAL, item_vectors
from flm_torchrec.training.checkpoint import storage
from flm_torchrec.training.gathered import GatheredModel, items_with_rows
from flm_torchrec.training.job import Job, open_job
from tests.conftest import NO_DROPOUT
from tests.processes import launch_ranks
from tests.training.test_warm_start import shuffled

SMALL = ["model.dim=8", "model.layers=1", "data.max_history=6", "train.batch_size=32"]
SMALL += ["distributed.device=cpu", "distributed.threads=1"]


@contextmanager
def made(data: PreparedData, table: Table, *overrides: str) -> Iterator[Job]:
    chosen = replace(data, schema=replace(data.schema, tables={"item_id": table}))
    with open_job(load_config(None, [*SMALL, *overrides]), chosen) as job:
        yield job


@given(st.lists(st.integers(0, 2**40), unique=True, min_size=2, max_size=50), st.booleans())
def test_no_two_items_ask_a_managed_table_for_the_same(ids: list[int], counted: bool) -> None:
    asked = managed_items(np.array(ids), np.full(len(ids), counted))
    assert asked.min() >= 0 and asked.max() < MANAGED_IDS
    assert len(np.unique(asked // 2)) == len(ids)
    assert (asked % 2 == counted).all()


def test_items_spread_evenly_over_the_ranks_of_a_managed_table() -> None:
    asked = managed_items(np.arange(10_000), np.zeros(10_000, bool))
    assert np.abs(np.bincount(asked // (MANAGED_IDS // 8 + 1)) / len(asked) - 1 / 8).max() < 0.01


def test_items_that_share_a_row_learn_and_score_as_rows_that_are_copies(small: PreparedData) -> None:
    """A hashed model is the model of a row for each item in which rows are equal: the same losses and item vectors."""
    table = Table("hash", 37)
    rows = torch.from_numpy(remap_ids(table, np.arange(small.schema.items)))
    assert len(rows.unique()) < small.schema.items
    losses, vectors = [], []
    weights: dict[str, Tensor] = {}
    for chosen in (table, Table()):
        with made(small, chosen, *(f"model.{name}dropout=0" for name in ("", "embedding_", "id_", "user_id_"))) as job:
            model = job.model
            for name, tensor in model.state_dict().items():
                local = tensor.local_shards()[0].tensor if hasattr(tensor, "local_shards") else tensor
                of_item = name.split(".")[-2] in ITEM_TABLES
                if chosen.kind == "hash":
                    weights[name] = torch.randn_like(local) if of_item else local.clone()
                local.copy_(weights[name][rows] if of_item and chosen.kind == "direct" else weights[name])
            _, outputs = model(next(job.loader.epoch(0)))
            losses.append({name: float(value) for name, value in outputs.losses.items()})
            vectors.append(job.encoder(everyone(small)).items(np.arange(small.schema.items)))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    torch.testing.assert_close(vectors[0], vectors[1])


def look_up(job: Job, counted: Sequence[int], drawn: Sequence[int] = ()) -> Tensor:
    """[n] items → [n, tables, D] what managed tables give. Those that are drawn as negatives are not counted."""
    items = np.array([*counted, *drawn])
    asked = item_lookups(job.data.schema.table("item_id"), items, np.arange(len(items)) < len(counted))
    values = torch.from_numpy(np.concatenate(list(asked.values())))
    features = KeyedJaggedTensor(list(asked), values, lengths=torch.ones_like(values))
    found = item_vectors(job.model.module.item_id, features, managed=True)
    return torch.stack([found[table].values() for table in ITEM_TABLES], 1)


def test_an_item_without_a_row_gets_zeros_and_a_new_holder_begins_there(small: PreparedData) -> None:
    """Seven items can hold the eight rows: the last row is that of all others, which are pulled, and stay at zero."""
    early, late, drawn = range(7), range(100, 107), range(50, 60)
    with made(small, Table("zch", 8, "lru")) as job:
        job.model.train()
        for step in range(1, 3 * EVICTION_INTERVAL + 1):
            holders = early if step <= 2 * EVICTION_INTERVAL else late
            found = look_up(job, holders, drawn)
            before = step <= EVICTION_INTERVAL or step > 2 * EVICTION_INTERVAL
            assert (found[:7].count_nonzero() == 0) == before, step
            assert found[7:].count_nonzero() == 0
            (found - 1).square().sum().backward()
        job.model.eval()
        assert look_up(job, late).abs().amin() > 0
        assert look_up(job, [*early, *drawn]).count_nonzero() == 0
        assert np.flatnonzero(items_with_rows(job)).tolist() == [i for i in late if job.train_stats.items[i]]
        rows = GatheredModel(job).rows("item_source", np.arange(small.schema.items)).any(1)
        assert rows.nonzero().flatten().tolist() == list(late)


def test_negatives_earn_no_row(small: PreparedData) -> None:
    with made(small, Table("zch", 64), "loss.negatives=all") as job:
        batch = next(job.loader.epoch(0))
        asked = batch.item_ids["item_target"].values()
        in_events = torch.cat([batch.targets, batch.tokens[batch.tokens < len(asked)]]).unique()
        assert len(asked) == small.schema.items > len(in_events)
        assert (asked % 2).nonzero().flatten().tolist() == in_events.tolist()


@pytest.fixture(scope="module", params=["hash", "zch"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained by two ranks: 160 items through 80 rows. Beside its data."""
    folder = tmp_path_factory.mktemp(request.param)
    recipe = ["--synthetic-users", "100", "--synthetic-items", "160", "--tables", f"item_id={request.param}:80"]
    assert main(["prepare", "--source", "synthetic", *recipe, "--output", str(folder / "data")]) == 0
    options = [f"--{option}" for option in SMALL]
    paths = [f"--data.path={folder / 'data'}", f"--train.run={folder / 'run'}"]
    steps = ["--train.max_steps=24", "--train.eval_every=24"]  # the last step is the best one: it is what goes on
    launch_ranks(2, ["-m", "flm_torchrec", "--", "train", *paths, *options, *steps, *NO_DROPOUT])
    return folder / "run"


def test_export_and_evaluation_know_which_items_have_rows(run: Path, tmp_path: Path) -> None:
    """Two ranks wrote the run, one reads it. An item without a row is its content, and is ranked like all others."""
    assert main(["evaluate", "--run", str(run)]) == 0
    assert json.loads((run / "evaluation-test.json").read_text())["users"] == 100
    assert main(["export", "--run", str(run), "--output", str(tmp_path / "out"), "--tower", "none"]) == 0
    columns = ["known", "embedding", "content", "id"]
    items = read_part(tmp_path / "out/items.parquet/part-00000.parquet", columns).to_pydict()
    known = np.array(items["known"])
    embedding, content, ids = (np.array(items[name]) for name in columns[1:])
    if run.parent.name.startswith("hash"):
        assert known.mean() > 0.9 and len(np.unique(ids, axis=0)) <= 80 < len(np.unique(embedding, axis=0))
        return
    assert 60 < known.sum() <= 78
    np.testing.assert_allclose(embedding[~known], content[~known], atol=1e-6)
    assert not ids[~known].any() and len(np.unique(ids[known], axis=0)) == known.sum()


def exported_items(run: Path, folder: Path) -> dict[str, tuple[bool, np.ndarray]]:
    """By key, whether an item's id is known, and its vector."""
    assert main(["export", "--run", str(run), "--output", str(folder), "--tower", "none"]) == 0
    rows = read_part(folder / "items.parquet/part-00000.parquet", ["item_key", "known", "embedding"]).to_pylist()
    return {row["item_key"]: (row["known"], np.array(row["embedding"])) for row in rows}


def test_a_run_goes_on_with_its_rows_and_with_new_items(run: Path, tmp_path: Path) -> None:
    data = run.parent / "data"
    # Two ranks wrote the run, one goes on. Managed rows go with their keys, whatever numbers these have.
    other = data if run.parent.name.startswith("hash") else shuffled(data, tmp_path / "shuffled")
    warm = ["train", "--train.warm_start", str(run), "--data.path", str(other), "--train.run", str(tmp_path / "warm")]
    assert main([*warm, "--train.max_steps", "1", "--train.sparse_lr", "1e-9", "--train.dense_lr", "1e-9"]) == 0
    before, after = exported_items(run, tmp_path / "before"), exported_items(tmp_path / "warm", tmp_path / "after")
    assert before.keys() == after.keys()
    for key, (known, vector) in before.items():
        assert after[key][0] == known
        np.testing.assert_allclose(after[key][1], vector, atol=1e-6, err_msg=key)
    # A follower: the tables stay as long as they are.
    plain = load_prepared(data)
    events = [{"user": plain.user_keys[n], "item": f"new{n % 2}", "timestamp": 1_900_000_000 + n} for n in range(20)]
    (tmp_path / "source").mkdir()
    (tmp_path / "source/a.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    live = ["--source", str(tmp_path / "source"), "--output", str(tmp_path / "live"), "--once"]
    assert main(["follow", "--run", str(run), *live]) == 0
    report = json.loads((tmp_path / "live/follow.json").read_text())
    assert (report["events"], report["growths"]) == (20, 1)
    best = storage.read_all(tmp_path / "live/checkpoints/best")
    assert all(len(best[name]) == 80 for name in best if name.endswith(tuple(f".{t}.weight" for t in ITEM_TABLES)))
    assert main(["evaluate", "--run", str(tmp_path / "live")]) == 0


def test_the_plan_has_the_rows_that_were_chosen_and_their_map(run: Path, tmp_path: Path) -> None:
    config = ["--config", str(run / "config.yaml"), "--hardware", "xeon-8480", "--per-node", "2"]
    assert main(["plan", *config, "--output", str(tmp_path / "plan")]) == 0
    made = json.loads((tmp_path / "plan/report.json").read_text())["report"]
    tables = {table["name"]: table for table in made["tables"]}
    assert all(tables[name]["rows"] == 80 and tables[name]["bytes"] == 80 * 8 * 4 for name in ITEM_TABLES)
    if run.parent.name.startswith("zch"):
        assert all(tables[name]["sharding_type"] == "row_wise" for name in ITEM_TABLES)
