"""A path names one file or folder, whatever characters are in it: no column, no pattern, no SQL."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flm_torchrec.cli import main
from flm_torchrec.data.dataset import load_prepared
from flm_torchrec.data.row_groups import RowGroups
from flm_torchrec.prepare.sources.input_files import find_files
from tests.prepare.test_prepare_shards import contents

NAMES = (
    "place=0", "user_id=7", "event_name=x/duplicate=1", "timestamp=9", "it's", "x'; SELECT 1; --", "run[1]", "[!a]",
    "**", "a?b", "{a,b}", "a::b", "50%20",
)  # fmt: skip
COLUMNS = ("--columns", "user=u,item=i,timestamp=t")


def no_note(line: str) -> None:
    pytest.fail(f"unexpected: {line}")


def flm(*arguments: str | Path) -> int:
    return main([str(a) for a in arguments])


def write(folder: Path) -> Path:
    """Logs in two files, of which the order matters, and features of items as Parquet."""
    (folder / "logs").mkdir(parents=True)
    (folder / "logs" / "1.csv").write_text("u,i,t\na,z1,5\na,z2,5\nb,z1,5\nb,z3,5\na,q1,1\nb,q1,1\n")
    (folder / "logs" / "2.csv").write_text("u,i,t\na,y1,5\na,y2,5\nb,y1,5\nb,y3,5\n")
    items = pl.DataFrame({"item_id": ["z1", "q1", "y1"], "brand": ["r", "s", "s"]})
    items.write_parquet(folder / "items.parquet")
    items.write_csv(folder / "items.csv")
    return folder


def prepare(inputs: Path, output: Path, items: str = "items.parquet") -> int:
    given = ("--input", inputs / "logs", "--items", inputs / items, "--item-features", "brand:categorical")
    return flm("prepare", "--source", "csv", *given, *COLUMNS, "--dedup", "exact", "--k-core", "2", "--output", output)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("plain")
    assert prepare(write(folder / "in"), folder / "out") == 0
    return contents(folder / "out")


@pytest.mark.parametrize("name", NAMES)
def test_names_of_folders_change_no_byte(
    tmp_path: Path, plain: dict[str, bytes], name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / name
    inputs = write(folder / "in")
    stale = folder / ".out.work-0123456789abcdef"
    stale.mkdir()
    assert prepare(inputs, folder / "out") == 0
    assert contents(folder / "out") == plain
    assert sorted(p.name for p in folder.iterdir()) == ["in", "out"] and len(list(tmp_path.iterdir())) == 1
    # Whatever reads prepared data takes no column from the path either.
    data = load_prepared(folder / "out")
    assert data.timestamp.tolist() == [1, 5, 5] * 2
    assert next(iter(RowGroups(folder / "out").scan(["user_id", "timestamp"])))[1].tolist() == data.timestamp.tolist()
    capsys.readouterr()
    assert flm("inspect", folder / "out") == 0
    told = capsys.readouterr().out
    shutil.copytree(folder / "out", tmp_path / "copy")
    assert flm("inspect", tmp_path / "copy") == 0
    assert capsys.readouterr().out == told and "leak" not in told
    assert flm("forget", "--data", folder / "out", "--user", "b") == 0
    assert load_prepared(folder / "out").schema.interactions == 3
    names = pq.read_table(folder / "out" / "users.parquet").column_names
    assert names == ["user_id", "user_key"]


@pytest.mark.parametrize("name", ["user_id=7", "run[1]", "it's"])
@pytest.mark.parametrize("source", ["parquet", "jsonl"])
def test_logs_are_read_where_they_lie(tmp_path: Path, name: str, source: str) -> None:
    folder = tmp_path / name
    folder.mkdir()
    frame = pl.DataFrame({"user_id": ["a", "a", "b"], "item_id": ["x", "y", "x"], "timestamp": [1, 2, 3]})
    frame.write_parquet(folder / "l.parquet") if source == "parquet" else frame.write_ndjson(folder / "l.jsonl")
    for location in (folder / f"l.{source}", folder, folder / f"?.{source}"):
        assert flm("prepare", "--source", source, "--input", location, "--output", tmp_path / "out", "--overwrite") == 0
        data = load_prepared(tmp_path / "out")
        assert (data.user_keys, data.item_keys, data.timestamp.tolist()) == (["a", "b"], ["x", "y"], [1, 2, 3])


def test_a_table_of_items_is_read_as_csv_too(tmp_path: Path, plain: dict[str, bytes]) -> None:
    assert prepare(write(tmp_path / "in[1]"), tmp_path / "out", items="items.csv") == 0
    assert contents(tmp_path / "out") == plain


def test_a_file_that_is_there_comes_before_a_pattern(tmp_path: Path) -> None:
    for name in ("a1.csv", "a[12].csv", "a2.csv", "b*.csv", "b1.csv"):
        (tmp_path / name).write_text("u,i\na,x\n")

    def found(pattern: str) -> list[str]:
        return [file.name for file in find_files("csv", str(tmp_path / pattern), no_note)]

    assert found("a[12].csv") == ["a[12].csv"] and found("b*.csv") == ["b*.csv"]
    assert found("a[1-2].csv") == ["a1.csv", "a2.csv"] and found("a?.csv") == ["a1.csv", "a2.csv"]
    url = f"memory://{tmp_path.name}/k=v/x[1]"
    import fsspec

    for name in ("x[1]/1.csv", "x[1]/2.csv", "x1/3.csv"):
        with fsspec.open(f"memory://{tmp_path.name}/k=v/{name}", "w") as file:
            file.write("u,i\na,x\n")
    assert [file.name for file in find_files("csv", url, no_note)] == ["1.csv", "2.csv"]
    assert [file.name for file in find_files("csv", f"{url}/*.csv", no_note)] == ["1.csv", "2.csv"]


def test_a_backslash_in_the_output_is_refused_in_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inputs = write(tmp_path / "in")
    assert prepare(inputs, tmp_path / "a\\b") == 2
    error = capsys.readouterr().err
    assert "with a backslash; rename that folder" in error and error.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


def test_a_folder_says_what_of_it_is_not_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line, logs = b"a,x,1\n", tmp_path / "logs"
    for name in ("a.csv", "B.CSV", "c.csv.gz", "D.CSV.ZST", "old/e.csv", "f.parquet", "_SUCCESS", ".a.csv.crc"):
        (logs / name).parent.mkdir(exist_ok=True, parents=True)
        content = b"u,i,t\n" + line.replace(b"a", name[:1].lower().encode())
        pack = {".gz": gzip.compress, ".ZST": lambda plain: bytes(pa.Codec("zstd").compress(plain))}
        (logs / name).write_bytes(pack.get(Path(name).suffix, bytes)(content))
    assert flm("prepare", "--source", "csv", "--input", logs, *COLUMNS, "--output", tmp_path / "out") == 0
    assert load_prepared(tmp_path / "out").user_keys == ["a", "b", "c", "d"]
    told = f"{logs}: its files *.csv are read, not f.parquet, old/; --input '{logs}/**/*.csv' reads the folders inside"
    assert f"warning: {told} it too\n" in capsys.readouterr().err
    deeper = ("--input", f"{logs}/**/*.csv", *COLUMNS, "--output", tmp_path / "deeper")
    assert flm("prepare", "--source", "csv", *deeper) == 0
    assert load_prepared(tmp_path / "deeper").user_keys == ["a", "o"] and "warning" not in capsys.readouterr().err
    (logs / "none").mkdir()
    (logs / "none" / "date=1").mkdir()
    none = ("--input", logs / "none", "--output", tmp_path / "none")
    assert flm("prepare", "--source", "parquet", *none) == 2
    assert "none: no file *.parquet, not date=1/; --input must be" in capsys.readouterr().err


def test_a_table_in_a_folder_is_read_whatever_the_case_of_its_names(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inputs = write(tmp_path / "in")
    items = inputs / "items"
    items.mkdir()
    (items / "A.PARQUET").write_bytes((inputs / "items.parquet").read_bytes())
    (items / "notes.txt").write_text("x")
    assert prepare(inputs, tmp_path / "out", "items") == 0
    assert f"warning: {items}: its files *.parquet are read, not notes.txt\n" in capsys.readouterr().err


def test_places_tell_files_of_one_name_apart(tmp_path: Path) -> None:
    for day, bad in (("1", ",x,1"), ("2", "a,,1")):
        (tmp_path / f"day={day}").mkdir()
        (tmp_path / f"day={day}" / "part-0.csv").write_text(f"u,i,t\na,x,1\n{bad}\n")
    logs = ("--input", tmp_path / "*" / "part-0.csv", *COLUMNS, "--output", tmp_path / "out")
    assert flm("prepare", "--source", "csv", *logs) == 0
    dropped = json.loads((tmp_path / "out" / "report.json").read_text())["dropped"]
    assert {reason: entry["examples"] for reason, entry in dropped.items()} == {
        "no user": ["day=1/part-0.csv: row 2"], "no item": ["day=2/part-0.csv: row 2"],
    }  # fmt: skip
