"""Delta and Iceberg tables: what a version of the table has is read, and nothing that its files hold besides."""

from __future__ import annotations

import json
import pickle
import re
import shutil
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pytest

import flm_torchrec as flm
from flm_torchrec.cli import main
from flm_torchrec.data.dataset import load_prepared
from flm_torchrec.errors import DataError
from flm_torchrec.prepare.clean import Dropped
from flm_torchrec.prepare.intake import shards_of
from flm_torchrec.prepare.options import LogOptions
from flm_torchrec.prepare.sources import logs


def rows(users: range, item: str) -> pa.Table:
    """A row a user, five days apart, with a struct column."""
    times = [datetime(2024, 1, 1 + 5 * n % 25) for n in users]
    columns = {
        "user_id": [f"u{n}" for n in users],
        "item_id": [f"{item}{n % 3}" for n in users],
        "timestamp": pa.array(times, pa.timestamp("us", "UTC")),
        "day": [f"d{n % 2}" for n in users],
        "at": [{"place": f"p{n % 2}"} for n in users],
    }
    return pa.table(columns)


@pytest.fixture(scope="module")
def delta(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[int, int]]:
    """A partitioned table of 8 rows from which 3 were deleted, and rows by version."""
    deltalake = pytest.importorskip("deltalake", reason="install flm_torchrec[delta]")
    folder = str(tmp_path_factory.mktemp("delta") / "table")
    deltalake.write_deltalake(folder, rows(range(5), "a"), partition_by=["day"])
    deltalake.write_deltalake(folder, rows(range(5, 8), "b"), mode="append")
    deltalake.DeltaTable(folder).delete("item_id = 'a0' or user_id = 'u7'")
    return shutil.move(folder, f"{folder} of=1 [a]"), {0: 5, 1: 8, 2: 5}


