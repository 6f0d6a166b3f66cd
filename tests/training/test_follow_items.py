"""What item files and event rows of `flm follow` say of items means what it means to `flm prepare`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow.parquet as pq
import pytest

from flm_torchrec.cli import main
from flm_torchrec.serve.event_log import export_items
from flm_torchrec.serve.event_store import EventStore
from flm_torchrec.training.follow.item_file import ItemFeed, ItemFile
from flm_torchrec.training.follow.item_rows import ItemRows
from tests.training.test_follow import NEW, put
from tests.training.test_follow_ids import follow

KINDS = "name:text,brand:categorical,tags:multi_categorical,weight:numeric,price:quantile,vec:dense"


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Logs of 20 users, a table of 12 items with several values in a cell, data made of both, and a run."""
    folder = tmp_path_factory.mktemp("shop")
    log = [f"u{u},i{(3 * u + n) % 12},{1_700_000_000 + 60 * n}" for u in range(20) for n in range(8)]
    (folder / "log.csv").write_text("\n".join(["user_id,item_id,timestamp", *log]) + "\n")
    rows = [f'i{n},Thing {n},b{n % 3},t{n % 4}|t{n % 3},{n},{n},"[{n % 5}.0, 0.5]"' for n in range(12)]
    (folder / "items.csv").write_text("\n".join(["item_id,name,brand,tags,weight,price,vec", *rows]) + "\n")
    items = ["--items", str(folder / "items.csv"), "--item-features", KINDS]
    files = ["--input", str(folder / "log.csv"), "--output", str(folder / "data")]
    assert main(["prepare", "--source", "csv", *files, *items]) == 0
    paths = ["--data.path", str(folder / "data"), "--train.run", str(folder / "run")]
    options = ["--train.max_steps", "2", "--train.batch_size", "32", "--model.dim", "8", "--data.max_history", "6"]
    assert main(["train", *paths, *options]) == 0
    return folder


def values_of(shop: Path, feature: str) -> list[str]:
    """Its values in order of code."""
    vocabulary = pq.read_table(shop / f"data/vocab/item_{feature}.parquet").sort_by("code")
    return list(vocabulary["value"].to_pylist())


def taken_in(live: Path) -> dict[str, dict[str, Any]]:
    """By key, the rows of the items that a follower knows."""
    rows = pq.read_table(live / "vocabulary/items.parquet").to_pylist()
    return {row["item_key"]: row for row in rows}


def left_out(live: Path) -> list[str]:
    """Values without a row that the follower counted."""
    return list(json.loads((live / "follow.json").read_text()).get("left_out", {}).get("examples", []))


def test_cold_items_that_a_server_wrote_in_two_forms_keep_their_values(shop: Path, tmp_path: Path) -> None:
    """Tags are a text in one item and a list in the next; then the file is written again, with lists alone."""
    source, file, live = tmp_path / "source", tmp_path / "cold.jsonl", tmp_path / "live"
    source.mkdir()
    store = EventStore(tmp_path / "live.sqlite")
    with store.writing() as write:
        write.add_item("c1", "x", {"tags": "t1"})
        write.add_item("c2", "y", {"tags": ["t1", "t2"]})
    assert export_items(store, file) == 2
    assert follow(shop / "run", source, live, "--items", str(file)) == 0
    tags, rows = values_of(shop, "tags"), taken_in(live)
    found = {key: [tags[code] for code in rows[key]["tags"]] for key in ("c1", "c2")}
    assert found == {"c1": ["t1"], "c2": ["t1", "t2"]} and left_out(live) == []
    with store.writing() as write:
        write.add_item("c1", "x", {"tags": ["t1"]})
    export_items(store, file)
    store.close()
    assert follow(shop / "run", source, live, "--items", str(file)) == 0


