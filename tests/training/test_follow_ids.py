"""Following with ids that live: unknown users and items come in, known rows stay, ids expire; also after a kill."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import flm_torchrec.files
from flm_torchrec.cli import main
from flm_torchrec.data.admission import Admission
from flm_torchrec.data.dataset import PreparedData
from flm_torchrec.export.parts import read_part
from flm_torchrec.training.checkpoint.storage import read_all
from flm_torchrec.training.follow.events import EventEncoder, RowForm
from flm_torchrec.training.follow.ids import IdIntake
from flm_torchrec.training.follow.item_file import ItemFile
from flm_torchrec.training.follow.item_rows import ItemRows
from tests.conftest import NO_DROPOUT
from tests.training.test_follow import NEW, put, rows_of, weights

DAY = 86400


@pytest.fixture(scope="module")
def run(small: PreparedData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "run"
    options = ["--train.max_steps", "4", "--train.batch_size", "32", "--model.dim", "8", "--data.max_history", "6"]
    assert main(["train", "--data.path", str(small.path), "--train.run", str(folder), *options]) == 0
    return folder


def one(user: str, item: str, second: int, **features: Any) -> dict[str, Any]:
    return {"user": user, "item": item, "timestamp": NEW + second, **features}


def follow(run: Path, source: Path, output: Path, *options: str) -> int:
    return main(["follow", "--run", str(run), "--source", str(source), "--output", str(output), "--once", *options])


def features_of(small: PreparedData, row: int) -> dict[str, Any]:
    """The features of an item of the data, as people write them."""
    items = pq.read_table(small.path / "items.parquet").slice(row, 1).to_pylist()[0]
    given = {}
    for feature in (f for f in small.schema.features if f.entity == "item"):
        if feature.kind in ("categorical", "multi_categorical"):
            values = (
                pq.read_table(small.path / f"vocab/item_{feature.name}.parquet").sort_by("code")["value"].to_pylist()
            )
            codes = items[feature.column]
            given[feature.name] = [values[c] for c in codes] if isinstance(codes, list) else values[codes]
        elif feature.kind == "text":
            given[feature.name] = items[feature.name]
        elif feature.kind == "numeric":
            given[feature.name] = items[feature.column] * feature.deviation + feature.mean
    return given


@pytest.fixture
def source(small: PreparedData, tmp_path: Path) -> Path:
    """Two files: the second brings a user and an item with features, and one that the first has brought already."""
    folder = tmp_path / "source"
    folder.mkdir()
    known = small.user_keys[3]
    put(folder / "a.jsonl", [one("ann", small.item_keys[1], 1), one(known, "plain", 2), *rows_of(small, 20, 10)])
    fresh = [one("bob", "rich", 50 + n, **features_of(small, 4)) for n in range(2)]
    put(folder / "b.jsonl", [*fresh, one("ann", "plain", 60), *rows_of(small, 20, 70)])
    return folder


def test_unknown_ids_come_in_and_export_and_evaluation_know_them(
    small: PreparedData,
    run: Path,
    source: Path,
    tmp_path: Path,
) -> None:
    live, exported = tmp_path / "live", tmp_path / "export"
    assert follow(run, source, live) == 0
    report = json.loads((live / "follow.json").read_text())
    assert report["events"] == 45 and report["refused"] == {} and report["growths"] == 2
    users, items = (pq.read_table(live / f"vocabulary/{e}s.parquet") for e in ("user", "item"))
    assert users["user_key"].to_pylist() == [*small.user_keys, "ann", "bob"]
    assert items["item_key"].to_pylist() == [*small.item_keys, "plain", "rich"]
    for feature in (f for f in small.schema.features if f.entity == "item" and f.sparse):
        rows = items[feature.column].to_pylist()
        assert rows[-1] == rows[4], feature.name
    tensors = read_all(live / "checkpoints/best")
    (name,) = (n for n in tensors if n.endswith(".item_id.weight"))
    assert len(tensors[name]) == small.schema.items + 2

    assert main(["evaluate", "--run", str(live)]) == 0
    assert main(["export", "--run", str(live), "--output", str(exported), "--tower", "none"]) == 0
    rows = read_part(exported / "users.parquet/part-00000.parquet", ["user_key", "seen"]).to_pylist()
    seen = {row["user_key"]: row["seen"] for row in rows}
    plain, rich = small.schema.items, small.schema.items + 1
    assert seen["ann"] == [1, plain] and seen["bob"] == [rich, rich] and plain in seen[small.user_keys[3]]

    # Nothing new: nothing changes. A run that took in ids is not followed under its own name for another output.
    before = weights(live)
    assert follow(run, source, live) == 0 and weights(live) == before
    assert follow(live, source, tmp_path / "other") == 2 and not (tmp_path / "other").exists()


def test_a_new_item_begins_at_the_cold_score_and_known_rows_stay(
    small: PreparedData,
    run: Path,
    tmp_path: Path,
) -> None:
    source, items, live = tmp_path / "source", tmp_path / "items.jsonl", tmp_path / "live"
    source.mkdir()
    items.write_text(json.dumps({"item": "rich", **features_of(small, 4)}) + "\n")
    assert follow(run, source, live, "--items", str(items)) == 0
    old, new = (read_all(folder / "checkpoints/best") for folder in (run, live))
    for name, tensor in old.items():
        assert np.array_equal(tensor, new[name][: len(tensor)] if tensor.dim() else new[name]), name
    (name,) = (n for n in new if n.endswith(".item_id.weight"))
    assert not new[name][-1].any()  # the id says nothing: the item is what its features are
    assert pq.read_table(live / "vocabulary/items.parquet")["item_key"].to_pylist()[-1] == "rich"


def test_an_item_file_that_cannot_be_read_is_refused_in_one_line(
    small: PreparedData,
    run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source, file = tmp_path / "source", tmp_path / "items.jsonl"
    source.mkdir()
    same = {"item": small.item_keys[4], **features_of(small, 4)}
    for rows, told in (
        ([same, {"item": None}], "row 2: no item"),
        ([{"item": "x"}, {"item": "x"}], "row 2: item 'x' has two rows"),
        ([{"sku": "x"}], "no column 'item'"),
    ):
        put(file, rows)
        assert follow(run, source, tmp_path / "out", "--items", str(file)) == 2
        error = capsys.readouterr().err
        assert told in error and error.count("\n") == 1 and not (tmp_path / "out").exists()
    file.write_text(json.dumps(same) + "\n[1]\n")
    assert follow(run, source, tmp_path / "out", "--items", str(file)) == 2
    assert "items.jsonl: row 2: not a JSON object; mend the row" in capsys.readouterr().err
    assert follow(run, source, tmp_path / "out", "--items", str(tmp_path / "none.csv")) == 2
    assert "put the item file back" in capsys.readouterr().err
    assert follow(run, source, tmp_path / "out", "--items", str(file), "--admit-after", "0") == 2
    assert follow(run, source, tmp_path / "out", "--admit-after", "999") == 2
    (tmp_path / "secret").write_bytes(b"s" * 32)
    assert follow(run, source, tmp_path / "out", "--key-file", str(tmp_path / "secret")) == 2
    assert "are not hashed; leave it out" in capsys.readouterr().err


def test_known_items_with_other_features_keep_theirs_and_are_told(
    small: PreparedData, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Items of the data and items that came in: their rows stay as they are, and those beside them come in."""
    source, file, live = tmp_path / "source", tmp_path / "items.jsonl", tmp_path / "live"
    source.mkdir()
    rich, same = ({"item": key, **features_of(small, 4)} for key in ("rich", small.item_keys[4]))
    put(file, [same, rich])
    assert follow(run, source, live, "--items", str(file)) == 0
    before = pq.read_table(live / "vocabulary/items.parquet")
    capsys.readouterr()
    other = {"item": small.item_keys[5], **features_of(small, 4)}
    put(file, [other, same, {**rich, **features_of(small, 5)}, {"item": "late"}])
    put(source / "a.jsonl", [one("u3", "rich", 1)])
    assert follow(run, source, live, "--items", str(file)) == 0
    assert "2 items with other features in the item file" in capsys.readouterr().out
    after = pq.read_table(live / "vocabulary/items.parquet")
    assert after.slice(0, len(before)).equals(before) and after["item_key"].to_pylist()[-1] == "late"
    changed = json.loads((live / "follow.json").read_text())["changed"]
    assert changed["items"] == 2 and changed["examples"][0].startswith(
        f"row 1: item '{small.item_keys[5]}' has another"
    )
    assert f"{file}: 2 items have other features than the run knows" in (live / "train.log").read_text()
    put(file, [same, rich])
    assert follow(run, source, live, "--items", str(file)) == 0
    assert json.loads((live / "follow.json").read_text())["changed"] == {"items": 0, "examples": []}


