"""Users and items out of core: the same tables and the same bytes, however many rows are read at once."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import flm_torchrec as flm
from flm_torchrec.data.keys import keys
from flm_torchrec.prepare.blocks import blocks, rows_of, write_blocks
from flm_torchrec.prepare.engine import DuckEngine
from flm_torchrec.prepare.events_per_user import QUANTILES, EventsPerUser
from flm_torchrec.prepare.features import _moments
from flm_torchrec.prepare.key_order import order_sql
from tests.prepare.test_prepare_shards import contents

MANY = 10**6
KINDS = {"brand": "categorical", "tags": "multi_categorical", "name": "text", "price": "quantile"}
TEXTS = st.one_of(st.none(), st.text(st.sampled_from("aZé٣ 09-"), max_size=3))


@pytest.fixture(scope="module")
def engine() -> Iterator[duckdb.DuckDBPyConnection]:
    with duckdb.connect(config={"threads": "1"}) as connection:
        yield connection


@settings(max_examples=25)
@given(names=st.lists(st.text(min_size=1, max_size=25).map(str.strip).filter(bool), unique=True))
@example(
    names=["a1", "a", "a01", "a10", "a2", "x\n3", "7", "07", "99999999999999999999", "9" * 18, "u٣", "U2", "é2", "é10"]
)
def test_sql_orders_keys_by_text_and_number(engine: duckdb.DuckDBPyConnection, names: list[str]) -> None:
    table = pl.DataFrame({"key": names}, schema={"key": pl.String})
    engine.register("given", table.to_arrow())
    found = [key for (key,) in engine.sql(f"SELECT key FROM given ORDER BY {order_sql('key')}").fetchall()]
    assert found == in_order(names)


def in_order(names: Iterable[str]) -> list[str]:
    """By the text before the number at a key's end, then by the number."""

    def place(key: str) -> tuple[str, int, str]:
        found = re.fullmatch(r"([^\n]*?)([0-9]{1,18})", key)
        return (found[1], int(found[2]), key) if found else (key, -1, key)

    return sorted(names, key=place)


@st.composite
def logs(draw: st.DrawFn) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Events, and a table of items of which some have no event: keys of texts or numbers, some missing or repeated."""
    ids = draw(st.sampled_from([TEXTS, st.one_of(st.none(), st.integers(-3, 12))]))
    size = draw(st.integers(8, 30))
    column = st.lists(ids, min_size=size, max_size=size)
    events = pl.DataFrame({"user_id": draw(column), "item_id": draw(column), "timestamp": range(size)})
    described = pl.DataFrame({"item_id": draw(st.lists(ids, unique=True, max_size=12))})
    values: dict[str, Any] = {
        "brand": draw(st.lists(st.sampled_from(["b", "a", None]), min_size=12, max_size=12)),
        "tags": draw(st.lists(st.sampled_from([["t", "s"], [], None]), min_size=12, max_size=12)),
        "name": draw(st.lists(st.sampled_from(["Deep sea", "sea", "", None]), min_size=12, max_size=12)),
        "price": draw(st.lists(st.sampled_from([0.5, 1.0, 7.0, None]), min_size=12, max_size=12)),
    }
    types: dict[str, Any] = dict(zip(KINDS, (pl.String, pl.List(pl.String), pl.String, pl.Float64), strict=True))
    columns = [pl.Series(name, some[: len(described)], dtype=types[name]) for name, some in values.items()]
    described = described.with_columns(columns)
    known = keys(events["user_id"], "").is_not_null() & keys(events["item_id"], "").is_not_null()
    return events if known.any() else events.with_columns(user_id=pl.lit("u"), item_id=pl.lit("i")), described


def described_once(items: pl.DataFrame) -> pl.DataFrame:
    """Items whose key no other has."""
    texts = keys(items["item_id"], "")
    return items.filter(texts.is_not_null() & ~texts.is_duplicated())


def prepared(folder: Path, events: pl.DataFrame, items: pl.DataFrame, bucket: int, block: int) -> dict[str, bytes]:
    """Prepare with so many rows a bucket, and with so many read at once; the files but those of interactions."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("flm_torchrec.prepare.interactions.ROWS_PER_BUCKET", bucket)
        patch.setattr("flm_torchrec.prepare.blocks.BLOCK", block)
        given: dict[str, Any] = {"items": items, "item_features": KINDS} if len(items) else {}
        flm.prepare(events, folder / "data", max_dropped=1.0, quantiles=2, keep_unseen_items=True, **given)
    return {name: body for name, body in contents(folder / "data").items() if not name.startswith("interactions")}


