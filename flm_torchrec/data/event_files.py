"""The Parquet files of interactions, and what is checked of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa

from flm_torchrec.data.schema import Schema
from flm_torchrec.errors import DataError
from flm_torchrec.safe_text import first_line

EVENT_COLUMNS = ("item_id", "timestamp", "event", "value")
WEIGHT = "weight"
"""Column of the interactions where the schema has `weights`."""


def event_columns(schema: Schema) -> tuple[str, ...]:
    """The columns of interactions that training reads beside the user."""
    weight = (WEIGHT,) if schema.weights else ()
    return (*EVENT_COLUMNS, *weight, *context_columns(schema))


def context_columns(schema: Schema) -> tuple[str, ...]:
    """The columns of interactions with features of events."""
    return tuple(f.column for f in schema.of("event", sparse=True))


def interaction_files(path: Path) -> list[Path]:
    """The files of interactions, in order of `user_id`.

    Raises:
        DataError: there are none.
    """
    files = sorted((path / "interactions").glob("*.parquet"))
    if not files:
        raise DataError(f"{path / 'interactions'}: no Parquet file; prepare the data again")
    return files


@contextmanager
def as_data_error(file: Path) -> Iterator[None]:
    """Raise what Arrow says about a file that it cannot read as a DataError that names the file."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"{file}: not a readable Parquet file ({first_line(error)}); put a whole copy in its place"
        ) from error


def check_columns(file: Path, columns: Sequence[str], present: Sequence[str]) -> None:
    """Raise DataError where one of the columns is not among those that the file has."""
    missing = [c for c in columns if c not in present]
    if missing:
        raise DataError(f"{file}: no column '{missing[0]}' (it has {', '.join(present)})")


class RowChecks:
    """Checks the rows of a data set part by part, in order, and counts the events of each user."""

    def __init__(self, path: Path, schema: Schema) -> None:
        self.path = path / "interactions"
        self.schema = schema
        self.rows = 0
        """Rows so far."""
        self.newest = 0
        """User of the last row."""
        self.counts = np.zeros(schema.users, np.int64)

    def add(self, user: np.ndarray, item: np.ndarray, event: np.ndarray) -> None:
        """Check the next rows, one or more.

        Raises:
            DataError: an id or a code is outside the schema, or users are not in order.
        """
        sizes = {"user_id": self.schema.users, "item_id": self.schema.items, "event": len(self.schema.events)}
        for (name, size), ids in zip(sizes.items(), (user, item, event), strict=True):
            if ids.min() < 0 or ids.max() >= size:
                bad = int(np.flatnonzero((ids < 0) | (ids >= size))[0])
                raise DataError(
                    f"{self.path}: row {self.rows + bad} has {name} {ids[bad]}, outside 0 … {size - 1} of schema.yaml"
                )
        if user[0] < self.newest or np.any(user[1:] < user[:-1]):
            raise DataError(f"{self.path}: rows are not sorted by user_id; prepare the data again")
        starts = np.flatnonzero(np.concatenate([[True], user[1:] != user[:-1]]))
        self.counts[user[starts]] += np.diff(np.append(starts, len(user)))
        self.rows, self.newest = self.rows + len(user), int(user[-1])

    def check_more(self, columns: Mapping[str, np.ndarray]) -> None:
        """Raise DataError where one of the next rows, by column, has a weight that is negative or not finite, or a code
        of an event's feature that is outside the schema.
        """
        if self.schema.weights:
            weight = columns[WEIGHT]
            bad = np.flatnonzero(~((weight >= 0) & (weight < np.inf)))
            if len(bad):
                row = self.rows + int(bad[0])
                raise DataError(f"{self.path}: row {row} has weight {weight[bad[0]]:g}; prepare the data again")
        for feature in self.schema.of("event", sparse=True):
            codes = columns[feature.column]
            bad = np.flatnonzero((codes < -1) | (codes >= feature.cardinality))
            if len(bad):
                row = self.rows + int(bad[0])
                raise DataError(
                    f"{self.path}: row {row} has {feature.column} {codes[bad[0]]}, outside -1 …"
                    f" {feature.cardinality - 1} of schema.yaml"
                )

    @property
    def offsets(self) -> np.ndarray:
        """[users + 1] int64: the first row of each user."""
        return np.concatenate([[0], np.cumsum(self.counts)])
