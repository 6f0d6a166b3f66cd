"""Incremental training: every new event is learnt from once, whatever stops it; bad rows are counted, never fatal."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flm_torchrec.cli import main
from flm_torchrec.data.batch import Batch
from flm_torchrec.data.dataset import PreparedData
from flm_torchrec.data.loader import TrainLoader
from flm_torchrec.data.splits import split
from flm_torchrec.prepare.clean import Dropped
from flm_torchrec.prepare.column_options import parse_columns
from flm_torchrec.prepare.options import LogOptions
from flm_torchrec.prepare.sources import logs
from flm_torchrec.training.checkpoint.storage import read_all
from flm_torchrec.training.follow.events import ROUNDED, EventEncoder, NewEvents, RowForm, append, new_windows, newest
from flm_torchrec.training.follow.sources import open_source
from tests.conftest import ROOT, only_shard

NEW = 1_900_000_000
"""Seconds: after all events of the data."""


@pytest.fixture(scope="module")
def run(small: PreparedData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "run"
    options = ["--train.max_steps", "8", "--train.batch_size", "32", "--model.dim", "8", "--data.max_history", "6"]
    assert main(["train", "--data.path", str(small.path), "--train.run", str(folder), *options]) == 0
    return folder


def rows_of(data: PreparedData, number: int, first: int) -> list[dict[str, Any]]:
    """Some new events of some users."""
    rng = np.random.default_rng(first)
    users, items = rng.integers(0, 40, number), rng.integers(0, data.schema.items, number)
    return [
        {"user": data.user_keys[u], "item": data.item_keys[i], "timestamp": NEW + first + n}
        for n, (u, i) in enumerate(zip(users, items, strict=True))
    ]


@pytest.fixture
def source(small: PreparedData, tmp_path: Path) -> Path:
    """Two JSONL files and a Parquet file; with rows of each kind that is refused, and files that are not whole."""
    folder = tmp_path / "source"
    folder.mkdir()
    bad = [{**rows_of(small, 1, 0)[0], **change} for change in (
        {"user": "nobody"}, {"item": None}, {"timestamp": -1}, {"value": "much"}, {"event": "stolen"}, {"user": 1.5},
        {"user": 2.0**53},
    )]  # fmt: skip
    lines = [json.dumps(row) for row in [*rows_of(small, 90, 0), *bad]]
    (folder / "a.jsonl").write_text("\n".join([*lines, "{not json", "[1]"]) + "\n")
    pq.write_table(pa.Table.from_pylist(rows_of(small, 200, 1000)), folder / "b.parquet")
    (folder / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows_of(small, 60, 2000)))
    (folder / "d.jsonl").write_text('{"user": "u1", "it')
    (folder / "e.parquet").write_bytes((folder / "b.parquet").read_bytes()[:-9])
    (folder / ".f.jsonl").write_text("hidden\n")
    return folder


def weights(folder: Path) -> list[str]:
    """Digests of the files of the newest state and of the model, but for how long it took."""
    newest_state = max((folder / "checkpoints").glob("step-*"))
    lines = [line for f in (newest_state, folder / "checkpoints" / "best") for line in
             (f / "SHA256SUMS").read_text().splitlines() if line.endswith(".distcp")]  # fmt: skip
    return [newest_state.name, *lines]


def test_a_killed_follower_goes_on_to_the_weights_of_an_undisturbed_one(
    small: PreparedData, run: Path, source: Path, tmp_path: Path
) -> None:
    follow = ["follow", "--run", str(run), "--source", str(source), "--once", "--admit-after", "0", "--output"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert main([*follow, str(whole)]) == 0
    report = json.loads((whole / "follow.json").read_text())
    assert list(report["source"]["files"]) == ["a.jsonl", "b.parquet", "c.jsonl"] and report["events"] == 350
    assert {reason: entry["rows"] for reason, entry in report["refused"].items()} == {
        "unknown user": 2, "no item": 1, "negative timestamp": 1, "unknown event": 1,
        "value missing or not a finite number": 1, "not a JSON object": 2,
        ROUNDED: 1,
    }  # fmt: skip
    assert report["refused"]["not a JSON object"]["examples"] == ["a.jsonl: row 98", "a.jsonl: row 99"]

    # Killed once the second file has begun to be learnt from, in the middle of its steps.
    script = f"""
