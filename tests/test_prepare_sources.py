"""Every source reads what it should, and says what is wrong with what it cannot."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from flm_torchrec.cli import main
from flm_torchrec.data.prepare import Options, prepare
from flm_torchrec.data.prepared import PreparedData, load_prepared
from flm_torchrec.data.sources import logs, movielens, s3rec, synthetic
from flm_torchrec.errors import DataError


def flm(*arguments: str | Path) -> int:
    return main([str(a) for a in arguments])


def test_beauty_has_the_published_counts(real_data: Path, tmp_path: Path) -> None:
    report = prepare(s3rec.read(real_data / "beauty"), tmp_path / "d", Options())
    assert (report["users"], report["items"], report["rows_kept"]) == (22363, 12101, 198502)


def test_ml_100k_has_the_published_counts(real_data: Path, tmp_path: Path) -> None:
    prepare(movielens.read(real_data / "ml-100k"), tmp_path / "d", Options())
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
        prepare(raw, tmp_path / f"{name}-out", Options())
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


def test_millisecond_timestamps(tmp_path: Path) -> None:
    file = tmp_path / "l.parquet"
    pl.DataFrame({"user_id": ["a"], "item_id": ["x"], "timestamp": [1700000000123]}).write_parquet(file)
    mapping = logs.Mapping(logs.parse_columns("user=user_id,item=item_id,timestamp=timestamp"), time_unit="ms")
    assert logs.read("parquet", file, mapping).interactions["timestamp"].to_list() == [1700000000]


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
    write(inputs / "badjson", {"X.txt": "1 2\n", "X_item2attributes.json": "[1,"})
    write(inputs / "badline", {"X.txt": "1 2\n3\n", "X_item2attributes.json": "{}"})
    filled = [a.format(d=inputs) for a in arguments]
    assert flm("prepare", "--output", tmp_path / "out", *filled) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    import re

    assert re.search(message, error), error
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


def test_synthetic_data_follow_the_recipe() -> None:
    recipe = synthetic.Recipe(users=400, items=200, events=20, content=1, collaborative=0, sequential=3, seed=5)
    raw = synthetic.read(recipe)
    rows = raw.interactions
    assert rows.equals(synthetic.read(recipe).interactions)
    assert rows.select("user", "item").is_unique().all()
    shares = dict(rows["segment"].value_counts(normalize=True).iter_rows())
    assert shares["sequential"] == pytest.approx(0.75, abs=0.02) and "collaborative" not in shares
    oracle = raw.oracle
    assert oracle["all"]["ndcg@10"] > 0.3 and "collaborative" not in oracle


def test_the_oracle_is_better_than_popularity_on_each_signal() -> None:
    raw = synthetic.read(synthetic.Recipe(users=600, items=300, events=20))
    oracle = raw.oracle
    for name in synthetic.MECHANISMS:
        assert oracle[f"only_{name}"]["ndcg@10"] > 0.12, name


def test_unknown_kind_in_the_schema_is_refused(small: PreparedData, tmp_path: Path) -> None:
    text = (small.path / "schema.yaml").read_text().replace("kind: numeric", "kind: number")
    (tmp_path / "schema.yaml").write_text(text)
    with pytest.raises(DataError, match="unknown kind 'number'"):
        load_prepared(tmp_path)
