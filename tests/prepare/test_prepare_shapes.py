"""The shapes that files come in: lists in cells, paths into objects, encodings, line ends, numbers, names."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flm_torchrec.cli import main
from flm_torchrec.data.dataset import load_prepared
from flm_torchrec.data.keys import stripped
from flm_torchrec.errors import DataError
from flm_torchrec.prepare.clean import Dropped
from flm_torchrec.prepare.column_options import parse_columns
from flm_torchrec.prepare.engine import DuckEngine
from flm_torchrec.prepare.entities import store_described
from flm_torchrec.prepare.memory import GIB
from flm_torchrec.prepare.options import LogOptions, NumberForm, TextForm
from flm_torchrec.prepare.sources import lines, logs, records
from flm_torchrec.prepare.sources.number_text import read_numbers
from flm_torchrec.prepare.sources.source_data import SourceData
from tests.conftest import only_shard

COLUMNS = "user=u,item=i"


def flm(*arguments: str | Path) -> int:
    return main(["prepare", *map(str, arguments)])


def events(file: Path, columns: str = COLUMNS, form: TextForm | None = None) -> tuple[pl.DataFrame, Dropped]:
    """All rows of a file and what was dropped or noted of it."""
    source = file.suffix.removeprefix(".")
    dropped = Dropped()
    shard = only_shard(logs.read(source, str(file), LogOptions(parse_columns(columns), form=form or TextForm())))
    return pl.concat(list(shard.batches(dropped))), dropped


def items_of(raw: SourceData) -> pl.DataFrame:
    """What a source says of items."""
    assert raw.items is not None
    return raw.items


def described(
    file: Path, kinds: dict[str, Any], form: TextForm | None = None, key: str = "i", **options: Any
) -> SourceData:
    """What a file says of items, beside a file of one event: read, with one row a key."""
    log = file.with_name("log.csv")
    log.write_text("u,i\na,x\n")
    options |= {"items": str(file), "item_key": key, "item_features": kinds}
    raw = logs.read("csv", str(log), LogOptions(parse_columns(COLUMNS), form=form or TextForm(), **options))
    with TemporaryDirectory() as work, DuckEngine(GIB, 1, Path(work)) as engine:
        features = store_described(engine, "item", Path(work), raw.tables["item"])
        rows = engine.query("SELECT * FROM described_items ORDER BY place")
    columns = (pl.col(column).cast(dtype).alias(name) for name, (column, dtype) in features.items())
    return replace(raw, items=rows.select("key", *columns), warnings=tuple(raw.tables["item"].notes))


def written(folder: Path, kind: str, rows: list[dict[str, Any]]) -> Path:
    """The same rows as Parquet, as JSON lines, or as CSV with lists as JSON."""
    file = folder / f"items.{kind}"
    if kind == "parquet":
        pl.DataFrame(rows).write_parquet(file)
    elif kind == "jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        cells = [{k: json.dumps(v) if isinstance(v, list) else v for k, v in row.items()} for row in rows]
        pl.DataFrame(cells).write_csv(file)
    return file


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "csv"])
def test_lists_are_the_same_in_every_format(tmp_path: Path, kind: str) -> None:
    rows = [{"i": "x", "tags": ["t0", "Books | all"], "vec": [0.5, 2.0]}, {"i": "y", "tags": [], "vec": [1.0, -3.0]}]
    raw = described(written(tmp_path, kind, rows), {"tags": "multi_categorical", "vec": "dense"})
    assert items_of(raw)["tags"].to_list() == [["t0", "Books | all"], []] and raw.warnings == ()
    assert items_of(raw)["vec"].to_list() == [[0.5, 2.0], [1.0, -3.0]]


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_a_whole_float_has_no_point_as_in_events(tmp_path: Path, kind: str) -> None:
    rows: list[dict[str, Any]] = [
        {"i": "x", "shelf": 1.0, "tags": [2.0, 2.5], "name": 3.0, "aisle": 4},
        {"i": "y", "shelf": 0.5, "tags": [-7.0], "name": 1e3, "aisle": 5},
        {"i": "z", "shelf": None, "tags": None, "name": None, "aisle": None},
    ]
    kinds = {"shelf": "categorical", "tags": "multi_categorical", "name": "text", "aisle": "categorical"}
    found = items_of(described(written(tmp_path, kind, rows), kinds))
    assert found["shelf"].to_list() == ["1", "0.5", None] and found["aisle"].to_list() == ["4", "5", None]
    assert found["tags"].to_list() == [["2", "2.5"], ["-7"], None] and found["name"].to_list() == ["3", "1000", None]
    if kind == "parquet":
        pl.DataFrame({"i": ["x", "y"], "shelf": [float("nan"), 1.0]}).write_parquet(tmp_path / "nan.parquet")
        of_floats = items_of(described(tmp_path / "nan.parquet", {"shelf": "categorical"}))
        assert of_floats["shelf"].to_list() == [None, "1"]


@pytest.mark.parametrize(
    ("cell", "values"),
    [
        ('["t0", "Books"]', ["t0", "Books"]), ("[1, 2.50, true, null]", ["1", "2.50", "true"]), ("a|b", ["a", "b"]),
        ("['it', \"it's\"]", ["it", "it's"]), (' ["a"] ', ["a"]), ("[]", []), ("[sale]", ["[sale]"]),
        ("[new, old]|x", ["[new, old]", "x"]), ('["zwölf"]', ["zwölf"]),
    ],
)  # fmt: skip
def test_a_cell_is_a_list_of_json_or_of_its_separator(tmp_path: Path, cell: str, values: list[str]) -> None:
    pl.DataFrame({"i": ["x", "y"], "tags": [cell, "p|q"]}).write_csv(tmp_path / "items.csv")
    found = described(tmp_path / "items.csv", {"tags": "multi_categorical"}).items
    assert found is not None
    assert found["tags"].to_list() == [values, ["p", "q"]]


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "csv"])
def test_blanks_around_a_value_are_no_part_of_it(tmp_path: Path, kind: str) -> None:
    rows: list[dict[str, Any]] = [
        {"i": "x", "shelf": "\u00a0Design ", "tags": "a| b c", "price": " 1.5", "vec": "1| 2"},
        {"i": "y", "shelf": " ", "tags": " |b c\t", "price": " ", "vec": "3 |4"},
    ]
    kinds = {"shelf": "categorical", "tags": "multi_categorical", "price": "numeric", "vec": "dense"}
    found = items_of(described(written(tmp_path, kind, rows), kinds))
    assert found["shelf"].to_list() == ["Design", ""] and found["tags"].to_list() == [["a", "b c"], ["", "b c"]]
    assert found["price"].to_list() == [1.5, None] and found["vec"].to_list() == [[1, 2], [3, 4]]
    log = tmp_path / "e.csv"
    log.write_text("u,i,app\na,x, web\nb,x,web\n")
    shard = only_shard(
        logs.read("csv", str(log), LogOptions(parse_columns(COLUMNS), event_features={"app": "categorical"}))
    )
    assert pl.concat(shard.batches(Dropped()))["context_app"].to_list() == ["web", "web"]


@pytest.mark.parametrize(
    ("cell", "kind", "message"),
    [
        ("[a, b]", "multi_categorical", "column 'tags': [a, b] looks like a list and is not JSON"),
        ('["a", {"b": 1}]', "multi_categorical", "looks like a list and is not JSON"),
        ('["a", "b"]', "categorical", "declare it tags:multi_categorical"),
        ("['a', 'b']", "categorical", "declare it tags:multi_categorical"),
        ("[1, 2]", "numeric", "declare it tags:multi_categorical"),
    ],
)
def test_a_list_that_cannot_be_one_is_refused(tmp_path: Path, cell: str, kind: str, message: str) -> None:
    pl.DataFrame({"i": ["x"], "tags": [cell]}).write_csv(tmp_path / "items.csv")
    with pytest.raises(DataError, match=re.escape(message)):
        described(tmp_path / "items.csv", {"tags": kind})


@given(st.lists(st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\0"), min_size=1), min_size=1))
@settings(max_examples=40)
def test_any_list_of_json_comes_back(tmp_path_factory, values: list[str]) -> None:  # type: ignore[no-untyped-def]
    file = tmp_path_factory.mktemp("list") / "items.csv"
    pl.DataFrame({"i": ["x"], "tags": [json.dumps(values)]}).write_csv(file)
    assert items_of(described(file, {"tags": "multi_categorical"}))["tags"].to_list() == [[stripped(v) for v in values]]


def test_a_list_separator_that_never_occurs_is_told_by_column(tmp_path: Path) -> None:
    file = tmp_path / "items.csv"
    file.write_text('i,tags,seen,one\nx,red;blue,a|b,k\ny,red,c,l\nz,"[""q""]",c,\n')
    kinds = dict.fromkeys(("tags", "seen", "one"), "multi_categorical")
    tags, one = described(file, kinds).warnings
    assert "'|' never occurs in column 'tags'" in tags and "';' occurs in 1 of 2" in tags
    assert "'|' never occurs in column 'one'" in one and "occurs in" not in one.split("one'", 1)[1]
    assert described(file, {"tags": "multi_categorical"}, TextForm(list_separator=";")).warnings == ()


def test_paths_lead_into_objects(tmp_path: Path) -> None:
    rows = [
        {"user": {"id": 7, "a.b": 1}, "it": {"of": {"sku": "x"}}, "t.s": 5},
        {"user": None, "it": {}, "t": {"s": 6}},
    ]
    (tmp_path / "l.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found, _ = events(tmp_path / "l.jsonl", "user=user.id,item=it.of.sku,timestamp=t.s")
    assert found.select("user", "item", "timestamp").rows() == [("7", "x", 5), (None, None, 6)]
    nested = [{"user": {"id": 7}, "it": {"of": {"sku": "x"}}}, {"user": None, "it": {"of": None}}]
    pl.DataFrame(nested).write_parquet(tmp_path / "l.parquet")
    found, _ = events(tmp_path / "l.parquet", "user=user.id,item=it.of.sku")
    assert found.select("user", "item").rows() == [("7", "x"), (None, None)]


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_a_name_that_is_not_there_names_those_that_are(tmp_path: Path, kind: str) -> None:
    file = written(tmp_path, kind, [{"usr": "a", "i": "x", "price": 1}])
    with pytest.raises(DataError, match=r"no column 'user'; did you mean 'usr'\? It has: usr, i, price"):
        events(file, "user=user,item=i")
    with pytest.raises(DataError, match="no column 'nme'; it has: usr, i, price"):
        described(file, {"nme": "text"})


@pytest.mark.parametrize(("sign", "given"), [(";", ","), ("\t", ","), ("|", ","), (",", ";")])
def test_another_separator_is_told(tmp_path: Path, sign: str, given: str) -> None:
    (tmp_path / "l.csv").write_text(f"user{sign}item\na{sign}b\n")
    shown = sign.replace("\t", r"\t")
    told = f"no column 'user'; read it with its separator (--separator '{shown}'). It has: user"
    with pytest.raises(DataError, match=re.escape(told)):
        events(tmp_path / "l.csv", "user=user,item=item", form=TextForm(separator=given))


def test_an_object_where_a_value_should_be_names_its_fields(tmp_path: Path) -> None:
    (tmp_path / "l.jsonl").write_text('{"user": {"id": 1, "name": "a"}, "i": "x"}\n')
    with pytest.raises(DataError, match=r"'user' is an object in every row; name a field of it: user.id, user.name"):
        events(tmp_path / "l.jsonl", "user=user,item=i")


def test_a_field_may_begin_late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "BLOCK", 20)
    (tmp_path / "l.jsonl").write_text('{"u": "a", "i": "x"}\n' * 3 + '{"u": "a", "i": "x", "v": 4}\n')
    found, _ = events(tmp_path / "l.jsonl", f"{COLUMNS},value=v")
    assert found["value"].to_list() == [None, None, None, 4.0]


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_names_may_differ_in_case_and_have_alternatives(tmp_path: Path, kind: str) -> None:
    file = written(tmp_path, kind, [{"User_ID": "a", "sku": "x", "Sku": "no"}])
    found, dropped = events(file, "user=uid|user_id,item=item|sku")
    assert found.select("user", "item").rows() == [("a", "x")]
    assert dropped.notes == ["column 'user_id' is read from 'User_ID', which differs in case or blanks alone"]
    with pytest.raises(DataError, match="no column 'SKU'"):  # of two that fit none is taken
        events(file, "user=User_ID,item=SKU")


def test_what_was_read_otherwise_is_told_and_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for n in range(2):
        (tmp_path / f"{n}.csv").write_text("USER_ID,Item_Id\na,x\n")
    call = (
        "--source",
        "csv",
        "--input",
        tmp_path,
        "--columns",
        "user=user_id,item=item_id",
        "--output",
        tmp_path / "o",
    )
    assert flm(*call) == 0
    told = capsys.readouterr().err.splitlines()
    assert told == [
        "warning: column 'user_id' is read from 'USER_ID', which differs in case or blanks alone",
        "warning: column 'item_id' is read from 'Item_Id', which differs in case or blanks alone",
    ]
    report = json.loads((tmp_path / "o" / "report.json").read_text())
    assert [f"warning: {line}" for line in report["warnings"]] == told


@pytest.mark.parametrize(
    "encoding", ["latin-1", "cp1252", "utf-16", "utf-16-le", "utf-32", "utf-8", "utf-8-sig", "big5"]
)
@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_encodings(tmp_path: Path, encoding: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "BLOCK", 7)
    monkeypatch.setattr(lines, "SAMPLE", 5)
    user = "中文" if encoding == "big5" else "Zoë"
    text = f"u,i\n{user},x\nb,y\n" if kind == "csv" else f'{{"u": "{user}", "i": "x"}}\n{{"u": "b", "i": "y"}}\n'
    (tmp_path / f"l.{kind}").write_bytes(text.encode(encoding))
    found, dropped = events(tmp_path / f"l.{kind}", form=TextForm(encoding=encoding))
    assert found["user"].to_list() == [user, "b"] and not dropped.counts
    items = tmp_path / f"items.{kind}"
    items.write_bytes(text.replace('"u"', '"name"').replace("u,", "name,").encode(encoding))
    raw = described(items, {"name": "text"}, TextForm(encoding=encoding))
    assert items_of(raw)["name"].to_list() == [user, "b"]


def test_what_an_encoding_does_not_know_is_dropped_with_its_row(tmp_path: Path) -> None:
    (tmp_path / "l.csv").write_bytes(b"u,i\na\x81,x\nb,y\n")
    found, dropped = events(tmp_path / "l.csv", form=TextForm(encoding="cp1252"))
    assert found["user"].to_list() == ["b"]
    assert dropped.to_json() == {"malformed: not cp1252": {"rows": 1, "examples": ["l.csv: row 1"]}}


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_lines_may_end_with_carriage_returns_alone(tmp_path: Path, kind: str) -> None:
    text = "u,i\ra,x\rb,y\r" if kind == "csv" else '{"u":"a","i":"x"}\r{"u":"b","i":"y"}'
    (tmp_path / f"l.{kind}").write_bytes(text.encode())
    found, dropped = events(tmp_path / f"l.{kind}")
    assert found.select("user", "item", "row").rows() == [("a", "x", 1), ("b", "y", 2)] and not dropped.counts


@pytest.mark.parametrize("block", [1, 2**24])
@pytest.mark.parametrize("multiline", [False, True])
def test_blank_lines_may_stand_before_the_header(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int, multiline: bool
) -> None:
    monkeypatch.setattr(lines, "BLOCK", block)
    monkeypatch.setattr(lines, "SAMPLE", 5)
    (tmp_path / "l.csv").write_bytes(b"\xef\xbb\xbf\n  \r\nu,i\n\na,x\nb\n")
    found, dropped = events(tmp_path / "l.csv", form=TextForm(multiline=multiline))
    assert found.select("user", "item", "row").rows() == [("a", "x", 4)]
    assert list(dropped.examples.values()) == [["l.csv: row 5"]]


RECORDS = st.lists(st.tuples(st.text('ab\n\r ",', max_size=6), st.sampled_from(["x", "y\nz"])), min_size=1, max_size=6)


@given(RECORDS, st.integers(1, 9), st.sampled_from(["\n", "\r\n"]), st.booleans())
@settings(max_examples=80)
def test_quoted_fields_go_over_lines(tmp_path_factory, records, block, end, closed) -> None:  # type: ignore[no-untyped-def]
    file = tmp_path_factory.mktemp("multi") / "l.csv"
    body = ['"' + user.replace('"', '""') + f'","{item}"' for user, item in records]
    file.write_bytes((end.join(["u,i", *body]) + (end if closed else "")).encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lines, "BLOCK", block)
        found, dropped = events(file, form=TextForm(multiline=True))
    expected = [(user.strip() or None, item) for user, item in records]  # an id has no white space around it
    assert found.select("user", "item").rows() == expected and not dropped.counts
    first = [1 + "".join(body[:n]).count("\n") + n for n in range(len(body))]  # the line that a record begins in
    assert found["row"].to_list() == first


def test_a_line_break_in_quotes_needs_multiline(tmp_path: Path) -> None:
    (tmp_path / "l.csv").write_text('u,i\n"a\nb",x\nc"d,y\ne"f,z\ng,w\n')
    found, dropped = events(tmp_path / "l.csv")
    assert found["item"].to_list() == ["w"] and dropped.counts == {"malformed: a quote is not closed on its line": 4}
    found, dropped = events(tmp_path / "l.csv", form=TextForm(multiline=True))
    assert found.select("user", "item", "row").rows() == [("a\nb", "x", 1), ("g", "w", 5)]
    assert list(dropped.examples.values()) == [["l.csv: row 3", "l.csv: row 4"]]


STRAY = {
    "never closed": ['"b', "c", "d", "e"],
    "closed by the next quote": ['"b', "c", '"d"', "e"],
    "closed by the next quotes": ['"b', "c", '""', '"d, d"', "e"],
    "inside a field": ['b"b', "c", '"d"', "e"],
    "inside two fields": ['b"b', "c", 'd"d', "e"],
    "behind a field of two lines": ['"b\nb"b', "c", "d"],
}


@pytest.mark.parametrize("cells", STRAY.values(), ids=list(STRAY))
@pytest.mark.parametrize("block", [1, 9, 2**24])
@pytest.mark.parametrize("end", ["\n", ""])
def test_a_stray_quote_swallows_no_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cells: list[str], block: int, end: str
) -> None:
    monkeypatch.setattr(lines, "BLOCK", block)
    rows = [f"{n},x,{cell}" for n, cell in enumerate(["a", '"a\na"', *cells, "f"])]
    (tmp_path / "l.csv").write_text("\n".join(["u,i,note", *rows]) + end)
    found, dropped = events(tmp_path / "l.csv", form=TextForm(multiline=True))
    bad = [n for n, cell in enumerate(cells, 2) if cell.count('"') % 2 or "\n" in cell]
    assert found["user"].to_list() == [str(n) for n in range(len(rows)) if n not in bad]
    first = [1 + n + "".join(rows[:n]).count("\n") for n in bad]
    bad_lines = [*first, first[0] + 1] if "\n" in cells[0] else first
    assert list(dropped.examples.values()) == [[f"l.csv: row {n}" for n in bad_lines]]


def test_an_open_quote_is_waited_for_no_longer_than_a_record_may_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lines, "BLOCK", 16)
    monkeypatch.setattr(records, "LONGEST", 40)
    users = [f"b{n}" for n in range(50)]
    (tmp_path / "l.csv").write_text("\n".join(["u,i", '"a,x', *(f"{user},y" for user in users), 'c,"y']))
    found, dropped = events(tmp_path / "l.csv", form=TextForm(multiline=True))
    assert found["user"].to_list() == users and dropped.counts == {"malformed: a quote is not closed on its line": 2}


@pytest.mark.parametrize(
    ("numbers", "text", "value"),
    [
        (NumberForm(",", "."), "1.234,56", 1234.56),
        (NumberForm(",", "."), "1.5", None),
        (NumberForm(",", "."), "1.234", 1234),
        (NumberForm(","), "0,5", 0.5),
        (NumberForm(","), "0.5", None),
        (NumberForm(","), ",5", 0.5),
        (NumberForm(","), " 7 ", 7),
        (NumberForm(","), "-1,5e2", -150),
        (NumberForm(","), "", None),
        (NumberForm(), " 7 ", 7),
        (NumberForm(), "1e3", 1000),
        (NumberForm(",", " "), "1\u202f234\u00a0567,5", 1234567.5),
        (NumberForm(".", ","), "12,34,567.5", 1234567.5),
        (NumberForm(".", "'"), "-1'000", -1000),
        (NumberForm(".", ","), "1,23", None),
        (NumberForm(".", ","), "1,234", 1234),
        (NumberForm(currency="$"), "$12.50", 12.5),
        (NumberForm(currency="$"), "-$ 3", -3),
        (NumberForm(currency="$"), "€3", None),
        (NumberForm(",", ".", "EUR"), "1.000,5 EUR", 1000.5),
        (NumberForm(",", ".", "€"), "€", None),
    ],
)
def test_numbers_are_read_as_people_write_them(numbers: NumberForm, text: str, value: float | None) -> None:
    assert read_numbers(pl.Series("n", [text]), numbers).to_list() == [value]


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_numbers_of_events_and_features_are_written_alike(tmp_path: Path, kind: str) -> None:
    form = TextForm(numbers=NumberForm(",", ".", "€"))
    rows = [{"u": "a", "i": "x", "v": "1.000,5 €", "w": "0,5|2"}, {"u": "a", "i": "y", "v": "2,5", "w": "1,5|-3"}]
    file = written(tmp_path, kind, rows)
    assert events(file, f"{COLUMNS},value=v", form)[0]["value"].to_list() == [1000.5, 2.5]
    raw = described(file, {"v": "numeric", "w": "dense"}, form)
    assert items_of(raw)["v"].to_list() == [1000.5, 2.5] and items_of(raw)["w"].to_list() == [[0.5, 2.0], [1.5, -3.0]]
    with pytest.raises(DataError, match=r"column 'v': '1\.000,5 €' is no number as --decimal ','"):
        described(file, {"v": "numeric"}, TextForm(numbers=NumberForm(",")))


def test_numbers_of_json_stay_what_they_are(tmp_path: Path) -> None:
    rows = [{"u": 1.5, "i": "x", "v": 1.5, "w": [0.5, 2]}, {"u": 2, "i": "y", "v": "1,25", "w": [1e-3, 2]}]
    file, form = written(tmp_path, "jsonl", rows), TextForm(numbers=NumberForm(","))
    found, _ = events(file, f"{COLUMNS},value=v", form)
    assert found["value"].to_list() == [1.5, 1.25] and found["user"].to_list() == ["1.5", "2"]
    raw = described(file, {"v": "numeric", "w": "dense"}, form)
    assert items_of(raw)["v"].to_list() == [1.5, 1.25]
    assert items_of(raw)["w"].to_list() == [[0.5, 2.0], [pytest.approx(0.001), 2.0]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--encoding", "utf-99"], "--encoding 'utf-99': not known"), (["--encoding", "base64"], "--encoding 'base64'"),
        (["--decimal", ",,"], "--decimal ',,': give one sign"), (["--decimal", "5"], "--decimal '5'"),
        (["--decimal", ",", "--thousands", ","], "must differ from --decimal"),
        (["--list-separator", ",", "--decimal", ","], "--list-separator ','"),
        (["--list-separator", ""], "--list-separator"),
        (["--currency", "$5"], "--currency '$5'"), (["--max-dropped", "1.5"], "--max-dropped 1.5: must be a share"),
        (["--items", "{d}/none.jsonl"], "none.jsonl: not found; --items must be a file *.jsonl"),
        (["--items", "{d}/bad.jsonl", "--item-key", "i"], "malformed: not a JSON object (bad.jsonl: row 2)"),
        (["--items", "{d}/twice.jsonl", "--item-key", "i"], "key 'x' occurs more than once as 'i'; keep one row"),
    ],
)  # fmt: skip
def test_wrong_options_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    (tmp_path / "l.csv").write_text("u,i\na,x\n")
    (tmp_path / "bad.jsonl").write_text('{"i": "x"}\nno\n')
    (tmp_path / "twice.jsonl").write_text('{"i": "x"}\n{"i": "x"}\n')
    call = ("--source", "csv", "--input", tmp_path / "l.csv", "--columns", COLUMNS, "--output", tmp_path / "out")
    assert flm(*call, *(option.format(d=tmp_path) for option in options)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("duplicates", "price"), [("first", [1.0, 3.0]), ("last", [2.0, 3.0])])
@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_of_rows_with_one_key_one_is_kept(tmp_path: Path, duplicates: str, price: list[float], kind: str) -> None:
    file = written(tmp_path, kind, [{"i": "x", "p": 1}, {"i": "y", "p": 3}, {"i": "x", "p": 2}])
    raw = described(file, {"p": "numeric"}, duplicates=duplicates)
    assert items_of(raw).sort("key")["p"].to_list() == price
    assert raw.warnings == (f"--items {file}: 1 keys have several rows; the {duplicates} one of each is kept",)


def test_items_come_as_events_may(tmp_path: Path) -> None:
    """Several files, packed, JSON lines with paths, columns called as the shards' own."""
    import gzip

    (tmp_path / "in").mkdir()
    for n, row in enumerate(
        ({"p": {"sku": "x"}, "row": "a", "file": ["t"]}, {"p": {"sku": "y"}, "row": "b", "file": []})
    ):
        (tmp_path / "in" / f"{n}.jsonl.gz").write_bytes(gzip.compress(json.dumps(row).encode()))
    (tmp_path / "l.csv").write_text("u,i\na,x\na,y\n")
    call = ("--source", "csv", "--input", tmp_path / "l.csv", "--columns", COLUMNS, "--output", tmp_path / "o")
    options = (
        "--items",
        tmp_path / "in",
        "--item-key",
        "p.sku",
        "--item-features",
        "row:categorical,file:multi_categorical",
    )
    assert flm(*call, *options) == 0
    data = load_prepared(tmp_path / "o")
    assert data.items.sparse["row"].values.tolist() == [0, 1] and data.items.sparse["file"].lengths.tolist() == [1, 0]


