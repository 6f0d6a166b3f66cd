"""Cleaning, coding and writing of prepared data."""

from __future__ import annotations

import itertools
import json
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flm_torchrec.data.dataset import load_prepared
from flm_torchrec.errors import DataError
from flm_torchrec.prepare.features import learn
from flm_torchrec.prepare.options import PrepareOptions
from flm_torchrec.prepare.prepare import check_output, prepare
from flm_torchrec.prepare.sources.source_data import DeclaredFeature, SourceData

EVENTS = st.lists(
    st.tuples(st.sampled_from("abcd"), st.sampled_from("xyzw"), st.integers(0, 5)), min_size=1, max_size=40
)

CODING = PrepareOptions(min_count=1, text_buckets=10)


def frame(events: list[tuple[str, str, int]]) -> pl.DataFrame:
    users, items, times = zip(*events, strict=True)
    return pl.DataFrame(
        {
            "file": "f", "row": range(1, len(events) + 1), "user": users, "item": items, "timestamp": times,
            "event": "view", "value": 1.0,
        }
    )  # fmt: skip


Event = tuple[str, str, int]


def kept(tmp: pytest.TempPathFactory, events: list[Event], options: PrepareOptions) -> list[Event]:
    """What preparation leaves of the events."""
    folder = tmp.mktemp("kept") / "data"
    try:
        report = prepare(SourceData("r", "test", frame(events)), folder, options)
    except DataError as error:
        assert "is left" in str(error)
        return []
    data = load_prepared(folder)
    found = [
        (data.user_keys[u], data.item_keys[i], t)
        for u, i, t in zip(data.event_users(), data.item, data.timestamp.tolist(), strict=True)
    ]
    assert len(found) == report["rows_kept"]
    assert len(found) + sum(d["rows"] for d in report["dropped"].values()) == len(events)
    return found


@settings(max_examples=15)
@given(EVENTS, st.integers(0, 4), st.integers(0, 3))
def test_a_core_has_enough_of_each_and_nothing_it_could_leave(tmp_path_factory, events, users, items) -> None:  # type: ignore[no-untyped-def]
    found = kept(tmp_path_factory, events, PrepareOptions(min_user_events=users, min_item_events=items))
    # The core is the largest such set: peeling one row at a time ends at the same rows.
    rows = list(events)
    rare = [True]
    while rare:
        of = [Counter(row[side] for row in rows) for side in (0, 1)]
        rare = [r for r in rows if of[0][r[0]] < users or of[1][r[1]] < items]
        rows = rows if not rare else [r for r in rows if r is not rare[0]]
    assert sorted(found) == sorted(rows)


@settings(max_examples=10)
@given(EVENTS)
def test_deduplication_keeps_one_of_each(tmp_path_factory, events) -> None:  # type: ignore[no-untyped-def]
    assert sorted(kept(tmp_path_factory, events, PrepareOptions(dedup="exact"))) == sorted(set(events))
    for how, pick in (("first", min), ("last", max)):
        expected = {(u, i): pick(t for v, j, t in events if (u, i) == (v, j)) for u, i, _ in events}
        assert {(u, i): t for u, i, t in kept(tmp_path_factory, events, PrepareOptions(dedup=how))} == expected  # type: ignore[arg-type]
    consecutive = kept(tmp_path_factory, events, PrepareOptions(dedup="consecutive"))
    assert all(a[:2] != b[:2] for a, b in itertools.pairwise(consecutive))
    assert {(u, i) for u, i, _ in consecutive} == {(u, i) for u, i, _ in events}


@settings(max_examples=15)
@given(EVENTS, st.integers(1, 3))
def test_a_repeat_within_the_window_is_dropped(tmp_path_factory, events, window) -> None:  # type: ignore[no-untyped-def]
    found = kept(tmp_path_factory, events, PrepareOptions(dedup="window", dedup_window=window))
    expected = []
    for user, item in sorted({(u, i) for u, i, _ in events}):
        times = sorted(t for u, i, t in events if (u, i) == (user, item))
        expected += [(user, item, t) for before, t in zip([-9, *times], times, strict=False) if t - before > window]
    assert sorted(found) == sorted(expected)