import os, signal
from flm_torchrec.cli import main
from flm_torchrec.training.steps import PlainSteps
take, count = PlainSteps.take, 0
def counted(self, batches, step):
    global count
    count += 1
    if count == {_steps_of_first(whole) + 1}:
        os.kill(os.getpid(), signal.SIGKILL)
    return take(self, batches, step)
PlainSteps.take = counted
main({[*follow, str(killed)]!r})
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, timeout=120)
    assert done.returncode == -9, done.stderr
    state = json.loads((killed / "follow.json").read_text())
    assert list(state["source"]["files"]) == ["a.jsonl"] and len(list((killed / "events").iterdir())) == 2
    assert main([*follow, str(killed)]) == 0
    assert json.loads((killed / "follow.json").read_text()) == report
    assert weights(killed) == weights(whole)

    # Nothing new: nothing learnt. More: learnt. The followed run is a run like any other.
    assert main([*follow, str(whole)]) == 0
    assert weights(whole) == weights(killed)
    (source / "d.jsonl").write_text(json.dumps(rows_of(small, 1, 3000)[0]) + "\n")
    assert main([*follow, str(whole)]) == 0
    assert weights(whole)[0] > weights(killed)[0]
    assert main(["evaluate", "--run", str(whole)]) == 0


def _steps_of_first(folder: Path) -> int:
    return json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])["step"]


