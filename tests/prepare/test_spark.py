"""Spark prepares the same data, to the byte."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

from flm_torchrec.data.dataset import load_prepared
from tests.conftest import QUICK_JAVA
from tests.prepare.test_prepare_shards import HEADER, contents, flm, report, write_logs

pytest.importorskip("pyspark", reason="the extra 'spark' is not installed")
pytestmark = pytest.mark.skipif(shutil.which("java") is None, reason="Spark needs Java, which is not installed")


@pytest.fixture(autouse=True)
def quick_java(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAVA_TOOL_OPTIONS", QUICK_JAVA)


OF_EVENTS = ("--event-features", "Gerät:categorical", "--min-count", "2", "--min-users", "2")


def add_columns(logs: Path) -> None:
    """Give each row a weight and a device, some of them missing."""
    for file in logs.iterdir():
        header, *rows = file.read_text(encoding="utf-8").splitlines()
        more = [f"{n % 3},{('tv', '', 'phone', f'only {file.name}')[n % 4]}" for n in range(len(rows))]
        lines = [f"{header},w,Gerät", *(f"{row},{of_row}" for row, of_row in zip(rows, more, strict=True))]
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")


@pytest.mark.parametrize(
    "cleaning",
    [
        ("--dedup", "window", "--dedup-window", "15", "--session-gap", "30", "--min-item-events", "9", "--k-core", "3"),
        (
            *("--dedup", "last", "--min-value", "0", "--columns", "user=user_id,item=item_id", "--keep-unseen-items"),
            *("--item-features", "brand:categorical,tags:multi_categorical,price:quantile", "--duplicates", "last"),
            *("--min-users", "2"),
        ),
        pytest.param(
            ("--dedup", "last", "--columns", "user=user_id,item=item_id,timestamp=timestamp,weight=w", *OF_EVENTS),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_spark_writes_the_bytes_that_duckdb_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cleaning: tuple[str, ...]
) -> None:
    monkeypatch.setattr("flm_torchrec.prepare.interactions.ROWS_PER_BUCKET", 60)
    logs = write_logs(tmp_path / "logs")
    (logs / "5.csv").write_bytes(HEADER + b"u1,i1\nu1,,4\nu1,i2,1000\n")
    if "--event-features" in cleaning:
        add_columns(logs)
    described = [f"i{n % 10},b{n % 3},t{n}|u,{n / 4}\n" for n in range(12)]
    (tmp_path / "items.csv").write_text("".join(["item_id,brand,tags,price\n", *described]))
    (tmp_path / "who.txt").write_text("u1\nu3\n")
    items = (
        ("--items", tmp_path / "items.csv", "--exclude-users", tmp_path / "who.txt")
        if "--item-features" in cleaning
        else ()
    )
    for engine in ("duckdb", "spark"):
        options = ("--engine", engine, "--threads", "2", *items, *cleaning)
        assert flm("--source", "csv", "--input", logs, "--output", tmp_path / engine, *options) == 0
    assert contents(tmp_path / "spark") == contents(tmp_path / "duckdb")
    data = load_prepared(tmp_path / "spark")
    assert data.schema.interactions == report(tmp_path / "spark")["rows_kept"] > 40
    assert (data.context >= 0).any() == ("--event-features" in cleaning) == data.schema.weights
    assert len(list((tmp_path / "spark" / "interactions").iterdir())) > 1
    assert ("u1" in data.user_keys) == (not items)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["duckdb", "items.csv", "logs", "spark", "who.txt"]


def test_a_wrong_file_is_one_line_from_spark_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "l.csv").write_text("uid,item_id,timestamp\na,b,1\n")
    call = ("--source", "csv", "--input", tmp_path / "l.csv", "--output", tmp_path / "out", "--engine", "spark")
    assert flm(*call) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(error) == 1 and "l.csv: no column 'user_id'" in error[0]


def test_without_pyspark_the_error_says_how_to_get_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyspark", None)
    assert flm("--output", tmp_path / "out", "--engine", "spark") == 2
    assert "pip install 'flm_torchrec[spark]'" in capsys.readouterr().err