def test_an_item_whose_event_comes_before_its_row_gets_its_features_later(
    small: PreparedData, run: Path, tmp_path: Path
) -> None:
    source, file, live = tmp_path / "source", tmp_path / "items.jsonl", tmp_path / "live"
    source.mkdir()
    rich = features_of(small, 4)
    put(file, [{"item": "other", **rich}])
    put(source / "a.jsonl", [one("u3", "early", 1), one("u4", "plain", 2), one("u5", "other", 3)])
    options = ("--items", str(file))
    assert follow(run, source, live, *options) == 0
    log = (live / "train.log").read_text()
    assert f"a.jsonl: 2 new items have no row in {file} yet, such as 'early'" in log
    (name,) = (n for n in read_all(live / "checkpoints/best") if n.endswith(".item_id.weight"))
    before = read_all(live / "checkpoints/best")[name]
    put(file, [{"item": "early", **rich}, {"item": "other", **rich}, {"item": "new", **rich}, {"item": "plain"}])
    assert follow(run, source, live, *options) == 0
    assert f"{file}: 1 new items, and features of 1 that had none" in (live / "train.log").read_text()
    items = {row["item_key"]: row for row in pq.read_table(live / "vocabulary/items.parquet").to_pylist()}
    assert list(items)[small.schema.items :] == ["other", "early", "plain", "new"]
    assert [row["item_id"] for row in items.values()] == list(range(small.schema.items + 4))
    own = ("item_id", "item_key")
    values = {key: {n: v for n, v in row.items() if n not in own} for key, row in items.items()}
    assert values["early"] == values["other"] == values["new"] and not any(values["plain"].values())
    after = read_all(live / "checkpoints/best")[name]
    assert np.array_equal(before, after[: len(before)])  # what the id learnt stays
    report = json.loads((live / "follow.json").read_text())
    assert (report["without_features"], report["described"]) == (2, 1) and "changed" not in report

    # The model has the features too: started again, and evaluated and exported.
    assert follow(run, source, live, *options) == 0
    assert json.loads((live / "follow.json").read_text()) == report
    assert main(["evaluate", "--run", str(live)]) == 0
    assert main(["export", "--run", str(live), "--output", str(tmp_path / "e"), "--tower", "none"]) == 0
    rows = read_part(tmp_path / "e/items.parquet/part-00000.parquet", ["item_key", "content"]).to_pylist()
    content = {row["item_key"]: row["content"] for row in rows}
    assert content["early"] == pytest.approx(content["new"], abs=1e-6) and content["early"] != content["plain"]


