"""Ids and times mean the same in every source, and a time taken in another unit is never kept without a word."""

from __future__ import annotations

import csv
import json
from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flm_torchrec import prepare
from flm_torchrec.cli import main
from flm_torchrec.data.feature_values import FeatureValues, codes_of
from flm_torchrec.data.keys import as_text, frame_of, json_text, keys
from flm_torchrec.data.times import LATEST, check_unit, seconds
from flm_torchrec.errors import DataError
from flm_torchrec.prepare.clean import Dropped
from flm_torchrec.prepare.column_options import parse_columns
from flm_torchrec.prepare.options import LogOptions
from flm_torchrec.prepare.sources import logs
from tests.conftest import only_shard

COLUMNS = parse_columns("user=user_id,item=item_id,timestamp=timestamp")


def flm(*arguments: str | Path) -> int:
    return main([str(a) for a in arguments])


def read(source: str, file: Path) -> pl.DataFrame:
    shard = only_shard(logs.read(source, str(file), LogOptions(COLUMNS)))
    return pl.concat(shard.batches(Dropped()))


def of_each_source(folder: Path, users: list[Any]) -> dict[str, list[str | None]]:
    """The ids that each source, and a follower, reads of the same values."""
    rows = [{"user_id": user, "item_id": "x", "timestamp": 1} for user in users]
    pq.write_table(pa.Table.from_pylist(rows), folder / "l.parquet")
    (folder / "l.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with (folder / "l.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["user_id", "item_id", "timestamp"], quoting=csv.QUOTE_MINIMAL)
        writer.writeheader()
        writer.writerows(rows)
    found = {source: read(source, folder / f"l.{source}")["user"].to_list() for source in ("parquet", "jsonl", "csv")}
    found["follow"] = keys(pl.Series("u", [json_text(user) for user in users], dtype=pl.String), "").to_list()
    return found


WORDS = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), max_size=6)
ODD = st.sampled_from([" a", "a\u00a0", "NULL", "null", "None", "nan", "NaN", "1.0", "-0.0", "007", "1e3", "1.50", ""])
USERS = st.one_of(
    st.lists(st.integers(-(2**63), 2**63 - 1) | st.none(), min_size=1, max_size=8),
    # Python's csv writes 1e16 as 1e+16, which is text; below that all write alike.
    st.lists(st.integers(-(10**15), 10**15).map(float) | st.none(), min_size=1, max_size=8),
    st.lists(st.integers(-10_000, 10_000).map(lambda n: n / 8) | st.just(float("nan")), min_size=1, max_size=8),
    st.lists(WORDS | ODD | st.none(), min_size=1, max_size=8),
)


@settings(max_examples=60)
@given(USERS)
def test_an_id_is_the_same_in_every_source(tmp_path_factory: pytest.TempPathFactory, users: list[Any]) -> None:
    found = of_each_source(tmp_path_factory.mktemp("s"), users)
    assert found["parquet"] == found["jsonl"] == found["csv"] == found["follow"]


@pytest.mark.parametrize(
    ("column", "ids"),
    [
        (pl.Series([1.0, 2.5, float("nan"), float("inf"), None, -0.0]), ["1", "2.5", None, None, None, "0"]),
        (pl.Series([1.0, 16777215.0], dtype=pl.Float32), ["1", "16777215"]),
        (pl.Series([2**64 - 1, 0], dtype=pl.UInt64), [str(2**64 - 1), "0"]),
        (pl.Series([Decimal("7.00"), Decimal("12.50"), None]), ["7", "12.50", None]),
        (pl.Series([b"ab", b" 1.0", b"\xff\x00", b"", None]), ["ab", "1", "ff00", None, None]),
        (pl.Series(["x", "NULL", "x"], dtype=pl.Categorical), ["x", None, "x"]),
        (pl.Series([" 1", "1.0\t", "\u20091.000 ", "+1", "1.", "v1.0"]), ["1", "1", "1", "+1", "1.", "v1.0"]),
        (pl.Series(["\\N", "<NA>", "None", "nullable", "Nan", " "]), [None, None, None, "nullable", "Nan", None]),
    ],
)
def test_ids_of_each_type(column: pl.Series, ids: list[str | None]) -> None:
    assert keys(column.alias("u"), "f").to_list() == ids


@pytest.mark.parametrize(
    ("column", "ids"),
    [
        (pa.array(["a", None]).dictionary_encode(), ["a", None]),
        (pa.array([7, 8]).dictionary_encode(), ["7", "8"]),
        (pc.run_end_encode(pa.array(["a", "a", "b"])), ["a", "a", "b"]),
        (pa.array([b"1.0", b"\xff"], pa.large_binary()), ["1", "ff"]),
        (pa.array([bytes(range(240, 256))], pa.uuid()), ["f0f1f2f3f4f5f6f7f8f9fafbfcfdfeff"]),
        (pa.array([Decimal(10**40)], pa.decimal256(50)), [f"1{'0' * 40}"]),
    ],
)
def test_ids_of_each_type_of_arrow(column: pa.Array, ids: list[str | None]) -> None:
    assert keys(frame_of(pa.table({"u": column}), "f")["u"], "f").to_list() == ids


