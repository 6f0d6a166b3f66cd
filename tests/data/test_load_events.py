"""Events in few bytes, mapped or in memory: the values of the files, whatever the sizes of blocks and files."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flm_torchrec.data import columns, dataset
from flm_torchrec.data.columns import event_types
from flm_torchrec.data.dataset import PreparedData, load_prepared
from flm_torchrec.data.splits import split
from flm_torchrec.data.train_stats import TrainStats
from flm_torchrec.errors import DataError
from flm_torchrec.evaluation.baselines import _seen, _transitions
from flm_torchrec.export.tower.writer import _usual_gap
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


@settings(deadline=None, max_examples=25)
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
    with pytest.raises(DataError, match=reason) as refused:
        load_prepared(path)
    assert "\n" not in str(refused.value)


def test_a_disk_that_is_too_small_is_told_before_it_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_data(tmp_path / "data", [9] * 20, 30)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(columns, "LARGE", 1)
    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(DataError, match=r"180 events do not fit \(No space left on device\); set TMPDIR"):
        load_prepared(path)