def test_rows_of_an_item_file_of_any_kind_are_those_of_the_data(small: PreparedData, tmp_path: Path) -> None:
    rows = ItemRows(small.path, tmp_path)
    given = [{"item": f"new-{n}" if n % 2 else small.item_keys[n], **features_of(small, n)} for n in range(8)]
    frame = pl.DataFrame(given)
    frame.write_ndjson(tmp_path / "items.jsonl")
    frame.write_parquet(tmp_path / "items.parquet")
    flat = frame.select(c.name for c in frame if not isinstance(c.dtype, pl.List))
    flat.write_csv(tmp_path / "items.csv")
    known = pq.read_table(small.path / "items.parquet").to_pylist()
    for name in ("items.jsonl", "items.parquet", "items.csv"):
        found = ItemFile(tmp_path / name, "item").read(rows).new
        assert [key for key, _ in found] == [f"new-{n}" for n in (1, 3, 5, 7)]
        for (_, row), n in zip(found, (1, 3, 5, 7), strict=True):
            wanted = {**features_of(small, n)} if name != "items.csv" else flat.row(n, named=True)
            assert rows.differs(wanted, row, known[n]) == ""
    assert rows.table(range(150, 154), found)["item_id"].to_pylist() == [150, 151, 152, 153]


def test_keys_and_features_of_an_item_file_are_those_of_all_its_rows(small: PreparedData, tmp_path: Path) -> None:
    rows = ItemRows(small.path, tmp_path)
    file = tmp_path / "items.jsonl"
    file.write_text("")  # as 'flm export-events' writes it where there are no cold items
    assert ItemFile(file, "item").read(rows).new == []
    price = next(f for f in small.schema.features if f.entity == "item" and f.kind == "numeric")
    lines = [{"item": f"x{n}", price.name: n} for n in range(150)]
    put(file, [*lines, {"item": "last", price.name: 1.5, "brand": features_of(small, 4)["brand"]}])
    *_, (key, row) = ItemFile(file, "item").read(rows).new
    assert key == "last" and row["brand"] is not None
    assert row[price.column] == pytest.approx((1.5 - price.mean) / price.deviation)
    table = tmp_path / "items.csv"
    table.write_text(f"item,{price.name}\n007,3\n7,4\n1e3,\n")
    assert [key for key, _ in ItemFile(table, "item").read(rows).new] == ["007", "7", "1e3"]


