"""Columns of events that stay on disk: what is asked for is read, complete users at a time."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from itertools import count
from threading import Lock
from typing import Any, NoReturn

import numpy as np
from numpy.typing import DTypeLike

from flm_torchrec.data.columns import EventBlock
from flm_torchrec.data.row_groups import RowGroups, units_of

KEPT = 48
"""Columns of units that stay in memory: 1.6 MB each at most, unless one user has more events than a unit."""


class Units:
    """The users who begin in one row group, or in a part of it, are a unit. Columns of units read last are kept."""

    def __init__(self, groups: RowGroups, offsets: np.ndarray, users: np.ndarray | None = None) -> None:
        self.groups = groups
        self.users = units_of(groups, offsets) if users is None else users  # [units + 1] the first user of each
        self.rows = offsets[self.users]  # [units + 1] the first row of each
        self.offsets = offsets
        self._numbers = count()
        self._kept: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()
        self._lock = Lock()  # batches are made in a thread of their own

    def __len__(self) -> int:
        return len(self.users) - 1

    def block(self, unit: int) -> EventBlock:
        """The events of a unit."""
        first, last = self.users[unit : unit + 2]
        return EventBlock(int(first), self.offsets[first : last + 1])

    def column(
        self, dtype: DTypeLike, make: Callable[[EventBlock], np.ndarray], width: tuple[int, ...] = ()
    ) -> DiskColumn:
        """A column of all events.

        Args:
            make: a unit's events → their values [n, *width], the same at each call.
        """
        return DiskColumn(self, next(self._numbers), np.dtype(dtype), make, width)

    def values(self, column: DiskColumn, unit: int) -> np.ndarray:
        """[n, …] the values of a unit's events: kept, or made now."""
        key = (column.number, unit)
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        made = column.make(self.block(unit)).astype(column.dtype, copy=False).view()
        made.flags.writeable = False  # others will get the same array
        with self._lock:
            self._kept[key] = made
            while len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        return made


class DiskColumn:
    """[interactions, …] values that are read where an index asks for them; no arithmetic with the whole column.

    An index is a slice, or an array of rows, which costs the reading of each unit that has such a row.
    """

    __array_ufunc__ = None  # column == 1 would be False, and not an array, without an error

    def __init__(
        self,
        units: Units,
        number: int,
        dtype: np.dtype,
        make: Callable[[EventBlock], np.ndarray],
        width: tuple[int, ...],
    ) -> None:
        self.units, self.number, self.dtype, self.make, self.width = units, number, dtype, make, width

    def __len__(self) -> int:
        return int(self.units.rows[-1])

    @property
    def shape(self) -> tuple[int, ...]:
        """As of an array."""
        return (len(self), *self.width)

    def __getitem__(self, index: Any) -> np.ndarray:
        if isinstance(index, slice):
            return self._slice(*index.indices(len(self)))
        rows = np.asarray(index)
        if rows.dtype == bool:
            raise TypeError("a mask of all events: choose block by block, of `blocks`")
        rows = np.where(rows < 0, rows + len(self), rows)
        unit = np.searchsorted(self.units.rows, rows, "right") - 1
        order = np.argsort(unit, kind="stable")
        found = np.empty((len(rows), *self.width), self.dtype)
        for part in np.split(order, np.flatnonzero(np.diff(unit[order])) + 1):
            if len(part):
                one = int(unit[part[0]])
                found[part] = self.units.values(self, one)[rows[part] - self.units.rows[one]]
        return found

    def _slice(self, start: int, stop: int, step: int) -> np.ndarray:
        if step != 1:
            raise TypeError(f"a step of {step}: read a slice without a step")
        first = int(np.searchsorted(self.units.rows, start, "right")) - 1
        last = int(np.searchsorted(self.units.rows, stop, "left"))
        parts = []
        for unit in range(first, last):
            begin = int(self.units.rows[unit])
            parts.append(self.units.values(self, unit)[max(0, start - begin) : stop - begin])
        if len(parts) == 1:
            return parts[0]
        return np.concatenate(parts) if parts else np.empty((0, *self.width), self.dtype)

    def __array__(self, *_: Any, **__: Any) -> NoReturn:
        raise TypeError("all events at once: read block by block, of `blocks`")

    def __eq__(self, _: object) -> NoReturn:
        raise TypeError("all events at once: read block by block, of `blocks`")

    __hash__ = None  # type: ignore[assignment]