def test_the_title_of_an_item_that_a_server_wrote_is_that_of_the_data(shop: Path, tmp_path: Path) -> None:
    """Where it comes from a feature with another name than `title`."""
    items = ["--items", str(shop / "items.csv"), "--item-features", KINDS, "--title", "name"]
    files = ["--input", str(shop / "log.csv"), "--output", str(tmp_path / "data")]
    assert main(["prepare", "--source", "csv", *files, *items]) == 0
    store, file = EventStore(None), tmp_path / "cold.jsonl"
    with store.writing() as write:
        write.add_item("by title", "Thing 7", {})
        write.add_item("by both", "Thing 7", {"name": "Thing 8"})
    export_items(store, file)
    rows, like = ItemRows(tmp_path / "data", tmp_path), pq.read_table(tmp_path / "data/items.parquet").to_pylist()
    of = {row["item_key"]: row["name_tokens"] for row in like}
    found = dict(ItemFile(file, "item").read(rows).new)
    assert found["by title"]["name_tokens"] == of["i7"] and found["by title"]["name"] == "Thing 7"
    assert found["by both"]["name_tokens"] == of["i8"]


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_cells_with_several_values_are_those_of_preparation(shop: Path, tmp_path: Path, kind: str) -> None:
    """The table that was prepared is taken as it is, and the rows of new items are those of the items like them."""
    source, file, live = tmp_path / "source", tmp_path / f"items.{kind}", tmp_path / "live"
    source.mkdir()
    table = pl.read_csv(shop / "items.csv", infer_schema=False)
    like = table.filter(pl.col("item_id").is_in(["i1", "i6"])).with_columns(
        pl.format("new-{}", "item_id").alias("item_id")
    )
    both = pl.concat([table, like])
    if kind == "csv":
        both.write_csv(file)
    elif kind == "jsonl":
        both.write_ndjson(file)
    else:
        both.write_parquet(file)
    put(source / "a.jsonl", [{"user": "u1", "item": "row-i6", "timestamp": NEW, **like.row(1, named=True)}])
    assert follow(shop / "run", source, live, "--items", str(file)) == 0
    rows = taken_in(live)
    assert list(rows)[12:] == ["new-i1", "new-i6", "row-i6"] and left_out(live) == []
    columns = [name for name in rows["i1"] if name not in ("item_id", "item_key")]
    for key in ("new-i1", "new-i6", "row-i6"):
        known = rows[f"i{key[-1]}"]
        assert len(known["tags"]) == 2 and known["vec"][1] == 0.5
        assert {name: rows[key][name] for name in columns} == {name: pytest.approx(known[name]) for name in columns}


@pytest.mark.parametrize(
    ("feature", "cell", "told"),
    [
        ("tags", "[t1, t2]", "features.tags: [t1, t2] looks like a list and is not JSON"),
        ("vec", "much|more", "features.vec: 'much' is no number"),
        ("vec", "[1.0]", "features.vec: takes a list of 2 numbers"),
        ("brand", ["b1"], "features.brand: takes one text"),
    ],
)
def test_a_cell_that_does_not_fit_its_kind_is_told_with_its_row(
    shop: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], feature: str, cell: Any, told: str
) -> None:
    source, file = tmp_path / "source", tmp_path / "items.jsonl"
    source.mkdir()
    put(file, [{"item": "x"}, {"item": "y", feature: cell}])
    assert follow(shop / "run", source, tmp_path / "out", "--items", str(file)) == 2
    error = capsys.readouterr().err
    assert f"{file}: row 2: {told}" in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


