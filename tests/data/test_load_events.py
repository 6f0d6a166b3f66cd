"""Events in few bytes, mapped or in memory: the values of the files, whatever the sizes of blocks and files."""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flm_torchrec.data import columns, dataset, disk_columns, row_groups
from flm_torchrec.data.columns import event_types
from flm_torchrec.data.dataset import PreparedData, load_prepared
from flm_torchrec.data.splits import Splits, split
from flm_torchrec.data.train_stats import TrainStats
from flm_torchrec.errors import DataError
from flm_torchrec.evaluation.baselines import _seen, _transitions
from flm_torchrec.export.tower.writer import _usual_gap, _write_histories
from flm_torchrec.training.follow.events import NewEvents, append, append_on_disk, newest
from flm_torchrec.training.follow.growth import FollowedData
from tests.data.test_stream import ITEMS, KINDS, folders, write_data


def rows_of(path: Path) -> pa.Table:
    """All interactions, read at once."""
    return pa.concat_tables([pq.read_table(file) for file in sorted((path / "interactions").iterdir())])


def edit(path: Path, change: Callable[[pa.Table], pa.Table]) -> Path:
    """Change the rows of the first file of interactions."""
    file = min((path / "interactions").iterdir())
    pq.write_table(change(pq.read_table(file)), file)
    return path


def replaced(name: str, values: pa.Array) -> Callable[[pa.Table], pa.Table]:
    return lambda table: table.set_column(table.schema.get_field_index(name), name, values)


@settings(max_examples=25)
@given(folders(), st.integers(1, 40), st.booleans(), st.sampled_from(KINDS))
def test_blocks_and_maps_change_no_value(folder: dict, block: int, mapped: bool, kind: str) -> None:
    with (
        TemporaryDirectory() as name,
        patch.object(dataset, "BLOCK_ROWS", block),
        patch.object(columns, "LARGE", 1 if mapped else 2**40),
    ):
        path = write_data(Path(name) / "data", *(folder[key] for key in ("events", "group", "files", "seed")))
        data, rows = load_prepared(path), rows_of(path)
        user = rows["user_id"].to_numpy()
        for column in ("timestamp", "event", "value"):
            np.testing.assert_array_equal(getattr(data, column), rows[column].to_numpy())
        np.testing.assert_array_equal(data.item, rows["item_id"].to_numpy())
        np.testing.assert_array_equal(data.offsets, np.searchsorted(user, np.arange(len(folder["events"]) + 1)))
        np.testing.assert_array_equal(np.concatenate([b.users for b in data.blocks()]), user)
        try:
            splits = split(data, kind, 0.2)
        except DataError:
            return  # too few events to leave some out
        check_against_all_at_once(data, splits.train_mask(data), user, splits.train_end)


def check_against_all_at_once(data: PreparedData, mask: np.ndarray, user: np.ndarray, train_end: np.ndarray) -> None:
    assert not mask[np.arange(len(user)) >= train_end[user]].any()
    np.testing.assert_array_equal(data.item_counts(mask), np.bincount(data.item[mask], minlength=ITEMS))
    np.testing.assert_array_equal(np.flatnonzero(data.users_of(mask)), np.unique(user[mask]))
    if mask.any():
        stats = TrainStats.of(data, mask, values=True)
        assert stats.value_mean == float(np.array(data.value)[mask].mean())
    pairs = np.zeros((data.schema.users, ITEMS))
    pairs[user[mask], data.item[mask]] = 1
    np.testing.assert_array_equal(_seen(data, mask).toarray(), pairs)
    moves, items, users = np.zeros((ITEMS, ITEMS)), data.item[mask], user[mask]
    np.add.at(moves, (items[:-1], items[1:]), users[:-1] == users[1:])
    np.testing.assert_array_equal(_transitions(data, mask).toarray(), moves)
    gaps = np.diff(data.timestamp)[user[1:] == user[:-1]]
    assert _usual_gap(data) == (int(np.median(gaps)) if len(gaps) else 0)