@pytest.fixture(scope="module")
def catalog(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A catalog of Iceberg tables in SQLite, with the address that pyiceberg takes."""
    pytest.importorskip("pyiceberg", reason="install flm_torchrec[iceberg]")
    pytest.importorskip("sqlalchemy", reason="make extras")
    from pyiceberg.catalog.sql import SqlCatalog

    folder = tmp_path_factory.mktemp("iceberg")
    catalog = SqlCatalog("shop", uri=f"sqlite:///{folder}/catalog.db", warehouse=str(folder / "wh"))
    catalog.create_namespace("logs")
    return catalog


@pytest.fixture(scope="module")
def iceberg(catalog: Any) -> tuple[str, dict[int, int]]:
    """The same as `delta`, in Iceberg."""
    table = catalog.create_table("logs.events", schema=rows(range(1), "a").schema)
    table.append(rows(range(5), "a"))
    table.append(rows(range(5, 8), "b"))
    versions = dict(zip([s.snapshot_id for s in table.metadata.snapshots], (5, 8), strict=True))
    table.delete("item_id = 'a0' or user_id = 'u7'")
    return table.location().removeprefix("file://"), versions | {table.current_snapshot().snapshot_id: 5}


@pytest.fixture(params=["delta", "iceberg"])
def table(request: pytest.FixtureRequest) -> tuple[str, str, dict[int, int]]:
    """Kind of a table, its folder, and its rows by version."""
    return request.param, *request.getfixturevalue(request.param)


def read(kind: str, folder: str, options: LogOptions) -> pl.DataFrame:
    """What the shards give, after a way to a worker and back."""
    shards = shards_of(logs.read(kind, folder, options))
    assert len({shard.identity for shard in shards}) == len(shards)
    sent = pickle.loads(pickle.dumps(shards))
    return pl.concat([frame for shard in sent for frame in shard.batches(Dropped())])


def told(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line of a command that fails."""
    assert main([str(a) for a in arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_a_version_of_a_table_is_read_without_the_rows_that_it_does_not_have(
    table: tuple[str, str, dict[int, int]], tmp_path: Path
) -> None:
    kind, folder, versions = table
    newest = flm.prepare(folder, tmp_path / "newest")  # the kind is seen from the folder
    assert newest.report["source"] == kind and newest.report["rows_read"] == newest.report["rows_kept"] == 5
    data = load_prepared(tmp_path / "newest")
    assert list(data.user_keys) == ["u1", "u2", "u4", "u5", "u6"]
    assert [data.item_keys[i] for i in data.item] == ["a1", "a2", "a1", "b2", "b0"]
    columns = {"user": "user_id", "item": "at.place|none", "timestamp": "timestamp"}
    for version, count in versions.items():
        found = read(kind, folder, LogOptions(columns=columns, table_version=version)).sort("user")
        assert len(found) == count and max(found["row"].to_list()) <= 5
        assert set(found["item"]) == {"p0", "p1"}
    shards = [shards_of(logs.read(kind, folder, LogOptions(time_unit=unit))) for unit in ("s", "ms")]
    assert {s.identity for s in shards[0]}.isdisjoint({s.identity for s in shards[1]})  # after a kill, read anew
    everything = pl.concat([pl.DataFrame(rows(range(5), "a")), pl.DataFrame(rows(range(5, 8), "b"))])
    found = read(kind, folder, LogOptions(table_version=list(versions)[1])).sort("user")
    assert found["item"].to_list() == everything["item_id"].to_list()
    assert found["timestamp"].to_list() == everything["timestamp"].dt.epoch("s").to_list()


def test_a_row_that_cannot_be_used_is_named_by_its_file(tmp_path: Path) -> None:
    write_deltalake = pytest.importorskip("deltalake", reason="install flm_torchrec[delta]").write_deltalake

    bad = pl.DataFrame({"user_id": ["u1", None, "u2"], "item_id": ["i", "i", "i"], "timestamp": [1, 2, None]})
    write_deltalake(tmp_path / "table", bad)
    report = flm.prepare(tmp_path / "table", tmp_path / "out").report
    assert report["dropped"]["no user"]["examples"][0].endswith(".parquet: row 2")
    assert report["rows_kept"] == 1


def test_items_may_be_a_table(table: tuple[str, str, dict[int, int]], tmp_path: Path) -> None:
    _, folder, _ = table
    events = pl.DataFrame({"user_id": ["u1", "u1", "u2"], "item_id": ["u1", "u4", "u6"], "timestamp": [1, 2, 3]})
    options: dict[str, Any] = {"item_key": "user_id", "item_features": {"day": "categorical"}}
    data = flm.prepare(events, tmp_path / "out", items=folder, **options)
    assert data.report["items_without_features"] == 0


def test_a_table_in_a_catalog(iceberg: Any, catalog: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import pyiceberg.catalog
    from pyiceberg.utils.config import Config

    monkeypatch.setenv("PYICEBERG_CATALOG__SHOP__URI", catalog.properties["uri"])
    monkeypatch.setenv("PYICEBERG_CATALOG__SHOP__TYPE", "sql")
    monkeypatch.setattr(pyiceberg.catalog, "_ENV_CONFIG", Config())
    assert len(read("iceberg", "catalog://shop/logs.events", LogOptions())) == 5
    with pytest.raises(DataError, match="none: not a readable Iceberg table"):
        flm.prepare("catalog://shop/logs.none", tmp_path / "none", source="iceberg")


@pytest.mark.parametrize(
    ("kind", "damage", "message"),
    [
        ("delta", lambda f: shutil.rmtree(f / "_delta_log"), "not a readable Delta table"),
        ("delta", lambda f: protocol(f, ["deletionVectors"]), "deletionVectors"),
        ("delta", lambda f: protocol(f, ["fancy"]), "fancy"),
        ("delta", lambda f: protocol(f, None), "renames its columns"),
        ("delta", lambda f: [file.unlink() for file in f.rglob("*.parquet")], "cannot be read"),
        ("delta", lambda f: (f / "_delta_log" / f"{0:020}.json").write_text("{nonsense"), "not a readable Delta table"),
        ("iceberg", lambda f: shutil.rmtree(f / "metadata"), "not an Iceberg table"),
        ("iceberg", lambda f: [file.unlink() for file in f.glob("metadata/*.avro")], "not a readable Iceberg table"),
        ("iceberg", lambda f: newest(f).write_text("{nonsense"), "not a readable Iceberg table"),
        ("iceberg", lambda f: shutil.copy(newest(f), f"{newest(f).parent}/00003-b.metadata.json"), "may be the newest"),
        ("iceberg", lambda f: [file.unlink() for file in f.rglob("*.parquet")], "cannot be read"),
    ],
)
def test_a_table_that_cannot_be_read_is_one_line(
    kind: str,
    damage: Callable[[Path], Any],
    message: str,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = Path(request.getfixturevalue(kind)[0])
    kept = tmp_path / "kept"
    shutil.copytree(folder, kept)
    try:  # in its place, since metadata of Iceberg hold complete paths
        damage(folder)
        line = told(capsys, "prepare", "--source", kind, "--input", folder, "--output", tmp_path / "out")
    finally:
        shutil.rmtree(folder)
        shutil.copytree(kept, folder)
    assert message in line and "\x1b" not in line and len(line) < 600
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept"]


def newest(folder: Path) -> Path:
    return max((folder / "metadata").glob("*.metadata.json"))


def protocol(folder: Path, features: list[str] | None) -> None:
    """Let the log demand a feature of its readers; None: renamed columns, in the version before features."""
    log = folder / "_delta_log" / f"{0:020}.json"
    actions = [json.loads(line) for line in log.read_text().splitlines()]
    for action in actions:
        if "protocol" in action:
            named = {"readerFeatures": features, "writerFeatures": features} if features else {}
            versions = (3, 7) if features else (2, 5)
            action["protocol"] = {"minReaderVersion": versions[0], "minWriterVersion": versions[1], **named}
        if "metaData" in action and not features:
            action["metaData"]["configuration"] = {"delta.columnMapping.mode": "name"}
            schema = json.loads(action["metaData"]["schemaString"])
            inner = next(field for field in schema["fields"] if field["name"] == "at")["type"]["fields"]
            for number, field in enumerate([*schema["fields"], *inner]):
                names = {"delta.columnMapping.id": number, "delta.columnMapping.physicalName": field["name"]}
                field["metadata"] = names
            action["metaData"]["schemaString"] = json.dumps(schema)
    log.write_text("\n".join(map(json.dumps, actions)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--table-version", "9"), "version 9|snapshot 9"),
        (("--columns", "user=user_id,item=item_id"), "no order"),
        (("--columns", "user=usr_id,item=item_id,timestamp=timestamp"), "did you mean 'user_id'"),
        (("--source", "parquet"), "give --source"),
        (("--source", "csv", "--table-version", "1"), "only delta and iceberg have versions"),
    ],
)
def test_a_wrong_option_is_one_line(
    table: tuple[str, str, dict[int, int]],
    options: tuple[str, ...],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    kind, folder, _ = table
    line = told(capsys, "prepare", "--source", kind, "--input", folder, "--output", tmp_path / "out", *options)
    assert re.search(message, line), line
    assert not any(tmp_path.iterdir())


def test_files_of_a_table_are_not_read_as_files_alone(
    table: tuple[str, str, dict[int, int]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kind, folder, _ = table
    inner = {str(file.parent) for file in Path(folder).rglob("*.parquet")}
    for location in (*inner, *(f"{place}/*.parquet" for place in inner)):
        line = told(capsys, "prepare", "--source", "parquet", "--input", location, "--output", tmp_path / "out")
        assert f"give --source {kind}" in line


@pytest.mark.parametrize(("kind", "module"), [("delta", "deltalake"), ("iceberg", "pyiceberg.catalog")])
def test_a_missing_library_names_the_extra(
    kind: str, module: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(__import__("sys").modules, module, None)
    with pytest.raises(DataError, match=rf"pip install 'flm_torchrec\[{kind}\]'"):
        flm.prepare(tmp_path, tmp_path / "out", source=kind)