@settings(max_examples=7, suppress_health_check=list(HealthCheck))
@given(logs(), st.integers(1, 9), st.integers(1, 5))
def test_any_number_of_rows_at_once_gives_the_tables_of_memory(
    tmp_path_factory: pytest.TempPathFactory, data: tuple[pl.DataFrame, pl.DataFrame], bucket: int, block: int
) -> None:
    folder = tmp_path_factory.mktemp("made")
    events, items = data[0], described_once(data[1])
    made = prepared(folder / "parts", events, items, bucket, block)
    assert made == prepared(folder / "whole", events, items, MANY, MANY) and len(made) >= 4
    good = events.with_columns(keys(events[name], "") for name in ("user_id", "item_id")).drop_nulls()
    of_items = pl.concat([good["item_id"], keys(items["item_id"], "")]) if len(items) else good["item_id"]
    shown = {}
    for name, seen in (("user", good["user_id"]), ("item", of_items)):
        expected = in_order(seen.unique().to_list())
        table = pl.read_parquet(folder / f"parts/data/{name}s.parquet")
        assert table[f"{name}_key"].to_list() == expected
        assert table[f"{name}_id"].to_list() == list(range(len(expected)))
        shown[name] = pl.Series(expected)
    rows = pl.read_parquet(sorted((folder / "parts/data/interactions").iterdir()))
    found = zip(
        shown["user"].gather(rows["user_id"]), shown["item"].gather(rows["item_id"]), rows["timestamp"], strict=True
    )
    assert sorted(found) == sorted(good.rows())


@settings(max_examples=50)
@given(st.lists(st.lists(st.integers(1, 30), max_size=9), min_size=1).filter(any), st.floats(0, 1))
def test_quantiles_of_counts_are_those_of_the_users(parts: list[list[int]], share: float) -> None:
    counts, users = EventsPerUser(), pl.Series([events for part in parts for events in part])
    for part in parts:
        counts.add(np.array(part, np.int64))
    assert counts.events == users.sum() and counts.fewer_than(3) == (users < 3).sum()
    found = counts.quantiles([*QUANTILES, share])
    assert found == {f"{q:.0%}": users.quantile(q, "nearest") for q in (*QUANTILES, share)}


@settings(max_examples=50)
@given(st.lists(st.lists(st.floats(-1e6, 1e6), max_size=6), min_size=1, max_size=6))
def test_mean_and_deviation_do_not_depend_on_the_parts(parts: list[list[float]]) -> None:
    numbers = np.array([number for part in parts for number in part])
    mean, deviation = _moments(pl.Series(part, dtype=pl.Float64) for part in parts)
    assert mean == pytest.approx(numbers.mean() if len(numbers) else 0, abs=1e-9, rel=1e-9)
    spread = numbers.std(ddof=1) if len(numbers) > 1 else 0
    assert deviation == pytest.approx(spread or 1, rel=1e-6, abs=1e-6) or spread < 1e-6


@pytest.mark.parametrize("number", [0.0, 0.1, -19.99, 1e7 / 3, 1e15 / 3])
@pytest.mark.parametrize("parts", [[100], [1000, 33, 777]])
def test_numbers_that_are_all_alike_are_not_standardised_by_rounding(number: float, parts: list[int]) -> None:
    assert _moments([pl.Series([number] * count) for count in parts])[1] == 1.0
    last = pl.Series([number] * 9 + [number + max(1e-6, 1e-6 * abs(number))])
    assert _moments([pl.Series([number] * count) for count in parts] + [last])[1] != 1.0


@settings(max_examples=30)
@given(st.lists(st.integers(1, 9), max_size=6), st.integers(1, 7), st.integers(1, 7))
def test_blocks_are_full_however_rows_were_written(
    tmp_path_factory: pytest.TempPathFactory, files: list[int], block: int, group: int
) -> None:
    folder, ends = tmp_path_factory.mktemp("blocks"), np.cumsum([0, *files])
    numbers = pl.Series("n", range(int(ends[-1])))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("flm_torchrec.prepare.blocks.BLOCK", block)
        patch.setattr("flm_torchrec.prepare.blocks.ROWS_PER_GROUP", group)
        paths = []
        for number, (first, end) in enumerate(itertools.pairwise(ends.tolist())):
            paths.append(folder / f"{number}.parquet")
            rows = numbers[first:end].to_frame()
            assert write_blocks([rows[:2], rows[2:]], paths[-1]) == len(rows)
            groups = pq.read_metadata(paths[-1])
            sizes = [groups.row_group(n).num_rows for n in range(groups.num_row_groups)]
            assert sizes[:-1] == [group] * (len(sizes) - 1) and sum(sizes) == len(rows)
        found = list(blocks(paths, ["n"]))
    assert rows_of(paths) == len(numbers)
    assert [len(part) for part in found[:-1]] == [block] * (len(found) - 1)
    assert [n for part in found for n in part["n"]] == numbers.to_list()