def test_a_followed_run_of_a_time_split_has_no_windows(
    small: PreparedData, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, output = tmp_path / "run", tmp_path / "out"
    options = ["--data.split", "time", "--train.max_steps", "1", "--model.dim", "8", "--model.layers", "1"]
    assert main(["train", "--data.path", str(small.path), "--train.run", str(run), *options]) == 0
    assert main(["follow", "--run", str(run), "--source", str(source), "--output", str(output), "--once"]) == 0
    capsys.readouterr()
    assert main(["evaluate", "--run", str(output), "--windows", "2"]) == 2
    told = capsys.readouterr().err
    assert "a run of 'flm follow' has no windows" in told and "--data.split" not in told and told.count("\n") == 1


def test_what_a_cold_start_split_holds_out_is_not_learnt(small: PreparedData, tmp_path: Path) -> None:
    run, source, live = tmp_path / "run", tmp_path / "source", tmp_path / "live"
    options = ["--data.split", "cold-start", "--data.holdout", "0.3", "--train.max_steps", "1", "--model.dim", "8"]
    assert main(["train", "--data.path", str(small.path), "--train.run", str(run), *options]) == 0
    splits = split(small, "cold-start", 0.3)
    assert splits.cold_users is not None and splits.cold_items is not None
    source.mkdir()
    rows = rows_of(small, 60, 0)
    put(source / "a.jsonl", rows)
    assert main(["follow", "--run", str(run), "--source", str(source), "--output", str(live), "--once"]) == 0
    users, items = (np.array([keys.index(row[name]) for row in rows])
                    for name, keys in (("user", small.user_keys), ("item", small.item_keys)))  # fmt: skip
    held = splits.cold_users[users] | splits.cold_items[items]
    assert 0 < held.sum() < 60
    report = json.loads((live / "follow.json").read_text())
    assert report["events"] == 60 - held.sum()
    assert {reason: entry["rows"] for reason, entry in report["refused"].items()} == {
        "of a user or an item that the split holds out": held.sum()
    }
    learned = pq.read_table(live / "events/part-000000.parquet")
    assert not splits.cold_users[learned["user"]].any() and not splits.cold_items[learned["item"]].any()
    old, new = (read_all(folder / "checkpoints/best") for folder in (run, live))
    (name,) = (n for n in old if n.endswith(".user_id.weight"))
    assert np.array_equal(old[name][splits.cold_users], new[name][splits.cold_users])


def test_what_cannot_be_followed_is_told(run: Path, source: Path, tmp_path: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    def told(*options: str) -> str:
        given = {"--run": str(run), "--source": str(source), "--output": str(tmp_path / "out")}
        given |= dict(zip(options[::2], options[1::2], strict=True))
        assert main(["follow", "--once", *(part for pair in given.items() for part in pair)]) == 2
        return capsys.readouterr().err

    assert "no run folder" in told("--run", str(source))
    assert "is the run itself" in told("--output", str(run))
    assert "no such folder" in told("--source", str(tmp_path / "none"))
    assert "'http' is not known" in told("--source", "http://there")
    assert "kafka://HOST:PORT/TOPIC" in told("--source", "kafka://there")
    assert "did you mean 'user'?" in told("--columns", "usr=u")
    assert "exists and is no run folder" in told("--output", str(source))
    (source / "0.parquet").write_bytes(b"PAR1 and no more PAR1")
    assert "0.parquet: not a readable Parquet file" in (line := told()) and "put a whole copy in its place" in line
    assert not (tmp_path / "out").exists()


def test_a_loss_that_is_not_a_number_names_its_file_and_what_helps(
    run: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    follow = ["follow", "--once", "--run", str(run), "--source", str(source), "--output", str(tmp_path / "live")]
    epoch = TrainLoader.epoch

    def poisoned(loader: TrainLoader, number: int) -> Iterator[Batch]:
        for batch in epoch(loader, number):
            yield batch if number == 0 else replace(batch, value=torch.full_like(batch.value, torch.nan))

    with monkeypatch.context() as patch:
        patch.setattr(TrainLoader, "epoch", poisoned)
        assert main(follow) == 2
    told = capsys.readouterr().err
    assert "is not a number; nothing of b.parquet is learnt" in told and "--train.warm_start" in told
    assert "non_finite" not in told and told.count("\n") == 1
    assert list(json.loads((tmp_path / "live/follow.json").read_text())["source"]["files"]) == ["a.jsonl"]
    assert main(follow) == 0


def test_an_output_goes_on_with_its_own_source_alone(
    small: PreparedData, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, other, output = tmp_path / "one", tmp_path / "other", tmp_path / "out"
    for number, folder in enumerate((one, other)):
        (folder / "spark.parquet").mkdir(parents=True)
        (folder / "link.jsonl").symlink_to("nowhere")
        put(folder / "day.jsonl", rows_of(small, 5, number))
    arguments = ["follow", "--run", str(run), "--output", str(output), "--once", "--source"]
    assert main([*arguments, str(one)]) == 0
    log = (output / "train.log").read_text()
    assert "spark.parquet: is a folder, left alone" in log and "link.jsonl: is a link that leads nowhere" in log
    before = (output / "follow.json").read_text()
    capsys.readouterr()
    assert main([*arguments, str(other)]) == 2
    told = capsys.readouterr().err
    assert f"--output began with folder {one}" in told and told.count("\n") == 1
    assert (output / "follow.json").read_text() == before
    with (one / "day.jsonl").open("a") as file:
        file.write(json.dumps(rows_of(small, 1, 7)[0]) + "\n")
    put(one / "again.jsonl", rows_of(small, 5, 0))
    assert main([*arguments, str(one)]) == 0
    assert json.loads((output / "follow.json").read_text())["events"] == 6


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


ROWS = st.fixed_dictionaries(
    {"user": JSON | st.just("u3"), "item": JSON | st.just("i3")},
    optional={name: JSON | st.just(5) for name in ("timestamp", "event", "value")},
)


@given(st.lists(JSON | ROWS, max_size=6))
def test_any_row_is_learnt_from_or_counted(run: Path, rows: list[Any]) -> None:
    refused: dict[str, Any] = {}
    found = EventEncoder(run / "vocabulary", RowForm({})).encode(
        [(f"row {n}", row) for n, row in enumerate(rows)], refused
    )
    assert len(found.user) + sum(entry["rows"] for entry in refused.values()) == len(rows)
    assert np.isfinite(found.value).all() and (found.timestamp >= 0).all()
    json.dumps(refused)


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 3 * 10**9)), min_size=1, max_size=40), st.integers(1, 9))
def test_new_windows_hold_each_new_event_once(small: PreparedData, new: list[tuple[int, int]], history: int) -> None:
    user, timestamp = np.array(new).T
    events = NewEvents(user * 3, timestamp, np.zeros(len(new), np.int32), np.ones(len(new), np.float32), user)
    data, fit = newest(small, np.zeros(len(small.item), bool), history + 2)
    grown, fit, fresh = append(data, fit, events)
    found = new_windows(grown, fresh, history)
    covered = np.concatenate([np.arange(s, e) for s, e in zip(found.start, found.end, strict=True)])
    assert len(np.unique(covered)) == len(covered) and np.isin(np.flatnonzero(fresh), covered).all()
    assert fresh.sum() == len(new) and (fit == fresh).all()
    assert set(found.user) == set(user)
    for one in range(10):
        assert (np.diff(grown.timestamp[grown.offsets[one] : grown.offsets[one + 1]]) >= 0).all()


