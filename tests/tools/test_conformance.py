"""The conformance suite: what models may see, what is refused, and that scores say what was learnt."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from flm_torchrec.errors import RunError
from flm_torchrec.prepare.options import Recipe
from flm_torchrec.prepare.sources import synthetic
from flm_torchrec.prepare.sources.synthetic import MECHANISMS
from tests.conftest import rows_of
from tools.studies import conformance
from tools.studies.conformance_adapters import run_baselines
from tools.studies.conformance_adapters.protocol import K, task_of
from tools.studies.conformance_data import Suite, write_suite
from tools.studies.conformance_score import ALL, FLOOR, Score, read_lists, scored, scores_of

RECIPE = Recipe(users=400, items=120, events=10, seed=4)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Suite:
    return write_suite(tmp_path_factory.mktemp("conformance") / "suite", RECIPE)


@pytest.fixture
def suite(written: Suite, tmp_path: Path) -> Suite:
    """The same data in a folder of its own."""
    return write_suite(tmp_path / "suite", Recipe(users=20, items=100, events=5, seed=1))


def oracle(suite: Suite, name: str) -> np.ndarray:
    return read_lists(suite.runs / "oracle-0" / f"{name}.parquet", suite)


def lists_of(suite: Suite, pick: Callable[[int], list[int]]) -> pl.DataFrame:
    """For user number u, the items `pick(u)`, by their numbers."""
    users = suite.test["user"].to_list()
    rows = [(user, rank, suite.items[i]) for u, user in enumerate(users) for rank, i in enumerate(pick(u), 1)]
    return pl.DataFrame(rows, schema=["user", "rank", "item"], orient="row")


def test_models_see_all_events_but_the_last_of_each_user(written: Suite) -> None:
    events = rows_of(synthetic.read(RECIPE)).select("user", "item", "timestamp")
    train, valid = (pl.read_parquet(written.data / f"{name}.parquet") for name in ("train", "valid"))
    test = written.test.select("user", "item", "timestamp")
    assert pl.concat([train, valid, test]).sort("user", "timestamp").equals(events.sort("user", "timestamp"))
    newest = [part.group_by("user").agg(pl.col("timestamp").max()).sort("user") for part in (train, valid, test)]
    assert (newest[0]["timestamp"] < newest[1]["timestamp"]).all() and len(valid) == len(test) == RECIPE.users
    assert (newest[1]["timestamp"] < newest[2]["timestamp"]).all()
    seen = {name: pl.read_parquet(written.data / f"{name}.parquet").columns for name in ("test_users", "items")}
    assert seen == {"test_users": ["user"], "items": ["item", "title", "genre", "brand", "price"]}


def test_an_oracle_reaches_its_ceiling_and_the_figures_of_the_source(written: Suite) -> None:
    ranks = {name: [oracle(written, name)] for name in ("mixture", *(f"{m} alone" for m in MECHANISMS))}
    scores = scores_of(written, {**ranks, FLOOR: [np.full(RECIPE.users, K + 1)]})
    told = synthetic.read(RECIPE).oracle
    assert told is not None
    for signal in (ALL, *MECHANISMS):
        best = scores[signal]["mixture" if signal == ALL else f"{signal} alone"]
        for metric, score in best.items():
            assert score.share == score.share_low == score.share_high == 1.0 and score.above_floor
            assert score.low < score.mean < score.high
            assert score.mean == pytest.approx(told[signal if signal == ALL else f"only_{signal}"][metric])
    assert scores["sequential"]["content alone"]["ndcg@10"].share < 0.2
    assert 0.1 < scores["content"]["mixture"]["ndcg@10"].share < 0.9


def test_a_random_ranking_learns_nothing(written: Suite, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    file = tmp_path / "random.parquet"
    lists_of(written, lambda u: rng.choice(RECIPE.items, K, replace=False).tolist()).write_parquet(file)
    popular = oracle(written, "content alone")  # stands for any floor that is better than chance
    found = scores_of(written, {"random": [read_lists(file, written)], FLOOR: [popular]})
    for signal in ("content", "sequential"):
        assert found[signal]["random"]["ndcg@10"].learns(0.0) == "no"
    assert found["sequential"]["random"]["ndcg@10"].share < 0.15


def test_a_score_is_the_mean_over_seeds_with_the_interval_over_users() -> None:
    rng = np.random.default_rng(3)
    ceiling, floor = np.ones(500), np.zeros(500)
    model = (rng.random(500) < 0.3) * 1.0
    found = scored(model, ceiling, floor)
    assert found.share == found.mean == pytest.approx(model.mean())
    error = np.sqrt(model.mean() * (1 - model.mean()) / 500)
    assert found.low == pytest.approx(model.mean() - 1.96 * error, abs=0.01)
    assert found.high == pytest.approx(model.mean() + 1.96 * error, abs=0.01)
    assert found.learns(0.25) == "learns it" and found.learns(0.5) == "a trace"
    same = scored(model, ceiling, model)
    assert not same.above_floor and same.learns(0.0) == "no"


def change(row: int, **values: Any) -> Callable[[pl.DataFrame], pl.DataFrame]:
    """Other values in a row, counted from 1."""
    there = pl.int_range(1, pl.len() + 1) == row

    def changed(frame: pl.DataFrame) -> pl.DataFrame:
        of = {name: pl.when(there).then(pl.lit(value)).otherwise(pl.col(name)) for name, value in values.items()}
        return frame.with_columns(**of)

    return changed


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (change(13, item="i999"), "row 13: user 'u1' gets item 'i999', which no row of data/items.parquet has"),
        (change(12, item="i0"), "row 12: user 'u1' gets item 'i0' twice"),
        (change(25, rank=4), "row 25: user 'u2' has rank 4 twice"),
        (change(30, rank=11), "row 30: user 'u2' has rank 11; ranks are 1 to 10"),
        (change(7, user="ghost"), "row 7: user 'ghost' is no user of data/test_users.parquet"),
        (change(3, item=None), "row 3: user 'u0' has an empty cell; fill it"),
        (lambda frame: frame.slice(0, 195), "user 'u19' has 5 rows; each of the 20 users needs ranks 1 to 10"),
        (lambda frame: frame.filter(pl.col("user") != "u4"), "user 'u4' has 0 rows"),
        (lambda frame: frame.drop("rank"), "no column 'rank'; write the columns user, rank, item"),
        (lambda frame: frame.with_columns(pl.col("rank") / 1), "column 'rank' is Float64; write integers"),
        (lambda frame: frame.with_columns(user=pl.lit(3)), "column 'user' is Int32; write text"),
    ],
)
def test_lists_that_break_a_rule_are_refused_in_one_line(
    suite: Suite, tmp_path: Path, wrong: Callable[[pl.DataFrame], pl.DataFrame], told: str
) -> None:
    file = tmp_path / "lists.parquet"
    right = lists_of(suite, lambda u: list(range(K)))
    right.write_parquet(file)
    assert len(read_lists(file, suite)) == 20
    wrong(right).write_parquet(file)
    with pytest.raises(RunError) as error:
        read_lists(file, suite)
    assert f"{file}: {told}" in str(error.value) and len(str(error.value).splitlines()) == 1


def test_the_order_of_the_rows_of_a_list_means_nothing(written: Suite, tmp_path: Path) -> None:
    file = tmp_path / "shuffled.parquet"
    pl.read_parquet(written.runs / "oracle-0" / "mixture.parquet").sample(
        fraction=1, shuffle=True, seed=1
    ).write_parquet(file)
    assert (read_lists(file, written) == oracle(written, "mixture")).all()


def test_what_is_no_list_is_refused(suite: Suite, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (file := tmp_path / "lists.csv").write_text("user,rank,item\n")
    for path in (file, tmp_path / "none.parquet"):
        assert conformance.main(["score", str(suite.folder), str(path), "--name", "mine"]) == 2
        told = capsys.readouterr().err
        assert str(path) in told and len(told.splitlines()) == 1


def test_adapters_run_once_and_lists_of_others_join_the_table(
    suite: Suite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started: list[list[str]] = []

    def here(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        """What the command of an adapter does, in this process."""
        if command[1] == "-c":
            return subprocess.CompletedProcess(command, 0, '{"flm_torchrec": "0"}')
        started.append(command)
        assert command[2].endswith(".run_baselines")
        run_baselines.main(task_of(command[3:]))
        return subprocess.CompletedProcess(command, 0)

    folder = str(suite.folder)
    assert conformance.main(["table", folder]) == 2
    assert "run the adapter baselines first" in capsys.readouterr().err
    monkeypatch.setattr(subprocess, "run", here)
    for _ in range(2):
        assert conformance.main(["run", folder, "--adapters", "baselines", "--seeds", "0", "1"]) == 0
    assert len(started) == 1  # one seed is enough, and a second call finds it
    mine = tmp_path / "mine.parquet"
    lists_of(suite, lambda u: list(range(K))).write_parquet(mine)
    for seed in "0", "1":
        assert conformance.main(["score", folder, str(mine), "--name", "mine", "--seed", seed]) == 0
    assert conformance.main(["score", folder, str(mine), "--name", "mine"]) == 2
    capsys.readouterr()
    assert conformance.main(["table", folder]) == 0
    rows = {line.split(" | ")[0][2:]: line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")}
    models = ("popularity", "random", "item-kNN", "Markov", "EASE-R")
    assert {f"baselines/{name}" for name in models} | {"other/mine", "oracle/mixture"} <= set(rows)
    told = json.loads((suite.folder / "table.json").read_text())
    assert Score(**told["scores"]["all"]["oracle/mixture"]["hr@10"]).share == 1.0
    known = pl.concat([pl.read_parquet(suite.data / f"{name}.parquet") for name in ("train", "valid")])
    lists = pl.concat([pl.read_parquet(file) for file in (suite.runs / "baselines-0").glob("*.parquet")])
    assert lists.join(known, on=["user", "item"], how="semi").is_empty()


def test_an_interpreter_without_the_peer_is_told_how_to_get_it(
    suite: Suite, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    peer = conformance.Adapter("run_implicit", ("no-such-peer",), "pip install no-such-peer==1")
    monkeypatch.setitem(conformance.ADAPTERS, "implicit", peer)
    for python, told in (sys.executable, "lacks one of no-such-peer; pip install"), ("/no/python", "cannot be run"):
        assert conformance.main(["run", str(suite.folder), "--adapters", "implicit", "--python", python]) == 2
        message = capsys.readouterr().err
        assert told in message and python in message and len(message.splitlines()) == 1
    assert not (suite.runs / "implicit-0").exists()


def test_data_are_kept_or_refused_but_never_changed(suite: Suite, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(suite.folder)
    same = ["--users", "20", "--items", "100", "--events", "5", "--seed", "1"]
    before = (suite.folder / "test.parquet").stat().st_mtime_ns
    assert conformance.main(["write", folder, *same]) == 0
    assert (suite.folder / "test.parquet").stat().st_mtime_ns == before
    assert conformance.main(["write", folder, *same[:-1], "2"]) == 2
    assert "another recipe" in capsys.readouterr().err
    (suite.data / "valid.parquet").write_bytes(b"")
    assert conformance.main(["table", folder]) == 2
    assert "valid.parquet: missing or changed" in capsys.readouterr().err
    assert conformance.main(["table", str(suite.folder / "none")]) == 2
    assert "no suite" in capsys.readouterr().err