def test_engines_hand_over_counts_not_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    handed: list[int] = []
    query, frame = DuckEngine.query, DuckEngine.frame
    monkeypatch.setattr(DuckEngine, "query", lambda self, select: _noted(query(self, select), handed))
    monkeypatch.setattr(DuckEngine, "frame", lambda self, name, rows: frame(self, name, _noted(rows, handed)))
    users = pl.DataFrame({"user_id": range(300), "age": [float(n) for n in range(300)], "city": ["a", "b"] * 150})
    events = pl.DataFrame({"user_id": [n % 300 for n in range(900)], "item_id": [n % 200 for n in range(900)]})
    (tmp_path / "secret").write_bytes(b"s" * 32)
    made = flm.prepare(
        events.with_columns(timestamp=pl.int_range(pl.len())),
        tmp_path / "data",
        users=users,
        user_features={"age": "quantile", "city": "categorical"},
        dedup="exact",
        k_core=2,
        hash_users=str(tmp_path / "secret"),
    )
    assert (made.report["users"], made.report["items"], max(handed) <= 5) == (300, 200, True)


def _noted(rows: pl.DataFrame, sizes: list[int]) -> pl.DataFrame:
    sizes.append(len(rows))
    return rows


@pytest.mark.parametrize(("duplicates", "prices"), [("first", [1.0, 7.0, 0.5]), ("last", [2.5, 7.0, 0.5])])
def test_files_of_several_types_are_one_table_in_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, duplicates: str, prices: list[float]
) -> None:
    (tmp_path / "items").mkdir()
    pl.DataFrame({"item_id": [1, 2, None], "price": [1, 7, 9]}).write_parquet(tmp_path / "items/a.parquet")
    pl.DataFrame({"item_id": [3.0, 1.0], "price": [0.5, 2.5]}).write_parquet(tmp_path / "items/b.parquet")
    events = pl.DataFrame({"user_id": ["u"] * 3, "item_id": [1, 2, 3], "timestamp": [1, 2, 3]})
    made = []
    for block in (1, MANY):
        monkeypatch.setattr("flm_torchrec.prepare.blocks.BLOCK", block)
        folder = tmp_path / f"{block}"
        given = {"item_features": {"price": "numeric"}, "duplicates": duplicates}
        warnings = flm.prepare(events, folder, items=tmp_path / "items", **given).report["warnings"]  # type: ignore[arg-type]
        assert "1 rows have no id" in warnings[0] and f"1 keys have several rows; the {duplicates}" in warnings[1]
        made.append(pl.read_parquet(folder / "items.parquet")["price"])
    expected = (np.array(prices) - np.mean(prices)) / np.std(prices, ddof=1)
    assert [found.to_list() for found in made] == [pytest.approx(expected.tolist(), rel=1e-5)] * 2


@pytest.mark.parametrize(
    ("cells", "told"), [(["a;b", "c", "d|e"], False), (["a;b", "c", "d"], True), (["", "x|y"], False)]
)
def test_a_separator_is_missed_in_the_whole_column_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cells: list[str], told: bool
) -> None:
    monkeypatch.setattr("flm_torchrec.prepare.blocks.BLOCK", 1)
    rows = "".join(f"i{n},{cell}\n" for n, cell in enumerate(cells))
    (tmp_path / "items.csv").write_text(f"item_id,tags\n{rows}")
    events = pl.DataFrame({"user_id": ["u"], "item_id": ["i0"], "timestamp": [1]})
    described = {"items": tmp_path / "items.csv", "item_features": {"tags": "multi_categorical"}}
    warnings = flm.prepare(events, tmp_path / "data", **described).report["warnings"]  # type: ignore[arg-type]
    assert [line for line in warnings if "never occurs in column 'tags'" in line] == warnings and bool(warnings) == told