def test_a_number_that_is_not_finite_is_missing(shop: Path, tmp_path: Path) -> None:
    source, live = tmp_path / "source", tmp_path / "live"
    source.mkdir()
    wrong = {"text": "NaN", "infinite": float("inf"), "json": float("nan"), "empty": ""}
    events = [
        {"user": "u1", "item": key, "timestamp": NEW + n, "name": "Thing", "weight": value, "price": value}
        for n, (key, value) in enumerate(wrong.items())
    ]
    put(source / "a.jsonl", events)
    rows = [{**event, "timestamp": NEW + 10, "item": f"table-{n}"} for n, event in enumerate(events[:1])]
    typed = pl.DataFrame(rows).with_columns(pl.lit(float("nan")).alias(name) for name in ("weight", "price"))
    put(source / "c.jsonl", [{"user": "u1", "item": "table-1", "timestamp": NEW, "name": "Thing", "vec": [None, 0.5]}])
    typed.with_columns(vec=pl.lit([float("nan"), 0.5])).write_parquet(source / "b.parquet")
    assert follow(shop / "run", source, live) == 0
    assert json.loads((live / "follow.json").read_text())["refused"] == {}
    new = [row for key, row in taken_in(live).items() if key in {*wrong, "table-0", "table-1"}]
    assert len(new) == 6
    assert all(row["name"] == "Thing" and row["price"] is row["weight"] is row["vec"] is None for row in new)


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_an_item_file_that_is_being_written_is_read_once_it_is_whole(shop: Path, tmp_path: Path, kind: str) -> None:
    """At any length nothing is raised, and what is read of it are rows of the whole file."""
    file = tmp_path / f"items.{kind}"
    table = pl.DataFrame({"item": ["x", "y"], "brand": ["b1", "b2"], "price": [3, 11], "name": ["A", "B c"]})
    getattr(table, {"csv": "write_csv", "jsonl": "write_ndjson", "parquet": "write_parquet"}[kind])(file)
    content = file.read_bytes()
    whole = dict(ItemFile(file, "item").read(ItemRows(shop / "data", tmp_path)).new)
    assert len(whole) == 2
    feed = ItemFeed(ItemFile(file, "item"), ItemRows(shop / "data", tmp_path))
    file.unlink()
    assert feed.read() is None and feed.read() is None
    assert len(feed.messages) == 1 and "put the item file back; until it can be read" in feed.messages[0]
    for size in range(0, len(content), 1 if len(content) < 200 else len(content) // 50):
        file.write_bytes(content[:size])
        news = feed.read()
        assert news is None or dict(news.new).items() <= whole.items(), size
    assert len(feed.messages) > 1
    file.write_bytes(content)
    news = feed.read()
    assert news is not None and dict(news.new) == whole and feed.read() is None


def test_an_id_that_a_float_has_rounded_is_told(shop: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, file = tmp_path / "source", tmp_path / "items.jsonl"
    source.mkdir()
    put(file, [{"item": 1.0}, {"item": 2.0**53}])
    assert follow(shop / "run", source, tmp_path / "out", "--items", str(file)) == 2
    assert f"{file}: column 'item' has the id 9007199254740992.0 as a float" in capsys.readouterr().err


def test_blanks_around_values_are_no_part_of_them_here_either(shop: Path, tmp_path: Path) -> None:
    source, file, live = tmp_path / "source", tmp_path / "items.csv", tmp_path / "live"
    source.mkdir()
    file.write_text("item_id,name,brand,tags,weight\nnew, Thing , b1,t1 | t2, 1.5\nnone,Thing, , , \n")
    assert follow(shop / "run", source, live, "--items", str(file)) == 0
    row, none = taken_in(live)["new"], taken_in(live)["none"]
    assert values_of(shop, "brand")[row["brand"]] == "b1" and row["name"] == "Thing" and row["weight"] is not None
    assert [values_of(shop, "tags")[code] for code in row["tags"]] == ["t1", "t2"] and left_out(live) == []
    assert none["brand"] is None and none["weight"] is None and not none["tags"]
    file.write_text("item_id,brand\ni1,b2 \n")
    assert follow(shop / "run", source, live, "--items", str(file)) == 0
    changed = json.loads((live / "follow.json").read_text())["changed"]["examples"]
    assert changed == ["row 1: item 'i1' has another brand ('b2 ', not ['b1'])"]
