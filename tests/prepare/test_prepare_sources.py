"""Every source reads what it should, and says what is wrong with what it cannot."""

from __future__ import annotations

import json
import re
from datetime import date, datetime, timedelta, timezone
from pathlib import Path
from typing import Literal

import numpy as np
import polars as pl
import pytest

from flm_torchrec.cli import main
from flm_torchrec.data.dataset import PreparedData, load_prepared
from flm_torchrec.errors import DataError
from flm_torchrec.prepare.clean import Dropped
from flm_torchrec.prepare.column_options import parse_columns
from flm_torchrec.prepare.options import LogOptions, PrepareOptions
from flm_torchrec.prepare.prepare import prepare
from flm_torchrec.prepare.sources import logs, movielens, s3rec
from tests.conftest import only_shard


def flm(*arguments: str | Path) -> int:
    return main([str(a) for a in arguments])


def test_beauty_has_the_published_counts(real_data: Path, tmp_path: Path) -> None:
    report = prepare(s3rec.read(real_data / "beauty"), tmp_path / "d", PrepareOptions())
    assert (report["users"], report["items"], report["rows_kept"]) == (22363, 12101, 198502)


def test_ml_100k_has_the_published_counts(real_data: Path, tmp_path: Path) -> None:
    prepare(movielens.read(real_data / "ml-100k"), tmp_path / "d", PrepareOptions())
    data = load_prepared(tmp_path / "d")
    assert (data.schema.users, data.schema.items, data.schema.interactions) == (943, 1682, 100_000)
    assert data.titles[0] == "Toy Story" and data.item_keys[0] == "1"


GROUPLENS = {
    "u.data": "1\t10\t5\t100\n1\t11\t3\t90\n2\t10\t4\t80\n",
    "u.user": "1|24|M|technician|85711\n2|53|F|other|94043\n",
    "u.item": "10|Amélie (2001)|01-Jan-2001||http|" + "|".join("1" if g in (5, 14) else "0" for g in range(19)) + "\n"
    "11|Unknown|||" + "|" + "|".join(["1"] + ["0"] * 18) + "\n",
}
ATOMIC = {
    "ml-100k.inter": "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
    "1\t10\t5\t100\n1\t11\t3\t90\n2\t10\t4\t80\n",
    "ml-100k.user": "user_id:token\tage:token\tgender:token\toccupation:token\tzip_code:token\n"
    "1\t24\tM\ttechnician\t85711\n2\t53\tF\tother\t94043\n",
    "ml-100k.item": "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n"
    "10\tAmélie\t2001\tComedy Romance\n11\tUnknown\t\tunknown\n",
}


def write(folder: Path, files: dict[str, str], encoding: str = "utf-8") -> Path:
    folder.mkdir(exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text, encoding=encoding if name == "u.item" else "utf-8")
    return folder


def test_both_layouts_of_movielens_give_the_same_data(tmp_path: Path) -> None:
    found: list[PreparedData] = []
    for name, files in (("grouplens", GROUPLENS), ("atomic", ATOMIC)):
        raw = movielens.read(write(tmp_path / name, files, "latin-1" if name == "grouplens" else "utf-8"))
        prepare(raw, tmp_path / f"{name}-out", PrepareOptions())
        found.append(load_prepared(tmp_path / f"{name}-out"))
    one, two = found
    assert one.schema == two.schema and one.titles == two.titles == ["Amélie", "Unknown"]
    assert one.item.tolist() == [1, 0, 0] and one.value.tolist() == [3.0, 5.0, 4.0]
    for name, codes in one.items.sparse.items():
        assert codes.offsets.tolist() == two.items.sparse[name].offsets.tolist(), name
        assert codes.values.tolist() == two.items.sparse[name].values.tolist(), name
    np.testing.assert_array_equal(one.users.dense, two.users.dense)


LOGS = "uid,sku,ts,action,price\na,x,1700000000,view,1.5\na,y,1700000060,buy,9\nb,x,1700000120,view,2\n"
ITEMS = "sku,name,tags,price,vec\nx,Red shoe,shoe|red,10,0.1|0.2\ny,Blue hat,hat,20,0.3|0.4\nz,Never sold,hat,5,0|0\n"
COLUMNS = "user=uid,item=sku,timestamp=ts,event=action,value=price"
FEATURES = "name:text,tags:multi_categorical,price:numeric,vec:dense"