@pytest.mark.parametrize("kind", [pa.duration("s"), pa.month_day_nano_interval(), pa.list_view(pa.string())])
def test_types_that_stand_for_no_value_are_refused(tmp_path: Path, kind: pa.DataType) -> None:
    table = pa.table({"user_id": ["a"], "item_id": ["x"], "timestamp": pa.array([None], kind)})
    with pytest.raises(DataError, match=r"^events: column 'timestamp' is .* in Arrow, which is not read; store it as"):
        prepare(table, tmp_path / "out")


@pytest.mark.parametrize(
    ("column", "kind", "values"),
    [
        (pa.array(["a|b", "b"]).dictionary_encode(), "multi_categorical", ["a", "b"]),
        (pa.array([b"a|b", b"\xff"]), "multi_categorical", ["a", "b", "ff"]),
        (pa.array([b"1.5", b"2"]), "quantile", ["-inf", "2.0"]),
        (pc.run_end_encode(pa.array([7.0, 7.0])), "categorical", ["7"]),
    ],
)
def test_values_of_each_type_of_arrow(tmp_path: Path, column: pa.Array, kind: str, values: list[str]) -> None:
    events = pa.table({"user_id": ["a", "b"], "item_id": ["x", "y"], "timestamp": [1, 2]})
    items = pa.table({"item_id": ["x", "y"], "f": column})
    prepare(events, tmp_path / "out", items=items, item_features={"f": kind})
    assert pl.read_parquet(tmp_path / "out" / "vocab" / "item_f.parquet")["value"].to_list() == values


def test_a_request_reads_values_as_preparation_does() -> None:
    described = {"name": "shelf", "entity": "item", "kind": "multi_categorical"}
    feature, left_out = FeatureValues.described({**described, "values": ("Art", "Design")}), list[str]()
    assert list(codes_of(feature, ["\u00a0Design ", " "], left_out)) == [1] and feature.shown(" Design", ()) == [
        "Design"
    ]
    assert left_out == ["features.shelf: ' ' was not in training"]
    older = FeatureValues.described({**described, "values": (" Design ", "Design")})
    assert list(codes_of(older, [" Design ", "Design ", "Design"], left_out)) == [0, 1, 1]


@pytest.mark.parametrize(
    ("column", "kind", "power"),
    [
        ([9007199254740992.0, 1.0], pl.Float64, 53),
        ([-1.5e300], pl.Float64, 53),
        ([16777216.0, 1.0], pl.Float32, 24),
        ([-2048.0], pl.Float16, 11),
    ],
)
def test_ids_that_a_float_has_rounded_are_refused(column: list[float], kind: type[pl.DataType], power: int) -> None:
    with pytest.raises(
        DataError, match=rf"f: column 'u' has the id .* as a float, which is rounded from 2\^{power} on"
    ):
        keys(pl.Series("u", column, kind), "f")


@pytest.mark.parametrize(("user", "exact"), [("9007199254740993.0", False), ("1e16", False), ("9" * 25, True)])
def test_rounded_ids_of_json_are_refused(tmp_path: Path, user: str, exact: bool) -> None:
    (tmp_path / "l.jsonl").write_text(f'{{"user_id": {user}, "item_id": "x", "timestamp": 1}}\n')
    if exact:
        assert read("jsonl", tmp_path / "l.jsonl")["user"].to_list() == [user]
        return
    with pytest.raises(DataError, match=r"l.jsonl: column 'user_id' has the id \d+\.0 as a float, which is rounded"):
        read("jsonl", tmp_path / "l.jsonl")


def test_ids_agree_between_events_and_what_describes_them(tmp_path: Path) -> None:
    (tmp_path / "l.csv").write_text("user_id,item_id,timestamp\n1, 7,1\n1.0,8,2\nNULL,8,3\n1,nan,4\n")
    pl.DataFrame({"item_id": [7.0, 8.0, None], "brand": ["r", "s", "t"]}).write_parquet(tmp_path / "i.parquet")
    assert flm("prepare", "--source", "csv", "--input", tmp_path / "l.csv", "--output", tmp_path / "out", "--items",
               tmp_path / "i.parquet", "--item-features", "brand:categorical") == 0  # fmt: skip
    assert pl.read_parquet(tmp_path / "out" / "items.parquet").rows() == [(0, "7", 0), (1, "8", 1)]
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert {reason: entry["rows"] for reason, entry in report["dropped"].items()} == {"no user": 1, "no item": 1}
    assert report["users"] == 1 and "1.0 is 1" in report["ids"]