def test_data_without_timestamps_take_events_in_order_of_arrival(small: PreparedData) -> None:
    data = replace(small, schema=replace(small.schema, timestamps=False))
    zeros = np.zeros(3, np.int64)
    events = NewEvents(np.array([5, 6, 7]), zeros, zeros.astype(np.int32), np.ones(3, np.float32), zeros + 1)
    grown, _, fresh = append(data, np.ones(len(data.item), bool), events)
    assert grown.item[fresh].tolist() == [5, 6, 7]
    assert np.flatnonzero(fresh).tolist() == list(range(grown.offsets[2] - 3, grown.offsets[2]))


def put(file: Path, rows: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_the_forgotten_are_out_of_what_a_follower_kept_and_it_goes_on(
    small: PreparedData, run: Path, tmp_path: Path
) -> None:
    data, base, live, source = tmp_path / "data", tmp_path / "base", tmp_path / "live", tmp_path / "source"
    shutil.copytree(small.path, data)
    shutil.copytree(run, base)
    config = (base / "config.yaml").read_text()
    (base / "config.yaml").write_text(config.replace(str(small.path), str(data)))
    source.mkdir()
    gone = rows_of(small, 1, 0)
    arguments = ["follow", "--run", str(base), "--source", str(source), "--output", str(live), "--once"]
    arguments += ["--admit-after", "0"]  # else a forgotten user whose events come again is a new user
    put(source / "a.jsonl", gone)
    put(source / "b.jsonl", rows_of(small, 30, 0))
    assert main(arguments) == 0
    key = gone[0]["user"]
    user = small.user_keys.index(key)
    assert main(["forget", "--data", str(data), "--user", key, "--run", str(base), "--run", str(live)]) == 0
    kept = [pq.read_table(file)["user"].to_pylist() for file in sorted((live / "events").glob("*"))]
    assert kept[0] == []
    assert kept[1]
    assert user not in kept[1]
    put(source / "c.jsonl", [*gone, *rows_of(small, 20, 50)])
    assert main(arguments) == 0
    assert json.loads((live / "follow.json").read_text())["refused"]["unknown user"]["rows"] >= 1


SECOND = NEW * 10**9
TYPED = {
    "ns": {"timestamp": pa.array([SECOND + 123_456_789, SECOND - 1], pa.timestamp("ns"))},
    "ms, with a zone": {"timestamp": pa.array([NEW * 1000, NEW * 1000 - 1], pa.timestamp("ms", "Asia/Tokyo"))},
    "float seconds": {"timestamp": pa.array([NEW + 0.25, NEW - 0.25])},
    "text": {"timestamp": pa.array(["2030-03-17T17:46:40Z", "2030-03-17 19:46:39.9 +02"])},
    "bytes": {"user": pa.array([b"u1", b" u2 "]), "item": pa.array([b"i1", b"i2"], pa.binary(2))},
    "dictionary": {"user": pa.array(["u1", "u2"]).dictionary_encode()},
}


@pytest.mark.parametrize("kind", TYPED)
def test_a_parquet_file_is_read_as_preparation_reads_it(run: Path, tmp_path: Path, kind: str) -> None:
    plain = {"user": ["u1", "u2"], "item": ["i1", "i2"], "timestamp": [NEW, NEW - 1]}
    table = pa.table({**plain, **TYPED[kind]})
    pq.write_table(table, tmp_path / "a.parquet")
    chunk = open_source(str(tmp_path)).after({})
    assert chunk is not None
    refused: dict[str, Any] = {}
    found = EventEncoder(run / "vocabulary", RowForm({})).encode(chunk.rows, refused)
    assert not refused and found.timestamp.tolist() == [NEW, NEW - 1] and (found.value == 1).all()
    columns = parse_columns("user=user,item=item,timestamp=timestamp")
    shard = only_shard(logs.read("parquet", str(tmp_path / "a.parquet"), LogOptions(columns)))
    prepared = pl.concat(shard.batches(Dropped()))
    assert prepared["user"].to_list() == plain["user"] and prepared["item"].to_list() == plain["item"]
    assert prepared["timestamp"].to_list() == found.timestamp.tolist()


def test_numbers_of_any_type_are_the_same_id(run: Path, tmp_path: Path) -> None:
    vocabulary = tmp_path / "vocabulary"
    shutil.copytree(run / "vocabulary", vocabulary)
    for name in ("user", "item"):
        ids = {f"{name}_id": list(range(4)), f"{name}_key": ["0", "1", "2", str(10**30)]}
        pq.write_table(pa.table(ids), vocabulary / f"{name}s.parquet")
    big = pa.array([1, 2, 10**30], pa.decimal128(38, 0))
    for column in (big, big.cast(pa.decimal256(60, 2)), pa.array([1.0, 2.0, None]), pa.array([1, 2, None], pa.int8())):
        folder = tmp_path / str(column.type)
        folder.mkdir()
        pq.write_table(pa.table({"user": column, "item": column, "timestamp": pa.array([1, 2, 3], pa.date32())}),
                       folder / "a.parquet")  # fmt: skip
        chunk = open_source(str(folder)).after({})
        assert chunk is not None
        refused: dict[str, Any] = {}
        found = EventEncoder(vocabulary, RowForm({})).encode(chunk.rows, refused)
        known = [1, 2] if column.null_count else [1, 2, 3]
        assert found.user.tolist() == found.item.tolist() == known
        assert found.timestamp.tolist() == [86400 * (n + 1) for n in range(len(known))]
        assert sum(entry["rows"] for entry in refused.values()) == 3 - len(known)


def test_times_in_another_unit_are_refused_and_read_with_the_unit(run: Path) -> None:
    rows = [(f"row {n}", {"user": "u1", "item": "i1", "timestamp": NEW * 1000 + n}) for n in range(3)]
    refused: dict[str, Any] = {}
    assert len(EventEncoder(run / "vocabulary", RowForm({})).encode(rows, refused).user) == 0
    (reason,) = refused
    assert "--time-unit" in reason and refused[reason] == {"rows": 3, "examples": ["row 0", "row 1", "row 2"]}
    assert EventEncoder(run / "vocabulary", RowForm({}, "ms")).encode(rows, {}).timestamp.tolist() == [NEW] * 3