@settings(max_examples=8)
@given(folders(), st.integers(1, 40), st.integers(1, 4), st.sampled_from(KINDS), st.booleans(), st.data())
def test_events_on_disk_are_those_in_memory(
    folder: dict, unit: int, kept: int, kind: str, chosen: bool, draw: st.DataObject
) -> None:
    """Units of one user and of all, files that end within a user's events, and memory for a column or two."""
    with (
        TemporaryDirectory() as name,
        patch.object(row_groups, "UNIT_ROWS", unit),
        patch.object(disk_columns, "KEPT", kept),
    ):
        path = write_data(Path(name) / "data", *(folder[key] for key in ("events", "group", "files", "seed")))
        halve(path)
        targets = np.array([False, True]) if chosen else None
        memory, disk = (replace(load_prepared(path, on_disk=on), targets=targets) for on in (False, True))
        rows = len(memory.item)
        np.testing.assert_array_equal(disk.offsets, memory.offsets)
        start = draw.draw(st.integers(0, rows))
        part = slice(start, draw.draw(st.integers(start, rows)))
        some = np.array(draw.draw(st.lists(st.integers(-rows, rows - 1), max_size=20)), int)
        for column in ("item", "timestamp", "event", "value"):
            here, there = getattr(disk, column), getattr(memory, column)
            assert here[some].dtype == there.dtype and here.shape == there.shape
            np.testing.assert_array_equal(here[part], there[part])
            np.testing.assert_array_equal(here[some], there[some])
        assert disk.segment is not None and memory.segment is not None
        assert disk.segment[some].tolist() == memory.segment[some].tolist()
        try:
            splits = split(memory, kind, 0.2)
        except DataError as error:
            with pytest.raises(DataError, match="example in a") as refused:
                split(disk, kind, 0.2)
            assert str(refused.value) == str(error)
            return
        check_same_split(memory, disk, splits, split(disk, kind, 0.2))
        check_same_growth(memory, disk, splits, split(disk, kind, 0.2))


def halve(path: Path) -> None:
    """Put the rows after the middle of the first file into a file of their own, with segments."""
    file = min((path / "interactions").iterdir())
    table, middle = pq.read_table(file), pq.read_metadata(file).num_rows // 2
    pq.write_table(table.slice(0, middle), file, row_group_size=5)
    rest = table.slice(middle)
    named = pa.array([None if n % 3 == 0 else f"kind {n % 4}" for n in range(len(rest))], pa.string())
    pq.write_table(rest.append_column("segment", named), file.with_name("part-00000.z.parquet"), row_group_size=7)


def check_same_split(memory: PreparedData, disk: PreparedData, splits: Splits, found: Splits) -> None:
    for one, other in ((splits.valid, found.valid), (splits.test, found.test)):
        for name in ("user", "end", "label", "until"):
            np.testing.assert_array_equal(getattr(other, name), getattr(one, name))
    np.testing.assert_array_equal(found.train_end, splits.train_end)
    np.testing.assert_array_equal(found.cold_items, splits.cold_items)
    mask, lazy = splits.train_mask(memory), found.train_mask(disk)
    np.testing.assert_array_equal(lazy[:], mask)
    np.testing.assert_array_equal(disk.of_targets(lazy)[:], memory.of_targets(mask))
    assert disk.count(lazy) == mask.sum()
    np.testing.assert_array_equal(disk.item_counts(lazy), memory.item_counts(mask))
    np.testing.assert_array_equal(disk.user_counts(lazy), memory.user_counts(mask))
    np.testing.assert_array_equal(disk.users_of(lazy), memory.users_of(mask))
    for make in (_seen, _transitions):
        assert (make(disk, lazy) != make(memory, mask)).nnz == 0
    short, kept = newest(memory, mask, 4)
    shorter, same = newest(disk, lazy, 4)
    np.testing.assert_equal((vars(shorter.events), shorter.offsets, same), (vars(short.events), short.offsets, kept))
    assert _usual_gap(disk) == _usual_gap(memory)
    files = [memory.path.parent / name for name in ("one.parquet", "two.parquet")]
    for data, file in zip((memory, disk), files, strict=True):
        _write_histories(data, 4, file)
    assert files[0].read_bytes() == files[1].read_bytes()
    if mask.any():
        ours, theirs = TrainStats.of(disk, lazy, values=True), TrainStats.of(memory, mask, values=True)
        assert (ours.value_mean, ours.value_scale) == (theirs.value_mean, theirs.value_scale)