def test_a_longer_pause_starts_a_session(tmp_path: Path) -> None:
    events = [("a", "x", 0), ("a", "y", 10), ("a", "y", 21), ("b", "x", 5), ("a", "z", 40), ("a", "z", 30)]
    report = prepare(SourceData("r", "test", frame(events)), tmp_path / "d", PrepareOptions(session_gap=10))
    sessions = pl.read_parquet(tmp_path / "d" / "interactions")["session"].to_list()
    assert sessions == [0, 0, 1, 1, 1, 0] and report["sessions"] == 3


@pytest.mark.parametrize(("last", "told"), [(20240229, True), (20241301, False), (1709164800, False)])
def test_days_that_were_taken_as_seconds_are_told(tmp_path: Path, last: int, told: bool) -> None:
    events = [("a", "x", 20231231), ("b", "x", 20240101), ("a", "y", last)]
    report = prepare(SourceData("r", "test", frame(events)), tmp_path / "d", PrepareOptions())
    assert any("days written as numbers such as 20240331" in line for line in report["warnings"]) == told


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (PrepareOptions(session_gap=10), "--session-gap"),
        (PrepareOptions(dedup="window", dedup_window=5), "--dedup win"),
    ],
)
def test_options_of_seconds_need_timestamps(tmp_path: Path, options: PrepareOptions, named: str) -> None:
    ordered = SourceData("r", "test", frame([("a", "x", 0), ("a", "y", 1)]), timestamps=False)
    with pytest.raises(DataError, match=f"r: has no timestamps, which {named}"):
        prepare(ordered, tmp_path / "d", options)
    assert not list(tmp_path.iterdir())


@settings(max_examples=15)
@given(EVENTS)
def test_nothing_is_lost_on_the_way_to_memory(tmp_path_factory: pytest.TempPathFactory, events) -> None:  # type: ignore[no-untyped-def]
    folder = tmp_path_factory.mktemp("round") / "data"
    prepare(SourceData("r", "test", frame(events)), folder, PrepareOptions())
    data = load_prepared(folder)
    users = [data.user_keys[u] for u in range(data.schema.users) for _ in range(data.offsets[u], data.offsets[u + 1])]
    found = list(zip(users, [data.item_keys[i] for i in data.item], data.timestamp.tolist(), strict=True))
    assert sorted(found) == sorted(events)
    assert [(u, t) for u, _, t in found] == sorted((u, t) for u, _, t in found)


def test_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    events = [("b", "y", 3), ("a", "x", 1), ("b", "x", 2), ("a", "y", 0)]
    for name in ("one", "two"):
        prepare(SourceData("r", "test", frame(events)), tmp_path / name, PrepareOptions())
    files = sorted(p.relative_to(tmp_path / "one") for p in (tmp_path / "one").rglob("*") if p.is_file())
    assert len(files) >= 5
    assert all((tmp_path / "one" / f).read_bytes() == (tmp_path / "two" / f).read_bytes() for f in files)


def test_bad_rows_are_counted_with_their_place(tmp_path: Path) -> None:
    good = [("a", "x", 1), ("a", "y", 2)]
    rows = frame([*good, ("a", "z", -1), ("b", "x", 3), ("b", "x", 4)]).with_columns(
        value=pl.Series([1.0, 2.0, 3.0, float("nan"), None]), item=pl.Series(["x", "y", "z", "x", None])
    )
    report = prepare(SourceData("r", "test", rows), tmp_path / "d", PrepareOptions())
    assert report["rows_kept"] == 2
    assert {reason: d["rows"] for reason, d in report["dropped"].items()} == {
        "no item": 1, "negative timestamp": 1, "value missing or not a finite number": 1,
    }  # fmt: skip
    assert report["dropped"]["negative timestamp"]["examples"] == ["f: row 3"]
    assert report["users_with_fewer_than_3_events"] == 1
    assert json.loads((tmp_path / "d" / "report.json").read_text())["rows_read"] == 5