def test_descriptions_over_lines_need_no_option(tmp_path: Path) -> None:
    (tmp_path / "items.csv").write_text('i,name\nx,"Two\nlines, ""one"" name"\n')
    assert items_of(described(tmp_path / "items.csv", {"name": "text"}))["name"].to_list() == ['Two\nlines, "one" name']


def lossy(folder: Path, bad: int, line: str = "b,y,\n") -> tuple[str | Path, ...]:
    (folder / "l.csv").write_text("u,i,v\n" + "a,x,1\n" * (100 - bad) + line * bad)
    return "--source", "csv", "--input", folder / "l.csv", "--columns", f"{COLUMNS},value=v", "--output", folder / "o"


@pytest.mark.parametrize(
    ("bad", "line", "options", "told"),
    [
        (20, "b,y,\n", (), ""),
        (21, "b,y,\n", (), "21 of 100 rows (21.0%) were dropped, most (21): value missing or not a finite number"),
        (60, "b,y,1,2\n", (), "malformed: not 3 columns (e.g. l.csv: row 41); check --separator and --encoding"),
        (
            50,
            "b,y,-4\n",
            ("--min-value", "0"),
            "value below 0.0 (e.g. l.csv: row 51); that is what --min-value asks for",
        ),
        (95, "b,y,-4\n", ("--min-value", "0"), "95 of 100 rows"),
        (95, "b,y,\n", ("--max-dropped", "1"), "leave value out of --columns, or check --decimal"),
        (0, "", ("--dedup", "last"), "99 of 100 rows (99.0%) were dropped, most (99): duplicate (last)"),
    ],
)
def test_many_dropped_rows_are_told_loudly(  # type: ignore[no-untyped-def]
    tmp_path: Path, capsys, bad: int, line: str, options: tuple[str, ...], told: str
) -> None:
    assert flm(*lossy(tmp_path, bad, line), *options) == 0
    error = capsys.readouterr().err
    assert error.startswith("warning: ") == bool(told) and told in error and error.count("\n") == bool(told)
    warnings = json.loads((tmp_path / "o" / "report.json").read_text())["warnings"]
    assert [f"warning: {warning}" for warning in warnings] == error.splitlines()


@pytest.mark.parametrize(("bad", "options"), [(95, ()), (91, ()), (40, ("--max-dropped", "0.3"))])
def test_nearly_all_rows_dropped_is_no_success(  # type: ignore[no-untyped-def]
    tmp_path: Path, capsys, bad: int, options: tuple[str, ...]
) -> None:
    assert flm(*lossy(tmp_path, bad), *options) == 2
    out, error = capsys.readouterr()
    assert out == "" and error.count("\n") == 1 and f"{bad} of 100 rows" in error and "--max-dropped" in error
    assert "value missing or not a finite number (e.g. l.csv: row" in error and not (tmp_path / "o").exists()