def test_values_without_a_row_are_counted_and_told(
    small: PreparedData, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, file, live = tmp_path / "source", tmp_path / "items.jsonl", tmp_path / "live"
    source.mkdir()
    given = features_of(small, 4)
    other = {**given, "genre": "never heard of", "brand": "acme"}
    known = {"item": small.item_keys[4], **given}
    put(file, [known, {"item": "one", **other}, {"item": "two", **given}])
    events = [one("u3", "three", 1, **other), one("u4", "three", 2, **other), one("u5", "one", 3, **other)]
    put(source / "a.jsonl", events)
    assert follow(run, source, live, "--items", str(file)) == 0
    assert "3 new items; 4 values of features without a row" in capsys.readouterr().out
    counted = json.loads((live / "follow.json").read_text())["left_out"]
    assert counted["values"] == 4 and len(counted["examples"]) == 2
    log = (live / "train.log").read_text()
    for where in (file, "a.jsonl"):
        assert f"{where}: 2 values of features have no row and are left out, such as features." in log
    assert f"--train.warm_start {live}" in log
    assert follow(run, source, live, "--items", str(file)) == 0  # the file is read again, and counts nothing twice
    assert json.loads((live / "follow.json").read_text())["left_out"] == counted


@pytest.mark.parametrize("after", [0, 1, 2, 3])
def test_ids_come_in_when_they_are_seen_often_enough(
    small: PreparedData, run: Path, tmp_path: Path, after: int
) -> None:
    intake = IdIntake(Admission(after), ItemRows(small.path, tmp_path)) if after else None
    encoder, refused = EventEncoder(run / "vocabulary", RowForm({}), intake), dict[str, Any]()
    rows = [one("u3", "plain", 1), one("ann", "i3", 2), one("u4", "plain", 3), one("ann", "plain", 4)]
    found = encoder.encode([(f"row {n}", row) for n, row in enumerate(rows)], refused)
    learned = {0: [], 1: [1, 2, 3, 4], 2: [3, 4], 3: []}[after]
    assert (found.timestamp - NEW).tolist() == learned
    told = sum(entry["rows"] for entry in refused.values())
    assert told == 4 - len(learned) and all("unknown" in r or "--admit-after" in r for r in refused)
    again = encoder.encode([("row 5", one("ann", "plain", 5))], refused)
    assert (again.timestamp - NEW).tolist() == ([5] if after else [])
    if after:
        assert again.user.tolist() == [small.schema.users] and again.item.tolist() == [small.schema.items]


def test_features_of_an_event_that_do_not_fit_are_told(small: PreparedData, run: Path, tmp_path: Path) -> None:
    encoder = EventEncoder(run / "vocabulary", RowForm({}), IdIntake(Admission(9), ItemRows(small.path, tmp_path)))
    refused: dict[str, Any] = {}
    kinds = {f.kind: f.name for f in small.schema.features if f.entity == "item"}
    bad = {kinds["text"]: 5} if "text" in kinds else {next(iter(kinds.values())): {"a": 1}}
    assert len(encoder.encode([("row 1", one("u3", "x", 1, **bad))], refused)) == 0
    assert refused == {"features that do not fit": {"rows": 1, "examples": ["row 1"]}}
    assert "x" not in encoder.ids.item


def test_a_follower_killed_at_any_write_ends_in_the_same_bits(
    small: PreparedData,
    run: Path,
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Files and folders are put on the disk by one function. Killed there, later and later, it starts again."""
    options = ("--admit-after", "2", "--expire-after", "400")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    writes = count_writes(monkeypatch, lambda: follow(run, source, whole, *options))
    for at in range(3, writes, writes // 5):
        with monkeypatch.context() as patch:
            die_at(patch, at, lambda: follow(run, source, killed, *options))
    assert follow(run, source, killed, *options) == 0
    assert weights(killed) == weights(whole)
    for name in ("follow.json", "vocabulary/users.parquet", "vocabulary/items.parquet"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes(), name


class Killed(BaseException):
    """Stands for SIGKILL: nothing may handle it."""


def count_writes(monkeypatch: pytest.MonkeyPatch, action: Callable[[], int]) -> int:
    calls = 0
    with monkeypatch.context() as patch:

        def counted(*args: Any) -> None:
            nonlocal calls
            calls += 1

        wrap_writes(patch, counted)
        assert action() == 0
    return calls


def die_at(patch: pytest.MonkeyPatch, at: int, action: Callable[[], int]) -> None:
    """Run until the `at`-th file or folder is put on the disk, and die there. DCP makes an error of it."""
    calls = 0

    def dying(*args: Any) -> None:
        nonlocal calls
        calls += 1
        if calls >= at:
            raise Killed

    wrap_writes(patch, dying)
    with contextlib.suppress(Killed):
        action()


def wrap_writes(patch: pytest.MonkeyPatch, before: Callable[..., None]) -> None:
    sync = flm_torchrec.files.sync

    def syncing(path: Path) -> None:
        before(path)
        sync(path)

    patch.setattr(flm_torchrec.files, "sync", syncing)


def test_ids_expire_and_come_back_from_nothing(small: PreparedData, run: Path, tmp_path: Path) -> None:
    source, live = tmp_path / "source", tmp_path / "live"
    source.mkdir()
    user = small.user_keys[3]
    put(source / "a.jsonl", [one(user, "old", 1), one("ann", "old", 2)])
    put(source / "b.jsonl", [one(small.user_keys[n], small.item_keys[n], 40 * DAY + n) for n in range(3, 9)])
    assert follow(run, source, live, "--expire-after", "30") == 0
    tensors = read_all(live / "checkpoints/best")
    (items,) = (n for n in tensors if n.endswith(".item_id.weight"))
    (users,) = (n for n in tensors if n.endswith(".user_id.weight"))
    assert not tensors[items][-1].any() and not tensors[users][-1].any()  # no one came for 40 days
    # Those of the last day alone have learned; training hides an id now and then.
    learned = tensors[items].any(1).nonzero().flatten().tolist()
    assert set(learned) <= set(range(3, 9)) and len(learned) > 3 and tensors[users][3].any()
    assert main(["export", "--run", str(live), "--output", str(tmp_path / "e"), "--tower", "none"]) == 0
    known = read_part(tmp_path / "e/items.parquet/part-00000.parquet", ["item_key", "known"]).to_pylist()
    assert [row["item_key"] for row in known if row["known"]] == small.item_keys[3:9]
    put(source / "c.jsonl", [one(user, "old", 41 * DAY)])
    assert follow(run, source, live, "--expire-after", "30") == 0
    assert read_all(live / "checkpoints/best")[items][-1].any()
    assert follow(run, source, live, "--expire-after", "31") == 2


def test_a_forgotten_user_whom_a_follower_took_in_is_gone(
    small: PreparedData,
    run: Path,
    source: Path,
    tmp_path: Path,
) -> None:
    data, base, live = tmp_path / "data", tmp_path / "base", tmp_path / "live"
    shutil.copytree(small.path, data)
    shutil.copytree(run, base)
    config = (base / "config.yaml").read_text()
    (base / "config.yaml").write_text(config.replace(str(small.path), str(data)))
    assert follow(base, source, live) == 0
    gone = small.user_keys[0]
    assert (
        main(["forget", "--data", str(data), "--user", "ann", "--user", gone, "--run", str(base), "--run", str(live)])
        == 0
    )
    users = pq.read_table(live / "vocabulary/users.parquet")["user_key"].to_pylist()
    number = small.schema.users
    assert users[0] == "forgotten-0" and users[-2:] == [f"forgotten-{number}", "bob"]
    kept = pa.concat_tables(pq.read_table(f) for f in sorted((live / "events").glob("part-*")))
    assert number not in kept["user"].to_pylist()
    assert b"ann" not in b"".join(f.read_bytes() for f in (live / "events").glob("users-*"))
    tensors = read_all(live / "checkpoints/best")
    (name,) = (n for n in tensors if n.endswith(".user_id.weight"))
    assert not tensors[name][number].any() and tensors[name][5].any()
    put(source / "c.jsonl", [one("ann", small.item_keys[1], 900)])
    assert follow(base, source, live) == 0  # who comes again is new
    assert pq.read_table(live / "vocabulary/users.parquet")["user_key"].to_pylist()[-1] == "ann"


def test_two_ranks_follow_to_the_weights_of_one(small: PreparedData, source: Path, tmp_path: Path, ranks: Any) -> None:
    """Without dropout, which each rank draws for itself, and but for the order of sums."""
    base, alone, together = tmp_path / "base", tmp_path / "alone", tmp_path / "together"
    options = ["--train.max_steps", "2", "--train.batch_size", "32", "--model.dim", "8", "--data.max_history", "6"]
    options += NO_DROPOUT
    assert main(["train", "--data.path", str(small.path), "--train.run", str(base), *options]) == 0
    assert follow(base, source, alone) == 0
    arguments = ["--run", str(base), "--source", str(source), "--output", str(together), "--once"]
    ranks(2, ["-m", "flm_torchrec", "--", "follow", *arguments])
    for name in ("users", "items"):
        one, two = (pq.read_table(run / f"vocabulary/{name}.parquet") for run in (alone, together))
        assert one.equals(two)
    old, new = (read_all(run / "checkpoints/best") for run in (alone, together))
    assert old.keys() == new.keys()
    for name, tensor in old.items():
        assert np.allclose(tensor, new[name], atol=1e-5), name