def test_when_nothing_is_left_the_error_says_why_and_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none of 1 rows is left.*negative timestamp.*f: row 1"):
        prepare(SourceData("r", "test", frame([("a", "x", -1)])), tmp_path / "d", PrepareOptions())
    assert list(tmp_path.iterdir()) == []


def test_output_in_use_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(DataError, match="holds no prepared data"):
        check_output(tmp_path, overwrite=True)
    prepare(SourceData("r", "test", frame([("a", "x", 1)])), tmp_path / "d", PrepareOptions())
    with pytest.raises(DataError, match="--overwrite"):
        check_output(tmp_path / "d", overwrite=False)
    check_output(tmp_path / "d", overwrite=True)


def test_prepare_itself_replaces_older_data_only_when_asked(tmp_path: Path) -> None:
    for events, overwrite in (([("a", "x", 1)], False), ([("a", "x", 1), ("a", "y", 2)], True)):
        prepare(SourceData("r", "test", frame(events)), tmp_path / "d", PrepareOptions(), overwrite)
    assert load_prepared(tmp_path / "d").schema.interactions == 2
    with pytest.raises(DataError, match="--overwrite"):
        prepare(SourceData("r", "test", frame([("a", "x", 1)])), tmp_path / "d", PrepareOptions())
    assert load_prepared(tmp_path / "d").schema.interactions == 2
    assert [p.name for p in tmp_path.iterdir()] == ["d"]


def test_an_interrupted_write_leaves_the_older_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(SourceData("r", "test", frame([("a", "x", 1)])), tmp_path / "d", PrepareOptions())
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("flm_torchrec.data.schema.Schema.save", full)
    with pytest.raises(DataError, match="d: cannot be written \\(No space left on device\\)"):
        prepare(SourceData("r", "test", frame([("a", "y", 1)])), tmp_path / "d", PrepareOptions(), overwrite=True)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize(("folder", "file"), [(0o700, 0o600), (0o750, 0o640)])
def test_prepared_anew_keeps_modes_links_and_neighbours(tmp_path: Path, folder: int, file: int) -> None:
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "d")
    prepare(SourceData("r", "test", frame([("a", "x", 1)])), link, PrepareOptions())
    for path in [*(tmp_path / "d").rglob("*"), tmp_path / "d"]:
        path.chmod(folder if path.is_dir() else file)
    for name in (".d.old", "d.old", ".d.work-mine", ".link.old"):
        (tmp_path / name).mkdir()
    prepare(SourceData("r", "test", frame([("a", "x", 1), ("a", "y", 2)])), link, PrepareOptions(), overwrite=True)
    assert link.is_symlink() and load_prepared(link).schema.interactions == 2
    after = {stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "d").rglob("*") if p.is_file()}
    assert after == {file} and stat.S_IMODE((tmp_path / "d").stat().st_mode) == folder
    assert {p.name for p in tmp_path.iterdir()} == {"d", "link", ".d.old", "d.old", ".d.work-mine", ".link.old"}


@settings(max_examples=15)
@given(EVENTS, st.integers(1, 6))
def test_a_user_is_never_split_between_files(tmp_path_factory, events, rows) -> None:  # type: ignore[no-untyped-def]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("flm_torchrec.prepare.interactions.ROWS_PER_BUCKET", rows)
        folder = tmp_path_factory.mktemp("parts") / "data"
        prepare(SourceData("r", "test", frame(events)), folder, PrepareOptions())
    parts = [pl.read_parquet(p)["user_id"].to_list() for p in sorted((folder / "interactions").iterdir())]
    rows_of = list(itertools.chain(*parts))
    assert rows_of == sorted(rows_of) and len(rows_of) == len(events)
    assert all(parts) and all(one[-1] < two[0] for one, two in itertools.pairwise(parts))


def test_ids_follow_the_numbers_in_the_keys(tmp_path: Path) -> None:
    keys = ["u10", "u2", "10", "2", "02", "b", "B7x"]
    prepare(SourceData("r", "test", frame([(k, k, 0) for k in keys])), tmp_path / "d", PrepareOptions())
    data = load_prepared(tmp_path / "d")
    assert data.user_keys == data.item_keys == ["02", "2", "10", "B7x", "b", "u2", "u10"]