def test_own_logs_from_csv(tmp_path: Path) -> None:
    write(tmp_path, {"logs.csv": LOGS, "items.csv": ITEMS})
    options = ("--items", tmp_path / "items.csv", "--item-key", "sku", "--item-features", FEATURES, "--title", "name")
    out = tmp_path / "out"
    assert flm("prepare", "--source", "csv", "--input", tmp_path / "logs.csv", "--output", out,
               "--columns", COLUMNS, *options) == 0  # fmt: skip
    data = load_prepared(out)
    assert (data.schema.users, data.schema.items, data.schema.events) == (2, 2, ("buy", "view"))
    assert data.titles == ["Red shoe", "Blue hat"]
    assert data.timestamp.tolist() == [1700000000, 1700000060, 1700000120]
    np.testing.assert_allclose(data.items.dense[:, 1:], [[0.1, 0.2], [0.3, 0.4]], rtol=1e-6)
    vocabulary = pl.read_parquet(out / "vocab" / "item_tags.parquet")["value"].to_list()
    assert [vocabulary[c] for c in data.items.sparse["tags"].row(0)] == ["shoe", "red"]


def test_own_logs_from_several_parquet_files_with_dates(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    frame = pl.DataFrame(
        {"user_id": [1, 2], "item_id": [7, 8], "timestamp": ["2024-01-01", "2024-01-02T03:00:00+02:00"]}
    )
    frame.write_parquet(tmp_path / "in" / "a.parquet")
    frame.with_columns(item_id=pl.lit(9)).write_parquet(tmp_path / "in" / "b.parquet")
    assert flm("prepare", "--source", "parquet", "--input", tmp_path / "in", "--output", tmp_path / "out") == 0
    data = load_prepared(tmp_path / "out")
    assert data.item_keys == ["7", "8", "9"]
    assert data.timestamp.tolist() == [1704067200, 1704067200, 1704157200, 1704157200]


@pytest.mark.parametrize(
    ("times", "unit", "seconds"),
    [
        ([1700000000123], "ms", 1700000000),
        ([1700000000_999_999], "us", 1700000000),
        # As a float this rounds up to the next second.
        ([1699999999_999_999_999], "ns", 1699999999),
        ([1700000000.9], "s", 1700000000),
        (["1700000000"], "s", 1700000000),
        (["1700000000.5"], "s", 1700000000),
        ([" 1700000000123 "], "ms", 1700000000),
        ([datetime(2023, 11, 14, 22, 13, 20)], "ms", 1700000000),
        ([datetime(2023, 11, 15, 0, 13, 20, tzinfo=timezone(timedelta(hours=2)))], "s", 1700000000),
        ([date(2023, 11, 14)], "s", 1699920000),
        (["2023-11-14"], "s", 1699920000),
        (["2023-11-14T22:13"], "s", 1699999980),
        (["2023-11-14 22:13:20"], "s", 1700000000),
        (["2023-11-14T22:13:20.250Z"], "s", 1700000000),
        (["2023-11-15T00:13:20+02:00"], "s", 1700000000),
        (["2023-11-15T00:13:20.5+0200"], "s", 1700000000),
        (["yesterday"], "s", None),
        ([float("nan")], "s", None),
    ],
)
def test_timestamps(
    tmp_path: Path, times: list[object], unit: Literal["s", "ms", "us", "ns"], seconds: int | None
) -> None:
    file = tmp_path / "l.parquet"
    pl.DataFrame({"user_id": ["a"], "item_id": ["x"], "timestamp": times}).write_parquet(file)
    mapping = LogOptions(parse_columns("user=user_id, item=item_id, timestamp=timestamp"), time_unit=unit)
    shard = only_shard(logs.read("parquet", str(file), mapping))
    assert pl.concat(shard.batches(Dropped()))["timestamp"].to_list() == [seconds]


def test_logs_without_times_keep_their_order_across_files(tmp_path: Path) -> None:
    write(tmp_path / "in", {"1.csv": "u,i\na,x\nb,x\na,y\n", "2.csv": "u,i\na,z\nb,w\n", "other.csv": "no,logs\n"})
    arguments = ("--source", "csv", "--input", tmp_path / "in" / "[0-9].csv", "--columns", "user=u,item=i")
    assert flm("prepare", *arguments, "--output", tmp_path / "out") == 0
    data = load_prepared(tmp_path / "out")
    assert not data.schema.timestamps
    assert [data.item_keys[i] for i in data.item] == ["x", "y", "z", "x", "w"]
    assert data.timestamp.tolist() == [0, 1, 2, 0, 1]


def test_keys_agree_between_files_that_store_them_differently(tmp_path: Path) -> None:
    """A missing value makes whole numbers floats in many tools: 7.0 is the item 7 all the same."""
    pl.DataFrame({"user_id": [1, 1, 2], "item_id": [7.0, None, 8.0]}).write_parquet(tmp_path / "l.parquet")
    write(tmp_path, {"items.csv": "item_id,brand\n7,b\n8,c\n"})
    arguments = ("--source", "parquet", "--input", tmp_path / "l.parquet", "--columns", "user=user_id,item=item_id")
    options = ("--items", tmp_path / "items.csv", "--item-features", "brand:categorical")
    assert flm("prepare", *arguments, *options, "--output", tmp_path / "out") == 0
    data = load_prepared(tmp_path / "out")
    assert data.item_keys == ["7", "8"] and data.items.sparse["brand"].values.tolist() == [0, 1]
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["dropped"] == {"no item": {"rows": 1, "examples": ["l.parquet: row 2"]}}


def test_features_of_users_and_their_own_separators(tmp_path: Path) -> None:
    write(tmp_path, {
        "logs.csv": 'user_id\titem_id\tvalue\nann\t"x\ty"\t2\nbob\tz\t3\n',
        "users.csv": "name\tlikes\tage\nann\tart;tea\t30\nbob\t\t50\n",
    })  # fmt: skip
    options = ("--columns", "user=user_id,item=item_id,value=value", "--users", tmp_path / "users.csv",
               "--user-key", "name", "--user-features", "likes:multi_categorical,age:numeric",
               "--separator", "\\t", "--list-separator", ";")  # fmt: skip
    assert flm("prepare", "--source", "csv", "--input", tmp_path / "logs.csv", *options,
               "--output", tmp_path / "out") == 0  # fmt: skip
    data = load_prepared(tmp_path / "out")
    assert data.item_keys == ["x\ty", "z"] and data.value.tolist() == [2.0, 3.0]
    assert data.users.sparse["likes"].lengths.tolist() == [2, 0]
    np.testing.assert_allclose(data.users.dense, [[-0.70710677], [0.70710677]])


def test_s3rec_keeps_the_order_of_a_line(tmp_path: Path) -> None:
    write(tmp_path / "in", {"Toys.txt": "2 9 7 9\n1 7 8\n", "Toys_item2attributes.json": '{"7": [3, 1], "9": []}'})
    assert flm("prepare", "--source", "amazon-s3rec", "--input", tmp_path / "in", "--output", tmp_path / "out") == 0
    data = load_prepared(tmp_path / "out")
    assert data.schema.name == "toys" and not data.schema.timestamps and data.user_keys == ["1", "2"]
    assert [data.item_keys[i] for i in data.item] == ["7", "8", "9", "7", "9"]
    assert data.timestamp.tolist() == [0, 1, 0, 1, 2]
    assert data.items.sparse["attributes"].lengths.tolist() == [2, 0, 0]


def test_items_without_events_are_kept_on_request(tmp_path: Path) -> None:
    write(tmp_path, {"logs.csv": LOGS, "items.csv": ITEMS})
    assert flm("prepare", "--source", "csv", "--input", tmp_path / "logs.csv", "--output", tmp_path / "out",
               "--columns", COLUMNS, "--items", tmp_path / "items.csv", "--item-key", "sku",
               "--item-features", "tags:multi_categorical", "--keep-unseen-items") == 0  # fmt: skip
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (report["items"], report["items_never_interacted"]) == (3, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--source", "movielens"], "did you mean 'movielens-100k'"),
        (["--source", "csv"], "--input: name the folder or file"),
        (["--source", "csv", "--input", "{d}/none.csv"], "none.csv: not found"),
        (["--source", "csv", "--input", "{d}/empty.csv"], "empty.csv: is empty"),
        (["--source", "csv", "--input", "{d}/header.csv"], "header.csv: has no rows"),
        (["--source", "csv", "--input", "{d}/logs.csv"], "no column 'user_id'"),
        (["--source", "csv", "--input", "{d}/logs.csv", "--columns", "user=uid"], "name the column of the item"),
        (["--source", "csv", "--input", "{d}/logs.csv", "--columns", "usr=uid"], "did you mean 'user'"),
        (["--source", "csv", "--input", "{d}/logs.csv", "--columns", "user=a,item=a"], "user and item are both 'a'"),
        (["--source", "csv", "--input", "{d}/logs.csv", "--columns", "user=a,item=b,user=c"], "'user' is given twice"),
        (["--source", "csv", "--input", "{d}/logs.csv", "--item-features", "a:text,a:numeric"], "'a' is given twice"),
        (["--source", "csv", "--input", "{d}/text.csv"], "timestamp missing or unreadable"),
        (["--source", "parquet", "--input", "{d}/corrupt.parquet"], "corrupt.parquet: not a readable Parquet file"),
        (["--source", "parquet", "--input", "{d}/folder"], "no file \\*.parquet"),
        (["--source", "csv", "--input", "{d}/logs.csv", "--columns", COLUMNS, "--items", "{d}/items.csv",
          "--item-key", "sku", "--item-features", "name:words"], "'name:words' is not COLUMN:KIND"),
        (["--source", "csv", "--input", "{d}/logs.csv", "--columns", COLUMNS, "--items", "{d}/twice.csv",
          "--item-key", "sku"], "key 'x' occurs more than once"),
        (["--source", "csv", "--input", "{d}/logs.csv", "--columns", COLUMNS, "--items", "{d}/items.csv",
          "--item-key", "sku", "--item-features", "name:numeric"], "column 'name' is String, and Float64"),
        (["--source", "csv", "--input", "{d}/logs.csv", "--columns", COLUMNS, "--items", "{d}/ragged.csv",
          "--item-key", "sku", "--item-features", "vec:dense"], "vectors of widths 1, 2"),
        (["--source", "csv", "--input", "{d}/logs.csv", "--columns", COLUMNS, "--k-core", "9"], "outside the 9-core"),
        (["--source", "amazon-s3rec", "--input", "{d}/folder"], "0 files NAME_item2attributes.json"),
        (["--source", "amazon-s3rec", "--input", "{d}/badjson"], "X_item2attributes.json:1: not JSON"),
        (["--source", "amazon-s3rec", "--input", "{d}/badline"], "X.txt:2: needs a user and at least one item"),
        (["--source", "movielens-100k", "--input", "{d}/folder"], "neither u.data nor ml-100k.inter"),
        (["--source", "synthetic", "--synthetic-users", "1"], "do not go together"),
        (["--source", "synthetic", "--input", "{d}/logs.csv"], "'synthetic' reads nothing; name yours with --source"),
        (["--source", "csv", "--input", "{d}/x*.csv"], "x\\*.csv: not found"),
        (["--source", "csv", "--input", "{d}/wide.csv"], "none of 1 rows is left, .*not 3 columns .*row 1"),
        (["--memory", "2"], "--memory '2': write it as 2GiB"),
        (["--memory", "1MB"], "--memory 1MB: the least is 1GiB"),
        (["--dedup", "window"], "--dedup-window: give it with --dedup window"),
        (["--hash-users", "{d}/none.key"], "none.key: not found; make a key with"),
        (["--hash-users", "{d}/header.csv"], "header.csv: 26 bytes; a key needs 32"),
        (["--source", "jsonl", "--input", "nowhere://x"], "nowhere://x: cannot be reached"),
        (["--source", "csv", "--input", "{d}/logs.csv", "--separator", ";;"], "logs.csv: not a readable table.*single"),
        (["--source", "parquet", "--input", "{d}/lists.parquet"], "lists.parquet: column 'user_id' is List"),
        (["--source", "parquet", "--input", "{d}/flags.parquet"], "flags.parquet: column 'timestamp' is Boolean, not"),
        (["--source", "csv", "--input", "{d}/logs.csv", "--item-features", "name:text"], "name the file .*--items"),
        (["--source", "csv", "--input", "{d}/logs.csv", "--columns", COLUMNS, "--items", "{d}/items.csv",
          "--item-key", "sku", "--item-features", "a.b:text"], "'a.b' cannot name a feature"),
        (["--source", "csv", "--input", "{d}/logs.csv", "--columns", COLUMNS, "--items", "{d}/items.csv",
          "--item-key", "sku", "--item-features", "nme:text"], "items.csv: no column 'nme'; did you mean 'name'"),
        (["--source", "csv", "--input", "{d}/logs.csv", "--columns", COLUMNS, "--title", "name"], "--title 'name'"),
        (["--source", "amazon-s3rec", "--input", "{d}/twolines"], "X.txt:3: user '1' has a line already, 1"),
        (["--source", "amazon-s3rec", "--input", "{d}/badlist"], "item '2' must have a list of attributes, not 'ab'"),
        (["--source", "amazon-s3rec", "--input", "{d}/badshape"], "must be JSON of the form"),
        (["--source", "movielens-100k", "--input", "{d}/twicefilm"], "key '10' occurs more than once as id of the"),
        (["--source", "movielens-100k", "--input", "{d}/nocolumn"], "ml-100k.item: no column 'class'"),
        (["--min-count", "0"], "--min-count 0: must be at least 1"),
        (["--text-buckets", "0"], "--text-buckets 0: must be at least 1"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    inputs = write(tmp_path / "in", {
        "logs.csv": LOGS, "items.csv": ITEMS, "empty.csv": "", "header.csv": "user_id,item_id,timestamp\n",
        "text.csv": "user_id,item_id,timestamp\na,x,yesterday\n", "corrupt.parquet": "PAR1 but not really",
        "twice.csv": "sku\nx\nx\n", "ragged.csv": "sku,vec\nx,1|2\ny,1\n",
    })  # fmt: skip
    (inputs / "folder").mkdir()
    write(inputs, {"wide.csv": "user_id,item_id,timestamp\nb,y,2,3\n"})
    keys = {"user_id": [[1]], "item_id": [1], "timestamp": [1]}
    pl.DataFrame(keys).write_parquet(inputs / "lists.parquet")
    pl.DataFrame({**keys, "user_id": [1], "timestamp": [True]}).write_parquet(inputs / "flags.parquet")
    write(inputs / "twolines", {"X.txt": "1 2\n2 3\n1 4\n", "X_item2attributes.json": "{}"})
    write(inputs / "badlist", {"X.txt": "1 2\n", "X_item2attributes.json": '{"2": "ab"}'})
    write(inputs / "badshape", {"X.txt": "1 2\n", "X_item2attributes.json": "[1]"})
    write(inputs / "twicefilm", {**ATOMIC, "ml-100k.item": ATOMIC["ml-100k.item"] + "10\tAgain\t\t\n"})
    write(inputs / "nocolumn", {**ATOMIC, "ml-100k.item": "item_id:token\tmovie_title:t\trelease_year:t\n1\ta\tb\n"})
    write(inputs / "badjson", {"X.txt": "1 2\n", "X_item2attributes.json": "[1,"})
    write(inputs / "badline", {"X.txt": "1 2\n3\n", "X_item2attributes.json": "{}"})
    filled = [a.format(d=inputs) for a in arguments]
    assert flm("prepare", "--output", tmp_path / "out", *filled) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert re.search(message, error), error
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


def test_unknown_kind_in_the_schema_is_refused(small: PreparedData, tmp_path: Path) -> None:
    text = (small.path / "schema.yaml").read_text().replace("kind: numeric", "kind: number")
    (tmp_path / "schema.yaml").write_text(text)
    with pytest.raises(DataError, match="unknown kind 'number'"):
        load_prepared(tmp_path)
