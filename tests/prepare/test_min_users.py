"""--min-users: what fewer than so many people have is not in the prepared data."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flm_torchrec.data.dataset import load_prepared
from flm_torchrec.prepare.options import PrepareOptions
from flm_torchrec.prepare.prepare import prepare
from flm_torchrec.prepare.sources.source_data import DeclaredFeature, SourceData


def source(pairs: list[tuple[str, str]], users: dict[str, list[Any]] | None = None, **kinds: str) -> SourceData:
    frame = pl.DataFrame(
        {
            "user": [user for user, _ in pairs],
            "item": [item for _, item in pairs],
            "timestamp": list(range(len(pairs))),
            "event": ["view"] * len(pairs),
            "value": [1.0] * len(pairs),
            "file": ["f"] * len(pairs),
            "row": list(range(len(pairs))),
        }
    )
    features = tuple(DeclaredFeature(name, "user", kind) for name, kind in kinds.items())  # type: ignore[arg-type]
    described = None if users is None else pl.DataFrame(users)
    return SourceData("test", "test", frame, None, described, features)


def items_by_people(folder: Path) -> dict[str, set[int]]:
    keys = pq.read_table(folder / "items.parquet")["item_key"].to_pylist()
    found: dict[str, set[int]] = {key: set() for key in keys}
    for row in pq.read_table(folder / "interactions").to_pylist():
        found[keys[row["item_id"]]].add(row["user_id"])
    return found


def test_items_of_few_people_are_dropped_however_often_these_had_them(tmp_path: Path) -> None:
    pairs = [("a", "often"), ("a", "often"), ("a", "often"), ("b", "often"), *((u, "all") for u in "abc")]
    report = prepare(source(pairs), tmp_path / "data", PrepareOptions(min_users=3))
    assert {key: len(people) for key, people in items_by_people(tmp_path / "data").items()} == {"all": 3}
    rows = {reason: dropped["rows"] for reason, dropped in report["dropped"].items()}
    assert list(rows.values()) == [4] and next(iter(rows)).endswith("and of 3 users an item")
    assert "often" not in "".join(p.read_bytes().decode("latin1") for p in (tmp_path / "data").glob("*.parquet"))


def test_items_of_few_people_do_not_come_back_as_items_without_events(tmp_path: Path) -> None:
    pairs = [("a", "rare"), ("b", "rare"), *((u, "all") for u in "abc")]
    made = replace(source(pairs), items=pl.DataFrame({"key": ["all", "rare", "new"]}))
    for people, left in ((3, ["all", "new"]), (1, ["all", "new", "rare"])):
        folder = tmp_path / str(people)
        prepare(made, folder, PrepareOptions(min_users=people, keep_unseen_items=True))
        assert sorted(items_by_people(folder)) == left


@settings(max_examples=25, suppress_health_check=list(HealthCheck))
@given(
    pairs=st.lists(st.tuples(st.sampled_from("abcdef"), st.sampled_from("uvwxyz")), min_size=1, max_size=40),
    people=st.integers(1, 4),
    events=st.integers(1, 3),
)
def test_every_item_that_is_left_has_enough_people(
    pairs: list[tuple[str, str]], people: int, events: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("p") / "data"
    options = PrepareOptions(min_users=people, min_user_events=events)
    try:
        prepare(source(pairs), folder, options)
    except Exception as error:
        assert "rows is left" in str(error)
        return
    found = items_by_people(folder)
    assert found and all(len(users) >= people for users in found.values())


KEYS = ["a", "b", "c", "d"]


def features(tmp_path: Path, column: list[Any], kind: str, people: int) -> tuple[list[Any], str]:
    """The column of a user feature as prepared, and all that the folder says in text."""
    users = {"key": KEYS, "trait": column}
    pairs = [(user, item) for user in KEYS for item in "xy"]
    prepare(source(pairs, users, trait=kind), tmp_path / "data", PrepareOptions(min_users=people, quantiles=4))
    feature = load_prepared(tmp_path / "data").schema.features[0]
    values = pq.read_table(tmp_path / "data" / "users.parquet")[feature.column].to_pylist()
    files = [f for f in (tmp_path / "data").rglob("*") if f.is_file()]
    words = "".join(str(pq.read_table(f).to_pylist()) for f in files if f.suffix == ".parquet")
    return values, words


@pytest.mark.parametrize(
    ("kind", "column", "people", "known", "rare"),
    [
        ("categorical", ["red", "red", "rareone", "red"], 2, [True, True, False, True], "rareone"),
        ("multi_categorical", [["s", "t"], ["t", "rareone", "rareone"], ["t"], []], 2, [1, 1, 1, 0], "rareone"),
        ("text", ["likes cats", "likes rareone", "likes", ""], 2, [1, 1, 1, 0], "rareone"),
    ],
)
def test_values_of_few_people_are_unknown(
    tmp_path: Path, kind: str, column: list[Any], people: int, known: list[Any], rare: str
) -> None:
    values, words = features(tmp_path, column, kind, people)
    shown = [len(v) for v in values] if isinstance(values[0], list) else [v is not None for v in values]
    assert shown == known and rare not in words
    kept, words = features(tmp_path / "all", column, kind, 1)
    assert rare in words and kept != values


@pytest.mark.parametrize(
    ("numbers", "people", "buckets"),
    [([1.0, 2.0, 2.0, 2.0], 2, 1), ([1.0, 2.0, 3.0, 4.0], 2, 2), ([1.0, 2.0, 3.0, 4.0], 1, 4), ([1.0] * 4, 3, 1)],
)
def test_buckets_of_numbers_have_enough_people(tmp_path: Path, numbers: list[float], people: int, buckets: int) -> None:
    codes, _ = features(tmp_path, numbers, "quantile", people)
    counts = [codes.count(code) for code in set(codes)]
    assert len(counts) == buckets and min(counts) >= people


def test_numbers_of_too_few_people_are_unknown(tmp_path: Path) -> None:
    codes, _ = features(tmp_path, [1.0, None, None, None], "quantile", 2)
    assert codes == [None] * 4