def test_a_value_too_large_for_float32_is_dropped(tmp_path: Path) -> None:
    rows = frame([("a", "x", 1), ("a", "y", 2)]).with_columns(value=pl.Series([1e300, 3e38]))
    report = prepare(SourceData("r", "test", rows), tmp_path / "d", PrepareOptions())
    assert report["rows_kept"] == 1 and np.isfinite(load_prepared(tmp_path / "d").value).all()


def test_values_below_the_least_are_dropped(tmp_path: Path) -> None:
    rows = frame([("a", "x", 1), ("a", "y", 2)]).with_columns(value=pl.Series([3.0, 2.9]))
    report = prepare(SourceData("r", "test", rows), tmp_path / "d", PrepareOptions(min_value=3.0))
    assert report["dropped"] == {"value below 3.0": {"rows": 1, "examples": ["f: row 2"]}}


def test_the_report_names_five_rows_a_reason_and_counts_them_all(tmp_path: Path) -> None:
    # Two rounds of the k-core: the counts add up, the examples stay five.
    events = [("a", "x", 0), ("a", "y", 1), ("b", "x", 0), ("b", "y", 1), *[(f"c{n}", "z", 0) for n in range(9)]]
    events += [("d", "z", 0), ("d", "w", 1), ("e", "w", 0)]
    report = prepare(SourceData("r", "test", frame(events)), tmp_path / "d", PrepareOptions(k_core=2))
    outside = report["dropped"]["outside the 2-core"]
    assert report["rows_kept"] == 4 and outside["rows"] == 12 and len(outside["examples"]) == 5


def test_the_report_describes_the_data(tmp_path: Path) -> None:
    events = [("a", i, n) for n, i in enumerate("wxyz")] + [("b", "w", 0), ("b", "w", 0)]
    described = pl.DataFrame({"key": ["w", "x", "y"], "tags": [["t"], [], None], "name": ["", "", "named"]})
    raw = SourceData(
        "r", "test", frame(events), described,
        features=(DeclaredFeature("tags", "item", "multi_categorical"), DeclaredFeature("name", "item", "text")),
    )  # fmt: skip
    report = prepare(raw, tmp_path / "d", PrepareOptions(dedup="exact"))
    assert (report["rows_read"], report["rows_kept"], report["duplicates"]) == (6, 5, 1)
    assert (report["users"], report["items"], report["items_without_features"]) == (2, 4, 2)
    assert report["users_with_fewer_than_3_events"] == 1 and report["events_per_user"]["100%"] == 4
    assert report["sparsity"] == 1 - 5 / 8 and report["options"]["dedup"] == "exact"