def check_same_growth(memory: PreparedData, disk: PreparedData, splits: Splits, found: Splits) -> None:
    """What a follower took in, at times before, between and after the known events."""
    rng, size = np.random.default_rng(0), 9
    user, item = rng.integers(0, memory.schema.users, size), rng.integers(0, ITEMS, size)
    new = NewEvents(item, rng.integers(-100, 6000, size), np.zeros(size, int), np.ones(size, np.float32), user)
    grown, _, is_new = append(memory, np.zeros(len(memory.item), bool), new)
    lazy, also_new = append_on_disk(disk, new)
    np.testing.assert_array_equal(lazy.offsets, grown.offsets)
    for column in ("item", "timestamp", "event", "value"):
        np.testing.assert_array_equal(getattr(lazy, column)[:], getattr(grown, column))
    both = []
    for before, data, fresh, split_ in ((memory, grown, is_new, splits), (disk, lazy, also_new, found)):
        nobody = [np.arange(size) < 2 for size in (data.schema.items, data.schema.users)]
        whole = FollowedData(
            **{f.name: getattr(data, f.name) for f in fields(PreparedData)}, before=before, own_fingerprint="",
            is_new=fresh, expired_items=nobody[0], expired_users=nobody[1],
        )  # fmt: skip
        placed, mask = whole.placed(split_), whole.placed_mask(split_.train_mask(before))
        held = None if placed.held_out is None else placed.held_out[:]
        ends = [placed.train_end, placed.valid.end, placed.test.end]
        stats = whole.stats(mask, values=True) if before.count(split_.train_mask(before)) else None
        both.append((fresh[:], ends, held, mask[:], stats and vars(stats)))
    np.testing.assert_equal(both[1], both[0])


def test_a_column_on_disk_does_no_arithmetic_by_mistake(tmp_path: Path) -> None:
    data = load_prepared(write_data(tmp_path / "data", [9] * 20, 30), on_disk=True)
    for wrong in (
        lambda: data.item == 1,
        lambda: data.value + np.ones(180),
        lambda: np.asarray(data.item),
        lambda: data.item[np.ones(180, bool)],
        lambda: data.item[::2],
    ):
        with pytest.raises(TypeError):
            wrong()
    with pytest.raises(ValueError, match="read-only"):
        data.item[0:9][0] = 3


def test_an_event_takes_17_bytes(tmp_path: Path) -> None:
    data = load_prepared(write_data(tmp_path / "data", [9] * 20, 30, 2))
    assert sum(getattr(data, name).nbytes for name in ("item", "timestamp", "event", "value")) == 17 * 180
    assert event_types(2**31 + 1, 300)["item_id"] == np.int64 and event_types(5, 300)["event"] == np.uint16


def test_segments_are_texts_also_where_a_file_has_none(tmp_path: Path) -> None:
    path = write_data(tmp_path / "data", [9] * 20, 7, 2)
    named = [None if n % 4 == 0 else f"kind {n % 3}" for n in range(90)]
    data = load_prepared(edit(path, lambda table: table.append_column("segment", pa.array(named))))
    assert data.segment is not None and len(data.segment) == 180
    assert data.segment[np.arange(180)].tolist() == [name or "" for name in named] + [""] * 90


@pytest.mark.parametrize(
    ("column", "value", "reason"),
    [
        ("item_id", 30, "item_id 30, outside 0 … 29"),
        ("event", 2, "event 2, outside 0 … 1"),
        ("event", -1, "event -1, outside"),
        ("user_id", -4, "user_id -4, outside"),
        ("timestamp", None, "a row has no 'timestamp'"),
        ("item_id", None, "a row has no 'item_id'"),
    ],
)
def test_rows_that_no_column_can_hold_are_refused(tmp_path: Path, column: str, value: object, reason: str) -> None:
    path = write_data(tmp_path / "data", [9] * 20, 30)
    values = rows_of(path)[column].to_pylist()
    values[1] = value
    edit(path, replaced(column, pa.array(values)))
    for on_disk in (False, True):
        with pytest.raises(DataError, match=reason) as refused:
            load_prepared(path, on_disk=on_disk)
        assert "\n" not in str(refused.value)


def test_a_disk_that_is_too_small_is_told_before_it_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_data(tmp_path / "data", [9] * 20, 30)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(columns, "LARGE", 1)
    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(DataError, match=r"180 events do not fit \(No space left on device\); set TMPDIR"):
        load_prepared(path)
