"""Users and items out of core: the same tables and the same bytes, however many rows are read at once."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
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
from flm_torchrec.prepare.events_per_user import QUANTILES, EventsPerUser
from flm_torchrec.prepare.features import _moments
from flm_torchrec.prepare.key_order import order_sql, ordered
from tests.prepare.test_prepare_shards import contents

MANY = 10**6
KINDS = {"brand": "categorical", "tags": "multi_categorical", "name": "text", "price": "quantile"}
TEXTS = st.one_of(st.none(), st.text(st.sampled_from("aZé٣ 09-"), max_size=3))


@pytest.fixture(scope="module")
def engine() -> Iterator[duckdb.DuckDBPyConnection]:
    with duckdb.connect(config={"threads": "1"}) as connection:
        yield connection


@settings(max_examples=25, deadline=None)
@given(names=st.lists(st.text(min_size=1, max_size=25).map(str.strip).filter(bool), unique=True))
@example(
    names=["a1", "a", "a01", "a10", "a2", "x\n3", "7", "07", "99999999999999999999", "9" * 18, "u٣", "U2", "é2", "é10"]
)
def test_sql_orders_keys_as_memory_does(engine: duckdb.DuckDBPyConnection, names: list[str]) -> None:
    table = pl.DataFrame({"key": names}, schema={"key": pl.String})
    engine.register("given", table.to_arrow())
    found = [key for (key,) in engine.sql(f"SELECT key FROM given ORDER BY {order_sql('key')}").fetchall()]
    assert found == ordered(table, "key")["key"].to_list()


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


@settings(max_examples=7, deadline=None, suppress_health_check=list(HealthCheck))
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
        expected = ordered(pl.DataFrame({"key": seen.unique()}), "key")["key"]
        table = pl.read_parquet(folder / f"parts/data/{name}s.parquet")
        assert table[f"{name}_key"].to_list() == expected.to_list()
        assert table[f"{name}_id"].to_list() == list(range(len(expected)))
        shown[name] = expected
    rows = pl.read_parquet(sorted((folder / "parts/data/interactions").iterdir()))
    found = zip(
        shown["user"].gather(rows["user_id"]), shown["item"].gather(rows["item_id"]), rows["timestamp"], strict=True
    )
    assert sorted(found) == sorted(good.rows())


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.integers(1, 30), max_size=9), min_size=1).filter(any), st.floats(0, 1))
def test_quantiles_of_counts_are_those_of_the_users(parts: list[list[int]], share: float) -> None:
    counts, users = EventsPerUser(), pl.Series([events for part in parts for events in part])
    for part in parts:
        counts.add(np.array(part, np.int64))
    assert counts.events == users.sum() and counts.fewer_than(3) == (users < 3).sum()
    found = counts.quantiles([*QUANTILES, share])
    assert found == {f"{q:.0%}": users.quantile(q, "nearest") for q in (*QUANTILES, share)}


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.floats(-1e6, 1e6), max_size=6), min_size=1, max_size=6))
def test_mean_and_deviation_do_not_depend_on_the_parts(parts: list[list[float]]) -> None:
    numbers = np.array([number for part in parts for number in part])
    mean, deviation = _moments(pl.Series(part, dtype=pl.Float64) for part in parts)
    assert mean == pytest.approx(numbers.mean() if len(numbers) else 0, abs=1e-9, rel=1e-9)
    spread = numbers.std(ddof=1) if len(numbers) > 1 else 0
    assert deviation == pytest.approx(spread or 1, rel=1e-6, abs=1e-6) or spread < 1e-6


@settings(max_examples=30, deadline=None)
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
