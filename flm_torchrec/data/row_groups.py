"""Prepared interactions read from disk, row group by row group."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from flm_torchrec.data.event_files import EVENT_COLUMNS, as_data_error, check_columns, interaction_files
from flm_torchrec.errors import DataError

BATCH = 2**17
"""Rows that `scan` reads at once."""
BUFFER = 2**20
"""Bytes of a column that are read at once, so that a part of a row group can be read without the rest."""
UNIT_ROWS = 200_000
"""Maximum rows of a unit, unless one user has more: a row group of usual size."""


class RowGroups:
    """The rows of `interactions/`, numbered through all files. No more is read than asked for.

    Raises:
        DataError: a file is missing or no Parquet, or lacks a column.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files = interaction_files(path)
        self.metadata: list[pq.FileMetaData] = []
        for file in self.files:
            with as_data_error(file):
                self.metadata.append(pq.read_metadata(file))
            check_columns(file, ["user_id", *EVENT_COLUMNS], self.metadata[-1].schema.to_arrow_schema().names)
        groups = [(f, g) for f, meta in enumerate(self.metadata) for g in range(meta.num_row_groups)]
        self.groups = np.array(groups, np.int64).reshape(-1, 2)  # [groups, 2]: file, and which of its groups
        sizes = [self.metadata[f].row_group(g).num_rows for f, g in groups]
        self.starts = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])  # [groups + 1] first row of each

    @property
    def rows(self) -> int:
        """Number of interactions."""
        return int(self.starts[-1])

    def has(self, column: str) -> bool:
        """Whether a file has the column."""
        return any(column in meta.schema.names for meta in self.metadata)

    def batches(self, columns: Sequence[str], optional: Sequence[str] = ()) -> Iterator[pa.RecordBatch]:
        """One pass over all rows, in order: parts of at most BATCH rows, none empty.

        Args:
            optional: columns that are read where a file has them.

        Raises:
            DataError: a file is broken, or a row has no value in one of the columns.
        """
        for number, file in enumerate(self.files):
            wanted = [*columns, *(name for name in optional if name in self.metadata[number].schema.names)]
            with as_data_error(file):
                for batch in filter(len, self._open(number).iter_batches(BATCH, columns=wanted)):
                    _check_complete(file, batch, columns)
                    yield batch

    def scan(self, columns: Sequence[str]) -> Iterator[tuple[np.ndarray, ...]]:
        """As `batches`, as arrays."""
        for batch in self.batches(columns):
            yield tuple(batch[name].to_numpy() for name in columns)

    def read(self, start: int, stop: int, columns: Sequence[str] = EVENT_COLUMNS) -> dict[str, np.ndarray]:
        """The columns of the rows `start:stop`, at least one. Reading ends with the last of these rows."""
        parts = list(self.tables(start, stop, columns))
        table = pa.concat_tables(parts, promote_options="permissive")
        return {name: table[name].to_numpy() for name in columns}  # no copy where it is one batch

    def tables(self, start: int, stop: int, columns: Sequence[str]) -> Iterator[pa.Table]:
        """As `read`, a table for each file that has such rows, with those of the columns that the file has."""
        first = int(np.searchsorted(self.starts, start, "right")) - 1
        last = int(np.searchsorted(self.starts, stop, "left"))
        of_file = self.groups[first:last, 0]
        for number in np.unique(of_file).tolist():
            here = first + np.flatnonzero(of_file == number)
            skip = max(0, start - int(self.starts[here[0]]))
            end = min(stop, int(self.starts[here[-1] + 1])) - int(self.starts[here[0]])
            groups = self.groups[here, 1].tolist()
            with as_data_error(self.files[number]):
                batches = self._open(number).iter_batches(end, groups, list(columns), use_threads=False)
                parts = list(_first_rows(batches, end))
            yield pa.Table.from_batches(parts).slice(skip, end - skip)

    def _open(self, number: int) -> pq.ParquetFile:
        return pq.ParquetFile(self.files[number], metadata=self.metadata[number], buffer_size=BUFFER)


def _first_rows(batches: Iterator[pa.RecordBatch], rows: int) -> Iterator[pa.RecordBatch]:
    """The batches up to that with the last of so many rows."""
    have = 0
    for batch in batches:
        yield batch
        have += len(batch)
        if have >= rows:
            return


def units_of(groups: RowGroups, offsets: np.ndarray, least: int = 1) -> np.ndarray:
    """[units + 1] first user of each unit: the users who begin in a row group, or in a part of a row group.

    A row group is split if it is larger than UNIT_ROWS, or if there would be fewer units than `least`. Each part is
    read from the start of its row group, so row groups of large data should not be larger than UNIT_ROWS.

    Args:
        offsets: [users + 1] first row of each user.
    """
    target = min(UNIT_ROWS, max(1, groups.rows // least))
    rows = [
        np.linspace(start, stop, -(-(stop - start) // target), endpoint=False).astype(np.int64)
        for start, stop in zip(groups.starts[:-1].tolist(), groups.starts[1:].tolist(), strict=True)
    ]
    first = np.searchsorted(offsets[:-1], np.concatenate(rows), "left")
    return np.unique(np.concatenate([[0], first, [len(offsets) - 1]]))


def _check_complete(file: Path, batch: pa.RecordBatch, columns: Sequence[str]) -> None:
    """Raise DataError where a row has no value in one of the columns."""
    for name in columns:
        if batch[name].null_count:
            raise DataError(f"{file}: a row has no '{name}'; prepare the data again")