DAY = 1711852200
"""2024-03-31 02:30 UTC."""


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("2024-03-31 02:30:00 UTC", DAY),
        ("2024-03-31 02:30:00.123456 UTC", DAY),
        ("2024-03-31 02:30:00+00", DAY),
        ("2024-03-31T04:30:00+02", DAY),
        ("2024-03-31T03:30+01:00", DAY),
        ("2024-03-31T02:30Z", DAY),
        ("2024-03-30 21:00:00.5 -05:30", DAY),
        ("2024-03-31T08:15:59+0545", DAY + 59),
        ("2024-03-31t02:30z", DAY),
        ("2024-03-31", DAY - 9000),
        ("2024-02-30 00:00", None),
        ("2024-03-31 25:00", None),
        ("2024-03-31 02:30 +25:00", None),
        ("2024-03-31 02:30 CET", None),
        ("31.03.2024", None),
    ],
)
def test_written_times(text: str, found: int | None) -> None:
    assert seconds(pl.Series("t", [text]), "s").to_list() == [found]


@settings(max_examples=60)
@given(st.datetimes(datetime(1970, 1, 2), datetime(2242, 1, 1)), st.integers(-18 * 60, 18 * 60))
def test_a_time_is_the_same_in_every_form(when: datetime, zone: int) -> None:
    there = when.replace(tzinfo=UTC).astimezone(timezone(timedelta(minutes=zone)))
    expected = int(when.replace(tzinfo=UTC).timestamp() // 1)
    forms = [
        pl.Series("t", [when]),
        pl.Series("t", [when]).dt.cast_time_unit("ns").dt.replace_time_zone("UTC").dt.convert_time_zone("Asia/Tokyo"),
        pl.Series("t", [there.isoformat()]),
        pl.Series("t", [there.isoformat(" ")]),
        pl.Series("t", [when.isoformat(" ") + " UTC"]),
        as_text(pl.Series("t", [when])),
        pl.Series("t", [expected]),
        pl.Series("t", [str(expected)]),
        pl.Series("t", [f"{expected}.75"]),
        pl.Series("t", [expected + 0.75]),
        pl.Series("t", [Decimal(expected)]),
    ]
    assert [seconds(form, "s").to_list() for form in forms] == [[expected]] * len(forms)
    for unit, size in (("ms", 1_000), ("us", 1_000_000), ("ns", 1_000_000_000)):
        if expected * size < 2**63:
            assert seconds(pl.Series("t", [expected * size + size - 1]), unit).to_list() == [expected]


@pytest.mark.parametrize(
    ("times", "given_unit", "mend", "when"),
    [
        ([1690000000000], "s", "ms", 55523),
        (["1700000000000123", "1700000000000124"], "s", "us", 53872825),
        ([1.7e18], "ms", "ns", 53872825),
        ([1700000000000000], "ms", "us", 55840),
        ([10_000_000_000], "s", "ms", 2286),
    ],
)
def test_another_unit_is_refused_with_its_mend(
    tmp_path: Path, times: list[Any], given_unit: str, mend: str, when: int, capsys: pytest.CaptureFixture[str]
) -> None:
    frame = pl.DataFrame({"user_id": ["a"] * len(times), "item_id": ["x"] * len(times), "at": times})
    frame.write_parquet(tmp_path / "l.parquet")
    call = ("prepare", "--source", "parquet", "--input", tmp_path / "l.parquet", "--output", tmp_path / "out",
            "--columns", "user=user_id,item=item_id,timestamp=at", "--time-unit")  # fmt: skip
    assert flm(*call, given_unit) == 2
    error = capsys.readouterr().err
    assert f"column 'at' has the time {as_text(frame['at'])[0]}" in error and f"year {when};" in error
    assert error.rstrip().endswith(f"--time-unit {mend}") and error.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["l.parquet"]
    assert flm(*call, mend) == 0


def test_a_few_times_in_another_unit_are_counted(tmp_path: Path) -> None:
    (tmp_path / "l.csv").write_text(f"user_id,item_id,timestamp\na,x,{LATEST}\na,y,{LATEST + 1}\nb,x,1700000000\n")
    assert flm("prepare", "--source", "csv", "--input", tmp_path / "l.csv", "--output", tmp_path / "out") == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["dropped"] == {
        "timestamp after the year 2242: is it in another --time-unit?": {"rows": 1, "examples": ["l.csv: row 2"]}
    }


def test_times_that_know_their_unit_are_never_told_to_be_in_another() -> None:
    column = pl.Series("t", [datetime(9999, 12, 31), datetime(2024, 1, 1)])
    check_unit(column, "s", seconds(column, "s"))
