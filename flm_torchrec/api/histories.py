"""Histories of users nobody knows, as a table → queries of the packaged tower."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import polars as pl
import pyarrow as pa

from flm_torchrec.data.dataset import Ragged
from flm_torchrec.data.history import Events
from flm_torchrec.data.keys import categories, keys
from flm_torchrec.data.times import check_unit, seconds
from flm_torchrec.errors import DataError
from flm_torchrec.export.recommend import ExportRecommender
from flm_torchrec.export.tower.reader import PackagedTower, TowerQuery
from flm_torchrec.names import nearest

COLUMNS = ("user", "item", "timestamp", "event", "value")
ENCODED = 256
"""Histories that the tower encodes at once."""


class HistoryTable:
    """Events by user, in the order of the users' first rows; the events of a user in order of time, then of row.

    Without timestamps events come in the order of the rows, with the data's usual gap between two.

    Raises:
        DataError: a column is missing or unknown, or a row has no user, item or time.
        RunError: an item is not in the export.
    """

    def __init__(self, table: pa.Table, recommender: ExportRecommender, tower: PackagedTower) -> None:
        frame = pl.DataFrame(pl.from_arrow(table))
        columns = (*COLUMNS, *(f.name for f in tower.contexts))
        for name in frame.columns:
            if name not in columns:
                raise DataError(f"histories: column '{name}' is not known; {nearest(name, columns)}")
        user, item = _ids(frame["user"]), _ids(frame["item"])
        distinct = user.unique(maintain_order=True)
        order = pl.DataFrame({"key": distinct}).with_row_index("place")
        place = user.to_frame("key").join(order, on="key", how="left", maintain_order="left")["place"].to_numpy()
        times = _times(frame, place, tower)
        chosen = np.lexsort((np.arange(len(frame)), times, place))
        self.tower = tower
        self.users = distinct.to_arrow().cast(pa.string())
        self.seen = Ragged(
            np.concatenate([[0], np.cumsum(np.bincount(place))]),
            recommender.item_rows(item.to_arrow().cast(pa.string()), "histories")[chosen],
        )
        self.times, self.codes = times[chosen], _codes(frame, tower)[chosen]
        self.values, self.context = _values(frame)[chosen], _contexts(frame, tower)[chosen]

    def had(self, some: slice) -> Ragged:
        """The items that recommendations leave out, for a range of users."""
        users = self.seen.take(np.arange(some.start, some.stop))
        first = int(self.seen.offsets[some.start])
        return users.only(self.tower.predicted[self.codes[first : first + len(users.values)]])

    def blocks(self) -> Iterator[tuple[slice, np.ndarray]]:
        """Ranges of users, and their vectors [q, heads + 1, D], fused last."""
        nothing = np.zeros((0, self.tower.dim), np.float32)
        for start in range(0, len(self.users), ENCODED):
            some = slice(start, min(start + ENCODED, len(self.users)))
            queries = [TowerQuery(self._events(user)) for user in range(some.start, some.stop)]
            yield some, np.stack([one.heads for one in self.tower.represent(queries, nothing)])

    def _events(self, user: int) -> Events:
        rows = slice(self.seen.offsets[user], self.seen.offsets[user + 1])
        columns = (self.seen.values, self.times, self.codes, self.values)
        return Events(*(column[rows] for column in columns), context=self.context[rows])


def _ids(column: pl.Series) -> pl.Series:
    ids = keys(column, "histories")
    if ids.null_count():
        row = int(ids.is_null().arg_max() or 0) + 1
        raise DataError(f"histories: row {row} has no {column.name}; remove the row")
    return ids


def _times(frame: pl.DataFrame, place: np.ndarray, tower: PackagedTower) -> np.ndarray:
    """[n] int64 seconds."""
    if "timestamp" not in frame.columns or not tower.timestamps:
        gap = tower.usual_gap if tower.timestamps else 1
        order = np.argsort(place, kind="stable")
        starts = np.concatenate([[0], np.cumsum(np.bincount(place))])
        within = np.empty(len(place), np.int64)
        within[order] = np.arange(len(place)) - starts[place[order]]
        return within * gap
    times = seconds(frame["timestamp"], "s")
    check_unit(frame["timestamp"], "s", times)
    if times.null_count():
        row = int(times.is_null().arg_max() or 0) + 1
        raise DataError(f"histories: row {row} has no time that can be read; mend it")
    return times.to_numpy().astype(np.int64)


def _codes(frame: pl.DataFrame, tower: PackagedTower) -> np.ndarray:
    """[n] int64 codes of the kinds of events; the data's first kind where the table names none."""
    if "event" not in frame.columns:
        return np.zeros(len(frame), np.int64)
    code = {name: number for number, name in enumerate(tower.events)}
    names = [tower.events[0] if name is None else name for name in keys(frame["event"], "histories")]
    for name in names:
        if name not in code:
            raise DataError(f"histories: no kind of event '{name}'; {nearest(name, tower.events)}")
    return np.array([code[name] for name in names], np.int64)


def _contexts(frame: pl.DataFrame, tower: PackagedTower) -> np.ndarray:
    """[n, C] int32 codes of the features of events; -1 where there is no value, or one that was not in training."""
    found = np.full((len(frame), len(tower.contexts)), -1, np.int32)
    for number, feature in enumerate(tower.contexts):
        if feature.name not in frame.columns or not len(frame):
            continue
        column = frame[feature.name]
        if column.dtype.is_nested():
            raise DataError(f"histories: column '{feature.name}' is {column.dtype}, and a text is needed")
        found[:, number] = [feature.codes.get(value, -1) for value in categories(column)]
    return found


def _values(frame: pl.DataFrame) -> np.ndarray:
    """[n] float32, finite; 1 where the table has none."""
    if "value" not in frame.columns:
        return np.ones(len(frame), np.float32)
    if not frame["value"].dtype.is_numeric():
        raise DataError(f"histories: column 'value' is {frame['value'].dtype}, and a number is needed")
    values = frame["value"].cast(pl.Float32).fill_null(1.0).fill_nan(1.0)
    if values.is_infinite().any():
        row = int(values.is_infinite().arg_max() or 0) + 1
        raise DataError(f"histories: row {row} has a value that is not finite; mend it")
    return values.to_numpy()