@pytest.mark.parametrize("rows", [20, 60_000])
def test_sparsity_is_of_pairs_that_never_meet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    monkeypatch.setattr("flm_torchrec.prepare.interactions.ROWS_PER_BUCKET", 7)
    events = [(f"u{n % 2}", "xy"[n % 2 and n % 4 // 2], n) for n in range(rows)]
    assert prepare(SourceData("r", "test", frame(events)), tmp_path / "d", PrepareOptions())["sparsity"] == 1 - 3 / 4


def test_features_of_which_nothing_is_known_still_load(tmp_path: Path) -> None:
    kinds = {"c": "categorical", "m": "multi_categorical", "t": "text", "n": "numeric"}
    described = pl.DataFrame({"key": ["other"], "c": ["a"], "m": [["a"]], "t": ["a"], "n": [1.0]})
    raw = SourceData("r", "test", frame([("a", "x", 1)]), described, features=tuple(
        DeclaredFeature(name, "item", kind) for name, kind in kinds.items()  # type: ignore[arg-type]
    ))  # fmt: skip
    prepare(raw, tmp_path / "d", PrepareOptions())
    items = load_prepared(tmp_path / "d").items
    assert [len(codes.values) for codes in items.sparse.values()] == [0, 0, 0] and items.dense.tolist() == [[0.0]]


@dataclass(frozen=True)
class Held:
    """A column in memory, in parts of two rows."""

    values: pl.Series

    @property
    def dtype(self) -> pl.DataType:
        return self.values.dtype

    def __iter__(self) -> Iterator[pl.Series]:
        return (self.values[n : n + 2] for n in range(0, len(self.values), 2))

    def ascending(self, numbers: Callable[[pl.Series], pl.Series]) -> Iterable[np.ndarray]:
        return [numbers(self.values).sort().to_numpy()]


def encode(declared: DeclaredFeature, values: pl.Series, options: PrepareOptions) -> SimpleNamespace:
    """The feature and its columns, learnt part by part."""
    learnt = learn(declared, Held(values), options)
    parts = [learnt.encode(part) for part in Held(values)]
    return SimpleNamespace(feature=learnt.feature, columns=[pl.concat(parts) for parts in zip(*parts, strict=True)])


@pytest.mark.parametrize(
    ("kind", "values", "codes"),
    [
        ("categorical", ["b", "a", None, "b"], [1, 0, None, 1]),
        ("multi_categorical", [["b", "a"], [], None, ["b"]], [[1, 0], [], [], [1]]),
        ("numeric", [1.0, 3.0, None, 2.0], [-1.0, 1.0, None, 0.0]),
        ("dense", [[1.0, 2.0], [3.0, 4.0], None, [5.0, 6.0]], [[1.0, 2.0], [3.0, 4.0], None, [5.0, 6.0]]),
    ],
)
def test_each_kind_is_coded_as_documented(kind, values, codes) -> None:  # type: ignore[no-untyped-def]
    coded = encode(DeclaredFeature("f", "item", kind), pl.Series("f", values), CODING)
    assert coded.columns[-1].to_list() == codes


def test_words_are_hashed_alike_everywhere() -> None:
    coded = encode(
        DeclaredFeature("t", "item", "text"),
        pl.Series("t", ["Deep sea", "SEA!", ""]),
        PrepareOptions(min_count=1, text_buckets=1000),
    )
    tokens = coded.columns[-1].to_list()
    assert tokens[0][1] == tokens[1][0] == 223  # crc32("sea") % 1000
    assert tokens[2] == [] and coded.feature.cardinality == 1000


def test_rare_values_become_unknown() -> None:
    coded = encode(
        DeclaredFeature("f", "item", "categorical"),
        pl.Series("f", ["a", "a", "b"]),
        PrepareOptions(min_count=2, text_buckets=10),
    )
    assert coded.columns[-1].to_list() == [0, 0, None] and coded.feature.cardinality == 1


def test_vectors_of_differing_width_are_refused() -> None:
    with pytest.raises(DataError, match="vectors of widths 1, 2"):
        encode(
            DeclaredFeature("f", "item", "dense"),
            pl.Series("f", [[1.0], [1.0, 2.0]]),
            CODING,
        )


def test_numbers_and_vectors_that_are_not_finite_become_unknown() -> None:
    numbers = pl.Series("f", [1.0, float("nan"), 3.0, float("inf")])
    number = encode(DeclaredFeature("f", "item", "numeric"), numbers, CODING)
    assert [n is None for n in number.columns[0].to_list()] == [False, True, False, True]
    vector = encode(
        DeclaredFeature("f", "item", "dense"),
        pl.Series("f", [[1.0, 2.0], [float("nan"), 1.0]]),
        CODING,
    )
    assert vector.columns[0].to_list() == [[1.0, 2.0], None]


def test_numbers_too_large_to_standardise_are_refused() -> None:
    with pytest.raises(DataError, match="'f': its largest numbers cannot be standardised"):
        encode(
            DeclaredFeature("f", "item", "numeric"),
            pl.Series("f", [1e308, 1.7e308]),
            CODING,
        )


def test_a_list_is_no_category() -> None:
    with pytest.raises(DataError, match="use multi_categorical"):
        encode(
            DeclaredFeature("f", "item", "categorical"),
            pl.Series("f", [["a"]]),
            CODING,
        )
